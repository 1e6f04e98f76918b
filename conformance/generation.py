"""Hypothesis strategies: a mixture of routing archetypes over boundary sizes, legal by construction.

Free lists alone almost never fill a rank or heat an expert, so a round first draws its archetype, then its token
counts from the boundaries of the cell, then the rows: a small palette of rows drawn slot by slot, or a recipe above
:data:`EXPLICIT_TOKENS` tokens x :data:`EXPLICIT_SLOTS` slots. Shrinking is not done here but by
:mod:`conformance.engine.reducer`, on the case itself. What is never drawn: ids or counts outside the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from random import Random

from hypothesis import strategies as st

from accelerated.contract import Contract, MaskedSlots
from conformance.cases import MAX_REPLAYED, Case, Cell, Explicit, Recipe, Round, Rows, Values, narrow_sizes
from conformance.rank.routing import wire_rows
from conformance.recipes import ARCHETYPES, Row, Site
from conformance.soak_generation import soak_rounds

#: Above this many (tokens x slots) over all ranks a round is a recipe.
EXPLICIT_SLOTS = 256 * 8
_PALETTE = 6
MASKED = "masked"
_MAX_SEED = 2**20 - 1
_VALUES: tuple[Values, ...] = ("integers", "integers", "normal", "wide", "bits")
#: With a codec: NaN and infinities have no defined code.
_CODED_VALUES: tuple[Values, ...] = ("edges", "edges", "normal", "wide", "integers")


def boundary_counts(capacity: int) -> tuple[int, ...]:
    """Token counts at and around limits: nothing, one, wave and tile edges, and the capacity."""
    inner = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, capacity // 2, capacity - 1}
    # Hypothesis begins every cell with the first choice of everything: let that be a full rank, not an empty one.
    return (capacity, *sorted(e for e in inner if 0 <= e < capacity))


@st.composite
def token_counts(draw: st.DrawFn, world_size: int, capacity: int) -> tuple[int, ...]:
    """Tokens per rank: ragged, all alike, one busy rank, or every other rank idle."""
    edge = st.sampled_from(boundary_counts(capacity))
    pattern = draw(st.sampled_from(("ragged", "alike", "full-and-ragged", "one-busy", "alternate")))
    if pattern == "alike":
        return (draw(edge),) * world_size
    if pattern == "one-busy":
        busy = draw(st.integers(0, world_size - 1))
        rest = draw(st.sampled_from((0, 1)))
        return tuple(capacity if r == busy else rest for r in range(world_size))
    if pattern == "alternate":
        count, parity = draw(edge), draw(st.integers(0, 1))
        return tuple(count if r % 2 == parity else 0 for r in range(world_size))
    counts = [draw(edge) for _ in range(world_size)]
    if pattern == "full-and-ragged":
        counts[draw(st.integers(0, world_size - 1))] = capacity
    return tuple(counts)


@st.composite
def palettes(draw: st.DrawFn, site: Site, archetype: str) -> tuple[Row, ...]:
    """A few distinct rows of an archetype for one source rank."""
    seed = draw(st.integers(0, _MAX_SEED))
    size = draw(st.integers(1, _PALETTE))
    random = Random(seed)
    rows = [tuple(ARCHETYPES[archetype](random, site)) for _ in range(size)]
    if archetype == MASKED:
        # Chance alone might leave every row of a narrow palette whole.
        rows[0] = (-1, *rows[0][1:])
    return tuple(rows)


@st.composite
def explicit_routing(draw: st.DrawFn, cell: Cell, counts: tuple[int, ...], archetype: str, parameter: int) -> Explicit:
    """Rows spelt out: each rank walks through its own palette with a drawn stride."""
    rows: list[tuple[Row, ...]] = []
    for rank, count in enumerate(counts):
        if count == 0:
            rows.append(())
            continue
        site = Site(cell.experts, cell.top_k, cell.world_size, cell.nodes, rank, parameter)
        palette = draw(palettes(site, archetype))
        stride = draw(st.integers(0, len(palette) - 1))
        rows.append(tuple(palette[token * stride % len(palette)] for token in range(count)))
    return Explicit(tuple(rows))


@st.composite
def rounds(
    draw: st.DrawFn,
    cell: Cell,
    names: Sequence[str],
    *,
    delays: bool,
    contract: Contract | None = None,
    capacity: int = 0,
    counts: tuple[int, ...] | None = None,
) -> Round:
    """One round of one of the named archetypes, of what the contract of a dispatch/combine takes.

    The most tokens of a rank are the cell's and token counts are drawn, if they are not given.
    """
    archetype = draw(st.sampled_from(names))
    parameter = draw(st.integers(0, cell.experts - 1))
    counts = draw(token_counts(cell.world_size, capacity or cell.most_tokens)) if counts is None else counts
    if contract is not None and not contract.idle_ranks:
        counts = tuple(max(1, count) for count in counts)
    routing: Explicit | Recipe
    if sum(counts) * cell.top_k > EXPLICIT_SLOTS:
        routing = Recipe(archetype, counts, parameter, draw(st.integers(0, _MAX_SEED)))
    else:
        routing = draw(explicit_routing(cell, counts, archetype, parameter))
    late = draw(st.integers(-cell.world_size, cell.world_size - 1)) if delays else -1
    return Round(
        routing=routing,
        values=draw(st.sampled_from(_CODED_VALUES if cell.codec else _VALUES)),
        seed=draw(st.integers(0, _MAX_SEED)),
        delays_ms=tuple(2 if r == late else 0 for r in range(cell.world_size)) if late >= 0 else (),
        hidden=draw(st.sampled_from(_row_sizes(cell, contract))) if cell.special else 0,
    )


def _row_sizes(cell: Cell, contract: Contract | None) -> tuple[int, ...]:
    """Elements of a round's rows: whole ones (0) half the time, shorter ones where the contract takes them."""
    shorter = narrow_sizes(cell) if contract is not None and contract.narrow_rows else ()
    return (*(0 for _ in shorter), *shorter) or (0,)


