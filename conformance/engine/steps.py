"""Single steps of a reduction: pure functions from a case with explicit rows to smaller ones.

Scope: how a case is changed so that it stays well-formed; whether a changed case still fails, and whether the backend
takes it, is the reducer's business. Nothing here proves that the steps reach every smaller case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import msgspec

from conformance.cases import Case, Cell, Explicit, LayerCase, Round, Rows, SequenceCase, Values, expand, row_step
from conformance.engine import layer_steps, sequence_steps
from conformance.rank.routing import wire_rows
from reference.problem import most_tokens

Row = tuple[int, ...]

#: The wire that others are replaced by: one scale for a row.
PLAIN_WIRE = "fp8_token"
#: Hidden sizes below the planned ones are no simpler.
PLAIN_HIDDEN = 32
#: Kinds of values, plainest first.
_VALUES: tuple[Values, ...] = get_args(Values)


def explicit(case: Case) -> Case:
    """The same input with every recipe spelt out."""
    rounds = tuple(msgspec.structs.replace(r, routing=Explicit(expand(case.cell, r.routing))) for r in case.rounds)
    return msgspec.structs.replace(case, rounds=rounds)


def rows_of(a_round: Round) -> Rows:
    """Rows of a round that is explicit."""
    assert isinstance(a_round.routing, Explicit)
    return a_round.routing.rows


def size(case: Case) -> tuple[Any, ...]:
    """What a reduction lowers, most important first: ranks, rounds, tokens, geometry, settings, placement of tokens."""
    cell, rounds = case.cell, case.rounds
    rows = [rows_of(r) for r in rounds]
    # A replayed round counts as often as it is dispatched, so that a plain dispatch of a copy is no larger.
    played = sequence_steps.played(case) if isinstance(case, SequenceCase) else range(len(rounds))
    return (
        cell.world_size,
        len(played),
        sum(len(tokens) for index in played for tokens in rows[index]),
        cell.nodes,
        cell.top_k,
        cell.experts,
        cell.capacity,
        cell.hidden,
        (cell.mode != "drained", cell.placement != "linear"),
        (len(cell.modes), bool(cell.codec), cell.scale_dim, _wire_cost(cell), sum(bool(r.hidden) for r in rounds)),
        layer_steps.size(case) if isinstance(case, LayerCase) else (),
        sequence_steps.size(case) if isinstance(case, SequenceCase) else (),
        sum(bool(r.delays_ms) for r in rounds),
        sum(_order(case).index(r.values) for r in rounds),
        sum(r.seed for r in rounds),
        sum(rank * len(tokens) for one in rows for rank, tokens in enumerate(one)),
        _total_cost(row for one in rows for tokens in one for row in tokens),
        rows,
    )


def _wire_cost(cell: Cell) -> int:
    return (PLAIN_WIRE, cell.wire).index(cell.wire) + 1 if cell.wire else 0


def _order(case: Case) -> list[Values]:
    """Kinds of values, plainest first. A codec carries small integers as they are and leaves what they show alone."""
    return sorted(_VALUES, key=lambda kind: (case.cell.codec != "" and kind != "edges", _VALUES.index(kind)))


def row_cost(row: Row) -> tuple[int, int]:
    """Duplicates and masks first, then how many ids differ from 0..k-1."""
    return len(row) - len({e for e in row if e >= 0}), sum(e != slot for slot, e in enumerate(row))


def _total_cost(rows: Iterator[Row]) -> tuple[int, int]:
    costs = [row_cost(row) for row in rows]
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


def with_cell(case: Case, **changes: Any) -> Case:
    """Another cell; it is of no model any more."""
    return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, model="", **changes))


def map_tokens(case: Case, change: Callable[[int, int, tuple[Row, ...]], Sequence[Row]]) -> Case:
    """Replace the tokens of every (round, rank)."""
    return with_all_rows(
        case,
        [[tuple(change(i, r, t)) for r, t in enumerate(rows_of(a_round))] for i, a_round in enumerate(case.rounds)],
    )


def map_at(case: Case, place: tuple[int, int], change: Callable[[tuple[Row, ...]], Sequence[Row]]) -> Case:
    """Replace the tokens of one (round, rank)."""
    return map_tokens(case, lambda i, r, tokens: change(tokens) if (i, r) == place else tokens)


def map_rows(case: Case, change: Callable[[Row], Row]) -> Case:
    """Replace every row."""
    return map_tokens(case, lambda i, r, tokens: [change(row) for row in tokens])


def with_all_rows(case: Case, rows: Sequence[Sequence[tuple[Row, ...]]]) -> Case:
    """Replace the rows of every round."""
    changed = [
        msgspec.structs.replace(a_round, routing=Explicit(tuple(one)))
        for a_round, one in zip(case.rounds, rows, strict=True)
    ]
    return msgspec.structs.replace(case, rounds=tuple(changed))


def with_rounds(case: Case, **changes: Any) -> Case:
    """Change settings of every round."""
    return msgspec.structs.replace(case, rounds=tuple(msgspec.structs.replace(r, **changes) for r in case.rounds))


# ---------------------------------------------------------------------------------------------------------- ranks


def narrower(case: Case) -> Iterator[Case]:
    """Fewer ranks: two at once, then half; on one node first. Expert ids are folded onto the ranks that stay."""
    cell = case.cell
    world_size = cell.world_size
    widths = [1] if world_size == 2 else [2, world_size // 2] if world_size > 2 else []
    for width in dict.fromkeys(widths):
        stride = world_size // width
        keeps = (
            range(width),
            range(world_size - width, world_size),
            range(0, width * stride, stride),
            range(stride - 1, width * stride, stride),
        )
        for nodes in sorted({1, cell.nodes}):
            if width % nodes == 0:
                for keep in dict.fromkeys(keeps):
                    yield _folded(case, keep, nodes)


def _folded(case: Case, keep: range, nodes: int) -> Case:
    cell, width = case.cell, len(keep)
    old = cell.experts // cell.world_size
    new = max(old, -(-cell.top_k // width))  # enough experts for every slot
    fold = {-1: -1}
    gone = [rank for rank in range(cell.world_size) if rank not in keep]
    for expert in range(cell.experts):
        rank, slot = divmod(expert, old)
        if rank in keep:
            fold[expert] = keep.index(rank) * new + slot
            continue
        # Where there is room, experts of ranks that go stay apart from those they come to.
        before = sum(other % width == rank % width for other in gone[: gone.index(rank)])
        fold[expert] = rank % width * new + (slot + old * (1 + before)) % new
    rounds = []
    for a_round in case.rounds:
        rows = rows_of(a_round)
        kept = tuple(tuple(tuple(fold[e] for e in row) for row in rows[r]) for r in keep)
        delays = tuple(a_round.delays_ms[r] for r in keep) if a_round.delays_ms else ()
        rounds.append(msgspec.structs.replace(a_round, routing=Explicit(kept), delays_ms=delays))
    if isinstance(case, SequenceCase):
        case = sequence_steps.folded(case, keep)
    return with_cell(
        msgspec.structs.replace(case, rounds=tuple(rounds)), world_size=width, nodes=nodes, experts=width * new
    )


def rank_moves(case: Case) -> Iterator[Case]:
    """Two ranks change places, in all rounds or in one; or the tokens of one rank move to a lower one."""
    every = range(len(case.rounds))
    for low in range(case.cell.world_size):
        for high in range(low + 1, case.cell.world_size):
            for rounds in dict.fromkeys((tuple(every), *((i,) for i in every))):
                yield _swapped(case, low, high, rounds, tokens=True)
                yield _swapped(case, low, high, rounds, tokens=False)
                yield from _moved(case, low, high, rounds)


def _swapped(case: Case, low: int, high: int, rounds: tuple[int, ...], *, tokens: bool) -> Case:
    """Exchange two ranks' experts in every row of the given rounds, and their tokens as well."""
    per_rank = case.cell.experts // case.cell.world_size
    places = {low: high, high: low}

    def other(expert: int) -> int:
        rank, slot = divmod(expert, per_rank)
        return places.get(rank, rank) * per_rank + slot if expert >= 0 else expert

    rows = [list(rows_of(a_round)) for a_round in case.rounds]
    for index in rounds:
        rows[index] = [tuple(tuple(other(e) for e in row) for row in tokens_) for tokens_ in rows[index]]
        if tokens:
            rows[index][low], rows[index][high] = rows[index][high], rows[index][low]
    return with_all_rows(case, rows)


