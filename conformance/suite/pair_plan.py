"""Cells of layers that are compared with the same experts behind another exchange.

Scope: every quantised or plain path of a backend under test gets one, with several slots or with a single one in turn,
at one EP size that changes from path to path; in explore, and where the experts were named, both at all. The other side
is another composed backend of the run with the same experts, else ``allgather`` with them, else ``replicated``, else
another kernel type of the same dispatch: the first whose outputs have to be the same (:mod:`conformance.layer_pairs`).
A path without one is listed as unsupported, with the reason. What the plan does not contain: ``@bf16`` paths beside
their quantised ones, placements by global ids, replicas, routers, real model shapes and free-running rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from accelerated.allgather import AllGatherBackend
from accelerated.experts import UNQUANTISED
from accelerated.interface import Backend
from accelerated.layer import JOIN, LayerBackend, split_path
from accelerated.replicated import ReplicatedBackend
from conformance.cases import LayerCell
from conformance.layer_pairs import misfit
from conformance.suite.cells import PlannedCell, Unsupported
from conformance.suite.layer_plan import ALONE_SUFFICES, LayerSlot, planned_cell, synthetic_layer

#: Drawn cases of a cell; the ladder comes on top.
SLOT = LayerSlot("layer", {1: 1})
#: Slots of a token: with several, those of every synthetic layer, one weight of a token is not zero.
SLOTS = 3
TOP_K = (SLOTS, 1)
#: How a reason begins that two layers have and neither has alone.
APART = "not compared with another exchange: "
#: Dispatches that every build of torch has.
NAIVE = (AllGatherBackend, ReplicatedBackend)


def pair_cells(
    name: str,
    backend: Backend,
    others: Sequence[tuple[str, Backend]],
    *,
    ep_sizes: Sequence[int],
    paths: Sequence[str],
    every: bool,
    named: bool,
) -> Iterator[PlannedCell | Unsupported]:
    """Cells of the given paths, and why a path has none.

    Args:
        name: what the registry calls the backend.
        backend: under test, composed.
        others: the run's other backends under test, by name.
        ep_sizes: of the run.
        paths: of the backend.
        every: at every EP size, also the experts that differ in what one rank computes alone.
        named: the user chose the experts.
    """
    # One step more at every kernel type: their numbers of operators and of EP sizes may have a common divisor.
    kernel_types = list(dict.fromkeys(split_path(path).kernel_type for path in paths))
    turns = dict.fromkeys(kernel_types, 0)
    for path in paths:
        if path.endswith(UNQUANTISED) or (not (every or named) and path.endswith(ALONE_SUFFICES)):
            continue
        kernel_type = split_path(path).kernel_type
        turn = kernel_types.index(kernel_type) + turns[kernel_type]
        told: set[str] = set()
        for top_k in TOP_K if every or named else (TOP_K[turn % len(TOP_K)],):
            found = list(_of_path(name, backend, others, ep_sizes, path, top_k))
            able = [one for one in found if isinstance(one, PlannedCell)]
            refused = [one for one in found if isinstance(one, Unsupported) and one.reason not in told]
            # What the path itself cannot do at the plan's number of slots is told there.
            told |= {one.reason for one in refused} if top_k == SLOTS else set()
            refused = [one for one in refused if top_k != SLOTS or one.reason.startswith(APART)]
            if every or named:
                yield from able
                yield from refused
            elif able:
                yield able[turn % len(able)]
            else:
                yield from refused[:1]
        turns[kernel_type] += 1


def _of_path(
    name: str,
    backend: Backend,
    others: Sequence[tuple[str, Backend]],
    ep_sizes: Sequence[int],
    path: str,
    top_k: int,
) -> Iterator[PlannedCell | Unsupported]:
    """The cell or the refusal at every EP size above 1, or at 1 where there is no other."""
    for world_size in [size for size in ep_sizes if size > 1] or ep_sizes:
        for nodes in (1, 2) if world_size % 2 == 0 else (1,):
            plain = msgspec.structs.replace(synthetic_layer(name, path, world_size, nodes, SLOT), top_k=top_k)
            found = planned_cell(backend, plain, SLOT.examples_at(world_size), companion=False)
            if isinstance(found, PlannedCell):
                cell = paired(plain, backend, others)
                found = f"{APART}{cell}" if isinstance(cell, str) else replace(found, cell=cell)
            yield found if isinstance(found, PlannedCell) else Unsupported(name, path, world_size, nodes, found)


def paired(cell: LayerCell, backend: Backend, others: Sequence[tuple[str, Backend]]) -> LayerCell | str:
    """The cell with the first exchange beside it whose outputs have to be the same, or why the first one's need not."""
    reasons: list[str] = []
    for against, other in _candidates(cell.backend, backend, others):
        for kernel_type in dict.fromkeys(split_path(path).kernel_type for path in other.kernel_types):
            if against == cell.backend and kernel_type == split_path(cell.kernel_type).kernel_type:
                continue
            found = msgspec.structs.replace(cell, against=against, against_type=kernel_type)
            reason = misfit(found, backend, other)
            if not reason:
                return found
            reasons.append(f"{against}, {kernel_type}: {reason}")
    return reasons[0] if reasons else "there is no other exchange"


def _candidates(name: str, backend: Backend, others: Sequence[tuple[str, Backend]]) -> Iterator[tuple[str, Backend]]:
    """Composed backends with the same experts, the ones under test first."""
    experts: Backend = backend.experts  # type: ignore[attr-defined]
    for other_name, other in others:
        half = getattr(other, "experts", None)
        if other_name != name and half is not None and half.name == experts.name:
            yield other_name, other
    experts_name = name.partition(JOIN)[2] or experts.name
    for make in NAIVE:
        composed: Backend = LayerBackend(make(), experts)  # type: ignore[assignment]
        if composed.name != backend.name:
            yield f"{make.name}{JOIN}{experts_name}", composed
    yield name, backend
