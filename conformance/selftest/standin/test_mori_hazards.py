"""The switches of the MoRI double: names, defaults, and each one on and off.

Scope: one spawn of four ranks for the switches that leave the process alive, one spawn each for the others. A pass
proves nothing about MoRI.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from accelerated.standin.mori_ep import hazards
from conformance.selftest.standin import ranks
from conformance.selftest.standin.scenarios_mori_hazards import FATAL, NAMES

MODULE = "conformance.selftest.standin.scenarios_mori_hazards"
SCENARIOS = [name.replace("-", "_") for name in NAMES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return ranks.run(4, MODULE, SCENARIOS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_switch(outcomes: list[dict[str, str]], scenario: str) -> None:
    errors = [report.get(scenario, f"ended with {report['exit']}: {report['stderr']}") for report in outcomes]
    assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors))


@pytest.mark.parametrize(
    ("scenario", "ending"),
    [
        ("receive_overflow_intranode_on", ""),
        ("receive_overflow_intranode_off", "max_total_recv_tokens"),
        ("gpu_per_node_on", "power of two"),
        ("gpu_per_node_off", ""),
        ("hidden_on", "hidden size 9"),
        ("hidden_off", ""),
        ("no_weights_on", "memory fault"),
        ("no_weights_off", ""),
    ],
)
def test_fatal_switch(scenario: str, ending: str, tmp_path: Path) -> None:
    report = ranks.run(1, "conformance.selftest.standin.scenarios_mori_fatal", [scenario], tmp_path)[0]
    assert report["exit"] == ("-6" if ending else "0"), report
    assert ending in report["stderr"]
    assert not report.get(scenario), report


def test_every_hazard_is_tested() -> None:
    assert {*NAMES, *FATAL} == set(hazards.HAZARDS)
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