def _moved(case: Case, low: int, high: int, rounds: tuple[int, ...]) -> Iterator[Case]:
    rows = [list(rows_of(a_round)) for a_round in case.rounds]
    for index in rounds:
        rows[index][low], rows[index][high] = rows[index][low] + rows[index][high], ()
        if len(rows[index][low]) > case.cell.most_tokens:
            return
    yield with_all_rows(case, rows)


# ------------------------------------------------------------------------------------------------------- geometry


def plain_settings(case: Case) -> Case:
    """Drained, without delays, small integers, seed 0, linear placement: all at once."""
    plain = with_rounds(linear(case), delays_ms=(), values=_order(case)[0], seed=0, hidden=0)
    return msgspec.structs.replace(plain, cell=msgspec.structs.replace(plain.cell, mode="drained"))


def linear(case: Case) -> Case:
    """The same traffic under linear placement: the ids on the wire become the global ids."""
    if case.cell.placement == "linear":
        return case
    wired = with_all_rows(case, [wire_rows(case.cell, rows_of(a_round)) for a_round in case.rounds])
    return with_cell(wired, placement="linear")


def settings(case: Case) -> Iterator[Case]:
    """One setting of all rounds, then of one round, made plain."""
    if isinstance(case, LayerCase):
        yield from layer_steps.settings(case)
    if isinstance(case, SequenceCase):
        yield from sequence_steps.plainer(case)
    yield linear(case)
    yield msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, mode="drained"))
    yield with_cell(case, nodes=1)
    yield from plainer_calls(case)
    choices: tuple[dict[str, Any], ...] = (
        {"delays_ms": ()},
        {"hidden": 0},
        {"values": "integers"},
        {"values": _order(case)[0]},
        {"seed": 0},
        {"seed": 1},
    )
    for change in choices:
        yield with_rounds(case, **change)
    for index, a_round in enumerate(case.rounds):
        for change in choices:
            one = msgspec.structs.replace(a_round, **change)
            yield msgspec.structs.replace(case, rounds=(*case.rounds[:index], one, *case.rounds[index + 1 :]))


