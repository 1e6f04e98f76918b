"""Values of rows, built from a pattern, a row number and a rank alone, in numpy.

Scope: the same numbers in every rank process, in the driver and in a stand-alone script; rounded to the element type
here, on integers, so that no device's cast decides what the input is. What these rows do not cover: data of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from accelerated.operators import NormContract, QuantContract
from accelerated.routers import RouteContract
from conformance.row_cases import BIASES, Call, Pattern, RowCaseError, RowCell
from reference.formats import Format

Array = npt.NDArray[np.float32]
Values = npt.NDArray[Any]

#: Largest exponent of "huge" values, by element type.
_TOP = {"bfloat16": 127, "float16": 15, "float32": 127}
#: Squares of so many as a row holds, summed over ranks, stay finite in float32.
NORM_TOP = 50
#: So many rows of a call differ; a prime, so that a row that is off by a tile or a power of two is another one.
DISTINCT = 251
#: What lies in the rows beyond num_rows, in turn.
_POISON = (math.nan, 1e30)
#: Stands for a rank in the values that ranks share.
_EVERY_RANK = 1 << 18
_SUBNORMAL = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}
_STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}


@dataclass(frozen=True)
class Shape:
    """What values depend on besides the pattern.

    Attributes:
        hidden: N.
        dtype: element type.
        group: columns that share a scale, or a block to scale where there is no quantiser.
        maximum: what a quantiser maps the largest magnitude to.
        midpoints: halfway between neighbouring codes of the quantiser, positive.
        top: exponent of "huge" values.
    """

    hidden: int
    dtype: str
    group: int = 32
    maximum: float = 6.0
    midpoints: tuple[float, ...] = field(default=(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    top: int = NORM_TOP


def shape_of(cell: RowCell, contract: QuantContract | NormContract | RouteContract) -> Shape:
    """What the rows of a cell depend on."""
    if isinstance(contract, RouteContract):
        groups = contract.numerics(1).groups
        return Shape(cell.hidden, cell.dtype, group=max(cell.hidden // groups, 1), top=_TOP[cell.dtype])
    codec = contract.codec
    quantises = isinstance(contract, QuantContract)
    plain = Shape(cell.hidden, cell.dtype, top=_TOP[cell.dtype] if quantises else NORM_TOP)
    if codec is None:
        return plain
    codes = [_decoded(code, codec.payload) for code in range(codec.payload.max_code + 1)]
    middles = tuple((low + high) / 2 for low, high in pairwise(codes) if high <= codec.maximum)
    return replace(plain, group=codec.group or cell.hidden, maximum=codec.maximum, midpoints=middles)


def _decoded(code: int, of: Format) -> float:
    """Value of a positive code."""
    exponent, mantissa = divmod(code, 1 << of.mantissa_bits)
    significand = mantissa + (1 << of.mantissa_bits if exponent else 0)
    return math.ldexp(float(significand), max(exponent, 1) - of.bias - of.mantissa_bits)


def rows_of(call: Call, cell: RowCell, shape: Shape, rank: int, *, residual: bool = False) -> Array:
    """``[min(M, DISTINCT), N]`` float32 values that the element type holds exactly; row i is row ``i % DISTINCT``."""
    patterns = call.residual if residual else call.patterns
    distinct = min(call.rows, DISTINCT)
    taken = [patterns[index % len(patterns)] for index in range(distinct)]
    return _made(taken, range(distinct), shape, rank + (1 << 16 if residual else 0))


def poison(call: Call, rows: Any) -> None:
    """Overwrite the rows that the row count of a call leaves out; ``rows`` is an array or a tensor with all M."""
    if call.num_rows >= 0:
        for offset, value in enumerate(_POISON):
            rows[call.num_rows + offset :: len(_POISON)] = value


def weight_of(call: Call, cell: RowCell) -> Array:
    """``[N]`` float32 norm weights that the element type holds exactly."""
    if call.weight == "normal":
        return round_values(1 + _drawn(call, cell) / 4, cell.dtype)
    return np.full(cell.hidden, 2.0 if call.weight == "twos" else 1.0, dtype=np.float32)


def bias_of(call: Call, cell: RowCell, dtype: str) -> Array:
    """``[E]`` float32 correction biases of a router that ``dtype`` holds exactly.

    Trained ones are a fraction of a score ("small"); beside "large" ones a score is lost; with "negative" ones every
    choice is below zero.

    Raises:
        RowCaseError: the call's weight is none of a bias.
    """
    if call.weight not in BIASES:
        raise RowCaseError(f"weight is {call.weight!r} for a router with a bias; give one of {', '.join(BIASES)}")
    drawn = _drawn(call, cell)
    made = {"zeros": drawn * 0.0, "small": drawn / 16, "large": drawn * 64, "negative": -1 - np.abs(drawn) / 4}
    return round_values(made[call.weight] + 0.0, dtype)


def _drawn(call: Call, cell: RowCell) -> Values:
    return _generator(Pattern("normal", seed=len(call.patterns)), 0, 1 << 20).standard_normal(cell.hidden)


def row_of(pattern: Pattern, index: int, shape: Shape, rank: int) -> Array:
    """One row."""
    row: Array = _made([pattern], [index], shape, rank)[0]
    return row


def _made(patterns: Sequence[Pattern], indices: Sequence[int], shape: Shape, rank: int) -> Array:
    """``[len(patterns), N]`` float32; rounded together, for that costs as much for one row as for many."""
    made = np.empty((len(patterns), shape.hidden), dtype=np.float64)
    for place, (pattern, index) in enumerate(zip(patterns, indices, strict=True)):
        made[place] = _MAKERS[pattern.kind](pattern, index, shape, rank)
    exponents = np.array([[pattern.exponent] for pattern in patterns], dtype=np.int64).reshape(-1, 1)
    kept = np.array([[pattern.kind in _UNSCALED] for pattern in patterns], dtype=bool).reshape(-1, 1)
    with np.errstate(over="ignore"):
        scaled = np.clip(np.ldexp(made, exponents), -_largest(shape), _largest(shape))
    return round_values(np.where(kept | ~np.isfinite(made), made, scaled), shape.dtype)


def round_values(values: npt.NDArray[np.floating], dtype: str) -> Array:
    """Round to float32, then to the element type, to nearest even; kept as float32."""
    with np.errstate(over="ignore", under="ignore"):
        single = np.asarray(values, dtype=np.float64).astype(np.float32)
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    kept: Array = np.where(np.isnan(single), single, rounded)
    return kept


def _largest(shape: Shape) -> float:
    return math.pow(2.0, min(shape.top, _TOP[shape.dtype]) + 0.99)


def _generator(pattern: Pattern, index: int, rank: int) -> np.random.Generator:
    """A stream of its own for every (pattern seed, row, rank)."""
    return np.random.Generator(
        np.random.Philox(key=np.array([pattern.seed + 1, (rank << 40) + index], dtype=np.uint64))
    )


def _normal(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    return _generator(pattern, index, rank).standard_normal(shape.hidden)


def _one_hot(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    row = np.zeros(shape.hidden)
    row[(pattern.position + index + rank) % shape.hidden] = 1.5
    return row


def _integers(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    return _generator(pattern, index, rank).integers(-8, 9, shape.hidden).astype(np.float64)


def _blocks(shape: Shape) -> npt.NDArray[np.int64]:
    """Number of each column's group."""
    return np.arange(shape.hidden) // shape.group


