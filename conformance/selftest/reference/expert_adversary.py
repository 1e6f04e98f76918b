"""Legal implementations of the experts that go to the ends of what their numerics allow, and data to run them on.

Scope: written from :mod:`reference.expert_numerics` alone, with an arithmetic of its own: float64 tensors that hold
float32 numbers, every operation rounded by one of :data:`DIRECTIONS`. Only the quantisers' choices come from
:func:`reference.quantisation.accepted_values`, which has selftests of its own. It proves nothing by itself.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from random import Random

import torch

from reference.codecs import STANDARD, Codec, Granularity
from reference.expert_numerics import Activation, ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16, FLOAT16, FLOAT32, Format
from reference.quantisation import accepted_scales, accepted_values, quantise
from reference.scales import expand

HIDDEN, INTER, EXPERTS, LOCAL, ROWS, TOP_K = 64, 32, 6, 4, 24, 3
DIRECTIONS = ("nearest", "down", "up", "away", "random")
TYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}


def rounded(value: torch.Tensor, direction: str = "nearest", to: Format = FLOAT32) -> torch.Tensor:
    """Float64 ``value`` as a number of ``to`` on one side of it; without overflow."""
    exponent = (torch.frexp(value).exponent - 1).clamp(min=to.min_exponent)
    unit = torch.ldexp(torch.ones_like(value), exponent - to.mantissa_bits)
    scaled = value / unit
    if direction == "random":
        side = torch.rand(value.shape, dtype=torch.float64) < 0.5
        return torch.where(side, scaled.floor(), scaled.ceil()) * unit
    if direction == "away":
        return scaled.sign() * scaled.abs().ceil() * unit
    return {"down": torch.floor, "up": torch.ceil, "nearest": torch.round}[direction](scaled) * unit


@dataclass
class Data:
    """One call: rows ``[M, H]`` in the element type, routing, and one rank's weights."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    local: ExpertWeights
    slot_of: torch.Tensor


def numerics_of(random: Random) -> ExpertNumerics:
    """A declaration at random, small groups included."""
    scheme = random.choice(("plain", "plain", "token", "block", "mx", "swiglu"))
    store = random.choice((None, BFLOAT16))
    common = ExpertNumerics(
        activation=random.choice((Activation.SILU, Activation.GELU)),
        limit=random.choice((None, None, 1.5)),
        weight_stage=random.choice((WeightStage.AFTER_W2, WeightStage.AFTER_W2, WeightStage.BEFORE_ACTIVATION)),
        gemm1_store=random.choice((None, None, BFLOAT16)),
        intermediate_store=store,
        slot_sum=random.choice(list(SlotSum)),
        accumulator_ulps=random.choice((0.5, 1.0)),
        function_ulps=random.choice((1.0, 8.0)),
    )
    token, group = STANDARD["token_hip_fn"], replace(STANDARD["group128_fn"], group=32)
    if random.random() < 0.3:
        common = replace(common, store_ulps=1.0)
    if common.slot_sum is not SlotSum.FLOAT32 and random.random() < 0.3:
        common = replace(common, inner_parts=random.choice((2, 4)))
    if random.random() < 0.3:
        common = replace(common, gemm1_partial=random.choice((BFLOAT16, FLOAT16)), gemm1_parts=random.choice((2, 4)))
    codec = {
        "token": (token, token),
        "block": (group, replace(STANDARD["block128_fn"], group=32, block_rows=32)),
        "mx": (STANDARD["mxfp4_even"], STANDARD["mxfp4_even"]),
    }.get(scheme)
    if scheme == "swiglu":
        swiglu = replace(common, activation=Activation.SWIGLU, limit=7.0, weight_stage=WeightStage.AFTER_W2)
        return replace(swiglu, weight_codec=STANDARD["mxfp4_even"], late_bias=random.random() < 0.5)
    if codec is None:
        return common
    found = replace(common, input_codec=codec[0], intermediate_codec=codec[0], weight_codec=codec[1])
    if random.random() < 0.7:
        return found
    whole = codec[0] if scheme == "mx" else replace(codec[0], granularity=Granularity.TOKEN, group=0)
    return replace(found, intermediate_codec=whole, intermediate_any_group=True)


