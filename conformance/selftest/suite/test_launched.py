"""Runs on a launched world: the verdicts of a local pool, an end with complete records, commands that show it again.

Scope: two torchruns on one host. A pass does not prove anything about a network between hosts.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from accelerated.contract import Standing
from accelerated.mori_ep.backend import HOSTS_VARIABLE
from accelerated.registry import backend
from conformance.engine.world_protocol import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE
from conformance.selftest.engine.agents import TOKEN, free_address, torchruns
from conformance.selftest.engine.backends import HOLD_VARIABLE, MODULE
from conformance.selftest.engine.helpers import descendants, wait_until
from conformance.selftest.suite.runs import LIMIT_S, Run, finish, run, start
from conformance.selftest.suite.test_harness import options
from conformance.selftest.suite.test_usage import one_line
from conformance.suite import controller, launched
from conformance.suite.options import Launched, Options
from conformance.suite.records import BeginRecord, EndRecord
from conformance.suite.summary import total
from conformance.verdicts import ExitCode, Verdict
from reference.problem import Problem

SMOKE = ("--tier", "smoke")
STANDIN = (*SMOKE, "--backend", "mori-standin", "--kernel-type", "InterNodeV1", "--kernel-type", "InterNodeV1LL")
FOUR = Launched(4, 2, ("a", "b"))


def launched_run(output: Path, *arguments: str) -> Run:
    """A run on two torchruns of two ranks each."""
    address = free_address()
    with torchruns(address, 2, 2):
        return run(output, "--world", address, *arguments, environment={TOKEN_VARIABLE: TOKEN})


def judged(done: Run) -> dict[str, list[tuple[object, ...]]]:
    """What every case ended with, by cell."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for end in done.ends:
        found.setdefault(end.cell, []).append((end.case_id, end.origin, end.verdict, end.check, end.ratio))
    return found


def complete(done: Run) -> bool:
    """Whether every case that was begun was ended, by cell and id."""
    begun = Counter((r.cell, r.case_id) for r in done.records if isinstance(r, BeginRecord))
    return begun == Counter((r.cell, r.case_id) for r in done.records if isinstance(r, EndRecord))


def test_the_verdicts_are_those_of_a_local_pool(tmp_path: Path) -> None:
    there = launched_run(tmp_path / "there", *STANDIN)
    assert there.code == ExitCode.OK, there.text
    here = run(tmp_path / "here", *STANDIN, "--ep-sizes", "4")
    assert here.code == ExitCode.OK, here.text
    wanted = {label: cases for label, cases in judged(here).items() if "ep4-2nodes" in label}
    assert judged(there) == wanted
    assert len(wanted) == 4
    assert there.opening.world.startswith("4 ranks on 2 nodes")
    assert "needs 4 on 1 node" in there.text
    told = there.opening.fingerprint
    assert [told[f"rank{rank}"] for rank in range(4)] == [socket.gethostname()] * 4
    assert told[f"{socket.gethostname()}.torch"] == told["torch"]
    assert "launched world of 4 ranks on 2 nodes" in there.text


def test_an_environment_that_only_the_ranks_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = free_address()
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "1G")
    with torchruns(address, 2, 1):
        monkeypatch.delenv("MORI_SHMEM_HEAP_SIZE")
        done = run(tmp_path / "out", "--world", address, *STANDIN, environment={TOKEN_VARIABLE: TOKEN})
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert not (tmp_path / "out" / "records").exists(), "nothing ran"
    (line,) = done.errors
    said = f"preflight: {socket.gethostname()} has MORI_SHMEM_HEAP_SIZE 1G and pytest has unset; export the same"
    assert said in line


def test_a_crash_is_one_verdict_that_is_not_reduced_and_nothing_follows(tmp_path: Path) -> None:
    done = launched_run(tmp_path / "out", *SMOKE, "--backend", f"{MODULE}:Crashes")
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    (crashed,) = done.cells.values()
    assert crashed.verdict is Verdict.CRASH
    assert complete(done)
    assert [end.verdict for end in done.ends if end.verdict is not Verdict.PASS] == [Verdict.CRASH]
    directory = Path(crashed.failure)
    assert (directory / "case.json").read_bytes() == (directory / "original.json").read_bytes()
    assert total(done.records).not_run == sorted(set(done.opening.planned) - set(done.cells))
    assert "NOT RUN: 1 cells" in done.text
    for said in ("failed 1 of 1 runs", "the launched world is over (rank 1 died)", "--nnodes 2 --nproc-per-node 2"):
        assert said in (directory / "report.txt").read_text()


def test_a_wrong_result_is_reduced_on_the_same_ranks(tmp_path: Path) -> None:
    done = launched_run(tmp_path / "out", *SMOKE, "--backend", f"{MODULE}:DropsARowOnNodes", "--reduce-budget", "20")
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    assert [cell.verdict for cell in done.cells.values()] == [Verdict.FAIL] * 2
    for cell in done.cells.values():
        case = json.loads((Path(cell.failure) / "case.json").read_bytes())
        assert (case["cell"]["world_size"], case["cell"]["nodes"]) == (4, 2)
        assert sum(map(len, case["rounds"][0]["routing"]["rows"])) == 1
        text = (Path(cell.failure) / "report.txt").read_text()
        assert "replay:      pytest conformance --replay " in text
        assert " --world 127.0.0.1:" in text


