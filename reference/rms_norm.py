"""Residual add + RMSNorm of rows that are summed over ranks: the arithmetic, and the interval of correct results.

Semantics (AITER e4048607 csrc/include/custom_all_reduce.cuh, csrc/kernels/rmsnorm_quant_kernels.cu,
csrc/include/opus/rmsnorm_opus_kernel.hpp, aiter/ops/triton/_triton_kernels/normalization/; vLLM 0.33.0)::

    s = sum over ranks in float32, rounded to the element type        (round_reduced)
    z = float32(s) + float32(residual);  residual out = round(z)
    x = z or residual out                                             (norm_input)
    r = rsqrt(sum(x * x) / N + epsilon)
    y = (x * r) * w, (x * w) * r or round(x * r) * w, with w or 1 + w (product, gemma);  output = round(y)

Bounds: every step rounds, and rounding is monotone, so an interval's ends go through the same steps as the value. Only
three steps widen it. The sum of squares is taken in any order, with or without fused multiply-add: at most N factors
(1 + d), |d| <= 2**-24, per term (``square_additions`` + 1 where that is declared), hence gamma(N) of a sum of positive
terms (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1). The division by N and the reciprocal root may
each be off by 2 units in the last place: AMD V_RCP_F32 and V_RSQ_F32 are within 1 (MI300 ISA reference), CUDA's rsqrtf
and the full-range division that Triton emits within 2 (CUDA C++ Programming Guide; PTX ISA, div.full.f32).
What an accepted result does not prove: anything about communication, or that a kernel follows the declared path where
two paths are a rounding apart. Not covered: rows with NaN, infinities or sums beyond the format (:func:`finite_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.codecs import Codec, ZeroScale
from reference.formats import FLOAT32, Ties
from reference.intervals import FLOAT32_NORMAL, Interval
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, WeightProduct
from reference.quantisation import accepted_scales, accepted_values
from reference.rounding import decode, encode, format_of, round_to, round_to_format
from reference.scales import amax
from reference.sums import add_up, gamma, mean_square, unit_roundoff

#: Units in the last place by which a division or a reciprocal root may be off.
HARDWARE_ULPS = 2.0


@dataclass
class Normalised:
    """What the arithmetic gives.

    Attributes:
        unrounded: ``[M, N]`` float32, the output before its store.
        output: ``[M, N]`` in the element type.
        residual: ``[M, N]`` in the element type: the sum that goes on.
    """

    unrounded: torch.Tensor
    output: torch.Tensor
    residual: torch.Tensor


@dataclass
class Expected:
    """Acceptable results, each ``[M, N]``.

    Attributes:
        residual: of residual out, or None without a residual.
        output: of the output in the element type.
        unrounded: of the float32 output before its store, which a fused quantiser may see.
    """

    residual: Interval | None
    output: Interval
    unrounded: Interval


@dataclass
class ExpectedQuantised:
    """Acceptable quantised output.

    Attributes:
        scales: shaped as :func:`reference.scales.amax` shapes them.
        values: ``[M, N]``, decoded codes, given the backend's own scales.
    """

    scales: Interval
    values: Interval


def store(value: torch.Tensor, dtype: torch.dtype, ties: Ties) -> torch.Tensor:
    """``value`` (float32) rounded to the element type, float32.

    Raises:
        ValueError: ``value`` is not float32, or no such element type is modelled.
    """
    if ties is Ties.EVEN or dtype == torch.float32:
        return round_to(value, dtype)
    return round_to_format(value, format_of(dtype), ties=ties).float()


def residual_ties(numerics: NormNumerics) -> Ties:
    """How residual out is rounded."""
    return numerics.residual_store or numerics.store


def ordered_sum(terms: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Sum of ``terms [W, ...]`` by float32 additions from ``first`` on, ascending and around."""
    ranks = [(first + i) % terms.shape[0] for i in range(terms.shape[0])]
    total = terms[ranks[0]].float()
    for rank in ranks[1:]:
        total = total + terms[rank].float()
    return total