def plainer_calls(case: Case) -> Iterator[Case]:
    """Rows in their element type, without codec, or calls without one of their modes."""
    cell = case.cell
    if cell.modes:
        yield with_cell(case, modes=())
        for mode in cell.modes:
            yield with_cell(case, modes=tuple(other for other in cell.modes if other != mode))
    if cell.codec:
        yield with_cell(case, codec="", scale_dim=0)
    if cell.scale_dim > 1:
        yield with_cell(case, scale_dim=1)
    if cell.wire:
        yield with_cell(case, wire="")
        if cell.wire != PLAIN_WIRE:
            yield with_cell(case, wire=PLAIN_WIRE)


def plain(case: Case) -> Iterator[Case]:
    """Settings and geometry, then either, all at once: one slot, one expert per rank and few elements."""
    yield from _plain_geometry(plain_settings(case))
    yield plain_settings(case)
    yield from _plain_geometry(case)


def _plain_geometry(case: Case) -> Iterator[Case]:
    for slot in range(case.cell.top_k):
        one = only_slot(case, slot)
        for few in (*itertools.islice(fewer_experts(one), 2), one):
            yield with_cell(few, hidden=min(case.cell.hidden, _plain_hidden(case.cell)))


def only_slot(case: Case, slot: int) -> Case:
    """Every row is one slot of it."""
    return with_cell(map_rows(case, lambda row: (row[slot],)), top_k=1)


def fewer_slots(case: Case) -> Iterator[Case]:
    """One slot alone, or all but one."""
    top_k = case.cell.top_k
    if top_k > 1:
        for slot in range(top_k):
            yield only_slot(case, slot)
        for slot in range(top_k):
            yield with_cell(map_rows(case, lambda row, s=slot: (*row[:s], *row[s + 1 :])), top_k=top_k - 1)  # type: ignore[misc]


