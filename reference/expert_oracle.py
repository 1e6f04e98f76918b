"""The oracle of the experts and of the whole layer: derived a second time, densely, in one process, in float64.

It judges the reference, so it shares no code with the modules it judges (experts, layer, intervals, sums, bounds,
quantisation, dispatch): weights are decoded from a table of exact fractions, rounding is by scaling instead of on bits,
a quantiser is what it may make of the ends of a range, an exchange is "each rank rounds its sum once". Bounds hold a
priori: gamma(n) times the sum of magnitudes for n roundings of a relative size (Higham, Accuracy and Stability of
Numerical Algorithms, lemma 3.1). Each n counts a rounding or two more than there are, which covers float64's own.

Model, with u = 2**-24 and ``[low, high]`` for every float32 number that a legal kernel may hold:

* GEMM of depth K: K additions, ``scale_roundings``, one for a bias, each off by ``accumulator_ulps`` 2u.
* gate and up are clamped; the activation is off by ``function_ulps`` of the sigmoid or erf and 4 roundings; over a
  range it takes its extremes at the ends or at its only minimum.
* a requantised range has scales between those of its least and its greatest largest magnitude; see
  :func:`reference.oracle_ranges.requantised`.
* sums of which the parts are rounded lose a share of the sum of magnitudes for each part and for each addition.
* c outputs of one rank, c ranks of a node and c nodes are sums: after c - 2 additions, each off by half a spacing at
  the largest partial sum, the last one rounds, a monotone step.

What agreeing with the oracle does not prove: anything about communication, or that the declared numerics are a
library's. Not covered: NaN, infinities, overflow, inputs or weights that are subnormal in float32 and flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from reference.codecs import Codec, Granularity
from reference.expert_numerics import ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16, FLOAT16, FLOAT32, Format
from reference.oracle import Expected
from reference.oracle_ranges import (
    ROUNDING,
    Range,
    activated,
    dequantised,
    gemm,
    nearest,
    of_parts,
    requantised,
    spacing,
    underflow,
)

#: Elements of the largest float64 tensors at a time.
_CHUNK = 1 << 22
_ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@dataclass
class Matrices:
    """One expert: float64 ``w1 [2 I, H]``, ``w2 [H, I]``, biases ``[2 I]`` and ``[H]`` or None."""

    w1: torch.Tensor
    w2: torch.Tensor
    bias1: torch.Tensor | None = None
    bias2: torch.Tensor | None = None


Experts = ExpertWeights | Callable[[int], Matrices]


@dataclass
class Shared:
    """Experts that every token passes with weight one on its own rank, apart from the routed ones.

    Their sum is stored in the element type and added to the combined result, which rounds to the element type again.
    """

    experts: Experts
    count: int
    numerics: ExpertNumerics


def decoded(weights: ExpertWeights) -> Callable[[int], Matrices]:
    """Experts by slot, each built when it is first asked for and kept."""

    @cache
    def build(slot: int) -> Matrices:
        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[slot].double().cpu()

        first = dequantised(weights.w1[slot].cpu(), of(weights.w1_scales), weights.codec)
        second = dequantised(weights.w2[slot].cpu(), of(weights.w2_scales), weights.codec)
        return Matrices(first, second, of(weights.bias1), of(weights.bias2))

    return build


def experts_expected(
    rows: torch.Tensor,
    ids: Sequence[Sequence[int]],
    weights: torch.Tensor,
    experts: Experts,
    numerics: ExpertNumerics,
    dtype: torch.dtype,
    *,
    slot_of: Sequence[int] | None = None,
    quantised: bool = False,
) -> Expected:
    """Output of the experts of one rank.

    Args:
        rows: ``[n, H]``, finite.
        ids: ``ids[token][slot]``, global.
        weights: ``[n, k]`` routing weights.
        experts: by local slot.
        numerics: rounding points.
        dtype: element type of rows and output.
        slot_of: local slot of each global id, -1 where not local; None: the ids are slots.
        quantised: the rows are dequantised codes of a wire, with a weight on the input in them: neither
            ``input_codec`` nor that weight is applied again.

    Raises:
        ValueError: what :func:`layer_expected` raises.
    """
    if slot_of is None and not isinstance(experts, ExpertWeights):
        raise ValueError("slot_of is None and experts are a function; without weights to count, give slot_of")
    count = experts.experts if isinstance(experts, ExpertWeights) else 0
    held = list(range(count)) if slot_of is None else list(slot_of)
    local = [[held[e] if 0 <= e < len(held) else -1 for e in row] for row in ids]
    return layer_expected(
        rows,
        local,
        weights,
        experts,
        numerics,
        owner=lambda slot: 0,
        world_size=1,
        dtype=dtype,
        combine=False,
        quantised=quantised,
    )


def layer_expected(
    rows: torch.Tensor,
    routing: Sequence[Sequence[int]],
    weights: torch.Tensor,
    experts: Experts,
    numerics: ExpertNumerics,
    *,
    owner: Callable[[int], int] | Sequence[int],
    world_size: int,
    dtype: torch.dtype,
    wire: Codec | None = None,
    nodes: int = 1,
    every_addition_rounds: bool = False,
    shared: Shared | None = None,
    combine: bool = True,
    quantised: bool = False,
) -> Expected:
    """Output of the layer for the tokens of one source rank.

    Args:
        rows: ``[n, H]``, finite.
        routing: ``routing[token][slot]`` expert ids; negative ones, and those without an owner, name no expert.
        weights: ``[n, k]`` routing weights.
        experts: every expert by id, or a function that builds one; only those hit are built.
        numerics: rounding points of the experts, the same on every rank.
        owner: rank that computes each id, -1 for none; ids beyond a sequence have none.
        world_size: W.
        dtype: element type of rows, of what a rank sends back and of the result.
        wire: quantiser of the rows at their source, in place of the numerics' ``input_codec``; None: rows travel as
            they are. A weight on the input is applied before it.
        nodes: levels of the sum over ranks; ranks of a node are consecutive.
        every_addition_rounds: the sum over ranks rounds to ``dtype`` after every addition.
        shared: experts apart from the routed ones, or None.
        combine: False for one rank's experts alone.
        quantised: the rows are dequantised codes already, with a weight on the input in them.

    Returns:
        Expected values ``[n, H]``; its ``weights`` are those of :func:`reference.oracle.layer_output`.

    Raises:
        ValueError: a codec with scales of several rows, or given by the caller; the weight on the input of more than
            one slot; biases with the weight before the activation, of which libraries make different things; an
            element type without a model; no combine with more than one rank; nodes that do not divide the ranks.
    """
    n, hidden = rows.shape
    top_k = weights.shape[1]
    _check(numerics, wire, dtype, world_size, nodes, combine, top_k)
    build = decoded(experts) if isinstance(experts, ExpertWeights) else experts
    at_once = max(1, _CHUNK // max(1, top_k * hidden))
    if n > at_once:
        some = partial(
            layer_expected,
            experts=build,
            numerics=numerics,
            owner=owner,
            world_size=world_size,
            dtype=dtype,
            wire=wire,
            nodes=nodes,
            every_addition_rounds=every_addition_rounds,
            shared=shared,
            combine=combine,
            quantised=quantised,
        )
        cuts = [slice(start, start + at_once) for start in range(0, n, at_once)]
        parts = [some(rows[cut], routing[cut], weights[cut]) for cut in cuts]
        return Expected(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value", "lower", "upper", "weights")))
    element, x, weight = _ELEMENTS[dtype], rows.double().cpu(), weights.double().cpu()
    sent, coded = Range.point(x), wire is not None or quantised
    if numerics.weight_stage is WeightStage.ON_INPUT and not quantised:
        # A product of two numbers of the element type.
        sent = Range.point(x * nearest(weight, element)).stored(element)
    if wire is not None:
        sent = requantised(sent, wire)
    ranks = _by_rank(routing, owner, world_size)
    levels = _Sum(n, hidden)
    reached = torch.zeros(n, 1, dtype=torch.float64)
    per_node = world_size // nodes
    for node in range(nodes):
        here = _Sum(n, hidden)
        for rank in range(node * per_node, (node + 1) * per_node):
            slots = ranks.get(rank)
            if slots:
                stored, hit = _on_one_rank(sent, slots, weight, build, numerics, element, coded)
                here.add(stored, hit)
        reached += here.count
        if nodes > 1:
            levels.add(here.total(FLOAT32, element), (here.count > 0).double())
        else:
            levels = here
    out = levels.total(element if every_addition_rounds else FLOAT32, element) if combine else levels.plain()
    if shared is not None:
        alone = experts_expected(
            rows,
            [list(range(shared.count))] * n,
            torch.ones(n, shared.count),
            shared.experts,
            shared.numerics,
            dtype,
            slot_of=range(shared.count),
        )
        ends = [
            a + b for a, b in zip((out.value, out.low, out.high), (alone.value, alone.lower, alone.upper), strict=True)
        ]
        out = Range(*ends).stored(element)
    return Expected(out.value.clamp(out.low, out.high), out.low, out.high, reached * weight)


def _check(
    numerics: ExpertNumerics,
    wire: Codec | None,
    dtype: torch.dtype,
    world_size: int,
    nodes: int,
    combine: bool,
    top_k: int,
) -> None:
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype is {dtype}; the oracle knows {', '.join(str(known) for known in _ELEMENTS)}")
    if nodes < 1 or world_size % nodes:
        raise ValueError(f"nodes is {nodes}; it must divide the {world_size} ranks")
    if not combine and world_size > 1:
        raise ValueError(f"world_size is {world_size} without a combine; ask for one rank's experts at a time")
    for codec in (wire, numerics.input_codec, numerics.intermediate_codec):
        if codec is not None and (codec.static or codec.granularity not in (Granularity.TOKEN, Granularity.GROUP)):
            raise ValueError(
                f"an activation codec is {'static' if codec.static else 'per ' + codec.granularity.value}; the oracle "
                f"knows scales of one row or its groups, computed from it"
            )
    if numerics.weight_stage is WeightStage.ON_INPUT and top_k != 1:
        raise ValueError(f"top_k is {top_k} with the weight on the input; a row carries the weight of one expert")


def _by_rank(
    routing: Sequence[Sequence[int]], owner: Callable[[int], int] | Sequence[int], world_size: int
) -> dict[int, list[tuple[int, int, int]]]:
    """(expert, token, slot) of each rank, ascending."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for token, row in enumerate(routing):
        for slot, expert in enumerate(row):
            if expert < 0 or (not callable(owner) and expert >= len(owner)):
                continue
            rank = owner(expert) if callable(owner) else owner[expert]
            if rank >= world_size:
                raise ValueError(f"expert {expert} is owned by rank {rank} of {world_size}; owners are below the ranks")
            if rank >= 0:
                found.setdefault(rank, []).append((expert, token, slot))
    return {rank: sorted(slots) for rank, slots in found.items()}


