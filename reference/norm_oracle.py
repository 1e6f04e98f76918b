"""The oracle of AllReduce + residual add + RMSNorm: derived a second time, in one process, from all ranks' rows.

It judges the reference, so it shares no code with :mod:`reference.rms_norm` or the interval arithmetic: rounding is by
scaling instead of on bits, sums over ranks are float64 sums rounded after each addition, and the norm is the exact one
times ``1 + d``, ``|d| <= rho``, with one a-priori rho per row width:

* N squares added in float32 in any order, a division off by at most 4 u (2 units in the last place) and the addition of
  epsilon: the shifted mean square is off by at most ``g = gamma(N + 6)``, u = 2**-24, one u to spare for float64;
* its reciprocal root by ``(1 - g) ** -0.5``, times ``1 + 4 u``; two products: ``(1 + u) ** 2``.

What agreeing with the oracle does not prove: anything about communication, quantised outputs, or devices that flush
subnormals (the reference does not). Rows with NaN, infinities or overflowing sums are not covered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reference.formats import Ties
from reference.norm_numerics import NormInput, NormNumerics, SumOrder, WeightProduct

_U = 2.0**-24
#: Significant bits, exponent of the smallest normal number, and the power of two at which overflow begins.
_SHAPES = {torch.float32: (24, -126, 128), torch.bfloat16: (8, -126, 128), torch.float16: (11, -14, 16)}


@dataclass
class Bounds:
    """Any result in ``[lower, upper]``, float64 ``[M, N]``; ``value`` lies within."""

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


@dataclass
class Expected:
    """Bounds of residual out (None without a residual), of the output, and of the output before its store."""

    residual: Bounds | None
    output: Bounds
    unrounded: Bounds


def expected(
    terms: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
) -> Expected:
    """Bounds of what every rank must get; arguments as of :func:`reference.rms_norm.expected`.

    Raises:
        ValueError: no such element type is modelled.
    """
    if dtype not in _SHAPES:
        raise ValueError(f"dtype is {dtype}; the oracle knows {', '.join(str(known) for known in _SHAPES)}")

    def store(value: torch.Tensor) -> torch.Tensor:
        return _rounded(value, dtype, numerics.store)

    low, exact, high = _reduced(terms.double(), numerics.sum_order)
    if numerics.round_reduced:
        low, exact, high = store(low), store(exact), store(high)
    if residual is not None:
        low, high = _rounded(low + residual.double()), _rounded(high + residual.double())
        exact = exact + residual.double()
    low_out, exact_out, high_out = (
        _rounded(value, dtype, numerics.residual_store or numerics.store) for value in (low, exact, high)
    )
    stored = low_out, exact_out, high_out
    sums = {
        NormInput.UNROUNDED: [(low, exact, high)],
        NormInput.ROUNDED: [stored],
        NormInput.EITHER: [(low, exact, high), stored],
    }[numerics.norm_input]
    scale = weight.double()
    if numerics.gemma:
        scale = _rounded(1 + scale)
    rounded_norm = numerics.product is WeightProduct.ROUNDED_NORM
    norms = [_normalised(*ends, scale, epsilon, store if rounded_norm else None) for ends in sums]
    lower = torch.stack([norm.lower for norm in norms]).amin(0)
    upper = torch.stack([norm.upper for norm in norms]).amax(0)
    unrounded = Bounds(norms[0].value, lower, upper)
    output = Bounds(store(unrounded.value), store(lower), store(upper))
    return Expected(
        None if residual is None else Bounds(stored[1].clamp(stored[0], stored[2]), *stored[::2]), output, unrounded
    )


def _reduced(terms: torch.Tensor, order: SumOrder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lowest, exact and highest sum of ``terms [W, M, N]`` in float32."""
    ranks = terms.shape[0]
    exact = terms.sum(0)
    if order is SumOrder.ANY:
        n = (ranks - 1) * _U
        slack = n / (1 - n) * terms.abs().sum(0)
        return _rounded(exact - slack), exact, _rounded(exact + slack)
    sums = []
    for start in range(ranks if order is SumOrder.ROTATED else 1):
        turned = torch.cat([terms[start:], terms[:start]])
        total = turned[0]
        for term in turned[1:]:
            total = _rounded(total + term)
        sums.append(total)
    low, high = torch.stack(sums).amin(0), torch.stack(sums).amax(0)
    return low, exact.clamp(low, high), high


def _normalised(
    low: torch.Tensor,
    exact: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    epsilon: float,
    between: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Bounds:
    """The float32 norm of a sum from ``low`` to ``high``; ``between`` rounds it before it meets the weight."""
    width = exact.shape[1]
    g = (width + 6) * _U
    g = g / (1 - g)
    rho = (1 - g) ** -0.5 * (1 + 4 * _U) * (1 + _U) ** 2 - 1
    epsilon = _rounded(torch.tensor(epsilon, dtype=torch.float64)).item()
    outside = torch.maximum(low.abs(), high.abs())
    inside = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
    # Squares may underflow: 2**-150 each, of which epsilon leaves no more than this.
    lost = 2.0**-149
    strongest = ((inside.square().mean(1, keepdim=True) - lost).clamp(min=0) + epsilon).sqrt().reciprocal()
    weakest = (outside.square().mean(1, keepdim=True) + lost + epsilon).sqrt().reciprocal()
    value = exact / (exact.square().mean(1, keepdim=True) + epsilon).sqrt()
    corners = torch.stack([x * r for x in (low, high) for r in (weakest * (1 - rho), strongest * (1 + rho))])
    lower, upper = corners.amin(0), corners.amax(0)
    if between is not None:
        value, lower, upper = between(value), between(lower - 2.0**-148), between(upper + 2.0**-148)
    corners = torch.stack([x * scale * (1 + sign * _U) for x in (lower, upper) for sign in (-1, 1)])
    # A product may underflow too, before a weight beyond 1 or, with the weight first, the root multiplies what is lost.
    tiny = 2.0**-148 * (1 + scale.abs() + strongest)
    return Bounds(value * scale, corners.amin(0) - tiny, corners.amax(0) + tiny)


def _rounded(value: torch.Tensor, dtype: torch.dtype = torch.float32, ties: Ties = Ties.EVEN) -> torch.Tensor:
    """Float64 ``value`` rounded once to ``dtype``."""
    bits, least, overflow = _SHAPES[dtype]
    _, exponent = torch.frexp(value)
    # value = m * 2**exponent with 0.5 <= |m| < 1
    quantum = torch.exp2((exponent.clamp(min=least + 1) - bits).double())
    steps = value / quantum
    if ties is Ties.EVEN:
        whole = torch.round(steps)
    elif ties is Ties.TRUNCATE:
        whole = torch.trunc(steps)
    else:
        whole = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
    infinite = torch.copysign(torch.full_like(value, torch.inf), value)
    return torch.where((whole * quantum).abs() >= 2.0**overflow, infinite, whole * quantum)
