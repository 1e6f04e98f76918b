"""Wrong arguments end a run with exit 4 and one line that names the value and what to give instead.

A pass does not prove that the advice is the best one.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from conformance.cases import encode
from conformance.selftest.engine.helpers import case, cell
from conformance.selftest.suite.runs import run
from conformance.verdicts import ExitCode

#: Arguments and what the line must hold.
WRONG = {
    "backend": (("--backend", "nosuch"), ("'nosuch'", "mori-standin")),
    "factory": (("--backend", "nosuch.module:make"), ("nosuch.module", "package.module:factory")),
    "kernel type": (("--kernel-type", "Intra"), ("'Intra'", "IntraNode")),
    "EP size of the kernel type": (
        ("--kernel-type", "IntraNode", "--ep-sizes", "16"),
        ("EP 16", "'mori-standin'", "8"),
    ),
    "EP size zero": (("--ep-sizes", "0"), ("'0'", "1 to 64")),
    "EP size in words": (("--ep-sizes", "2,four"), ("'four'", "2,4,8")),
    "architecture": (("--arch", "gfx90a"), ("'gfx90a'", "gfx942")),
    "model": (("--model", "gpt-5"), ("'gpt-5'", "deepseek-v3")),
    "hardware": (("--require-hardware", "--backend", "mori-standin"), ("stand-in", "'mori-standin'")),
    "hardware on a CPU": (("--require-hardware", "--backend", "reference"), ("--device cuda", "cpu")),
    "reruns": (("--reruns", "2"), ("--reruns",)),
    "tier": (("--tier", "nightly"), ("'nightly'", "gate")),
    "backend with workers": (("--backend", "nosuch", "-n", "2"), ("'nosuch'", "mori-standin")),
}


def one_line(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """The one line of a run that must end as a usage error."""
    done = run(tmp_path / "out", *arguments, environment=environment)
    assert done.code == ExitCode.USAGE, done.text
    assert "Traceback" not in done.text
    # pytest itself adds its usage and where it found its configuration.
    lines = [line for line in done.errors if not line.strip().startswith(("inifile:", "rootdir:", "ERROR: usage:"))]
    assert len(lines) == 1, done.text
    return lines[0]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(tmp_path: Path, name: str) -> None:
    arguments, parts = WRONG[name]
    line = one_line(tmp_path, *arguments)
    assert all(part in line for part in parts), line


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    hidden = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
    line = one_line(tmp_path, "--backend", "reference", "--device", "cuda", **hidden)
    assert "no GPU" in line
    assert "--device cpu" in line


def test_a_replay_file_that_is_missing_or_not_a_case(tmp_path: Path) -> None:
    assert "cannot be read" in one_line(tmp_path, "--replay", str(tmp_path / "absent.json"))
    corrupt = tmp_path / "corrupt.json"
    corrupt.write_bytes(encode(case(cell()))[:-20])
    line = one_line(tmp_path, "--replay", str(corrupt))
    assert str(corrupt) in line
    assert "not a valid case" in line


@pytest.mark.parametrize(
    ("change", "part"),
    [({"backend": "nosuch"}, "unknown backend 'nosuch'"), ({"kernel_type": "two-level"}, "choose one of one-level")],
)
def test_a_replay_of_what_this_installation_cannot_do(tmp_path: Path, change: dict[str, str], part: str) -> None:
    path = tmp_path / "case.json"
    good = case(cell(world_size=2))
    path.write_bytes(encode(msgspec.structs.replace(good, cell=msgspec.structs.replace(good.cell, **change))))
    line = one_line(tmp_path, "--replay", str(path))
    assert str(path) in line
    assert part in line


def test_an_output_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    line = one_line(tmp_path)
    assert str(tmp_path / "out") in line
    assert "cannot be written" in line


def test_a_collection_only_lists_and_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--collect-only", "-q", "--tier", "smoke")
    assert done.code == 0, done.text
    assert "test_round_trip.py" in done.text
    assert not (tmp_path / "out").exists()