def data_of(random: Random, numerics: ExpertNumerics, dtype: torch.dtype) -> Data:
    """Rows of every kind: normal, wide, positive, small integers, zeros; duplicates, -1, remote and unknown ids."""
    generator = torch.Generator().manual_seed(random.getrandbits(40))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = normal(ROWS, HIDDEN)
    wide = torch.exp2(torch.randint(-12, 7, rows.shape, generator=generator).float())
    kind = torch.arange(ROWS) % 8
    rows = torch.where((kind == 1)[:, None], rows * wide, rows)
    rows = torch.where((kind == 2)[:, None], rows.abs(), rows)
    rows = torch.where((kind == 3)[:, None], (2 * rows).round(), rows)
    rows[kind == 4] *= 30.0
    rows[kind == 5] = 0.0
    rows[kind == 6, : HIDDEN // 2] = 0.0
    # No sum leaves float16, nor a partial one.
    narrow = dtype == torch.float16 or numerics.gemm1_partial is FLOAT16
    share = random.choice((1.0, 0.2, 4.0)) / (16 if narrow else 1)
    matrices = normal(LOCAL, 2 * INTER, HIDDEN) * share / 8, normal(LOCAL, HIDDEN, INTER) / 6
    matrices[0][-1], matrices[1][-1] = matrices[0][-1].abs(), matrices[1][-1].abs()
    biased = numerics.activation is Activation.SWIGLU
    biases = (normal(LOCAL, 2 * INTER), normal(LOCAL, HIDDEN)) if biased else (None, None)
    local = stored(matrices[0], matrices[1], numerics.weight_codec, dtype, *biases)
    ids = torch.randint(-1, EXPERTS + 1, (ROWS, TOP_K), generator=generator).int()
    slot_of = torch.tensor([2, -1, 0, 3, -1, 1])
    weights = normal(ROWS, TOP_K)
    weights[torch.rand(weights.shape, generator=generator) < 0.1] = 0.0
    weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0.5
    return Data(rows.to(dtype), ids, weights, local, slot_of)


def stored(
    w1: torch.Tensor,
    w2: torch.Tensor,
    codec: Codec | None,
    dtype: torch.dtype,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
) -> ExpertWeights:
    """Float32 matrices as the experts hold them."""
    if codec is None:
        return ExpertWeights(w1.to(dtype), w2.to(dtype), bias1=bias1, bias2=bias2)
    first, second = ([quantise(matrix, codec) for matrix in matrices] for matrices in (w1, w2))
    codes = [torch.stack([q.codes for q in found]) for found in (first, second)]
    scales = [torch.stack([q.scales for q in found]) for found in (first, second)]
    return ExpertWeights(codes[0], codes[1], codec, scales[0], scales[1], bias1, bias2)


class Legal:
    """One implementation at random that keeps to ``numerics``."""

    def __init__(self, numerics: ExpertNumerics, dtype: torch.dtype, random: Random) -> None:
        self.numerics, self.element, self.random = numerics, TYPES[dtype], random
        self.direction = "nearest" if numerics.accumulator_ulps < 1 else random.choice(DIRECTIONS)
        self.store = "nearest" if numerics.store_ulps < 1 else random.choice(DIRECTIONS)
        self.fused, self.tree, self.bias_first = random.random() < 0.5, random.random() < 0.5, random.random() < 0.5
        self.end = random.choice(("value", "lower", "upper", "mixed"))
        self.off = random.choice((-1.0, 0.0, 1.0))
        self.association = random.randrange(4)
        self.real = random.random() < 0.25

    def run(self, data: Data) -> torch.Tensor:
        """Output ``[M, H]``, float64."""
        numerics = self.numerics
        x = data.rows.double()
        if numerics.input_codec is not None:
            x = self.quantised(x, numerics.input_codec)
        first, second = data.local.dequantised()
        pairs = [
            (row, int(data.slot_of[name]), column)
            for row, names in enumerate(data.ids.tolist())
            for column, name in enumerate(names)
            if 0 <= name < len(data.slot_of) and data.slot_of[name] >= 0
        ]
        out = torch.zeros(data.rows.shape, dtype=torch.float64)
        if not pairs:
            return out
        row, slot, column = torch.tensor(pairs).unbind(1)
        biases = [None if bias is None else bias[slot].double() for bias in (data.local.bias1, data.local.bias2)]
        factors = data.weights[row, column].double()[:, None]
        terms = self.experts(x[row], first[slot], second[slot], biases, factors)
        for each in row.unique():
            found = torch.cat([part[row == each] for part in terms])
            out[each] = self.added(found[torch.randperm(len(found))])
        return out

    def experts(
        self,
        x: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        biases: list[torch.Tensor | None],
        factors: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Weighted outputs ``[P, H]`` of P pairs of a row and an expert, in one part or more."""
        numerics = self.numerics
        product = self.first(x, first, None if numerics.late_bias else biases[0])
        if numerics.weight_stage is WeightStage.BEFORE_ACTIVATION:
            product = rounded(product * factors)
        product = self.stored(product, numerics.gemm1_store)
        if numerics.late_bias and biases[0] is not None:
            product = rounded(product + biases[0])
        hidden = self.stored(self.activation(*product.chunk(2, 1)), numerics.intermediate_store)
        if numerics.intermediate_codec is not None:
            hidden = self.requantised(hidden, numerics.intermediate_codec)
        owner = torch.randint(0, numerics.inner_parts, (hidden.shape[1],))
        parts = [(owner == part).nonzero()[:, 0] for part in range(numerics.inner_parts)]
        terms = [
            self.product(hidden[:, part], second[..., part], None if number else biases[1])
            for number, part in enumerate(parts)
        ]
        if numerics.weight_stage is WeightStage.AFTER_W2:
            terms = [rounded(term * factors) for term in terms]
        return terms

    def stored(self, value: torch.Tensor, to: Format | None) -> torch.Tensor:
        """A store as well as ``store_ulps`` says."""
        return value if to is None else rounded(value, self.store, to)

    def first(self, x: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The first GEMM, in parts if they may be."""
        numerics = self.numerics
        if numerics.gemm1_partial is None:
            return self.product(x, matrices, bias)
        inner = range(1, x.shape[1])
        cuts = [0, *sorted(self.random.sample(inner, self.random.randrange(numerics.gemm1_parts))), x.shape[1]]
        total = torch.zeros((), dtype=torch.float64)
        for start, end in self.random.sample(list(itertools.pairwise(cuts)), len(cuts) - 1):
            part = self.product(x[:, start:end], matrices[..., start:end], None if start else bias)
            total = rounded(total + self.stored(part, numerics.gemm1_partial), to=numerics.gemm1_store or FLOAT32)
        return total

    def requantised(self, rows: torch.Tensor, codec: Codec) -> torch.Tensor:
        """The quantiser between the GEMMs; over parts of its groups, if nobody knows them."""
        if not self.numerics.intermediate_any_group:
            return self.quantised(rows, codec)
        token, out = replace(codec, granularity=Granularity.TOKEN, group=0), rows.clone()
        group = codec.group or rows.shape[1]
        owner = torch.arange(rows.shape[1]) // group * 4 + torch.randint(
            0, self.random.choice((1, 4)), (rows.shape[1],)
        )
        for part in owner.unique():
            out[:, owner == part] = self.quantised(rows[:, owner == part], token)
        return out

    def quantised(self, rows: torch.Tensor, codec: Codec) -> torch.Tensor:
        """Rows ``[P, K]`` through a quantiser that takes this implementation's end wherever it may choose."""
        scales = self.chosen(*(getattr(accepted_scales(rows, codec), end) for end in ("value", "lower", "upper")))
        codes = accepted_values(rows, scales, codec)
        return self.chosen(codes.value, codes.lower, codes.upper) * expand(scales, codec, *rows.shape)

    def chosen(self, value: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        if self.end == "mixed":
            return torch.where(torch.rand(value.shape) < 0.5, lower, upper)
        return {"value": value, "lower": lower, "upper": upper}[self.end]

    def product(self, x: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [P, K]`` times ``matrices [P, N, K]``: products rounded or fused, in an order of its own."""
        if not x.shape[1]:
            empty = torch.zeros(matrices.shape[:2], dtype=torch.float64)
            return empty if bias is None else empty + bias
        terms = matrices * x[:, None]
        order = torch.randperm(terms.shape[2])
        terms = terms[..., order] if self.fused else rounded(terms[..., order])
        parts = list(terms.unbind(2))
        if bias is not None:
            parts.insert(0 if self.bias_first else len(parts), bias)
        if self.fused:
            # An exact product goes into an addition, never into the accumulator as it is.
            parts[0] = rounded(parts[0])
        if not self.tree or self.fused:
            total = parts[0]
            for part in parts[1:]:
                total = rounded(total + part, self.direction)
            return total
        while len(parts) > 1:
            odd = parts[len(parts) // 2 * 2 :]
            parts = [rounded(a + b, self.direction) for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
        return parts[0]

    def activation(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``f(gate) * up``, off by as much as ``function_ulps`` allows, or a float32 implementation in use."""
        numerics, kind = self.numerics, self.numerics.activation
        if numerics.limit is not None:
            gate, up = gate.clamp(max=numerics.limit), up.clamp(-numerics.limit, numerics.limit)
        slope = 1.702 if kind is Activation.SWIGLU else 1.0
        if kind is Activation.GELU:
            erf = torch.erf(gate * math.sqrt(0.5))
            if self.real and numerics.function_ulps >= 8:
                erf = torch.erf(gate.float() * 0.70710678118654752440).double()
            else:
                erf = self.nudged(erf)
            function = rounded(1 + erf) / 2
        elif self.real and numerics.function_ulps >= 8:
            single = gate.float() * slope
            function = (1.0 / (1.0 + torch.exp2(single * -1.4426950408889634))).double()
        else:
            function = self.nudged(torch.sigmoid(gate * slope))
        if kind is Activation.SWIGLU:
            curve = rounded(gate * function)
            return rounded(curve * up + curve) if self.association == 3 else rounded(curve * rounded(up + 1))
        if self.association == 1:
            return rounded(gate * rounded(function * up))
        if self.association == 2:
            return rounded(rounded(gate * up) * function)
        return rounded(rounded(gate * function) * up)

    def nudged(self, exact: torch.Tensor) -> torch.Tensor:
        """A float32 number ``function_ulps`` to one side of ``exact``; a subnormal one is zero on some devices."""
        # The exact erf and sigmoid are below 1, whatever float64 makes of them.
        exponent = (torch.frexp(exact.clamp(-1 + 2.0**-53, 1 - 2.0**-53)).exponent - 1).clamp(min=-126)
        unit = torch.ldexp(torch.ones_like(exact), exponent - 23)
        moved = exact + self.off * self.numerics.function_ulps * unit
        inwards = rounded(moved, "down" if self.off > 0 else "up" if self.off < 0 else "nearest")
        flushed = (exact.abs() < 2.0**-126) & (self.off < 0)
        return torch.where(flushed, 0.0, inwards)

    def added(self, terms: torch.Tensor) -> torch.Tensor:
        """Terms ``[c, H]`` of one row, in a random order."""
        kind = self.numerics.slot_sum
        if kind is not SlotSum.FLOAT32:
            terms = self.stored(terms, self.element)
        total = terms[0]
        for term in terms[1:]:
            total = rounded(total + term, to=self.element if kind is SlotSum.ATOMIC else FLOAT32)
        return total if kind is SlotSum.ATOMIC else self.stored(total, self.element)