def _block_scaled(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    return np.ldexp(_normal(pattern, index, shape, rank), (_blocks(shape) * 7 + index) % 25 - 12)


def _zero_group(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    blocks = _blocks(shape)
    return np.where(blocks == pattern.position % (int(blocks[-1]) + 1), 0.0, _normal(pattern, index, shape, rank))


def _powers(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    """Powers of two and their neighbours, and another power for each group.

    The largest of a group in three is one of them; that of the others is the maximum times a power of two, or a
    neighbour of it, so that the scale is a power of two or the next number. Which group is which changes with the seed.
    """
    generator = _generator(pattern, index, rank)
    blocks, step = _blocks(shape), _STEP[shape.dtype]
    mantissa = generator.choice([1.0, 1 + step, 1 - step / 2], shape.hidden)
    signs, exponent = generator.choice([-1.0, 1.0], shape.hidden), generator.integers(-9, 1, shape.hidden)
    made = np.ldexp(mantissa * signs, exponent)
    which = (index + blocks + pattern.seed + 1) % 3
    lead = (np.arange(shape.hidden) % shape.group == pattern.position % min(shape.group, shape.hidden)) & (which > 0)
    made = np.where(lead, shape.maximum * np.where(which == 1, 1.0, mantissa) * signs, made)
    scaled: Values = np.ldexp(made, (index * 7 + blocks * 5 + 30) % 61 - 30)
    return scaled


def _ties(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    """Midpoints of the codes, and in each group one element that makes its scale a power of two."""
    column = np.arange(shape.hidden)
    midpoints = np.array(shape.midpoints)[(column + index + pattern.seed) % len(shape.midpoints)]
    signed = np.where((column + index) % 3 == 0, -midpoints, midpoints)
    return np.where(column % shape.group == pattern.position % min(shape.group, shape.hidden), shape.maximum, signed)


def _wide(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    """Magnitudes far apart. Half of the elements cancel over four ranks or more: what the small ones leave in a float32
    sum depends on its order."""
    generator = _generator(pattern, index, rank)
    made: Values = np.ldexp(generator.standard_normal(shape.hidden), generator.integers(-20, 21, shape.hidden))
    shared = _generator(pattern, index, _EVERY_RANK)
    cancels = shared.random(shape.hidden) < 0.5
    large = np.ldexp(shared.uniform(1, 2, shape.hidden), 12 if shape.dtype == "float16" else 20)
    sign = {0: 1.0, 3: -1.0}.get(rank % 4, 0.0)
    return np.where(cancels, sign * large if sign else generator.standard_normal(shape.hidden), made)


def _huge(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    generator = _generator(pattern, index, rank)
    signs = generator.choice([-1.0, 1.0], shape.hidden)
    made: Values = np.ldexp(generator.uniform(0.5, 0.99, shape.hidden) * signs, min(shape.top, _TOP[shape.dtype]) + 1)
    return made


def _subnormal(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    integers = _generator(pattern, index, rank).integers(-127, 128, shape.hidden)
    return integers * _SUBNORMAL[shape.dtype]


def _with(value: float, pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    row = _normal(pattern, index, shape, rank)
    row[pattern.position % shape.hidden] = value
    return row


def _every_code(pattern: Pattern, index: int, shape: Shape, rank: int) -> Values:
    """Every bit pattern of 16 bits in turn, row after row; zero for NaN and infinities."""
    codes = (np.arange(shape.hidden) + shape.hidden * (index + pattern.position)) % (1 << 16)
    if shape.dtype == "float16":
        values = codes.astype(np.uint16).view(np.float16).astype(np.float64)
    else:
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.where(np.isfinite(values), values, 0.0)


#: Kinds of rows that no exponent scales.
_UNSCALED = ("subnormal", "huge", "every_code")
_MAKERS: dict[str, Callable[[Pattern, int, Shape, int], Values]] = {
    "zero": lambda p, i, s, r: np.zeros(s.hidden),
    "one_hot": _one_hot,
    "ones": lambda p, i, s, r: np.full(s.hidden, float(1 + r % 64)),
    "integers": _integers,
    "normal": _normal,
    "row_scaled": lambda p, i, s, r: np.ldexp(_normal(p, i, s, r), i % 25 - 12),
    "block_scaled": _block_scaled,
    "zero_group": _zero_group,
    "powers": _powers,
    "ties": _ties,
    "wide": _wide,
    "huge": _huge,
    "subnormal": _subnormal,
    "nan": lambda p, i, s, r: _with(np.nan, p, i, s, r),
    "infinity": lambda p, i, s, r: _with(-np.inf if p.position % 2 else np.inf, p, i, s, r),
    "every_code": _every_code,
    "masked": lambda p, i, s, r: np.where((np.arange(s.hidden) + i + p.position) % 2, -np.inf, _normal(p, i, s, r)),
    "few_left": lambda p, i, s, r: np.where(np.arange(s.hidden) == (p.position + i) % s.hidden, 1.5, -np.inf),
    "all_masked": lambda p, i, s, r: np.full(s.hidden, -np.inf),
    "all_nan": lambda p, i, s, r: np.full(s.hidden, np.nan),
}
