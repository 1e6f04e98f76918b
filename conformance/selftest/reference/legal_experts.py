"""Legal experts and layers, as different as the numerics allow; and with a defect, if asked for one.

Scope: numpy's float32: GEMMs in several orders, of codes with the scales after or of dequantised numbers, fused or not,
additions rounded to nearest or to the neighbour on one side, a sigmoid or erf as far off as it may be, every choice of
a quantiser, stores to either neighbour, sums in parts and in any order. It shares no code with reference/ but the data
types. It proves nothing by itself; test_expert_oracle_bounds.py uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from conformance.selftest.reference.adversary import Array, fused
from conformance.selftest.reference.norm_adversary import furthest, to
from conformance.selftest.reference.quantiser_adversary import choices, scale_of, values_of
from reference.codecs import Codec, Granularity
from reference.expert_numerics import SWIGLU_ALPHA, Activation, ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16, FLOAT16, FLOAT32, Format
from reference.quantisation_oracle import magnitudes

F32 = np.float32
_ELEMENTS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
ORDERS = ("ascending", "descending", "shuffled", "tree")
#: Inner dimensions of one scale of every codec are multiples of it.
_STEP = 32


@dataclass(frozen=True)
class Stored:
    """Numbers as values of a payload, or as they are, and a scale for each: both ``[M, K]``."""

    values: Array
    scales: Array | None

    def columns(self, index: Array) -> Stored:
        return Stored(self.values[:, index], None if self.scales is None else self.scales[:, index])


@dataclass(frozen=True)
class Way:
    """One legal way."""

    order: str = "ascending"
    scales_after: bool = True
    fused: bool = False
    side: int = 0  # of the neighbour that an addition of a GEMM rounds to; 0: to nearest
    function: int = 0  # direction in which the sigmoid or erf is off
    up_first: bool = False
    choice: int = 0  # of those that a quantiser leaves

    @classmethod
    def draw(cls, numerics: ExpertNumerics, random: np.random.Generator) -> Way:
        return cls(
            order=str(random.choice(ORDERS)),
            scales_after=bool(random.integers(2)),
            fused=bool(random.integers(2)),
            side=int(random.integers(-1, 2)) if numerics.accumulator_ulps >= 1 else 0,
            function=int(random.integers(-1, 2)),
            up_first=bool(random.integers(2)),
            choice=int(random.integers(60)),
        )


def experts_of(weights: ExpertWeights) -> list[tuple[Stored, Stored]]:
    """W1 and W2 of each expert."""
    found = []
    for slot in range(weights.experts):
        pair = []
        for stored, scales in ((weights.w1, weights.w1_scales), (weights.w2, weights.w2_scales)):
            if weights.codec is None or scales is None:
                pair.append(Stored(stored[slot].float().numpy(), None))
                continue
            codes, codec = stored[slot].numpy(), weights.codec
            table = np.array([float(m) for m in magnitudes(codec.payload.name)])
            sign_bit = 1 << (codec.payload.bits - 1)
            values = np.where(codes & sign_bit, -1, 1) * table[codes & (sign_bit - 1)]
            tall = codec.block_rows or 1
            wide = codec.group or codes.shape[1]
            each = scales[slot].numpy().repeat(tall, 0)[: len(codes)].repeat(wide, 1)[:, : codes.shape[1]]
            pair.append(Stored(values.astype(F32), each.astype(F32)))
        found.append((pair[0], pair[1]))
    return found


def quantised(x: Array, codec: Codec | None, number: int) -> Stored:
    """Float32 ``x [M, K]`` as payload values and scales, by the codec's choice of this number."""
    if codec is None:
        return Stored(x, None)
    options = list(choices(codec))
    choice = options[number % len(options)]
    group = codec.group or x.shape[1]
    largest = np.abs(x).reshape(len(x), -1, group).max(2).astype(F32)
    scales = scale_of(largest, codec, choice).repeat(group, 1)
    return Stored(values_of(x, scales, codec, choice).astype(F32), scales)


def _add(left: Array, right: Array, side: int) -> Array:
    exact = left.astype(np.float64) + right
    near: Array = exact.astype(F32)
    if side == 0:
        return near
    # A neighbour is within a unit in the last place of the exact sum; a sum that is a float32 stays.
    moved = np.nextafter(near, F32(side * np.inf))
    return np.where((near - exact) * side < 0, moved, near)


