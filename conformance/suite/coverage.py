"""Input classes that a case hits, in the driver, from the routing alone; a cell without the needed ones is MISTRUSTED.

What a hit class does not prove: that the backend took a different path because of it.
"""

from __future__ import annotations

from accelerated.mori_ep.calls import BLOCKWISE_TYPES, fast_rows
from conformance.cases import Case, Cell, LayerCell, Recipe, SequenceCase, SequenceCell, expand, routing_counts
from conformance.rank.routing import wire_rows
from conformance.sequence_cases import Poison, kind_of
from reference.catalogue import VLLM_BACKENDS

#: Ways in which a blockwise combine adds up, as its contract tells them apart.
COMBINES = ("fast", "generic")


def classes(case: Case) -> tuple[str, ...]:
    """Names of the classes that any round of the case hits."""
    hit: set[str] = set()
    if isinstance(case, SequenceCase):
        hit |= {f"step {kind_of(step)}" for step in case.sequence}
        hit |= {f"poison {step.what}" for step in case.sequence if isinstance(step, Poison)}
    cell = case.cell
    per_rank = cell.experts // cell.world_size
    for a_round in case.rounds:
        counts = routing_counts(a_round.routing)
        if 0 in counts:
            hit.add("rank without tokens")
        if cell.most_tokens in counts:
            hit.add("rank at capacity")
        if not any(counts):
            hit.add("nothing at all")
        if isinstance(a_round.routing, Recipe):
            hit.add("recipe")
        reached = set()
        # Under round-robin placement the rank follows from the id on the wire.
        for source, rows in enumerate(wire_rows(cell, expand(cell, a_round.routing))):
            for row in set(rows):
                owners = {e // per_rank for e in row if e >= 0}
                reached |= owners
                if owners - {source}:
                    hit.add("row crosses ranks")
                if -1 in row:
                    hit.add("masked slot")
                if not owners:
                    hit.add("token to nowhere")
                if len(set(row)) < len(row) and -1 not in row:
                    hit.add("duplicate expert")
        if any(counts) and len(reached) < cell.world_size:
            hit.add("rank receives nothing")
        if a_round.delays_ms:
            hit.add("delayed rank")
        if a_round.hidden:
            hit.add("narrow rows")
        if a_round.values == "edges":
            hit.add("values edges")
        if combine_of(cell, a_round.hidden or cell.hidden) == "fast":
            hit.add("fast combine")
    return tuple(sorted(hit))


def combine_of(cell: Cell, hidden: int) -> str:
    """How combine adds up rows of ``hidden`` elements, one of :data:`COMBINES`; "" without a blockwise codec."""
    # vLLM's names mean IntraNode on one node, and other kernel types of several have no blockwise codecs.
    kernel_type = "IntraNode" if cell.kernel_type in VLLM_BACKENDS else cell.kernel_type
    if isinstance(cell, LayerCell) or kernel_type not in BLOCKWISE_TYPES.get(cell.codec, ()):
        return ""
    return "fast" if hidden in fast_rows(cell.problem(), kernel_type) else "generic"


def required(world_size: int, *, masked: bool, coded: bool = False, fast: bool = False) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing.

    Args:
        world_size: of the cell.
        masked: part of its budget is for masked slots.
        coded: combine carries rows in a codec, or is asked to.
        fast: combine adds up whole rows faster than others.
    """
    crossing = {"row crosses ranks"} if world_size > 1 else set()
    named = {"masked slot": masked, "values edges": coded, "fast combine": fast}
    return frozenset(crossing | {name for name, wanted in named.items() if wanted})


def required_steps(cell: SequenceCell) -> frozenset[str]:
    """Steps without which a cell of sequences is nothing but rounds: a look at an earlier result, poison, a replay."""
    replays = {"step replay"} if "handle" in cell.modes else set()
    return frozenset({"step check", "step poison"} | replays)
