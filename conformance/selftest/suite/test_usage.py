"""Wrong arguments end a run with exit 4 and one line that names the value and what to give instead.

A pass does not prove that the advice is the best one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conformance.cases import encode
from conformance.selftest.engine.helpers import case, cell
from conformance.selftest.suite.runs import run
from conformance.selftest.suite.test_harness import options as small_options
from conformance.suite import controller
from conformance.suite.options import Options
from conformance.suite.state import RunState
from conformance.verdicts import ExitCode

#: Arguments and what the line must hold.
WRONG = {
    "backend": (("--backend", "nosuch"), ("'nosuch'", "mori-standin")),
    "factory": (("--backend", "nosuch.module:make"), ("nosuch.module", "package.module:factory")),
    "kernel type": (("--kernel-type", "Intra"), ("'Intra'", "IntraNode")),
    "operator": (("--operator", "quantise"), ("'quantise'", "choose one of")),
    "EP size of the kernel type": (
        ("--kernel-type", "IntraNode", "--ep-sizes", "16"),
        ("EP 16", "'mori-standin'", "8"),
    ),
    "EP size zero": (("--ep-sizes", "0"), ("'0'", "1 to 64")),
    "EP size in words": (("--ep-sizes", "2,four"), ("'four'", "2,4,8")),
    "architecture": (("--arch", "gfx90a"), ("'gfx90a'", "gfx942")),
    "expected architecture": (("--expect-arch", "MI355X"), ("'MI355X'", "gfx950")),
    "model": (("--model", "gpt-5"), ("'gpt-5'", "deepseek-v3")),
    "hardware": (("--require-hardware", "--backend", "mori-standin"), ("stand-in", "'mori-standin'")),
    "hardware on a CPU": (("--require-hardware", "--backend", "reference"), ("--device cuda", "cpu")),
    "reruns": (("--reruns", "2"), ("--reruns",)),
    "tier": (("--tier", "nightly"), ("'nightly'", "gate")),
    "backend with workers": (("--backend", "nosuch", "-n", "2"), ("'nosuch'", "mori-standin")),
}


def made(**change: Any) -> Options:
    """Options of a run of the reference, but for what is given."""
    return replace(small_options(Path("unused"), "reference"), **change)


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


def test_only_sizes_that_were_given_must_be_possible() -> None:
    wide = {"backends": ("mori",), "arch": "gfx942", "ep_sizes": (8, 64), "tier": "explore", "device": "cuda"}
    plan = controller.plan_of(made(**wide))
    assert {p.cell.world_size for p in plan.cells} == {8}
    assert {u.world_size for u in plan.unsupported} >= {64}
    with pytest.raises(pytest.UsageError, match="cannot do EP 64"):
        controller.plan_of(made(**wide, ep_sizes_given=True))
    with pytest.raises(pytest.UsageError, match="cannot do EP 64"):
        controller.plan_of(made(**{**wide, "ep_sizes": (64,)}))


@pytest.mark.parametrize(("workers", "at_a_time"), [(1, 1), (2, 2), (1000, 3)])
def test_the_explore_budget_is_that_of_the_workers(
    monkeypatch: pytest.MonkeyPatch, workers: int, at_a_time: int
) -> None:
    monkeypatch.setattr(controller, "core_slots", lambda: ["a", "b", "c"])
    plan = controller.plan_of(made(tier="explore", workers=workers, time_budget_s=60.0))
    # A quotient, and float64's additions.
    assert sum(p.seconds for p in plan.cells) == pytest.approx(60 * at_a_time, rel=len(plan.cells) * 2.0**-53, abs=0)


def recorded(path: Path, **change: object) -> Path:
    good = case(cell("Held", world_size=2))
    changed = msgspec.structs.replace(good.cell, **change) if change else good.cell  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(msgspec.structs.replace(good, cell=changed)))
    return path


def test_of_the_corpus_what_the_backend_does_not_take_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "CORPUS", tmp_path)
    taken = recorded(tmp_path / "taken.json", kernel_type="one-level")
    lacked = recorded(tmp_path / "lacked.json", kernel_type="IntraNode")
    options = made(tier="replay", output=tmp_path / "out")
    state = RunState(options)
    for _ in range(2):  # before and after the machine is looked at
        state.choose_items()
        assert [path for path, _ in state.replays] == [taken]
        assert state.options.backends == ("reference",)
        (left_out,) = state.plan.unsupported
        assert "lacked.json" in left_out.reason
    with pytest.raises(pytest.UsageError, match="lacked"):
        RunState(replace(options, replay=(lacked,))).choose_items()
    RunState(replace(options, replay=(tmp_path,))).choose_items()
    taken.unlink()
    with pytest.raises(pytest.UsageError, match=r"nothing to replay: .*choose one of"):
        state.choose_items()


def test_a_replay_that_is_wider_than_the_gpus(tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json")
    state = RunState(made(tier="replay", replay=(path,), device="cuda"))
    state.choose_items()
    state.machine = controller.Machine(uuids=("one",))
    with pytest.raises(pytest.UsageError, match=r"case.json: the case needs 2 GPUs and 1 are visible"):
        state.choose_items()


def test_the_fingerprint_names_gpus_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "4G")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(controller, "torch_builds", lambda: {"hip": "6.4.1", "cuda": ""})
    found = controller.fingerprint(("AMD Instinct MI300X gfx942",))
    wanted = {"MORI_SHMEM_HEAP_SIZE": "4G", "ROCR_VISIBLE_DEVICES": "0,1", "torch.hip": "6.4.1"}
    assert found.items() >= {**wanted, "gpu0": "AMD Instinct MI300X gfx942"}.items()
    assert "torch.cuda" not in found


def test_the_yardstick_comes_first(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--collect-only", "-q", "--tier", "smoke", "--ep-sizes", "1,2")
    items = [line for line in done.text.splitlines() if "::" in line]
    yardstick = ["-reference-" in item or "-reference+reference-" in item for item in items]
    assert any(yardstick)
    assert yardstick == sorted(yardstick, reverse=True)
