"""Cells of the experts alone and of whole layers: sizes, placements and budgets.

Every path (kernel type, experts operator, format on the wire) of a composed backend gets a cell at every EP size that
both halves take and that the tier has cases for, with three exceptions. Paths of experts in ``ALONE_SUFFICES`` get none
and are listed as unsupported; paths with ``@bf16``, the element type beside a quantised wire, run at one EP size above
1, which changes from path to path; so do lines ``in_turn``. Explore, ``--operator`` and ``--model`` make no exception.
Sizes are small and awkward, and real shapes are for explore, ``--model`` and GPUs, with the intermediate cut to what
the memory of one host holds. What the plan does not contain: shared experts beside an exchange, which vLLM computes
apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerated.contract import Standing
from accelerated.experts import SEPARATOR, UNQUANTISED
from accelerated.interface import Backend
from accelerated.operators import Family, operators_of
from conformance.cases import LayerCell, Placement
from conformance.row_cases import Mode
from conformance.suite.cells import PlannedCell, Unsupported
from reference.catalogue import ModelShape
from reference.problem import ProblemError

#: Intermediate size of a real model's layer here: one block of 128, since the whole would not fit a host's memory.
CUT_INTERMEDIATE = 128
MODEL_CAPACITY = 8


@dataclass(frozen=True)
class ExpertSlot:
    """One line of the plan of the experts alone."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    capacity: int
    examples: int
    shards: int = 1
    shared: int = 0
    placement: Placement = "linear"
    short: bool = False  # see PlannedCell


#: Line by line: paths that switch at up to 256 rows; three shards and three slots, no power of two; one slot per token;
#: experts scattered over the shards; a shared expert. All but the second have two shards.
EXPERTS = (
    ExpertSlot(256, 128, 8, 4, 257, 6, shards=2),
    ExpertSlot(512, 256, 6, 3, 33, 4, shards=3, short=True),
    ExpertSlot(256, 128, 4, 1, 33, 3, shards=2),
    ExpertSlot(256, 128, 8, 2, 17, 4, shards=2, placement="round_robin"),
    ExpertSlot(256, 128, 8, 2, 17, 4, shards=2, shared=1, short=True),
)
EXPERTS_SMOKE = (ExpertSlot(256, 128, 8, 4, 17, 3, shards=2, short=True),)
EXPERTS_COMPANION = (ExpertSlot(256, 128, 8, 4, 17, 3, shards=2),)
#: Rows of the longest buffer: 4,096 times as many as are valid, and what a relation adds.
LONGEST_BUFFER = 4 * 4096 + 1024
#: What a GPU gets on top.
EXPERTS_HARDWARE = (
    ExpertSlot(4096, 1024, 32, 8, 1024, 6, shards=4),
    ExpertSlot(7168, 2048, 32, 8, 512, 4, shards=8),
    ExpertSlot(2880, 2880, 16, 4, 512, 4, shards=2),
)


@dataclass(frozen=True)
class LayerSlot:
    """One line of the plan of layers: a property with its number of cases per EP size."""

    check: str
    examples: dict[int, int]
    mode: Mode = "drained"
    placement: Placement = "linear"
    redundant: int = 0  # replicas per rank
    unquantised: bool = True  # paths that dispatch the element type beside a quantised wire get this line, too
    translated: bool = True
    in_turn: bool = False  # one EP size of a path gets this line, the next path another one
    capacity: int = 16

    def examples_at(self, world_size: int) -> int:
        """Cases at an EP size: those of the nearest smaller key, 0 below the least."""
        keys = [w for w in self.examples if w <= world_size]
        return self.examples[max(keys)] if keys else 0