def pairwise_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, kept as 1, in float32: the upper half onto the lower half until one is left.

    The order depends on the width only, so the result does not depend on the device or on the other rows. A square goes
    through ``ceil(log2(N))`` additions. Compiled, it is the compiler's own sum, in any order: TorchInductor
    2.11 made wrong results of these slices on CUDA once the width had become dynamic.
    """
    if torch.compiler.is_compiling():
        return value.sum(-1, keepdim=True)
    while value.shape[-1] > 1:
        half = value.shape[-1] // 2
        folded = value[..., :half] + value[..., half : 2 * half]
        value = torch.cat([folded, value[..., 2 * half :]], -1) if value.shape[-1] % 2 else folded
    return value


def normalise(
    total: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
) -> Normalised:
    """Residual add and RMSNorm of rows summed over ranks. No host sync; ``torch.compile`` takes it whole.

    Where the numerics leave a choice open: the unrounded sum, and the norm before the weight.

    Args:
        total: ``[M, N]`` float32, not yet rounded; M may be 0.
        residual: ``[M, N]`` or None, which adds nothing.
        weight: ``[N]``.
        epsilon: added to the mean square.
        numerics: rounding points.
        dtype: element type.

    Raises:
        ValueError: shapes that do not fit, or an epsilon that is no positive normal float32.
    """
    check(total.shape, residual, weight, epsilon)
    if numerics.round_reduced:
        total = store(total, dtype, numerics.store)
    if residual is not None:
        total = total + residual.float()
    rounded = store(total, dtype, residual_ties(numerics))
    x = rounded if numerics.norm_input is NormInput.ROUNDED else total
    scale = weight.float() + 1.0 if numerics.gemma else weight.float()
    # Correctly rounded operations, where nothing is compiled: the same on every device, unlike a reciprocal root. So is
    # a division by a tensor, where CUDA multiplies by the reciprocal of a number.
    total_squares = pairwise_sum(x * x)
    mean = total_squares / torch.full_like(total_squares, x.shape[1])
    root = 1.0 / torch.sqrt(mean + epsilon)
    if numerics.product is WeightProduct.WEIGHT_FIRST:
        y = (x * scale) * root
    elif numerics.product is WeightProduct.ROUNDED_NORM:
        y = store(x * root, dtype, numerics.store) * scale
    else:
        y = (x * root) * scale
    return Normalised(y, store(y, dtype, numerics.store).to(dtype), rounded.to(dtype))


def check(shape: torch.Size, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> None:
    """Refuse arguments that do not belong together.

    Raises:
        ValueError: names the argument, its shape and the right one; or the epsilon and its limit.
    """
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"rows have shape {list(shape)}; give [M, N] with N of at least 1")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual has shape {list(residual.shape)}; give {list(shape)}, as the rows have")
    if list(weight.shape) != [shape[1]]:
        raise ValueError(f"weight has shape {list(weight.shape)}; give [{shape[1]}]")
    if not FLOAT32_NORMAL <= epsilon <= FLOAT32.max:
        raise ValueError(f"epsilon is {epsilon}; give at least 2**-126, the smallest normal float32")


def finite_rows(terms: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``[M]`` bool: rows of ``terms [W, M, N]`` with a residual whose sums are finite in every order.

    The others (NaN, infinities, overflow) are not bounded here; they must not change any other row.
    """
    magnitude = terms.double().abs().sum(0)
    if residual is not None:
        magnitude = magnitude + residual.double().abs()
    return (magnitude <= format_of(dtype).max).all(1)


def reduced(terms: torch.Tensor, numerics: NormNumerics, dtype: torch.dtype) -> Interval:
    """Acceptable sums over ranks of ``terms [W, M, N]``, rounded to the element type if ``round_reduced``.

    One result where the order is declared; the hull of all rotations; for any order gamma (:mod:`reference.sums`).
    """
    total = add_up(Interval.exact(terms), order=numerics.sum_order, may_flush=numerics.may_flush)
    return _stored(total, dtype, numerics.store) if numerics.round_reduced else total


