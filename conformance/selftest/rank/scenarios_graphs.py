"""Scenarios of captured calls on gloo ranks: the specification and the all-gather, recorded; each defect is named.

Scope: conformance/rank/graph_program.py with the backends whose collectives a GPU captures, on a recorder that runs
them again. A pass says that their captured calls need nothing of the host and read their inputs anew, nothing about a
device's graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from accelerated.contract import RowOrder
from accelerated.interface import Combined, Operation, RankContext, Received
from accelerated.registry import backend
from conformance.cases import GraphCase, GraphCell
from conformance.engine.protocol import Mismatch
from conformance.faults import GRAPH_FAULTS
from conformance.graph_generation import first_case
from conformance.rank.experts import LocalExperts
from conformance.rank.graph_program import GraphProgram
from conformance.rank.guard import BackendError
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.selftest.rank.recorded_graphs import GlooGraphs
from conformance.selftest.reference.ranks import World
from conformance.suite.graph_plan import FORMS

_KINDS = {"allgather": "naive", "reference": "one-level", "replicated": "all-reduce"}


def _cell_of(world: World, name: str, base: str, **form: Any) -> GraphCell:
    modes = ("handle",) if base == "reference" else ()
    size = world.size
    return GraphCell("graphs", name, _KINDS[base], size, 1, 24, 2 * size, 2, 6, "bfloat16", modes=modes, **form)


def _run(world: World, case: GraphCase, wrap: Callable[[Any], Any] | None = None) -> tuple[Mismatch | None, float]:
    cell = case.cell
    context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
    made: Any = backend(cell.backend)
    session = made.open(context)
    if hasattr(session, "_genuine"):
        session._genuine.graphs = GlooGraphs()
    contract = made.contract(cell.problem(), cell.kernel_type)
    if wrap is not None:  # one that promises no order, so that only places tell
        contract = replace(contract, row_order=RowOrder.ANY)

    def build() -> Operation:
        built = session.build(cell.problem(), cell.kernel_type)
        return GuardedExchange(built if wrap is None else wrap(built), cell.problem())

    graphs = session.graphs if hasattr(session, "_genuine") else GlooGraphs()
    experts = LocalExperts(cell, world.rank, context.device)
    program = GraphProgram(context, build, graphs, contract, made.judged_by, experts)
    try:
        first = program.run(case, lambda _name, _index: None)
        second = program.run(case, lambda _name, _index: None)
    finally:
        program.close()
        session.close()
    return (first[0] or second[0]), max(first[1], second[1])


def captured_collectives_read_their_inputs_anew(world: World) -> None:
    for base in _KINDS:
        for form in (form for form in FORMS if form.warm):
            cell = _cell_of(world, base, base, mode=form.mode, length=form.length, halves=form.halves)
            case = first_case(cell, backend(base).contract(cell.problem(), cell.kernel_type))
            mismatch, ratio = _run(world, case)
            assert mismatch is None, (base, form, mismatch.text())
            assert ratio <= 1


def defects_of_captures_are_named(world: World) -> None:
    warm = [form for form in FORMS if form.warm]
    for turn, fault in enumerate(GRAPH_FAULTS.values()):
        if fault.base == "mori-standin":
            continue
        for form in warm[turn % len(warm) :][:1]:
            cell = _cell_of(world, fault.backend, fault.base, mode=form.mode, length=form.length, halves=form.halves)
            case = first_case(cell, backend(fault.base).contract(cell.problem(), cell.kernel_type))
            mismatch, _ = _run(world, case)
            # A rank whose tokens all come from others may see nothing itself.
            seen: list[Any] = [None] * world.size
            dist.all_gather_object(seen, "" if mismatch is None else mismatch.check, group=world.group)
            assert fault.check in seen, (fault.name, form, seen)
            assert set(seen) <= {fault.check, "", "graph.combine.output"}, (fault.name, form, seen)


class _Reversed:
    """An operation whose replays deliver in the reverse order, with a source map and a combine to match."""

    def __init__(self, inner: Operation) -> None:
        self._inner, self._turned = inner, False
        self.close = inner.close

    def prepare(self, *given: torch.Tensor) -> Received:
        self._turned = False
        return self._patched(self._inner.prepare(*given))

    def _patched(self, received: Received) -> Received:
        again = received.replay
        assert again is not None

        def replay(rows: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None) -> Received:
            found = again(rows, weights, scales)
            self._turned = True
            for name in ("rows", "ids", "weights"):
                setattr(found, name, getattr(found, name).flip(0))
            return found

        received.replay = replay
        return received

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        if not self._turned:
            return self._inner.finalize(expert_rows, received)
        received.weights = received.weights.flip(0)  # which the reference sums
        return self._inner.finalize(expert_rows.flip(0), received)


def a_captured_replay_into_other_places_is_named(world: World) -> None:
    for form in (form for form in FORMS if form.warm):
        cell = _cell_of(world, "reference", "reference", mode=form.mode, length=form.length, halves=form.halves)
        case = first_case(cell, backend("reference").contract(cell.problem(), cell.kernel_type))
        mismatch, _ = _run(world, case, _Reversed)
        assert mismatch is not None, form
        assert mismatch.check == "graph.dispatch.places", mismatch.text()


class _Logged:
    """Graphs, or an operation, whose calls are written down."""

    def __init__(self, inner: Any, log: list[str], raises: str = "") -> None:
        self._inner, self._log, self._raises = inner, log, raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def capture(self) -> Iterator[Any]:
        with self._inner.capture() as graph:
            yield _Logged(graph, self._log, self._raises)

    def replay(self) -> None:
        self._log.append("replay")
        if self._raises:
            raise RuntimeError(self._raises)
        self._inner.replay()

    def release(self) -> None:
        self._log.append("release")
        self._inner.release()

    def close(self) -> None:
        self._log.append("close")
        self._inner.close()


def graphs_are_released_before_anything_else(world: World) -> None:
    for raises in ("", "lost"):
        cell = _cell_of(world, "allgather", "allgather", mode="drained")
        context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
        made: Any = backend("allgather")
        contract, log = made.contract(cell.problem(), "naive"), list[str]()
        session = made.open(context)

        def build(of: Any = session, log: list[str] = log, cell: GraphCell = cell) -> Any:
            log.append("build")
            return _Logged(of.build(cell.problem(), "naive"), log)

        experts = LocalExperts(cell, world.rank, context.device)
        graphs: Any = _Logged(GlooGraphs(), log, raises)
        program = GraphProgram(context, build, graphs, contract, "reference", experts)
        case = first_case(cell, contract)
        if raises:
            try:
                program.run(case, lambda _name, _index: None)
            except BackendError as error:
                assert str(error) == raises  # noqa: PT017  the scenario goes on
            assert log == ["build", "replay", "release", "release"], "whatever happens, none outlives the case"
        else:
            assert program.run(case, lambda _name, _index: None)[0] is None
            ended = ["release", "release", "close", "build"]
            assert log == ["build", *["replay"] * 4, *ended, *["replay"] * 3, "release", "release"]
        # As after a command that ended in the middle of a case.
        program._capture(case, program._routings(case), lambda _name, _index: None)
        log.clear()
        program.close()
        assert log == ["release", "release", "close"]


def a_case_is_refused_that_the_contract_does_not_promise(world: World) -> None:
    made: Any = backend("reference")
    cell = _cell_of(world, "reference", "reference", mode="drained")
    promised = made.contract(cell.problem(), "one-level")
    case = first_case(cell, promised)
    plain = msgspec.structs.replace(case, cell=msgspec.structs.replace(cell, modes=()))
    cold = msgspec.structs.replace(case, cell=msgspec.structs.replace(cell, warm=False))
    for bad, message in ((plain, "reads the row counts on the host"), (cold, "warm it up")):
        try:
            _run(world, bad)
        except ValueError as error:
            assert message in str(error)  # noqa: PT017  raised on every rank, before any collective
        else:
            raise AssertionError(message)
