"""Activations between the two GEMMs of an expert: executed in float32, and the interval of every legal result.

Scope: SiLU, GELU (erf) and gpt-oss' SwiGLU, each times the up half, with their clamps
(:class:`reference.expert_numerics.Activation`). Sources: AITER e4048607 csrc/kernels/activation_kernels.cu and
aiter/fused_moe.py (``torch_moe_stage1``, the clamp before SiLU); openai/gpt-oss, torch model, ``swiglu``.

Bounds. The curve f of the gate falls to its only minimum and rises from there on, so its range over an interval is
known exactly from both ends and the minimum. An implementation is off f by

- the argument of the exponential or of erf, which is the gate times a rounded constant: a relative 2**-23 for each
  constant (its own rounding and the product's). A sigmoid at x changes by a relative ``|x| sigmoid(-x)`` of that, at
  most ``|x|`` where x < 0 and 0.28 elsewhere; erf by at most 0.49 of it, for ``2 / sqrt(pi) y exp(-y y)`` is at most
  0.484;
- the function: ``function_ulps`` units in the last place of its result, a unit being at most 2**-23 of it, and at most
  2**-24 where it is below 1;
- one rounding for each product and addition;
- 2**-126 wherever a result or an exponential is subnormal or overflows: then a sigmoid may be 0.

Relative errors r add up to at most r / (1 - r) in all. Float64 evaluates f within 2**-40.
Not covered: NaN and infinite gates, and sigmoids made of a tanh, whose error is absolute.
"""

from __future__ import annotations

import math

import torch

from reference.expert_numerics import SWIGLU_ALPHA, Activation
from reference.intervals import FLOAT32_NORMAL, Interval

_UNIT = 2.0**-24
#: Units of relative error beside the function's: products and additions (gate, up, and the 1 of SwiGLU or of GELU).
_ROUNDINGS = {Activation.SILU: 2, Activation.GELU: 3, Activation.SWIGLU: 3}
#: Constants that the argument is multiplied by: log2(e), 1 / sqrt 2, 1.702 and log2(e).
_CONSTANTS = {Activation.SILU: 1, Activation.GELU: 1, Activation.SWIGLU: 2}
_SLOPE = {Activation.SILU: 1.0, Activation.SWIGLU: SWIGLU_ALPHA}
#: Where x sigmoid(x) and x Phi(x) are least, and (rounded down) how much they are there.
_LEAST_OF_SIGMOID = (-1.2784645427610738, -0.2784645427610739)
_LEAST_OF_ERF = (-0.7517915246935646, -0.1699712075)
#: Below minus this a sigmoid is less than float32's least number: only the absolute error counts.
_SUBNORMAL = 200.0
#: Relative error of the curve in float64.
_EVALUATION = 2.0**-40


def clamped_gate(gate: torch.Tensor, limit: float | None) -> torch.Tensor:
    """The gate half after its clamp, which is from above only."""
    return gate if limit is None else gate.clamp(max=limit)


def clamped_up(up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """The up half after its clamp, which is on both sides."""
    return up if limit is None else up.clamp(-limit, limit)


def activate(gate: torch.Tensor, up: torch.Tensor, activation: Activation, limit: float | None) -> torch.Tensor:
    """``f(gate) * up`` in float32 arithmetic; SwiGLU adds 1 to up. Any shape, both float32.

    Raises:
        ValueError: an argument is not float32.
    """
    if gate.dtype != torch.float32 or up.dtype != torch.float32:
        raise ValueError(f"gate is {gate.dtype} and up {up.dtype}; activations are computed in torch.float32")
    gate, up = clamped_gate(gate, limit), clamped_up(up, limit)
    if activation is Activation.GELU:
        return gate * ((1.0 + torch.erf(gate * math.sqrt(0.5))) * 0.5) * up
    if activation is Activation.SWIGLU:
        return gate * torch.sigmoid(gate * SWIGLU_ALPHA) * (up + 1.0)
    return gate * torch.sigmoid(gate) * up


def accepted(
    gate: Interval, up: Interval, activation: Activation, limit: float | None, function_ulps: float
) -> Interval:
    """Every float32 result that an implementation may give for a gate and an up half in these intervals.

    Args:
        gate: any shape.
        up: of the same shape.
        activation: which.
        limit: of the clamps, or None.
        function_ulps: error of the sigmoid or erf, in units in the last place of its result.
    """
    gate = gate.apply(lambda end: clamped_gate(end, limit))
    up = up.apply(lambda end: clamped_up(end, limit))
    if activation is Activation.SWIGLU:
        up = up + 1.0
    low, value, high = _range(gate, activation)
    zero = (gate.lower == 0) & (gate.upper == 0)
    size = torch.maximum(-gate.lower, gate.upper)
    arguments = 2.0 * _CONSTANTS[activation]
    units = torch.full_like(size, float(_ROUNDINGS[activation]))
    absolute = FLOAT32_NORMAL * (1 + size)
    if activation is Activation.GELU:
        # Of 1 + erf, and halved: by the unit of the erf, which is no larger than that of its largest result.
        erf = torch.erf(size * math.sqrt(0.5)) * (1 + _EVALUATION)
        last_place = torch.minimum(2 * _UNIT * erf, torch.full_like(erf, _UNIT))
        absolute = absolute + size * (function_ulps * last_place + 0.49 * arguments * _UNIT) * (0.5 + 2.0**-20)
    else:
        slope = _SLOPE[activation]
        units = units + 2 * function_ulps + arguments * (0.28 + (-slope * gate.lower).clamp(0, _SUBNORMAL))
    relative = units * _UNIT + 4 * _EVALUATION
    relative = relative / (1 - relative)
    absolute = torch.where(zero, 0.0, absolute)
    low, high = low - low.abs() * relative - absolute, high + high.abs() * relative + absolute
    return _times(Interval(value, low, high), up)


def _range(gate: Interval, activation: Activation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least, declared and greatest value of the curve over ``gate``."""
    x = torch.stack([gate.lower, gate.value, gate.upper])
    if activation is Activation.GELU:
        curve, (where, least) = x * torch.special.erfc(x * -math.sqrt(0.5)) * 0.5, _LEAST_OF_ERF
    else:
        slope = _SLOPE[activation]
        curve = x * torch.sigmoid(x * slope)
        where, least = _LEAST_OF_SIGMOID[0] / slope, _LEAST_OF_SIGMOID[1] / slope
    first, value, last = curve.unbind()
    low = torch.minimum(first, last)
    # A hair to either side, for the place of the minimum is rounded, too; there the curve is flat.
    around = (gate.lower < where * (1 - 2.0**-30)) & (gate.upper > where * (1 + 2.0**-30))
    return torch.where(around, least, low), value, torch.maximum(first, last)


def _times(curve: Interval, up: Interval) -> Interval:
    """The product, whose rounding the curve has borne; a subnormal one may be flushed."""
    ends = [a * b for a in (curve.lower, curve.upper) for b in (up.lower, up.upper)]
    low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    high = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
    flushed = torch.where((low == 0) & (high == 0), 0.0, FLOAT32_NORMAL)
    return Interval(curve.value * up.value, low - flushed, high + flushed)
