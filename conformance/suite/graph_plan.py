"""Cells of captured calls: forms of graphs, sizes and budgets.

In the gate every kernel type gets two forms of graph, on a GPU all of them, at EP sizes that take turns; explore
crosses all forms with all EP sizes. A cell whose operator's first call is captured is unclaimed unless the double runs
it: upstream's benchmark and vLLM warm up. Where a device or a contract refuses to capture, the kernel type is
unsupported with the reason. What the plan does not contain: wires, codecs and other ways of calling beside a capture,
except for the handle where the contract asks for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from accelerated.contract import Standing, exchange
from accelerated.interface import Backend
from conformance.cases import GraphCase, GraphCell
from conformance.graph_cases import misfit
from conformance.row_cases import Mode
from conformance.suite.cells import PlannedCell, Unsupported
from reference.problem import ProblemError

CHECK = "graphs"


@dataclass(frozen=True)
class Form:
    """How a graph is made and replayed."""

    length: int = 1
    halves: bool = False
    warm: bool = True
    mode: Mode = "drained"


#: One round cold; an odd number of collectives of each kind; dispatch and combine apart; an even number, cold.
FORMS = (
    Form(warm=False, mode="free-running"),
    Form(length=3),
    Form(halves=True, mode="free-running"),
    Form(length=2, warm=False),
    Form(mode="free-running"),
    Form(halves=True, warm=False),
    Form(length=3, warm=False, mode="free-running"),
)
#: Forms of a kernel type in the gate, of which the first comes one further with each kernel type.
GATE_FORMS = 2
EP_SIZES = {"gate": (2, 4, 8), "explore": (1, 2, 4, 8)}
#: Drawn cases, beside the one that every cell begins with.
EXAMPLES = {"gate": 1, "explore": 8}
#: More of them where collectives are those of a device.
DEVICE_EXAMPLES = 6


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer per rank."""

    hidden: int
    experts_per_rank: int
    top_k: int
    capacity: int


SMALL = Sizes(64, 2, 2, 8)
#: On a GPU, large enough that a replay is still running when the next one is given to the device.
LARGE = Sizes(4096, 8, 4, 64)


def graph_cells(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    kernel_types: Sequence[str],
    topologies: Sequence[tuple[int, int]],
    device: str,
) -> Iterator[PlannedCell | Unsupported]:
    """Cells and refusals of one backend.

    Args:
        name: to ask the registry for.
        backend: that offers the kernel types.
        companion: it is the yardstick of the run; no graphs then.
        tier: smoke (no graphs), gate or explore.
        kernel_types: to plan.
        topologies: (EP size, nodes).
        device: ``"cpu"`` or ``"cuda"``.
    """
    if companion or tier not in EP_SIZES:
        return
    ep_sizes = sorted({size for size, _ in topologies if size in EP_SIZES[tier]})
    for turn, kernel_type in enumerate(kernel_types):
        told: set[str] = set()
        every = tier == "explore"
        count = GATE_FORMS if device == "cpu" and not every else len(FORMS)
        for place, number in enumerate((turn * GATE_FORMS + i) % len(FORMS) for i in range(count)):
            for world_size in ep_sizes if every else ep_sizes[(turn + place) % max(len(ep_sizes), 1) :][:1]:
                nodes = _nodes(backend, name, kernel_type, world_size, topologies)
                # The oracle works in float64 on the host.
                sizes = SMALL if device == "cpu" or backend.judged_by == "oracle" else LARGE
                cell = _cell(name, kernel_type, world_size, nodes, FORMS[number], sizes)
                found = planned_cell(backend, cell, device, tier)
                if isinstance(found, PlannedCell):
                    yield found
                elif found is not None and found not in told:
                    told.add(found)
                    yield Unsupported(name, kernel_type, world_size, nodes, found)


def _nodes(
    backend: Backend, name: str, kernel_type: str, world_size: int, topologies: Sequence[tuple[int, int]]
) -> int:
    """Two nodes where the kernel type then sums in levels, at this EP size: there more is captured."""
    found = sorted(n for size, n in topologies if size == world_size and n <= 2)
    for nodes in reversed(found):
        problem = _cell(name, kernel_type, world_size, nodes, FORMS[0], SMALL).problem()
        if backend.support(problem, kernel_type).standing is not Standing.CLAIMED:
            continue
        if exchange(backend.contract(problem, kernel_type)).node_levels:
            return nodes
    return found[0]


def planned_cell(backend: Backend, cell: GraphCell, device: str, tier: str) -> PlannedCell | str | None:
    """A cell with its budget, why it is refused, or None where the form alone does not suit the contract."""
    try:
        problem = cell.problem()
    except ProblemError as error:
        return str(error)
    support = backend.support(problem, cell.kernel_type)
    if support.standing is Standing.REFUSED:
        return support.reason
    if reason := off_device(backend, device):
        return reason
    contract = exchange(backend.contract(problem, cell.kernel_type))
    if not contract.captures and not cell.modes:
        frozen = msgspec.structs.replace(cell, modes=("handle",))
        if backend.support(frozen.problem(), cell.kernel_type).standing is not Standing.REFUSED:
            promised = exchange(backend.contract(frozen.problem(), cell.kernel_type)).captures
            return planned_cell(backend, frozen, device, tier) if promised else contract.capture_refusal
    if not contract.captures:
        return contract.capture_refusal
    if not cell.warm and ("cold" not in contract.captures or cell.modes):
        return None
    examples = DEVICE_EXAMPLES if device != "cpu" and tier == "gate" else EXAMPLES[tier]
    claimed = support.standing is Standing.CLAIMED and (cell.warm or backend.standin)
    return PlannedCell(cell, examples, claimed)


def refusal(case: GraphCase, backend: Backend, device: str) -> str:
    """Why a recorded case of captured calls cannot run; empty if it can."""
    contract = exchange(backend.contract(case.cell.problem(), case.cell.kernel_type))
    return off_device(backend, device) or misfit(case, contract)


def off_device(backend: Backend, device: str) -> str:
    """Why calls of a backend cannot be captured on a device; empty if they can."""
    devices: Sequence[str] = getattr(backend, "graph_devices", ("cuda",))
    if device in devices:
        return ""
    return f"calls of {backend.name} cannot be captured on {device}; give --device {devices[0]}"


def _cell(name: str, kernel_type: str, world_size: int, nodes: int, form: Form, sizes: Sizes) -> GraphCell:
    return GraphCell(
        check=CHECK,
        backend=name,
        kernel_type=kernel_type,
        world_size=world_size,
        nodes=nodes,
        hidden=sizes.hidden,
        experts=sizes.experts_per_rank * world_size,
        top_k=sizes.top_k,
        capacity=sizes.capacity,
        dtype="bfloat16",
        mode=form.mode,
        length=form.length,
        halves=form.halves,
        warm=form.warm,
    )
