"""The switches of the MoRI double: names, defaults, and the variable that sets them.

Scope: no ranks; what each switch does is shown by its probe (``selftest/hazards``). A pass proves nothing about MoRI.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from accelerated.standin.mori_ep import hazards


def test_what_the_library_shows_sometimes_acts_when_named_only() -> None:
    assert not {"push-fence", "handle-dispatches-race", "combine-twice-hangs"} & hazards.DEFAULT
    assert all(hazard.reference and hazard.text for hazard in hazards.HAZARDS.values())


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, hazards.DEFAULT),
        ("", hazards.DEFAULT),
        ("none", frozenset()),
        ("push-fence, weights-disagree", {"push-fence", "weights-disagree"}),
        ("default,push-fence", hazards.DEFAULT | {"push-fence"}),
        ("default,-weights-disagree", hazards.DEFAULT - {"weights-disagree"}),
    ],
)
def test_variable(value: str | None, wanted: frozenset[str]) -> None:
    assert hazards.parse(value) == wanted


@pytest.mark.parametrize("value", ["push_fence", "none,push-fence", "-nothing", "all"])
def test_unknown_names_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=hazards.VARIABLE):
        hazards.parse(value)


def test_naming_a_hazard_imports_no_torch() -> None:
    code = "import sys; from accelerated.standin.mori_ep import hazards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_hang_lasts() -> None:
    code = "from accelerated.standin.mori_ep.fatal import hang; hang('nothing comes')"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"nothing comes" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