class _Sum:
    """Sum of ranges by row, and how many of them each row has."""

    def __init__(self, rows: int, hidden: int) -> None:
        self.ends = [torch.zeros(rows, hidden, dtype=torch.float64) for _ in range(3)]
        self.above, self.below = (torch.zeros(rows, hidden, dtype=torch.float64) for _ in range(2))
        self.count = torch.zeros(rows, 1, dtype=torch.float64)

    def add(self, terms: Range, present: torch.Tensor) -> None:
        """One term for each row, exactly zero where not ``present [rows, 1]``."""
        for total, end in zip(self.ends, (terms.value, terms.low, terms.high), strict=True):
            total.add_(end)
        self.above += terms.high.clamp(min=0)
        self.below += terms.low.clamp(max=0)
        self.count += present

    def scatter(self, terms: Range, rows: torch.Tensor, parts: int, magnitude: torch.Tensor) -> None:
        """Term i, of so many parts whose magnitudes add up to no more than ``magnitude``, to row ``rows[i]``."""
        for total, end in zip(self.ends, (terms.value, terms.low, terms.high), strict=True):
            total.index_add_(0, rows, end)
        above, below = terms.high.clamp(min=0), terms.low.clamp(max=0)
        if parts > 1:
            above, below = (magnitude + terms.high) / 2, (terms.low - magnitude) / 2
        self.above.index_add_(0, rows, above)
        self.below.index_add_(0, rows, below)
        self.count.index_add_(0, rows, torch.full((len(rows), 1), float(parts), dtype=torch.float64))

    def plain(self) -> Range:
        """Of at most one term, itself."""
        return Range(*self.ends)

    def total(self, accumulate: Format, store: Format, ulps: float = 0.5) -> Range:
        """Added up in any order, each addition rounded to ``accumulate``, then stored.

        A partial sum of exact terms lies between those of the negative and of the positive ones; with its roundings, of
        which each is at most half a spacing at M, in ``[-M, M]``, ``M = max / (1 - c u)``.
        """
        unit = 2.0 ** -(accumulate.mantissa_bits + 1)
        most = torch.maximum(self.above, -self.below) * (1 + 2.0**-40) / (1 - self.count * unit)
        slack = (self.count - 2).clamp(min=0) * spacing(most, accumulate) / 2
        slack = torch.where(most > 0, slack, 0.0)
        return self.plain().off(slack + underflow(slack)).stored(FLOAT32).stored(accumulate).stored(store, ulps)