LAYERS = (
    LayerSlot("layer", {1: 2, 2: 3, 4: 2, 8: 2}),
    LayerSlot("layer", {2: 2, 4: 1, 8: 1}, mode="free-running", unquantised=False, in_turn=True),
    LayerSlot("layer", {2: 2, 4: 1, 8: 1}, placement="round_robin", unquantised=False, translated=False),
    LayerSlot("eplb", {2: 1, 4: 1, 8: 1}, redundant=1, unquantised=False, in_turn=True),
    # The same routing at the least capacity and at a large one.
    LayerSlot("layer", {2: 1, 4: 1, 8: 1}, unquantised=False, in_turn=True, capacity=1),
    LayerSlot("layer", {2: 1, 4: 1, 8: 1}, unquantised=False, in_turn=True, capacity=64),
)
LAYERS_SMOKE = (LayerSlot("layer", {2: 2, 4: 1}),)
LAYERS_COMPANION = (
    LayerSlot("layer", {1: 1, 2: 2, 4: 1, 8: 1}, unquantised=False, in_turn=True),
    LayerSlot("layer", {2: 2, 4: 1}, placement="round_robin", unquantised=False, translated=False, in_turn=True),
    LayerSlot("eplb", {2: 1, 4: 1}, redundant=1, unquantised=False, in_turn=True),
)
#: Experts that differ from others in what one rank computes alone: their layers are for explore, or asked for by name.
ALONE_SUFFICES = ("_gelu", "stored_terms")
#: Experts per rank, slots and sizes of a synthetic layer; two blocks of 128 in a row.
_PER_RANK, _TOP_K, _HIDDEN, _INTERMEDIATE = 2, 3, 256, 128


def expert_cells(
    name: str, backend: Backend, *, companion: bool, tier: str, operators: Sequence[str], device: str
) -> Iterator[PlannedCell | Unsupported]:
    """Cells of every experts operator that a backend offers; a refusal where it takes none of the sizes."""
    slots: tuple[ExpertSlot, ...] = {"smoke": EXPERTS_SMOKE}.get(tier, EXPERTS_COMPANION if companion else EXPERTS)
    if device == "cuda" and tier != "smoke" and backend.judged_by != "oracle":
        slots += EXPERTS_HARDWARE
    offered = operators_of(backend)
    found_operators = [
        *(("experts", name) for name in offered.get(Family.EXPERTS.value, ())),
        *(("sort", name) for name in offered.get(Family.SORT.value, ())),
    ]
    for check, operator in found_operators:
        if operators and not companion and operator not in operators:
            continue
        refused: dict[str, str] = {}
        planned = 0
        for slot in slots:
            if check == "sort" and slot.shared:
                continue
            cell = LayerCell(
                check=check,
                backend=name,
                kernel_type=operator,
                world_size=1,
                nodes=1,
                hidden=slot.hidden,
                experts=slot.experts,
                top_k=slot.top_k,
                capacity=slot.capacity,
                dtype="bfloat16",
                mode="drained",
                placement=slot.placement,
                intermediate=slot.intermediate,
                shards=slot.shards,
                shared=slot.shared,
                buffer=min(LONGEST_BUFFER, getattr(backend, "longest_buffer", LONGEST_BUFFER)),
            )
            found = planned_cell(backend, cell, slot.examples, companion, short=slot.short)
            if isinstance(found, PlannedCell):
                planned += 1
                yield found
            else:
                refused.setdefault(found, f"{slot.experts} experts, top-{slot.top_k}, {slot.shards} shards")
        for reason, sizes in refused.items():
            yield Unsupported(name, operator, 1, 1, reason if not planned else f"{sizes}: {reason}")


def layer_cells(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    ep_sizes: Sequence[int],
    paths: Sequence[str],
    models: Sequence[ModelShape],
    only_models: bool,
    named: bool = False,
) -> Iterator[PlannedCell | Unsupported]:
    """Cells of the given paths of a composed backend, and every refusal with its reason.

    ``named``: the user chose the experts.
    """
    slots: tuple[LayerSlot, ...] = {"smoke": LAYERS_SMOKE}.get(tier, LAYERS_COMPANION if companion else LAYERS)
    every = tier == "explore" or only_models
    wide = [size for size in ep_sizes if size > 1]
    for number, path in enumerate(paths):
        if path.endswith(UNQUANTISED) and not has_wire(backend, path.removesuffix(UNQUANTISED)):
            continue  # the path without the suffix is the same
        if not (every or named) and path.removesuffix(UNQUANTISED).endswith(ALONE_SUFFICES):
            reason = "these experts differ in what one rank computes alone: planned in explore, or with --operator"
            yield Unsupported(name, path, max(ep_sizes), 1, reason)
            continue
        able = [size for size in wide if _runs(backend, path, size)]
        for world_size in ep_sizes:
            if path.endswith(UNQUANTISED) and not (every or named) and able and world_size != able[number % len(able)]:
                continue  # the wire is what differs: one EP size beside all those of the quantised path
            both = world_size % 2 == 0 and all(_runs(backend, path, world_size, nodes) for nodes in (1, 2))
            for nodes in (1, 2) if world_size % 2 == 0 else (1,):
                refused: dict[str, None] = {}
                shapes = models if every else ()
                turn = every or named or not able or world_size == able[number % len(able)]
                # How nodes are summed is the dispatches' own matter: of a path's lines in turn, one or two nodes.
                mine = every or named or not both or nodes == 1 + number // max(len(able), 1) % 2
                here = [slot for slot in slots if not slot.in_turn or (turn and mine)]
                for cell, examples in _layers(name, path, world_size, nodes, here, shapes, only_models):
                    found = planned_cell(backend, cell, examples, companion)
                    if isinstance(found, PlannedCell):
                        yield found
                    elif cell.translated:  # without: a line for the dispatches that see global ids
                        refused[found] = None
                for reason in refused:
                    yield Unsupported(name, path, world_size, nodes, reason)