def applies(archetype: str, cell: Cell, contract: Contract) -> bool:
    """Whether an archetype makes sense in a cell, and the contract takes it."""
    if archetype == MASKED:
        return contract.masked_slots is MaskedSlots.DROPPED
    if archetype == "one-node":
        return cell.nodes > 1
    return cell.world_size > 1 or archetype in ("uniform", "hot-expert", "duplicates")


@st.composite
def every_expert(draw: st.DrawFn, cell: Cell) -> Case:
    """A case that routes to every global expert once, in a drawn order, in as many rounds as the capacity needs."""
    strides = [s for s in range(1, cell.experts + 1) if gcd(s, cell.experts) == 1]
    start, stride = draw(st.integers(0, cell.experts - 1)), draw(st.sampled_from(strides))
    first = draw(st.integers(0, cell.world_size - 1))
    order = [(start + i * stride) % cell.experts for i in range(cell.experts)]
    # The last row wraps around, so that every row is full.
    tokens = [
        tuple(order[(t + j) % cell.experts] for j in range(cell.top_k)) for t in range(0, cell.experts, cell.top_k)
    ]
    per_round = cell.capacity * cell.world_size
    built = []
    for begin in range(0, len(tokens), per_round):
        some = tokens[begin : begin + per_round]
        rows = _dealt(some, first, cell.world_size)
        if not _crosses(cell, rows):
            rows = _dealt(some, first + 1, cell.world_size)
        built.append(Round(Explicit(rows), "integers", draw(st.integers(0, _MAX_SEED))))
    return Case(cell, tuple(built))


def _dealt(tokens: Sequence[Row], first: int, world_size: int) -> Rows:
    """Tokens dealt to the ranks one by one."""
    return tuple(tuple(tokens[(rank + first) % world_size :: world_size]) for rank in range(world_size))


def _crosses(cell: Cell, rows: Rows) -> bool:
    """Whether any token goes to another rank than its own."""
    per_rank = cell.experts // cell.world_size
    wire = wire_rows(cell, rows)
    return any(e // per_rank != rank for rank, tokens in enumerate(wire) for row in tokens for e in row)


def strata(cell: Cell, contract: Contract, examples: int) -> list[tuple[str, int]]:
    """Parts of a cell's budget: (archetype or "" for the mixture, cases).

    Masked slots are what padding rows look like, and a mixture of ten archetypes may miss one in a small cell; where
    the contract says they are dropped they get an eighth of the budget to themselves.
    """
    if cell.check == "placement" or examples < 2 or not applies(MASKED, cell, contract):
        return [("", examples)]
    masked = max(1, examples // 8)
    return [("", examples - masked), (MASKED, masked)]


@st.composite
def cases(draw: st.DrawFn, cell: Cell, contract: Contract, only: str = "") -> Case:
    """A case of the cell: one round when drained, two to four when free-running (a hundred in a
    soak), and all experts for placement. Cells with a wire, a codec or a mode also vary the length of their rows.

    ``only`` names an archetype that every round is to have.
    """
    if cell.check == "placement":
        return draw(every_expert(cell))
    names = [only] if only else [a for a in ARCHETYPES if applies(a, cell, contract)]
    if cell.mode == "drained":
        return Case(cell, (draw(rounds(cell, names, delays=False, contract=contract)),))
    if cell.check == "soak":
        values = _CODED_VALUES if cell.codec else _VALUES
        sizes = _row_sizes(cell, contract) if cell.special else (0,)
        return Case(cell, draw(soak_rounds(cell, names, contract, values, sizes)))
    length = draw(st.integers(2, 4))
    length = min(length, MAX_REPLAYED) if "handle" in cell.modes else length
    return Case(cell, tuple(draw(rounds(cell, names, delays=True, contract=contract)) for _ in range(length)))