def expected(
    terms: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
) -> Expected:
    """Acceptable results of the sum over ranks + residual add + RMSNorm.

    Args:
        terms: ``[W, M, N]``, the rows of every rank; ``[1, M, N]`` for a local norm.
        residual: ``[M, N]`` or None, which adds nothing.
        weight: ``[N]``.
        epsilon: added to the mean square, as float32.
        numerics: declared rounding points.
        dtype: element type of the results.

    Raises:
        ValueError: as :func:`normalise` does.
    """
    check(terms.shape[1:], residual, weight, epsilon)
    total = reduced(terms, numerics, dtype)
    if residual is not None:
        addends = _read(total, numerics), _read(Interval.exact(residual), numerics)
        total = (addends[0] + addends[1]).round_float32(may_flush=numerics.may_flush)
    stored = _stored(total, dtype, residual_ties(numerics))
    output, unrounded = _norm(total, stored, weight, epsilon, numerics, dtype)
    return Expected(None if residual is None else stored, output, unrounded)


def expected_given_residual(
    residual_out: torch.Tensor, weight: torch.Tensor, epsilon: float, numerics: NormNumerics, dtype: torch.dtype
) -> Expected:
    """Acceptable norms of the residual that a backend returned, whatever it should have returned.

    Where the unrounded sum is normalised, it lies anywhere in what rounds to ``residual_out``: half a unit in the last
    place to either side, or one away from zero where stores truncate.
    """
    check(residual_out.shape, None, weight, epsilon)
    stored = Interval.exact(residual_out)
    total = stored
    if numerics.norm_input is not NormInput.ROUNDED and dtype != torch.float32:
        total = Interval(stored.value, *_rounds_to(stored.value, dtype, residual_ties(numerics)))
    output, unrounded = _norm(total, stored, weight, epsilon, numerics, dtype)
    return Expected(stored, output, unrounded)


def quantised_acceptance(
    expected: Expected, codec: Codec, numerics: NormNumerics, scales: torch.Tensor
) -> ExpectedQuantised:
    """Acceptable quantised outputs of a norm with a fused quantiser.

    Scales follow from the least and the greatest possible largest magnitude of each group, for every scale rule is
    monotone; payloads from both ends of the output, divided by the scales that the backend itself chose.

    Args:
        expected: of the norm.
        codec: the quantiser's numerics.
        numerics: say whether it sees the output before or after the store.
        scales: the backend's, float64, in logical layout.
    """
    seen = expected.output if numerics.quantised_from is QuantisedFrom.ROUNDED else expected.unrounded
    magnitude = seen.abs()
    value, least, most = (accepted_scales(end, codec) for end in (magnitude.value, magnitude.lower, magnitude.upper))
    lower, upper = torch.minimum(least.lower, most.lower), torch.maximum(least.upper, most.upper)
    if codec.zero_scale is ZeroScale.ONE:
        # The exception from monotone: zero has scale one, and what is just above zero a scale just above zero.
        ends = amax(magnitude.lower, codec), amax(magnitude.upper, codec)
        lower = torch.where((ends[0] == 0) & (ends[1] > 0), 0.0, lower)
    given = [accepted_values(end, scales, codec) for end in (seen.value, seen.lower, seen.upper)]
    values = Interval(given[0].value, given[1].lower, given[2].upper)
    return ExpectedQuantised(Interval(value.value.clamp(lower, upper), lower, upper), values)