def _on_one_rank(
    x: Range,
    slots: list[tuple[int, int, int]],
    weights: torch.Tensor,
    build: Callable[[int], Matrices],
    numerics: ExpertNumerics,
    element: Format,
    quantised: bool,
) -> tuple[Range, torch.Tensor]:
    """What one rank makes of its slots: a row for each token, and ``[n, 1]`` which tokens have any."""
    token = torch.tensor([t for _, t, _ in slots])
    weight = weights[token, torch.tensor([j for _, _, j in slots])].unsqueeze(1)
    places: dict[int, list[int]] = {}
    for place, (expert, _, _) in enumerate(slots):
        places.setdefault(expert, []).append(place)
    parts = [(build(expert), slice(place[0], place[-1] + 1)) for expert, place in places.items()]
    stage = numerics.weight_stage
    if numerics.input_codec is not None and not quantised:
        x = requantised(x, numerics.input_codec)
    x = x.rows(token)
    if stage is WeightStage.BEFORE_ACTIVATION and any(part.bias1 is not None for part, _ in parts):
        raise ValueError("biases with the weight before the activation: libraries disagree which comes first")
    ulps = numerics.store_ulps
    late = [None if numerics.late_bias else m.bias1 for m, _ in parts]
    product, magnitude = gemm(x, [(m.w1, bias, at) for (m, at), bias in zip(parts, late, strict=True)], numerics)
    if numerics.gemm1_partial is not None:
        added = numerics.gemm1_store or FLOAT32
        slack = of_parts(magnitude, numerics.gemm1_parts, numerics.gemm1_partial, added, ulps)
        product = product.off(slack).stored(added, ulps)
    if stage is WeightStage.BEFORE_ACTIVATION:
        product = product.times(weight)
    product = product.stored(numerics.gemm1_store, ulps)
    if numerics.late_bias and parts[0][0].bias1 is not None:
        of_row = torch.cat([m.bias1.expand(at.stop - at.start, -1) for m, at in parts if m.bias1 is not None])
        product = product.each(lambda end: end + of_row)
        product = product.off(product.size() * ROUNDING)
    middle = product.value.shape[1] // 2
    between = activated(product.each(lambda end: end[:, :middle]), product.each(lambda end: end[:, middle:]), numerics)
    between = between.stored(numerics.intermediate_store, ulps)
    if numerics.intermediate_codec is not None:
        between = requantised(between, numerics.intermediate_codec, numerics.intermediate_any_group)
    out, magnitude = gemm(between, [(m.w2, m.bias2, at) for m, at in parts], numerics)
    if stage is WeightStage.AFTER_W2:
        out, magnitude = out.times(weight), magnitude * weight.abs() * (1 + 2 * ROUNDING)
    if numerics.inner_parts > 1:
        slack = of_parts(magnitude, numerics.inner_parts, element, None, ulps)
        out, magnitude = out.off(slack), magnitude + slack
    elif numerics.slot_sum is not SlotSum.FLOAT32:
        out = out.stored(element, ulps)
    total = _Sum(len(weights), out.value.shape[1])
    total.scatter(out, token, numerics.inner_parts, magnitude)
    if numerics.slot_sum is SlotSum.ATOMIC:
        return total.total(element, element), (total.count > 0).double()
    return total.total(FLOAT32, element, ulps), (total.count > 0).double()
