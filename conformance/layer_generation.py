"""Cases of the experts alone and of whole layers: a fixed ladder for the experts, and Hypothesis strategies.

The ladder of the experts runs the empty call, both sides of every row count at which the backend changes its path, a
buffer up to 4,096 times as long as its valid rows, no token for a shard's first expert, no token for a shard at all,
masked slots, every relation and, where rows may come quantised, a quantised call. Layers draw their routing like any
exchange. What is never drawn: ids beyond the logical experts, masked slots where exchange or experts do not drop them,
and NaN in valid rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import msgspec
from hypothesis import strategies as st

from accelerated.contract import Contract
from accelerated.experts import ExpertContract, LayerContract
from conformance.cases import (
    Explicit,
    LayerCase,
    LayerCell,
    LayerRound,
    Relation,
    Round,
    Rows,
    Values,
    Weighting,
    expand,
)
from conformance.generation import MASKED, applies, rounds
from conformance.layer_rules import drops_masked, relations_of, suits, takes_duplicates, without_repeats
from conformance.recipes import ARCHETYPES, Site
from reference.placement import physical_to_global

#: Valid rows of the long buffer, and how many times as long it is.
_FEW, _TIMES = 4, (2, 32, 4096)
_VALUES: tuple[Values, ...] = ("normal", "normal", "integers", "wide")
#: What tells most first: Hypothesis begins with the first choice of everything.
_WEIGHTINGS: tuple[Weighting, ...] = ("signed", "single", "zeros", "positive", "ones")
#: Rows at which kernels are known to switch, declared or not.
_SWITCHES = (15, 16, 17, 31, 32, 33, 64, 255, 256, 257)
#: More rows than this are slow to judge once for each slot.
_MANY = 64
#: Part of a layer's cases for that placement.
ROUND_ROBIN = "round-robin"
_MAX_SEED = 2**20 - 1
_PALETTE = 5
#: Archetypes of the experts alone: how the slots of a token spread over the shards.
_ARCHETYPES = ("uniform", "hot-expert", "hot-rank", "spread", "avoid-rank")


# ---------------------------------------------------------------------------------------------------- the ladder
def ladder(cell: LayerCell, contract: ExpertContract, *, short: bool = False) -> Iterator[LayerCase]:
    """Cases that every run of the experts alone begins with; ``short`` leaves out what does not depend on the size.

    No two have the same numbers: what is kept from one call to the next shows.
    """
    for number, case in enumerate(_rungs(cell, contract, short=short)):
        (only,) = case.rounds
        yield LayerCase(cell, (msgspec.structs.replace(only, seed=number + 1),))


def _rungs(cell: LayerCell, contract: ExpertContract, *, short: bool) -> Iterator[LayerCase]:
    repeats = contract.takes_duplicates
    for count in _row_ladder(cell, contract):
        yield _one(cell, _routing(cell, count, "uniform", seed=count), weighting="signed")
    counted = contract.takes_num_rows
    for times in _TIMES if counted else ():
        valid = min(_FEW, cell.capacity)
        if valid * times <= cell.rows:
            yield _one(cell, _routing(cell, valid, "uniform", seed=times), tail=valid * (times - 1))
    if counted and contract.takes_empty:
        yield _one(cell, Explicit(((),)), tail=5)
    few = min(9, cell.capacity)
    yield _one(cell, _routing(cell, few, "uniform", seed=5), weighting="single")
    if short:
        return
    for parameter in range(cell.shards):
        yield _one(cell, _routing(cell, few, "hot-rank", parameter=parameter, repeats=repeats), values="integers")
    yield _one(cell, _routing(cell, few, "duplicates" if repeats else "spread", repeats=repeats), weighting="zeros")
    yield _one(cell, _routing(cell, few, "without the first", repeats=repeats), values="integers", counted=counted)
    yield _one(cell, _routing(cell, few, "hot-expert", parameter=cell.logical - 1), values="wide")
    if contract.drops_masked:
        yield _one(cell, _routing(cell, few, MASKED), counted=counted)
    if contract.wire is not None:
        yield _one(cell, _routing(cell, few, "uniform", seed=3), quantised=True, tail=3 if counted else 0)
    for seed, relation in enumerate(relations_of(contract, cell)):
        # A buffer without a tail may take another path.
        spare = cell.rows - few - (relation == "larger buffer")
        tail = min(3, spare) if counted and relation != "scaled weights" else 0
        # Experts that do not say how they round do so from some number of rows on.
        above = [boundary + 1 for boundary in contract.boundaries if boundary < min(_MANY, cell.capacity)]
        rows = max([few, *above]) if relation == "slots apart" else few
        routing = _routing(cell, rows, "uniform", seed=seed)
        yield _one(
            cell,
            routing,
            relation=relation,
            weighting=_weighting_for(relation) or "signed",
            tail=min(tail, cell.rows - rows),
            counted=counted,
        )


def _weighting_for(relation: Relation) -> Weighting | None:
    """Weights without which a relation says nothing."""
    return "zeros" if relation in ("zero routes", "masked routes") else None


def _row_ladder(cell: LayerCell, contract: ExpertContract) -> list[int]:
    sides = [boundary + step for boundary in contract.boundaries for step in (0, 1)]
    least = 0 if contract.takes_empty else 1
    found = {rows for rows in (0, 1, 3, cell.capacity, *_SWITCHES, *sides) if least <= rows <= cell.capacity}
    return sorted(found)


def _one(cell: LayerCell, routing: Explicit, **settings: object) -> LayerCase:
    plain: dict[str, object] = {"values": "normal", "weighting": "positive", "seed": 1}
    return LayerCase(cell, (LayerRound(routing, **(plain | settings)),))  # type: ignore[arg-type]


def _routing(
    cell: LayerCell, count: int, archetype: str, *, seed: int = 0, parameter: int = 0, repeats: bool = True
) -> Explicit:
    """``count`` rows of one archetype, with shards in the place of ranks."""
    random = Random(seed)
    site = Site(cell.logical, cell.top_k, cell.shards, 1, parameter % cell.shards, parameter)
    if archetype == "without the first":
        per_shard = cell.logical // cell.shards
        pool = [e for e in range(cell.logical) if e % per_shard or per_shard == 1]
        rows = tuple(tuple(pool[(t + slot) % len(pool)] for slot in range(cell.top_k)) for t in range(count))
        return _where_they_lie(cell, (rows,) if repeats else without_repeats((rows,), cell.logical))
    palette = [tuple(ARCHETYPES[archetype](random, site)) for _ in range(min(count, _PALETTE))]
    if archetype == MASKED and palette:
        palette[0] = (-1, *palette[0][1:])
    found = (tuple(palette[t % len(palette)] for t in range(count)),)
    return _where_they_lie(cell, found if repeats else without_repeats(found, cell.logical))


def _where_they_lie(cell: LayerCell, rows: Rows) -> Explicit:
    """Rows that name experts by shard, then slot, as ids of experts that are placed round-robin, if they are."""
    if cell.placement == "linear":
        return Explicit(rows)
    table = physical_to_global(cell.logical, cell.shards)
    return Explicit(tuple(tuple(tuple(table[e] if e >= 0 else e for e in row) for row in t) for t in rows))


def layer_ladder(cell: LayerCell, contract: LayerContract) -> Iterator[LayerCase]:
    """Cases that every run of a layer begins with: sizes that change from round to round and, with replicas, moves.

    The first round has one token per rank and the same routing whatever the capacity; drained it is alone.
    """
    counts: tuple[int, ...] = (1, min(7, cell.capacity), min(2, cell.capacity))
    tables: tuple[tuple[int, ...], ...] = ((), (), ())
    if cell.mode == "drained" and not cell.redundant:
        counts, tables = counts[:1], tables[:1]
    if cell.router and len(counts) > 1:
        # Ids that a router has just made are translated, too. To load weights the host waits, so the first two do not.
        tables = ((), (), physical_to_global(cell.experts, cell.world_size))
    if cell.redundant:
        replicas = [cell.logical - 1 - i % cell.logical for i in range(cell.redundant)]
        # Everybody moves; then replicas of one expert lie beside each other.
        moved = (*reversed(range(cell.logical)), *replicas)
        counts = (counts[0], counts[2], counts[1])
        tables = ((), moved, (*([0] * cell.redundant), *range(cell.logical)))
    rounds_ = []
    for number, (count, physical) in enumerate(zip(counts, tables, strict=True)):
        rows = tuple(
            tuple(tuple((rank + 3 * t + number + j) % cell.logical for j in range(cell.top_k)) for t in range(count))
            for rank in range(cell.world_size)
        )
        repeats = takes_duplicates(contract) and not cell.router
        routing = Explicit(rows if repeats else without_repeats(rows, cell.logical))
        # With one term in a token what another replica makes of it has the same bits.
        one_term = bool(cell.against) or (cell.redundant > 0 and number == len(counts) - 1)
        weighting: Weighting = "single" if one_term else "signed"
        rounds_.append(LayerRound(routing, values="normal", seed=number, weighting=weighting, physical=physical))
    yield LayerCase(cell, tuple(rounds_))


# ---------------------------------------------------------------------------------------------------- drawn cases
@st.composite
def expert_rounds(draw: st.DrawFn, cell: LayerCell, contract: ExpertContract) -> LayerRound:
    """One call of the experts alone."""
    sides = {boundary + step for boundary in contract.boundaries for step in (0, 1)}
    edges = sorted(e for e in {1, 2, 7, 8, 9, 31, 33, *sides, cell.capacity} if e <= cell.capacity)
    count = draw(st.sampled_from([e for e in (1, 2, 3, 5, 8, 13) if e <= cell.capacity] + edges))
    repeats = contract.takes_duplicates
    names = _ARCHETYPES + ((MASKED,) if contract.drops_masked else ()) + (("duplicates",) if repeats else ())
    counted = contract.takes_num_rows and draw(st.booleans())
    relation: Relation = draw(st.sampled_from(("", "", *relations_of(contract, cell))))
    counted |= relation == "larger buffer"
    weighting: Weighting = draw(st.sampled_from(_WEIGHTINGS))
    drawn = LayerRound(
        routing=_routing(
            cell,
            count,
            draw(st.sampled_from(names)),
            seed=draw(st.integers(0, _MAX_SEED)),
            parameter=draw(st.integers(0, cell.logical - 1)),
            repeats=repeats,
        ),
        values=draw(st.sampled_from(_VALUES)),
        seed=draw(st.integers(0, _MAX_SEED)),
        weighting=_weighting_for(relation) or weighting,
        tail=draw(st.sampled_from([t for t in (0, 1, 5, 40) if t + count <= cell.rows])) if counted else 0,
        counted=counted,
        quantised=contract.wire is not None and draw(st.booleans()),
        relation=relation,
    )
    return drawn if suits(drawn, contract, cell) else msgspec.structs.replace(drawn, relation="")


@st.composite
def layer_rounds(
    draw: st.DrawFn,
    cell: LayerCell,
    names: Sequence[str],
    physical: tuple[int, ...],
    weighting: Weighting | None,
    *,
    delays: bool,
    repeats: bool,
) -> LayerRound:
    """One forward pass of a layer, routed by logical experts, which lie where ``physical`` says."""
    drawn: Round = draw(rounds(_routed(cell), names, delays=delays))
    rows = expand(_routed(cell), drawn.routing)
    return LayerRound(
        routing=Explicit(rows if repeats else without_repeats(rows, cell.logical)),
        values=draw(st.sampled_from(_VALUES)),
        seed=drawn.seed,
        delays_ms=drawn.delays_ms,
        weighting=draw(st.sampled_from(_WEIGHTINGS)) if weighting is None else weighting,
        physical=physical,
    )


@st.composite
def placements(draw: st.DrawFn, cell: LayerCell) -> tuple[int, ...]:
    """Logical expert of every physical one: each at least once, replicas anywhere, on one rank too."""
    random = Random(draw(st.integers(0, _MAX_SEED)))
    few = draw(st.booleans())  # all replicas of one or two hot experts, or of any
    pool = [int(random.random() * cell.logical) for _ in range(2)] if few else list(range(cell.logical))
    held = [*range(cell.logical), *(pool[int(random.random() * len(pool))] for _ in range(cell.redundant))]
    order = sorted(range(len(held)), key=lambda _: random.random())
    return tuple(held[i] for i in order)


@st.composite
def layer_cases(
    draw: st.DrawFn, cell: LayerCell, contract: ExpertContract | LayerContract, only: str = ""
) -> LayerCase:
    """A case of the cell: one round when drained, two to four when free-running.

    ``only`` names an archetype, or :data:`ROUND_ROBIN` for that placement.
    """
    if isinstance(contract, ExpertContract):
        return LayerCase(cell, (draw(expert_rounds(cell, contract)),))
    exchange = _exchange(contract)
    # A router chooses every expert once and masks none.
    repeats = takes_duplicates(contract) and not cell.router
    unfit = (() if repeats else ("duplicates",)) + ((MASKED,) if cell.router else ())
    names = [a for a in ARCHETYPES if applies(a, cell, exchange) and a not in unfit]
    names = [only] if only not in ("", ROUND_ROBIN) else names
    if cell.redundant:
        # Ranks of logical experts change with every placement.
        names = [a for a in names if a in ("uniform", "hot-expert", "duplicates", MASKED)]
    length = 1 if cell.mode == "drained" and not cell.redundant else draw(st.integers(2, 4))
    free = cell.mode != "drained"
    built = []
    for _ in range(length):
        physical = draw(placed(cell, only)) if cell.translated else ()
        # A part of its own has a weighting of its own: with few cases every choice is the first one.
        alone = only == ROUND_ROBIN or (cell.against and cell.top_k > 1)
        weighting: Weighting | None = "single" if alone else None
        built.append(draw(layer_rounds(cell, names, physical, weighting, delays=free, repeats=repeats)))
    return LayerCase(cell, tuple(built))


def placed(cell: LayerCell, only: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Where the experts lie: replicas anywhere; without replicas linear, round-robin, or any other way."""
    if cell.redundant:
        return placements(cell)
    round_robin = physical_to_global(cell.experts, cell.world_size)
    if only == ROUND_ROBIN:
        return st.just(round_robin)
    return st.one_of(st.just(()), st.just(()), st.just(round_robin), placements(cell))


def _exchange(contract: LayerContract) -> Contract:
    """The exchange's contract, with the fate that masked slots have on the whole path."""
    return replace(contract.exchange, masked_slots=contract.masked_slots)


def _routed(cell: LayerCell) -> LayerCell:
    """The cell as its router sees it: logical experts only."""
    if not cell.redundant:
        return cell
    return msgspec.structs.replace(cell, experts=cell.logical, redundant=0)


def strata_of(cell: LayerCell, contract: ExpertContract | LayerContract, examples: int) -> list[tuple[str, int]]:
    """Parts of a cell's budget: (archetype or "" for the mixture, cases)."""
    if not isinstance(contract, LayerContract) or examples < 3:
        return [("", examples)]
    own = [(MASKED, 1)] if drops_masked(contract) and not cell.router else []
    own += [(ROUND_ROBIN, 1)] if cell.world_size > 1 and cell.translated and not cell.redundant else []
    return [("", examples - len(own)), *own]