def _norm(
    total: Interval,
    stored: Interval,
    weight: torch.Tensor,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
) -> tuple[Interval, Interval]:
    """Output, stored and not, of the sum ``total``, which is ``stored`` as residual out."""
    flush = numerics.may_flush
    x = stored if numerics.norm_input is NormInput.ROUNDED else total
    declared = x.value
    if numerics.norm_input is NormInput.EITHER:
        # By element, too: AITER's kernel for wide rows takes the squares of the unrounded sum, but what its registers
        # do not hold it reloads from residual out for the product.
        x = x.hull(stored)
    x = _read(x, numerics)
    offset = torch.tensor(epsilon, dtype=torch.float32).item()
    root = (_mean_square(x, numerics) + offset).round_float32(may_flush=flush).rsqrt(ulps=HARDWARE_ULPS)
    scale = weight.float() + 1.0 if numerics.gemma else weight.float()
    w = _read(Interval.exact(scale), numerics)
    norm = (x * root).round_float32(may_flush=flush)
    exact = declared * torch.rsqrt(declared.square().mean(1, keepdim=True) + offset)
    if numerics.product is WeightProduct.ROUNDED_NORM:
        norm, exact = _stored(norm, dtype, numerics.store), _round(exact, dtype, numerics)
    results = [(norm * w).round_float32(may_flush=flush)]
    if numerics.product in (WeightProduct.WEIGHT_FIRST, WeightProduct.EITHER):
        results.append(((x * w).round_float32(may_flush=flush) * root).round_float32(may_flush=flush))
    if numerics.product is WeightProduct.WEIGHT_FIRST:
        del results[0]
    unrounded = _around(exact * scale.double(), results[0].hull(results[-1]))
    output = _stored(unrounded, dtype, numerics.store)
    return _around(_round(unrounded.value, dtype, numerics), output), unrounded


def _mean_square(x: Interval, numerics: NormNumerics) -> Interval:
    """Mean of the squares of rows, ``[M, 1]``; the division is off by :data:`HARDWARE_ULPS`."""
    n, flush = x.shape[1], numerics.may_flush
    if not numerics.square_additions:
        return mean_square(x, may_flush=flush).within_ulps(HARDWARE_ULPS)
    # One factor (1 + d) for the square, one for each addition; then what float64 errs by.
    relative = gamma(min(numerics.square_additions, n) + 1, unit_roundoff(FLOAT32)).item() + n * 2.0**-52
    # A square may underflow by 2**-150; where subnormals are flushed, it and every partial sum by 2**-126.
    absolute = 2 * n * FLOAT32_NORMAL if flush else n * 2.0**-150
    total = x.square().apply(lambda end: end.sum(1, keepdim=True)).widened(relative, absolute)
    total = Interval(total.value, total.lower.clamp(min=0), total.upper).round_float32(may_flush=flush)
    return (total / n).within_ulps(HARDWARE_ULPS)


def _round(value: torch.Tensor, dtype: torch.dtype, numerics: NormNumerics) -> torch.Tensor:
    return round_to_format(value, format_of(dtype), ties=numerics.store)


def _stored(value: Interval, dtype: torch.dtype, ties: Ties) -> Interval:
    """Float32 results, of which the subnormal ones already count as flushed, rounded to the element type."""
    return value.store(format_of(dtype), ties=ties)


def _read(value: Interval, numerics: NormNumerics) -> Interval:
    """Operands that, where subnormal, may be taken for zero."""
    return value.flushed() if numerics.may_flush else value


def _around(value: torch.Tensor, interval: Interval) -> Interval:
    """The interval with ``value``, or the nearest end to it, as its value."""
    return Interval(value.clamp(interval.lower, interval.upper), interval.lower, interval.upper)


def _rounds_to(value: torch.Tensor, dtype: torch.dtype, ties: Ties) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest number that rounds to ``value`` (of the element type)."""
    to = format_of(dtype)
    magnitude = value.abs()
    code = encode(magnitude, to)
    below = decode((code - 1).clamp(min=0), to)
    # One above the largest number would be decoded as infinity.
    above = torch.where(code >= to.max_code, 2 * magnitude - below, decode((code + 1).clamp(max=to.max_code), to))
    truncated = ties is Ties.TRUNCATE
    inner, outer = (magnitude, above) if truncated else ((magnitude + below) / 2, (magnitude + above) / 2)
    inner = torch.where(code == 0, -outer, inner)
    negative = value < 0
    return torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)
