"""The transport of MoRI's puts: chosen by an option or the environment, set for every pool, named wherever it matters.

A pass does not prove that a library obeys the environment: its own source is what says so.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from accelerated.mori_ep.transports import DISABLE_P2P, ENABLE_SDMA, TRANSPORTS, in_force
from accelerated.registry import backend
from conformance.cases import Case, Cell, Explicit, GraphCase, GraphCell, GraphRound, Round
from conformance.engine.driver import Outcome
from conformance.engine.lease import lock_directory
from conformance.selftest.engine.backends import MODULE
from conformance.selftest.engine.helpers import case, cell
from conformance.selftest.suite.runs import run
from conformance.selftest.suite.sequence_examples import replays
from conformance.selftest.suite.test_harness import options
from conformance.selftest.suite.test_usage import one_line
from conformance.suite import preflight
from conformance.suite.failure import Failure
from conformance.suite.options import transport_of
from conformance.suite.resources import Resources
from conformance.verdicts import ExitCode, Verdict

SMALL = ("--tier", "smoke", "--ep-sizes", "2")


@pytest.mark.parametrize(
    ("disabled", "enabled", "found"),
    [
        ("", "", "p2p"),
        ("0", "off", "p2p"),
        ("1", "0", "rdma"),
        ("ON", "", "rdma"),
        ("maybe", "no", "rdma"),
        ("1", "1", "sdma"),  # enabled SDMA is asked first
        ("", "TRUE", "sdma"),
    ],
)
def test_the_transport_that_an_environment_chooses(disabled: str, enabled: str, found: str) -> None:
    assert in_force({DISABLE_P2P: disabled, ENABLE_SDMA: enabled}) == found


def test_every_transport_is_the_one_that_its_environment_chooses() -> None:
    assert in_force({}) == "p2p"
    assert {name: in_force(dict(setting)) for name, setting in TRANSPORTS.items()} == {n: n for n in TRANSPORTS}


def test_the_ranks_get_it_whatever_the_environment_says(tmp_path: Path) -> None:
    arguments = (*SMALL, "--backend", f"{MODULE}:TellsTransport", "--transport", "sdma")
    done = run(tmp_path / "out", *arguments, environment={DISABLE_P2P: "1", ENABLE_SDMA: "0"})
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert f"{DISABLE_P2P}=0 {ENABLE_SDMA}=1" in done.text
    assert done.opening.transport == "sdma"
    assert ", transport sdma" in done.text


def test_without_the_option_the_environment_chooses(tmp_path: Path) -> None:
    done = run(tmp_path / "out", *SMALL, "--backend", f"{MODULE}:TellsTransport", environment={DISABLE_P2P: "yes"})
    assert f"{DISABLE_P2P}=1 {ENABLE_SDMA}=0" in done.text
    assert done.opening.transport == "rdma"


def test_it_is_part_of_what_makes_two_pools_interchangeable(tmp_path: Path) -> None:
    lock_directory()
    made = replace(options(tmp_path, "reference"), transport="rdma")
    resources = Resources(made, (), None, progress=lambda text: None, on_teardown=lambda cell, outcome: None)
    with resources.hold(cell("Held", 2), None) as driver:
        assert driver._environment == TRANSPORTS["rdma"]


def test_it_is_told_of_mori_alone_and_where_it_is_not_the_default() -> None:
    made = replace(options(Path("unused"), "mori-standin"), transport="rdma")
    told = {name: transport_of(backend(name), made) for name in ("mori", "mori-standin+reference", "allgather")}
    assert told == {"mori": "rdma", "mori-standin+reference": "rdma", "allgather": ""}
    assert transport_of(backend("mori"), replace(made, transport="p2p")) == ""


def test_a_failure_names_it_and_both_commands_bring_it_back(tmp_path: Path) -> None:
    failing = case(cell("DropsARow", world_size=2))
    failure = Failure("mori", False, failing, failing, Outcome(Verdict.FAIL, "dispatch.rows"), transport="rdma")
    failure.store(tmp_path)
    report = (failure.directory / "report.txt").read_text()
    assert failure.headline.endswith("EP 2, transport rdma")
    assert "case.json --transport rdma\n" in report
    tree = ast.parse((failure.directory / "reproduce.py").read_text())
    last, entry = tree.body[-2:]
    assert ast.unparse(last) == f"os.environ.update({dict(TRANSPORTS['rdma'])!r})"
    assert isinstance(entry, ast.If), "the environment is set before anything runs"


_ONE = Explicit((((0,), (1,)), ((1,),)))
_PLAIN = Cell("round_trip", "mori-standin", "InterNodeV1", 2, 1, 64, 2, 1, 4, "bfloat16", "drained")
_WIRE = msgspec.structs.replace(_PLAIN, wire="fp8_token")
_GRAPH = GraphCell("graphs", *msgspec.structs.astuple(_PLAIN)[1:])
EXCHANGES: dict[str, Case] = {
    "plain": Case(_PLAIN, (Round(_ONE),)),
    "wire": Case(_WIRE, (Round(_ONE),)),
    "edges": Case(_PLAIN, (Round(_ONE, "edges"),)),
    "graph": GraphCase(_GRAPH, (GraphRound(_ONE, graph=0),)),
    "sequence": replays("mori-standin", "InterNodeV1", "drained"),
}


@pytest.mark.parametrize("kind", EXCHANGES)
def test_every_script_of_an_exchange_sets_it_before_the_library_initialises(tmp_path: Path, kind: str) -> None:
    failing = EXCHANGES[kind]
    found = Failure("mori", True, failing, failing, Outcome(Verdict.FAIL, "combine.output"), transport="sdma")
    found.store(tmp_path)
    tree = ast.parse((found.directory / "reproduce.py").read_text())
    lines = [ast.unparse(node) for node in tree.body]
    chosen = f"os.environ.update({dict(TRANSPORTS['sdma'])!r})"
    assert lines.index(chosen) == len(lines) - 2
    assert lines[-1].endswith("main()"), "which opens the backend"
    assert not any(".open(" in line for line, node in zip(lines, tree.body, strict=True) if _runs(node))


def _runs(node: ast.stmt) -> bool:
    """Whether a statement of a module does anything when it is loaded."""
    return not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)


def test_a_transport_of_what_does_not_dispatch_through_mori(tmp_path: Path) -> None:
    line = one_line(tmp_path, "--backend", "allgather", "--transport", "rdma")
    assert all(part in line for part in ("--transport rdma", "allgather", "leave it out")), line


def test_rdma_without_an_adapter_is_found_before_mori_ends_the_process(tmp_path: Path) -> None:
    assert preflight.check_rdma("p2p", 1, tmp_path) == preflight.check_rdma("sdma", 1, tmp_path) == []
    (lone,) = preflight.check_rdma("rdma", 1, tmp_path)
    (wide,) = preflight.check_rdma("p2p", 2, tmp_path / "absent")
    assert "--transport rdma put through RDMA" in lone.what
    assert "ranks on 2 hosts" in wide.what
    (tmp_path / "mlx5_0").mkdir()
    assert preflight.check_rdma("rdma", 2, tmp_path) == []