@contextmanager
def under_way(tmp_path: Path) -> Iterator[tuple[Run, list[int]]]:
    """A run whose second torchrun is killed in the middle of its first case."""
    address, hold = free_address(), tmp_path / "hold"
    hold.write_text("")
    environment = {TOKEN_VARIABLE: TOKEN}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOLD_VARIABLE, str(hold))
        with torchruns(address, 2, 2) as nodes:
            arguments = (*SMOKE, "--backend", f"{MODULE}:HeldOnNodes", "--world", address)
            process = start(tmp_path / "out", *arguments, environment=environment)
            wait_until(lambda: len(list(tmp_path.glob("hold-*"))) == 4, LIMIT_S)
            below = descendants(nodes[1].pid)
            nodes[1].kill()
            yield finish(process, tmp_path / "out"), below


def test_a_killed_agent_ends_the_run_as_infrastructure(tmp_path: Path) -> None:
    with under_way(tmp_path) as (done, below):
        assert done.code == ExitCode.INFRASTRUCTURE, done.text
        assert below
    (cell,) = done.cells.values()
    assert cell.verdict is Verdict.INFRA
    assert "an agent of the launched world is gone during case" in cell.reason
    assert complete(done)
    assert [end.verdict for end in done.ends] == [Verdict.INFRA]
    assert total(done.records).not_run == sorted(set(done.opening.planned) - {cell.label}) != []
    assert "what follows is not run" in done.text


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (("--world", "here"), {TOKEN_VARIABLE: TOKEN}, ("'here'", "127.0.0.1:29600")),
        (("--world", "127.0.0.1:1"), {TOKEN_VARIABLE: "short"}, ("5 characters", TOKEN_VARIABLE, "openssl")),
        (("--world", "127.0.0.1:1"), {TOKEN_FILE_VARIABLE: "/nosuch"}, ("/nosuch", "cannot be read")),
        (("--world", "127.0.0.1:1", "-n", "2"), {TOKEN_VARIABLE: TOKEN}, ("-n 2", "leave -n out")),
    ],
)
def test_wrong_arguments_of_a_world(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], parts: tuple[str, ...]
) -> None:
    line = one_line(tmp_path, *arguments, **environment)
    assert all(part in line for part in parts), line


def on_a_world(**change: object) -> Options:
    made = replace(options(Path("unused"), "mori-standin"), tier="smoke", **change)  # type: ignore[arg-type]
    return launched.fitted(made, FOUR)


def test_only_cells_of_its_ranks_whose_nodes_lie_within_its_own_are_planned() -> None:
    made = on_a_world(ep_sizes=(2, 4, 8), ep_sizes_given=True)
    plan = controller.plan_of(made)
    assert {(p.cell.world_size, p.cell.nodes) for p in plan.cells} == {(4, 2)}
    told = {
        (u.world_size, u.nodes) for u in plan.unsupported if "the launched world has 4 ranks on 2 nodes" in u.reason
    }
    assert told >= {(2, 1), (2, 2), (4, 1), (8, 1), (8, 2)}
    assert controller.plan_of(on_a_world()).cells == plan.cells, "its size is the default"
    one = launched.fitted(replace(made, ep_sizes_given=False), Launched(4, 1, ("a",)))
    assert {p.cell.nodes for p in controller.plan_of(one).cells} == {1, 2}, "nodes are emulated within a real one"
    with pytest.raises(pytest.UsageError, match=r"--ep-sizes is 2,8 and the launched world has 4 ranks on 2 nodes"):
        on_a_world(ep_sizes=(2, 8), ep_sizes_given=True)
    with pytest.raises(pytest.UsageError, match=r"no cell of mori-standin fits .* needs 4 on 1 node"):
        controller.plan_of(replace(on_a_world(), kernel_types=("IntraNode",)))


def test_the_nodes_of_a_world_are_planned_whatever_their_number() -> None:
    made = replace(options(Path("unused"), "mori-standin"), tier="smoke")
    plan = controller.plan_of(launched.fitted(made, Launched(32, 16, tuple("abcdefghijklmnop"))))
    assert {p.cell.nodes for p in plan.cells} == {16}


def test_a_host_takes_eight_ranks_of_the_real_library_and_two_take_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(16, hidden=64, experts=32, top_k=2, capacity=64, nodes=2)
    made = backend("mori", "gfx942")
    refused = made.support(problem, "InterNodeV1")
    assert refused.standing is Standing.REFUSED
    assert "at most 8 ranks on a host" in refused.reason
    monkeypatch.setenv(HOSTS_VARIABLE, "2")
    assert made.support(problem, "InterNodeV1").standing is Standing.CLAIMED
    wide = made.support(replace(problem, world_size=32), "InterNodeV1")
    assert "world_size is 32 on 2 hosts; MoRI runs at most 8 ranks on a host" in wide.reason