def fewer_experts(case: Case) -> Iterator[Case]:
    """Fewer experts per rank, fewest first: ids beyond become the rank's last expert, or wrap around."""
    cell = case.cell
    old = cell.experts // cell.world_size
    new = 1
    sizes = []
    while new < old:
        sizes.append(new)
        new *= 2
    for new in dict.fromkeys((*sizes, old - 1)):
        if 0 < new < old and new * cell.world_size >= cell.top_k:
            for wrap in (False, True):
                yield with_cell(
                    map_rows(case, lambda row, n=new, w=wrap: tuple(_shrunk(e, old, n, w) for e in row)),  # type: ignore[misc]
                    experts=new * cell.world_size,
                )


def _shrunk(expert: int, old: int, new: int, wrap: bool) -> int:
    if expert < 0:
        return expert
    rank, slot = divmod(expert, old)
    return rank * new + (slot % new if wrap else min(slot, new - 1))


def _plain_hidden(cell: Cell) -> int:
    """The fewest elements worth trying that the wire and the codec divide evenly."""
    return -(-PLAIN_HIDDEN // row_step(cell)) * row_step(cell)


def fewer_elements(case: Case) -> Iterator[Case]:
    """A shorter row."""
    hidden, least = case.cell.hidden, _plain_hidden(case.cell)
    if hidden > least:
        yield with_cell(case, hidden=least)
        yield with_cell(case, hidden=max(least, hidden // 2))
    if isinstance(case, LayerCase):
        yield from layer_steps.fewer_elements(case)


def lower_capacity(case: Case) -> Iterator[Case]:
    """A smaller operator and no more tokens than it holds, smallest first."""
    capacity = 1
    while capacity < case.cell.capacity:
        most = most_tokens(capacity, case.cell.modes)
        yield with_cell(map_tokens(case, lambda i, r, tokens, c=most: tokens[:c]), capacity=capacity)  # type: ignore[misc]
        capacity *= 2


# ----------------------------------------------------------------------------------------------------------- rows


def single_tokens(case: Case, most: int) -> Iterator[Case]:
    """One token alone, for the first few (round, rank, row) that differ."""
    found: dict[tuple[int, int, Row], None] = {}
    for index, a_round in enumerate(case.rounds):
        for rank, tokens in enumerate(rows_of(a_round)):
            found.update(dict.fromkeys((index, rank, row) for row in tokens))
    for index, rank, row in list(found)[:most]:
        empty = map_tokens(case, lambda i, r, tokens: ())
        yield map_at(empty, (index, rank), lambda _, alone=row: (alone,))  # type: ignore[misc]


def all_alike(case: Case) -> Iterator[Case]:
    """Every token on rank 0 and with the same row; for a sequence this is more than one step apart."""
    rows = [list(rows_of(a_round)) for a_round in case.rounds]
    gathered = [[sum(one, ()), *(() for _ in one[1:])] for one in rows]
    if max((len(one[0]) for one in gathered), default=0) <= case.cell.most_tokens:
        yield from same_rows(with_all_rows(case, gathered))


def same_rows(case: Case) -> Iterator[Case]:
    """All tokens get the same row: a run of ids from some rank's first expert, or a row that occurs."""
    found = dict.fromkeys(row for a_round in case.rounds for tokens in rows_of(a_round) for row in tokens)
    for row in (*_runs(case.cell), *list(found)[:4]):
        yield map_rows(case, lambda _, r=row: r)  # type: ignore[misc]


def _runs(cell: Cell) -> list[Row]:
    per_rank = cell.experts // cell.world_size
    starts = range(0, cell.experts, per_rank)
    return [tuple((start + slot) % cell.experts for slot in range(cell.top_k)) for start in starts]


def plainer_rows(row: Row, cell: Cell) -> Iterator[Row]:
    """Rows to try in the place of ``row``: runs, then another order, then each slot changed."""
    yield from _runs(cell)
    yield tuple(sorted(row))
    lowest = min((e for e in row if e >= 0), default=0)
    if lowest:
        yield tuple(e - lowest if e >= 0 else e for e in row)
    per_rank = cell.experts // cell.world_size
    for slot, expert in enumerate(row):
        near = expert - expert % per_rank if expert >= 0 else 0
        for lower in dict.fromkeys((slot, near, near + slot, *range(min(cell.experts, 8)), expert // 2, expert - 1)):
            if 0 <= lower < cell.experts and lower != expert:
                yield (*row[:slot], lower, *row[slot + 1 :])