def _accumulate(left: Array, right: Array, way: Way, random: np.random.Generator) -> Array:
    """``left [S, K]`` times ``right [N, K]`` transposed, float32."""
    depth = left.shape[1]
    if way.order == "tree":
        parts = [(left[:, k : k + 1] * right[:, k]).astype(F32) for k in range(depth)]
        while len(parts) > 1:
            odd = parts[len(parts) // 2 * 2 :]
            parts = [_add(a, b, way.side) for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
        return parts[0]
    order = np.arange(depth)
    if way.order != "ascending":
        order = order[::-1] if way.order == "descending" else random.permutation(depth)
    total = np.zeros((len(left), len(right)), F32)
    for k in order:
        if way.fused and way.side == 0:
            total = fused(left[:, k : k + 1], right[:, k], total)
        else:
            total = _add(total, (left[:, k : k + 1] * right[:, k]).astype(F32), way.side)
    return total


def gemm(x: Stored, matrix: Stored, way: Way, random: np.random.Generator) -> Array:
    """Their product, with the scales after each stretch of the depth that shares them, or before."""
    if x.scales is None and matrix.scales is None:
        return _accumulate(x.values, matrix.values, way, random)
    one_x = np.ones_like(x.values) if x.scales is None else x.scales
    one_w = np.ones_like(matrix.values) if matrix.scales is None else matrix.scales
    if not way.scales_after:
        return _accumulate((x.values * one_x).astype(F32), (matrix.values * one_w).astype(F32), way, random)
    total = np.zeros((len(x.values), len(matrix.values)), F32)
    for start in range(0, x.values.shape[1], _STEP):
        cut = slice(start, start + _STEP)
        part = _accumulate(x.values[:, cut], matrix.values[:, cut], way, random)
        scale = (one_x[:, start : start + 1] * one_w[:, start]).astype(F32)
        total = _add(total, (part * scale).astype(F32), way.side)
    return total


def activation(product: Array, numerics: ExpertNumerics, way: Way) -> Array:
    """Of ``[S, 2 I]``, float32."""
    gate, up = np.split(product, 2, axis=1)
    if numerics.limit is not None:
        gate, up = np.minimum(gate, F32(numerics.limit)), np.clip(up, -F32(numerics.limit), F32(numerics.limit))
    ulps = int(numerics.function_ulps)
    direction = np.full(gate.shape, way.function)
    if numerics.activation is Activation.GELU:
        erf = torch.special.erf(torch.from_numpy((gate * F32(0.5**0.5)).astype(np.float64))).numpy()
        moved = np.copysign(furthest(np.abs(erf), direction, ulps), erf)
        factor = ((F32(1) + moved) * F32(0.5)).astype(F32)
    else:
        argument = gate if numerics.activation is Activation.SILU else gate * F32(SWIGLU_ALPHA)
        exact = torch.sigmoid(torch.from_numpy(argument.astype(np.float64))).numpy()
        factor = furthest(exact, direction, ulps)
    if numerics.activation is Activation.SWIGLU:
        up = (up + F32(1)).astype(F32)
    middle: Array = (gate * up) * factor if way.up_first else (gate * factor) * up
    return middle.astype(F32)


Defect = Callable[[str, Array], Array]


@dataclass(frozen=True)
class Kernel:
    """A legal layer on ``world_size`` ranks; ``defect(place, numbers)`` may change what it holds."""

    experts: Sequence[tuple[Stored, Stored]]
    numerics: ExpertNumerics
    dtype: torch.dtype
    bias1: Array | None = None
    bias2: Array | None = None
    defect: Defect = lambda place, numbers: numbers

    def terms(self, rows: Array, expert: int, weight: Array, way: Way, random: np.random.Generator) -> list[Array]:
        """Weighted outputs of one expert, float32 ``[S, H]`` in parts, of rows ``[S, H]`` and weights ``[S, 1]``."""
        numerics, stage = self.numerics, self.numerics.weight_stage
        w1, w2 = self.experts[expert]
        if stage is WeightStage.ON_INPUT:
            rows = to(self.dtype, (rows * to(self.dtype, weight)).astype(F32))
        product = self._first(quantised(rows, numerics.input_codec, way.choice), w1, way, random)
        if self.bias1 is not None and not numerics.late_bias:
            product = _add(product, self.bias1[expert], way.side)
        if stage is WeightStage.BEFORE_ACTIVATION:
            product = (product * weight).astype(F32)
        product = self.defect("product", self.stored(product, numerics.gemm1_store, random))
        if self.bias1 is not None and numerics.late_bias:
            product = (product + self.bias1[expert]).astype(F32)
        middle = self.stored(activation(product, numerics, way), numerics.intermediate_store, random)
        codec = numerics.intermediate_codec
        if codec is not None and numerics.intermediate_any_group:
            codec = replace(codec, granularity=Granularity.GROUP, group=int(random.choice((4, 32))))
        between = quantised(self.defect("middle", middle), codec, way.choice)
        if between.scales is not None:
            between = replace(between, scales=self.defect("scales", between.scales))
        found, part_of = [], random.integers(numerics.inner_parts, size=middle.shape[1])
        for part in range(numerics.inner_parts):
            columns = np.flatnonzero(part_of == part)
            after = way.scales_after and numerics.inner_parts == 1 and (codec is None or codec.group % _STEP == 0)
            out = gemm(between.columns(columns), w2.columns(columns), replace(way, scales_after=after), random)
            if self.bias2 is not None and part == 0:
                out = _add(out, self.bias2[expert], way.side)
            found.append((out * weight).astype(F32) if stage is WeightStage.AFTER_W2 else out)
        return found

    def _first(self, x: Stored, matrix: Stored, way: Way, random: np.random.Generator) -> Array:
        """``W1 x``, split over the depth where the numerics say."""
        numerics, depth = self.numerics, x.values.shape[1]
        if numerics.gemm1_partial is None:
            return gemm(x, matrix, way, random)
        places = random.permutation(np.arange(_STEP, depth, _STEP))[: numerics.gemm1_parts - 1]
        parts = [
            self.stored(gemm(x.columns(cut), matrix.columns(cut), way, random), numerics.gemm1_partial, random)
            for cut in np.split(np.arange(depth), np.sort(places))
        ]
        total = np.zeros_like(parts[0])
        for place in random.permutation(len(parts)):
            total = self.stored((total + parts[place]).astype(F32), numerics.gemm1_store, random)
        return total

    def stored(self, value: Array, of: Format | None, random: np.random.Generator) -> Array:
        """To nearest, or to any neighbour where the numerics allow it."""
        if of is None:
            return value
        if self.numerics.store_ulps == 0.5:
            return to(getattr(torch, of.name), value)
        wide = value.astype(np.float64)
        unit = np.ldexp(1.0, np.maximum(np.frexp(wide)[1], of.min_exponent + 1) - of.mantissa_bits - 1)
        up = random.integers(2, size=value.shape) if random.integers(2) else random.integers(2)
        found: Array = np.where(up == 1, np.ceil(wide / unit), np.floor(wide / unit)) * unit
        return found.astype(F32)

    def rank(self, rows: Array, ids: Array, weights: Array, random: np.random.Generator) -> Array:
        """What one rank sends back: float32 ``[n, H]`` that the element type holds."""
        held: list[list[Array]] = [[] for _ in rows]
        way = Way.draw(self.numerics, random)
        for expert in range(len(self.experts)):
            token, slot = np.nonzero(ids == expert)
            if len(token):
                found = self.terms(rows[token], expert, weights[token, slot][:, None], way, random)
                for place, t in enumerate(token):
                    held[t] += [part[place] for part in found]
        return np.stack([self._sum(terms, rows.shape[1], random) for terms in held])

    def _sum(self, terms: list[Array], hidden: int, random: np.random.Generator) -> Array:
        total, how, element = np.zeros(hidden, F32), self.numerics.slot_sum, _ELEMENTS[self.dtype]
        for place in random.permutation(len(terms)):
            term = terms[place] if how is SlotSum.FLOAT32 else self.stored(terms[place], element, random)
            total = (total + term).astype(F32)
            if how is SlotSum.ATOMIC:
                total = to(self.dtype, total)
        return total if how is SlotSum.ATOMIC else self.stored(total, element, random)

    def layer(
        self,
        rows: Array,
        ids: Array,
        weights: Array,
        owner: Array,
        random: np.random.Generator,
        *,
        nodes: int = 1,
        every: bool = False,
    ) -> Array:
        """Output ``[n, H]``; ``owner[expert]`` is the rank that computes it, ids outside contribute nothing."""
        known = (ids >= 0) & (ids < len(owner))
        rank_of = np.where(known, owner[np.where(known, ids, 0)], -1)
        ranks = int(owner.max()) + 1
        parts = [self.rank(rows, np.where(rank_of == rank, ids, -1), weights, random) for rank in range(ranks)]
        per_node = ranks // nodes
        if nodes > 1:
            parts = [self._combine(parts[i : i + per_node], False, random) for i in range(0, ranks, per_node)]
        return self._combine(parts, every, random)

    def _combine(self, parts: list[Array], every: bool, random: np.random.Generator) -> Array:
        total = np.zeros_like(parts[0])
        for place in random.permutation(len(parts)):
            total = (total + parts[place]).astype(F32)
            if every:
                total = to(self.dtype, total)
        return to(self.dtype, total)