def _layers(
    name: str,
    path: str,
    world_size: int,
    nodes: int,
    slots: Sequence[LayerSlot],
    models: Sequence[ModelShape],
    only_models: bool,
) -> Iterator[tuple[LayerCell, int]]:
    for slot in slots if not only_models else ():
        examples = slot.examples_at(world_size)
        if not examples or (path.endswith(UNQUANTISED) and not slot.unquantised):
            continue
        yield synthetic_layer(name, path, world_size, nodes, slot), examples
    for shape in models:
        if shape.experts % world_size == 0 and world_size > 1:
            yield _model_layer(name, path, world_size, nodes, shape), 2


def synthetic_layer(name: str, path: str, world_size: int, nodes: int, slot: LayerSlot) -> LayerCell:
    """The cell of one line on one path."""
    redundant = slot.redundant * world_size
    return LayerCell(
        check=slot.check,
        backend=name,
        kernel_type=path,
        world_size=world_size,
        nodes=nodes,
        hidden=_HIDDEN,
        experts=(_PER_RANK * world_size if world_size > 1 else 4) + redundant,
        top_k=_TOP_K,
        capacity=slot.capacity,
        dtype="bfloat16",
        mode=slot.mode,
        placement=slot.placement,
        intermediate=_INTERMEDIATE,
        redundant=redundant,
        translated=slot.translated,
    )


def _model_layer(name: str, path: str, world_size: int, nodes: int, shape: ModelShape) -> LayerCell:
    return LayerCell(
        check="layer",
        backend=name,
        kernel_type=path,
        world_size=world_size,
        nodes=nodes,
        hidden=shape.hidden,
        experts=shape.experts,
        top_k=shape.top_k,
        capacity=MODEL_CAPACITY,
        dtype="bfloat16",
        mode="drained",
        model=shape.name,
        intermediate=min(shape.intermediate, CUT_INTERMEDIATE),
    )


def planned_cell(
    backend: Backend, cell: LayerCell, examples: int, companion: bool, *, short: bool = False
) -> PlannedCell | str:
    """The cell as it is planned, or why it is refused."""
    try:
        support = backend.support(cell.problem(), cell.kernel_type)
    except ProblemError as error:
        return str(error)
    if support.standing is Standing.REFUSED:
        return support.reason
    if cell.whole:
        declared = backend.contract(cell.problem(), cell.kernel_type)
        if declared.buffer_rows is None and declared.experts.boundaries:
            return (
                "the experts' path follows from the rows that each rank receives, and the judge takes one path for all "
                "ranks; choose a dispatch with buffers of one size"
            )
    claimed = support.standing is Standing.CLAIMED
    if cell.router:
        claimed &= backend.support(cell.route_problem(), cell.router).standing is Standing.CLAIMED
    return PlannedCell(cell, examples, claimed, companion, short)


def _runs(backend: Backend, path: str, world_size: int, nodes: int = 1) -> bool:
    """Whether a path runs at an EP size on so many nodes."""
    problem = synthetic_layer("", path, world_size, nodes, LAYERS[0]).problem()
    return backend.support(problem, path).standing is not Standing.REFUSED


def has_wire(backend: Backend, path: str) -> bool:
    """Whether a path quantises rows before it dispatches them, as far as a problem that it takes can tell."""
    problem = synthetic_layer("", path, 1, 1, LAYERS[0]).problem()
    if backend.support(problem, path).standing is Standing.REFUSED:
        return True  # its refusals are told
    declared = backend.contract(problem, path)
    return bool(declared.wire)


def is_layer(backend: Backend) -> bool:
    """Whether a backend is composed of a dispatch and experts."""
    return any(SEPARATOR in path for path in backend.kernel_types)
