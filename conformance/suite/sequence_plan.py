"""Cells of sequences and of soaks.

Scope: in the gate every kernel type gets its sequences drained and free-running, at EP sizes and numbers of nodes that
take turns, with a second operator of the same capacity or of another one, and again with routing handles where they can
be replayed; explore has every topology of up to eight ranks and the other ways of calling. A soak is one cell in the
gate; in explore it is planned like sequences, on GPUs at production sizes, too (:mod:`conformance.suite.plan`). What
the plan does not contain: sequences with a wire, a codec or the sizes of a model, and captured calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from accelerated.contract import Standing
from accelerated.interface import Backend
from conformance.cases import Cell, SequenceCell
from conformance.row_cases import Mode
from conformance.suite.cells import PlannedCell, Unsupported
from reference.problem import ProblemError

CHECK, SOAK = "sequences", "soak"
HIDDEN, EXPERTS_PER_RANK, TOP_K, CAPACITY = 64, 2, 2, 16
#: Capacity of the second operator: the first one's, or another.
SECOND: dict[Mode, int] = {"drained": CAPACITY, "free-running": CAPACITY // 2}
#: (EP size, nodes) that take turns in the gate; where a kernel type does not run, it gets the next one.
TURNS: dict[Mode, tuple[tuple[int, int], ...]] = {
    "drained": ((2, 1), (4, 2), (2, 1)),
    "free-running": ((4, 1), (2, 1), (8, 1)),
}
#: Widest soaks and sequences of explore: a hundred rounds of more ranks than cores take minutes.
WIDEST = 8
#: Cases of a cell by EP size.
GATE = {1: 8, 2: 8, 4: 4, 8: 2}
COMPANION = 3
EXPLORE = {1: 12, 2: 24, 4: 16, 8: 10}
HANDLE = "handle"
WAYS = ("", HANDLE, "zero-copy", "weightless", "expert count")
SOAKS = 4


def planned_sequences(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    kernel_types: Sequence[str],
    topologies: Sequence[tuple[int, int]],
) -> Iterator[PlannedCell | Unsupported]:
    """Cells and refusals of one backend.

    Args:
        name: to ask the registry for.
        backend: that offers the kernel types.
        companion: it is the yardstick of the run.
        tier: smoke, which has none, gate or explore.
        kernel_types: to plan.
        topologies: (EP size, nodes).
    """
    places = [place for place in topologies if place[0] <= WIDEST]
    if tier == "smoke" or not places or not kernel_types:
        return
    if companion:
        yield from _gate(name, backend, kernel_types[:1], places, companion=True)
        return
    if tier == "explore":
        yield from _explore(name, backend, kernel_types, places)
        return
    yield from _gate(name, backend, kernel_types, places, companion=False)
    wide = [place for place in places if place[0] > 1]
    soak = plain_cell(name, kernel_types[0], min(wide, default=(0, 0)), "free-running", SOAK)
    if wide and (claimed := _claimed(backend, soak)) is not None:
        yield PlannedCell(soak, 1, claimed)


def _gate(
    name: str,
    backend: Backend,
    kernel_types: Sequence[str],
    places: Sequence[tuple[int, int]],
    *,
    companion: bool,
) -> Iterator[PlannedCell | Unsupported]:
    modes: tuple[Mode, ...] = ("free-running",) if companion else ("drained", "free-running")
    for number, kernel_type in enumerate(kernel_types):
        for mode in modes:
            turns = [place for place in TURNS[mode] if place in places] or list(places[:1])
            # Companions begin with what is cheapest.
            rotated = [turns[(number + companion + step) % len(turns)] for step in range(len(turns))]
            cells = [sequence_cell(name, kernel_type, place, mode) for place in rotated]
            yield _first(backend, cells, companion=companion)
            handled = [msgspec.structs.replace(cell, modes=(HANDLE,)) for cell in (*cells[1:], cells[0])]
            found = _first(backend, handled, companion=companion)
            # Where there are no handles, the plan of ways of calling says so.
            if isinstance(found, PlannedCell) and found.claimed and not companion:
                yield found


def _first(backend: Backend, cells: Sequence[SequenceCell], *, companion: bool) -> PlannedCell | Unsupported:
    """The first of the cells that the backend takes, or why it takes the first one not."""
    for cell in cells:
        claimed = _claimed(backend, cell)
        if claimed is not None:
            return PlannedCell(cell, COMPANION if companion else GATE[cell.world_size], claimed, companion)
    return _unsupported(backend, cells[0])


def _explore(
    name: str, backend: Backend, kernel_types: Sequence[str], places: Sequence[tuple[int, int]]
) -> Iterator[PlannedCell | Unsupported]:
    modes: tuple[Mode, ...] = ("drained", "free-running")
    for kernel_type in kernel_types:
        for place in places:
            plain = sequence_cell(name, kernel_type, place, "drained")
            if _claimed(backend, plain) is None:
                yield _unsupported(backend, plain)
                continue
            for mode in modes:
                for way in WAYS:
                    cell = sequence_cell(name, kernel_type, place, mode)
                    cell = msgspec.structs.replace(cell, modes=(way,) if way else ())
                    if (claimed := _claimed(backend, cell)) is not None:
                        yield PlannedCell(cell, EXPLORE[_key(place[0])], claimed)
            soak = plain_cell(name, kernel_type, place, "free-running", SOAK)
            if (claimed := _claimed(backend, soak)) is not None and place[0] > 1 and backend.judged_by != "oracle":
                yield PlannedCell(soak, SOAKS, claimed)


def _key(world_size: int) -> int:
    return max(size for size in EXPLORE if size <= world_size)


def _claimed(backend: Backend, cell: Cell) -> bool | None:
    """Whether a cell is claimed; None if any of its operators is refused."""
    ops = range(cell.operators) if isinstance(cell, SequenceCell) else range(1)
    standings = set()
    for op in ops:
        try:
            problem = cell.problem_of(op) if isinstance(cell, SequenceCell) else cell.problem()
        except ProblemError:
            return None
        standings.add(backend.support(problem, cell.kernel_type).standing)
    return None if Standing.REFUSED in standings else standings == {Standing.CLAIMED}


def _unsupported(backend: Backend, cell: SequenceCell) -> Unsupported:
    try:
        reason = backend.support(cell.problem(), cell.kernel_type).reason
    except ProblemError as error:
        reason = str(error)
    return Unsupported(cell.backend, cell.kernel_type, cell.world_size, cell.nodes, reason)


def plain_cell(name: str, kernel_type: str, place: tuple[int, int], mode: Mode, check: str) -> Cell:
    """A cell of the sizes that sequences have, with one operator."""
    world_size, nodes = place
    return Cell(
        check,
        name,
        kernel_type,
        world_size,
        nodes,
        HIDDEN,
        EXPERTS_PER_RANK * world_size,
        TOP_K,
        CAPACITY,
        "bfloat16",
        mode,
    )


def sequence_cell(name: str, kernel_type: str, place: tuple[int, int], mode: Mode) -> SequenceCell:
    """A cell of sequences on two operators."""
    plain = plain_cell(name, kernel_type, place, mode, CHECK)
    return SequenceCell(**{field: getattr(plain, field) for field in Cell.__struct_fields__}, second=SECOND[mode])
