"""The plan: which cells a run has, how many cases each gets, and which combinations are unsupported and why.

Geometry is fixed per cell. Synthetic geometries sit on awkward sizes; every real model shape is touched, spread over
kernel types and EP sizes in the gate tier and crossed with all of them in explore. Wires, combine codecs and ways of
calling are planned in pairs (:mod:`conformance.suite.call_plan`), orders of calls and soaks in
:mod:`conformance.suite.sequence_plan`. What the plan does not contain: all numbers of nodes: it has one, two, nodes of
eight ranks, and those of a launched world.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from accelerated.contract import Standing
from accelerated.interface import Backend
from accelerated.layer import split_path
from conformance.cases import Cell, Placement
from conformance.row_cases import Mode
from conformance.suite.call_plan import call_cells
from conformance.suite.cells import Plan, PlannedCell, Unsupported
from conformance.suite.graph_plan import graph_cells
from conformance.suite.layer_plan import expert_cells, is_layer, layer_cells
from conformance.suite.pair_plan import pair_cells
from conformance.suite.routed_plan import lends_its_dispatch, routed_cells, weighs_input
from conformance.suite.row_plan import row_cells
from conformance.suite.sequence_plan import planned_sequences
from reference.catalogue import ModelShape
from reference.problem import Problem, ProblemError


@dataclass(frozen=True)
class Geometry:
    """Sizes of a synthetic layer per rank."""

    hidden: int
    experts_per_rank: int
    top_k: int
    capacity: int
    dtype: str


#: Small and even, odd sizes in float32, more slots than a row of eight, one slot, and enough tokens for recipes.
PAIRS = Geometry(64, 2, 2, 64, "bfloat16")
ODD = Geometry(77, 5, 5, 33, "float32")
WIDE = Geometry(136, 12, 9, 16, "bfloat16")
SINGLE = Geometry(32, 1, 1, 128, "bfloat16")
BULK = Geometry(64, 8, 8, 256, "bfloat16")
MODEL_CAPACITY = 16
#: Ranks that share a node of a production machine.
HOST_RANKS = 8


@dataclass(frozen=True)
class Slot:
    """One line of the plan: a property on a geometry, with its number of cases per EP size."""

    check: str
    geometry: Geometry | None  # None: a model shape
    mode: Mode
    examples: dict[int, int]  # EP size -> cases; beyond the widest key they fall with the EP size
    placement: Placement = "linear"

    def examples_at(self, world_size: int) -> int:
        """Cases at an EP size: those of the nearest smaller key, fewer in proportion beyond it."""
        key = max(w for w in self.examples if w <= world_size)
        return max(1, self.examples[key] * key // world_size) if world_size > 8 else self.examples[key]


GATE = (
    Slot("round_trip", PAIRS, "drained", {1: 10, 2: 18, 4: 14, 8: 18}),
    Slot("round_trip", ODD, "drained", {1: 5, 2: 14, 4: 10, 8: 9}),
    Slot("round_trip", WIDE, "drained", {1: 4, 2: 12, 4: 9, 8: 8}),
    Slot("round_trip", SINGLE, "drained", {1: 4, 2: 11, 4: 8, 8: 6}),
    Slot("round_trip", BULK, "drained", {1: 2, 2: 6, 4: 5, 8: 3}),
    Slot("round_trip", None, "drained", {1: 2, 2: 9, 4: 8, 8: 6}),
    Slot("rounds", PAIRS, "free-running", {1: 4, 2: 8, 4: 6, 8: 6}),
    Slot("placement", None, "drained", {1: 1, 2: 3, 4: 2, 8: 2}),
    Slot("placement", PAIRS, "drained", {2: 3, 4: 2, 8: 2}, "round_robin"),
)
SMOKE = (
    Slot("round_trip", PAIRS, "drained", {1: 4, 2: 6, 4: 4, 8: 3}),
    Slot("rounds", PAIRS, "free-running", {1: 2, 2: 3, 4: 2, 8: 2}),
)
#: What a backend that is not the subject of the run gets: enough to trust it as the yardstick.
COMPANION = (
    Slot("round_trip", PAIRS, "drained", {1: 4, 2: 12, 4: 8, 8: 5}),
    Slot("round_trip", ODD, "drained", {1: 2, 2: 8, 4: 5, 8: 3}),
    Slot("rounds", PAIRS, "free-running", {1: 2, 2: 5, 4: 4, 8: 3}),
    Slot("placement", None, "drained", {1: 1, 2: 2, 4: 2, 8: 1}),
)
#: What a GPU gets on top: production sizes, aligned float32, odd bfloat16, and many rounds without a host sync.
LARGE = Geometry(7168, 32, 8, 512, "bfloat16")
ALIGNED = Geometry(4096, 8, 8, 64, "float32")
UNEVEN = Geometry(2099, 8, 6, 64, "bfloat16")
HARDWARE = (
    Slot("round_trip", LARGE, "drained", {1: 2, 2: 6}),
    Slot("round_trip", ALIGNED, "drained", {1: 2, 2: 8}),
    Slot("round_trip", UNEVEN, "drained", {1: 2, 2: 8}),
    Slot("soak", LARGE, "free-running", {2: 4}),
    Slot("soak", ALIGNED, "free-running", {2: 4}),
)
DEFAULT_EP_SIZES = {"smoke": (1, 2, 4), "gate": (1, 2, 4, 8), "explore": (1, 2, 4, 8, 16, 32)}


def make_plan(
    backends: Sequence[tuple[str, Backend, bool]],
    *,
    tier: str,
    ep_sizes: Sequence[int],
    kernel_types: Sequence[str],
    models: Sequence[ModelShape],
    only_models: bool = False,
    operators: Sequence[str] = (),
    device: str = "cpu",
    launched_nodes: int = 0,
) -> Plan:
    """Cross backends, kernel types, EP sizes and slots; ask each backend what it supports.

    Args:
        backends: (name to ask the registry for, backend, is companion); the name goes into the cells, because ranks
            and replays construct the backend from it.
        tier: smoke, gate or explore.
        ep_sizes: EP sizes to plan.
        kernel_types: kernel types to keep, all if empty; with some and no operators there are no row operators.
        models: model shapes to spread (gate) or cross (explore).
        only_models: drop the synthetic geometries, and the row operators with them.
        operators: row operators to keep, all if empty; with some and no kernel types there is no dispatch/combine.
        device: ``"cuda"`` adds the slots that only a GPU is fast enough for.
        launched_nodes: nodes of a launched world; 0 where this host emulates them.
    """
    cells: list[PlannedCell] = []
    refused: dict[tuple[str, str, int, int, str], Unsupported] = {}
    turn = 0

    def take(found: Iterator[PlannedCell | Unsupported]) -> None:
        for one in found:
            if isinstance(one, PlannedCell):
                cells.append(one)
            else:
                refused[(one.backend, one.kernel_type, one.world_size, one.nodes, one.reason)] = one

    for name, backend, companion in backends:
        if is_layer(backend):
            paths = _paths(backend, () if companion else kernel_types, () if companion else operators)
            # Experts that take no row count: of the exchanges only the specification's hands out valid rows alone.
            lent = companion and lends_its_dispatch(backend)
            take(
                layer_cells(
                    name,
                    backend,
                    companion=companion,
                    tier=tier,
                    ep_sizes=ep_sizes,
                    paths=() if lent else paths,
                    models=models,
                    only_models=only_models,
                    named=bool(operators) and not companion,
                )
            )
            take(
                routed_cells(
                    name,
                    backend,
                    companion=companion,
                    tier=tier,
                    ep_sizes=ep_sizes,
                    paths=[path for path in paths if not only_models and (weighs_input(path) or not lent)],
                    named=bool(operators) and not companion,
                )
            )
            if not companion and tier != "smoke" and not only_models:
                take(
                    pair_cells(
                        name,
                        backend,
                        [(other, made) for other, made, beside in backends if not beside],
                        ep_sizes=ep_sizes,
                        paths=paths,
                        every=tier == "explore",
                        named=bool(operators),
                    )
                )
            continue
        wanted = list(backend.kernel_types)
        if kernel_types and not companion:
            offered = (*backend.kernel_types, *getattr(backend, "aliases", ()))
            wanted = [k for k in offered if k in kernel_types]
        if operators and not kernel_types:
            wanted = []
        if not only_models and (operators or not kernel_types):
            take(
                row_cells(
                    name, backend, companion=companion, tier=tier, ep_sizes=ep_sizes, operators=operators, device=device
                )
            )
            take(expert_cells(name, backend, companion=companion, tier=tier, operators=operators, device=device))
        slots: tuple[Slot, ...] = {"smoke": SMOKE}.get(tier, COMPANION if companion else GATE)
        # The oracle works in float64 on the host: production sizes would take it minutes.
        if not companion and tier != "smoke" and backend.judged_by != "oracle" and device == "cuda":
            slots += HARDWARE
        if wanted and not only_models:
            take(
                call_cells(
                    name,
                    backend,
                    companion=companion,
                    tier=tier,
                    kernel_types=wanted,
                    topologies=list(_topologies(ep_sizes, launched_nodes)),
                )
            )
        if wanted and not only_models:
            take(
                graph_cells(
                    name,
                    backend,
                    companion=companion,
                    tier=tier,
                    kernel_types=wanted,
                    topologies=list(_topologies(ep_sizes, launched_nodes)),
                    device=device,
                )
            )
        if not only_models:
            take(
                planned_sequences(
                    name,
                    backend,
                    companion=companion,
                    tier=tier,
                    kernel_types=wanted,
                    topologies=list(_topologies(ep_sizes, launched_nodes)),
                )
            )
        for kernel_type in wanted:
            for world_size, nodes in _topologies(ep_sizes, launched_nodes):
                for slot in slots:
                    if only_models and slot.geometry is not None:
                        continue
                    shapes: Sequence[ModelShape | None] = [None]
                    if slot.geometry is None:
                        every = tier == "explore" or only_models
                        shapes = models if every else [models[turn % len(models)]]
                        turn += 1
                    for shape in shapes:
                        found = _cell(name, backend, kernel_type, world_size, nodes, slot, shape)
                        if isinstance(found, Unsupported):
                            refused[(found.backend, found.kernel_type, world_size, nodes, found.reason)] = found
                        else:
                            examples = slot.examples_at(world_size) if world_size >= min(slot.examples) else 0
                            if examples:
                                cells.append(PlannedCell(found[0], examples, found[1], companion))
    # Wide cells first: they take longest, and neighbours of one width share a pool.
    cells.sort(key=_turn)
    return Plan(tuple(cells), tuple(refused.values()))


def _paths(backend: Backend, kernel_types: Sequence[str], operators: Sequence[str]) -> list[str]:
    """Paths of a composed backend to plan: of these kernel types and with these experts, all if empty.

    Vendor names for kernel types are planned only where they are asked for.
    """
    offered = (*backend.kernel_types, *(getattr(backend, "aliases", ()) if kernel_types else ()))
    taken = [split_path(path) for path in offered]
    return [
        path
        for path, parts in zip(offered, taken, strict=True)
        if (not kernel_types or parts.kernel_type in kernel_types) and (not operators or parts.operator in operators)
    ]


def _turn(planned: PlannedCell) -> tuple[Any, ...]:
    cell = planned.cell
    sizes = msgspec.structs.astuple(cell) if isinstance(cell, Cell) else (cell.label,)
    return -cell.world_size, cell.backend, cell.kernel_type, cell.nodes, isinstance(cell, Cell), sizes


def _topologies(ep_sizes: Sequence[int], launched: int) -> Iterator[tuple[int, int]]:
    """EP sizes with numbers of nodes: one, two, so many that eight ranks share one, and a launched world's."""
    for world_size in ep_sizes:
        for nodes in sorted({1, 2, world_size // HOST_RANKS, launched} - {0}):
            if world_size % nodes == 0:
                yield world_size, nodes


def _cell(
    name: str,
    backend: Backend,
    kernel_type: str,
    world_size: int,
    nodes: int,
    slot: Slot,
    shape: ModelShape | None,
) -> tuple[Cell, bool] | Unsupported:
    """A cell and whether it is claimed, or the refusal."""
    cell = cell_for(name, kernel_type, world_size, nodes, slot, shape)
    try:
        problem = cell.problem()
    except ProblemError as error:
        return Unsupported(name, kernel_type, world_size, nodes, str(error))
    support = backend.support(problem, kernel_type)
    if support.standing is Standing.REFUSED and slot.geometry is WIDE:
        # A kernel type that stops at eight slots still gets the wide layer, with eight.
        problem = Problem(world_size, cell.hidden, cell.experts, 8, cell.capacity, cell.dtype, nodes)
        support = backend.support(problem, kernel_type)
        cell = cell_for(name, kernel_type, world_size, nodes, slot, shape, top_k=8)
    if support.standing is Standing.REFUSED:
        return Unsupported(name, kernel_type, world_size, nodes, support.reason)
    return cell, support.standing is Standing.CLAIMED


def cell_for(
    backend: str,
    kernel_type: str,
    world_size: int,
    nodes: int,
    slot: Slot,
    shape: ModelShape | None,
    top_k: int | None = None,
) -> Cell:
    """The cell of one slot."""
    geometry = slot.geometry
    if geometry is None:
        assert shape is not None
        geometry = Geometry(shape.hidden, 0, shape.top_k, MODEL_CAPACITY, "bfloat16")
    return Cell(
        check=slot.check,
        backend=backend,
        kernel_type=kernel_type,
        world_size=world_size,
        nodes=nodes,
        hidden=geometry.hidden,
        experts=shape.experts if shape is not None else geometry.experts_per_rank * world_size,
        top_k=top_k or geometry.top_k,
        capacity=geometry.capacity,
        dtype=geometry.dtype,
        mode=slot.mode,
        placement=slot.placement,
        model=shape.name if shape is not None else "",
    )
