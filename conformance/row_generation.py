"""Cases of the row operators: a fixed ladder that no cell goes without, and Hypothesis strategies beside it.

The ladder runs every kind of row, the empty call, one row, the capacity, every limit of ``num_rows``, and both sides of
every row count at which the backend changes its path. The drawn cases mix kinds, exponents and positions within a call
and put several calls on one operator. What is never drawn: NaN and infinities where one scale or one sum covers all
rows, for there nothing is promised of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from accelerated.operators import Family, NormContract, QuantContract
from accelerated.routers import RouteContract
from conformance.row_cases import (
    BIASES,
    EPSILONS,
    KINDS,
    LOGIT_KINDS,
    NONFINITE,
    Call,
    Kind,
    Pattern,
    RowCase,
    RowCell,
    Weight,
)
from reference.codecs import Granularity

RowContract = QuantContract | NormContract | RouteContract
#: Rows of a rung of the ladder that is about their contents.
_FEW = 5
#: Kinds of residual rows: what a sum of these with the rows rounds to is worth looking at.
_RESIDUALS: tuple[Kind, ...] = ("normal", "zero", "wide", "ties", "row_scaled", "integers")
_WEIGHTS: tuple[Weight, ...] = ("normal", "twos", "ones")
#: Kinds of logits in one call.
_TOGETHER = 4
#: Logits of which a router may promise no more than that the ids are distinct and in range.
_SPECIAL: tuple[Kind, ...] = ("all_masked", "all_nan", "few_left", *NONFINITE, "masked")
_SCALES = (1.0, 0.125, 0.37, 3.0)
_MAX_SEED = 2**20 - 1


@dataclass(frozen=True)
class _Traits:
    """What the contract says about which cases make sense."""

    kinds: tuple[Kind, ...]
    residual: bool
    num_rows: bool
    static: bool
    boundaries: tuple[int, ...]
    empty: bool
    out: bool = False
    weights: tuple[Weight, ...] = ("ones",)  # plain ones first; the second is what most calls have


def _traits(cell: RowCell, contract: RowContract) -> _Traits:
    if isinstance(contract, QuantContract):
        shared = contract.codec.granularity in (Granularity.TENSOR, Granularity.BLOCK) and not contract.codec.static
        return _Traits(
            kinds=tuple(k for k in KINDS if k not in LOGIT_KINDS and not (shared and k in NONFINITE)),
            residual=False,
            num_rows=contract.takes_num_rows,
            static=contract.codec.static,
            boundaries=(),
            empty=contract.takes_empty,
            out=contract.takes_out,
        )
    if isinstance(contract, RouteContract):
        return _Traits(
            kinds=tuple(k for k in KINDS if k != "every_code"),
            residual=False,
            num_rows=False,
            static=False,
            boundaries=contract.boundaries,
            empty=contract.takes_empty,
            weights=BIASES if contract.takes_bias else ("ones",),
        )
    return _Traits(
        kinds=tuple(k for k in KINDS if k != "every_code" and k not in LOGIT_KINDS),
        residual=contract.residual,
        num_rows=False,
        static=False,
        boundaries=contract.boundaries,
        empty=contract.takes_empty,
        weights=("ones", "twos", "normal"),
    )


def takes(contract: RowContract, case: RowCase) -> bool:
    """Whether the contract says something about every call of a case."""
    traits = _traits(case.cell, contract)
    return all(
        (call.rows > 0 or traits.empty)
        and (call.num_rows < 0 or traits.num_rows)
        and (traits.out or not call.into)
        and call.weight in traits.weights
        and {p.kind for p in call.patterns} <= set(traits.kinds)
        for call in case.calls
    )


# ---------------------------------------------------------------------------------------------------- the ladder
def ladder(cell: RowCell, contract: RowContract, *, short: bool = False) -> Iterator[RowCase]:
    """Cases that every run of the cell begins with, the same in every run; ``short`` leaves out the kinds of rows."""
    traits = _traits(cell, contract)
    if cell.check == "codecs":
        yield from _every_code(cell)
        return
    normal = Pattern("normal", seed=1)
    for rows in _row_ladder(cell, traits):
        yield _single(cell, traits, rows, (normal, Pattern("row_scaled", seed=2)))
    for kind in traits.kinds if not short and cell.family is not Family.ROUTE else ():
        # A row of another kind beside it must not feel it.
        yield _single(cell, traits, min(_FEW, cell.capacity), (Pattern(kind, seed=3), normal))
    if cell.family is Family.ROUTE:
        if not short:
            # Rows are routed one by one: several kinds share a call, ordinary rows between them.
            together = max(min(_TOGETHER, cell.capacity // 2), 1)
            for first in range(0, len(traits.kinds), together):
                mixed = tuple(
                    p for kind in traits.kinds[first : first + together] for p in (Pattern(kind, seed=3), normal)
                )
                yield _single(cell, traits, min(len(mixed), cell.capacity), mixed)
            # The least choices beside the largest, and ties that only the bias breaks.
            tied = (normal, Pattern("zero"), Pattern("ties", seed=3))
            yield from (RowCase(cell, (Call(min(_FEW, cell.capacity), tied, weight=w),)) for w in traits.weights)
        # Every row with nothing, or too little, to choose by in one call, and rows of ties; ordinary ones between them.
        between = tuple(p for kind in (*_SPECIAL, "zero", "ties") for p in (Pattern(kind, seed=3), normal))
        yield _single(cell, traits, min(len(between), cell.capacity), between)
    if cell.family is Family.QUANTISE:
        # Scales at and beside as many powers of two as there are groups.
        for seed in (6, 7, 8):
            yield _single(cell, traits, cell.capacity, (Pattern("powers", seed=seed),))
        # Codes at midpoints, where the least difference between the paths of few and many rows shows.
        yield _single(cell, traits, cell.capacity, (Pattern("ties", seed=9),))
    if traits.num_rows:
        rows = min(cell.capacity, 9)
        for count in sorted({0, 1, rows - 1, rows}):
            call = Call(rows, (normal, Pattern("zero_group", seed=4)), num_rows=count)
            yield RowCase(cell, (call,))
    if traits.out:
        # Dirty buffers: what an earlier call with larger magnitudes wrote must not show.
        exponents = (7, 0, -3)
        large_first = (Call(min(_FEW, cell.capacity), (Pattern("normal", e, seed=7),), into=True) for e in exponents)
        yield RowCase(cell, tuple(large_first))
    if traits.static:
        for scale in _SCALES[1:]:
            yield RowCase(cell, (Call(min(_FEW, cell.capacity), (normal, Pattern("wide", seed=5)), scale=scale),))


def _single(cell: RowCell, traits: _Traits, rows: int, patterns: tuple[Pattern, ...]) -> RowCase:
    residual = (Pattern("normal", seed=6),) if traits.residual else ()
    weight = traits.weights[min(1, len(traits.weights) - 1)]
    return RowCase(cell, (Call(rows, patterns if rows else (), residual=residual if rows else (), weight=weight),))


def _row_ladder(cell: RowCell, traits: _Traits) -> list[int]:
    """Nothing, one row, an odd number, the capacity, and both sides of every boundary.

    Two row counts beyond it, because ranks share the rows: what divides them evenly leaves no tail.
    """
    sides = [b + d for b in traits.boundaries for d in (-1, 0, 1, 2)]
    least = 0 if traits.empty else 1
    return sorted({rows for rows in (0, 1, 3, cell.capacity, *sides) if least <= rows <= cell.capacity})


def _every_code(cell: RowCell) -> Iterator[RowCase]:
    """All 65,536 codes of a 16-bit type, at several scales, in as many calls as the capacity needs."""
    per_call = min(cell.capacity, -(-65536 // cell.hidden))
    starts = range(0, -(-65536 // cell.hidden), per_call)
    for scale in _SCALES:
        calls = (Call(per_call, (Pattern("every_code", position=start),), scale=scale) for start in starts)
        yield RowCase(cell, tuple(calls))


# ---------------------------------------------------------------------------------------------------- drawn cases
def row_counts(cell: RowCell, traits: _Traits) -> st.SearchStrategy[int]:
    """Row counts, mostly few, at and around limits."""
    few = st.sampled_from([r for r in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17) if r <= cell.capacity] or [1])
    edges = {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, cell.capacity - 1, cell.capacity}
    edges |= {b + d for b in traits.boundaries for d in (-1, 0, 1)}
    least = 0 if traits.empty else 1
    edge = st.sampled_from(sorted(e for e in edges if least <= e <= cell.capacity))
    return st.one_of(few, few, few, edge)


@st.composite
def patterns(draw: st.DrawFn, kinds: Sequence[Kind]) -> Pattern:
    """One pattern."""
    return Pattern(
        draw(st.sampled_from(kinds)),
        exponent=draw(st.sampled_from((0, 0, 0, 1, -3, 7, -12, 20))),
        position=draw(st.integers(0, 255)),
        seed=draw(st.integers(0, _MAX_SEED)),
    )


@st.composite
def calls(draw: st.DrawFn, cell: RowCell, traits: _Traits, *, delays: bool) -> Call:
    """One call."""
    rows = draw(row_counts(cell, traits))
    palette = tuple(draw(st.lists(patterns(traits.kinds), min_size=1, max_size=4))) if rows else ()
    residual = (draw(patterns(_RESIDUALS)),) if rows and traits.residual else ()
    norm = cell.family in (Family.NORM, Family.ALLREDUCE_NORM)
    late = draw(st.integers(-cell.world_size, cell.world_size - 1)) if delays and cell.world_size > 1 else -1
    return Call(
        rows,
        palette,
        residual=residual,
        num_rows=draw(st.integers(0, rows)) if traits.num_rows and draw(st.booleans()) else -1,
        scale=draw(st.sampled_from(_SCALES)) if traits.static else 1.0,
        weight=draw(st.sampled_from(_WEIGHTS if norm else traits.weights)) if len(traits.weights) > 1 else "ones",
        epsilon=draw(st.sampled_from(EPSILONS)) if norm else EPSILONS[0],
        into=traits.out and draw(st.booleans()),
        delays_ms=tuple(2 if r == late else 0 for r in range(cell.world_size)) if late >= 0 else (),
    )


@st.composite
def row_cases(draw: st.DrawFn, cell: RowCell, contract: RowContract) -> RowCase:
    """A case of the cell: one call when drained, several on one operator when free-running."""
    traits = _traits(cell, contract)
    if cell.mode == "drained":
        return RowCase(cell, (draw(calls(cell, traits, delays=False)),))
    length = draw(st.integers(3, 8))
    return RowCase(cell, tuple(draw(calls(cell, traits, delays=True)) for _ in range(length)))
