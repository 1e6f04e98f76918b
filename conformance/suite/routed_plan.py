"""Cells of layers whose ids and weights come from a router: paths with one of them, in turn over EP sizes.

Scope: which router, at which size; every pair of the two comes up over as many paths as there are pairs. Experts that
weigh their input take one expert per token, and so the router that chooses one; the experts of gpt-oss get its router.
A cell runs without host sync: a failure that does not need that is reduced to one with. What the plan does not contain:
a router beside replicas, real model shapes and, but for explore and experts asked for by name, paths with ``@bf16``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from accelerated.contract import Standing
from accelerated.experts import UNQUANTISED
from accelerated.interface import Backend
from accelerated.layer import halves_of, split_path
from accelerated.routers import FORMS
from conformance.cases import LayerCell
from conformance.suite.cells import PlannedCell, Unsupported
from conformance.suite.layer_plan import ALONE_SUFFICES, LayerSlot, has_wire, planned_cell, synthetic_layer

#: Qwen3, DeepSeek-V3, gpt-oss, Llama-4.
ROUTED_FORMS = ("softmax_k8", "grouped_g8t4k8", "after_k4", "sigmoid_k1")
#: What every form above takes, over up to 32 ranks.
EXPERTS = 32
#: Ends the names of experts that weigh their input.
STAGE1 = "_stage1"
#: Few tokens: the oracle takes every one of them through k experts in float64.
SLOT = LayerSlot("layer", {1: 1}, mode="free-running", capacity=4)


def form_for(operator: str, turn: int) -> str:
    """Router form of some experts."""
    if operator.endswith(STAGE1):
        return "sigmoid_k1"
    return "after_k4" if "swiglu" in operator else ROUTED_FORMS[turn % len(ROUTED_FORMS)]


def routed(backend: Backend, cell: LayerCell, form: str, turn: int) -> LayerCell | str:
    """The cell with a router of that form, a claimed one if there is one; or why there is none."""
    top_k = FORMS[form].numerics.top_k
    wanted = msgspec.structs.replace(cell, experts=EXPERTS, top_k=top_k)
    offered = [name for name in getattr(backend, "routers", ()) if name.rpartition(".")[2] == form]
    found = {name: backend.support(wanted.route_problem(), name) for name in offered}
    able = [name for name, support in found.items() if support.standing is not Standing.REFUSED]
    if not able:
        reasons = "; ".join(f"{name}: {support.reason}" for name, support in found.items())
        return f"no router of the form {form} over {EXPERTS} experts" + (f" ({reasons})" if reasons else "")
    best = [name for name in able if found[name].standing is Standing.CLAIMED] or able
    return msgspec.structs.replace(wanted, router=best[turn // len(ROUTED_FORMS) % len(best)])


def weighs_input(path: str) -> bool:
    """Whether a path's experts multiply a row by its routing weight before they quantise it."""
    return split_path(path).operator.endswith(STAGE1)


def lends_its_dispatch(backend: Backend) -> bool:
    """Whether a composed backend has the specification's dispatch around experts of another's."""
    halves = halves_of(backend)
    return backend.judged_by != "oracle" and halves[0].judged_by == "oracle"


def routed_cells(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    ep_sizes: Sequence[int],
    paths: Sequence[str],
    named: bool = False,
) -> Iterator[PlannedCell | Unsupported]:
    """A cell of each path, or the refusal at the size whose turn it is; in explore at every size.

    A companion has one of each router, and one kernel type has one cell in smoke.

    Args:
        name: what the registry is asked for.
        backend: a composed one.
        companion: it is not the subject of the run.
        tier: smoke, gate or explore.
        ep_sizes: EP sizes to plan.
        paths: paths to plan.
        named: the user chose the experts.
    """
    every = tier == "explore"
    turn, held = 0, set()
    for path in paths:
        plain, kernel_type = path.removesuffix(UNQUANTISED), split_path(path).kernel_type
        if plain != path and (not (every or named) or not has_wire(backend, plain)):
            continue
        if not (every or named) and plain.endswith(ALONE_SUFFICES):
            continue
        if (companion and turn == len(ROUTED_FORMS)) or (tier == "smoke" and kernel_type in held):
            continue
        found = list(_of_path(name, backend, path, ep_sizes, turn, companion, every=every))
        if any(isinstance(one, PlannedCell) for one in found):
            turn += 1
            held.add(kernel_type)
        yield from found


def _of_path(
    name: str, backend: Backend, path: str, ep_sizes: Sequence[int], turn: int, companion: bool, *, every: bool
) -> Iterator[PlannedCell | Unsupported]:
    """Cells of one path: the first size from its turn on at which it runs, or all of them."""
    wide = [size for size in ep_sizes if size > 1] or list(ep_sizes)
    refused: list[Unsupported] = []
    for step in range(len(wide)):
        # One further after every round of routers: else two or four sizes would always meet the same ones.
        world_size = wide[(turn + turn // len(ROUTED_FORMS) + step) % len(wide)]
        for nodes in (1, 2) if world_size % 2 == 0 else (1,):
            cell = routed(
                backend,
                synthetic_layer(name, path, world_size, nodes, SLOT),
                form_for(split_path(path).operator, turn + step if every else turn),
                turn,
            )
            found = (
                cell if isinstance(cell, str) else planned_cell(backend, cell, SLOT.examples_at(world_size), companion)
            )
            if isinstance(found, PlannedCell):
                yield found
                if not every:
                    return
            else:
                refused.append(Unsupported(name, path, world_size, nodes, found))
    yield from refused if every else refused[:1]
