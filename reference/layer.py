"""The whole layer on W ranks: quantise, dispatch, experts, combine, shared experts; and the interval of every result.

Semantics (vLLM 0.33.0 fused_moe, its flow of one layer)::

    codes, scales = quantise(rows)                     where the dispatch has a wire
    received      = dispatch(codes, scales, ids, weights)
    answers       = experts(received)                  stored in the element type
    output        = combine(answers)                   a plain sum over the ranks that a token went to
    output        = round(output + shared(rows))       where there are shared experts apart

:func:`masked_all_reduce_layer` is the same without an exchange: every rank has every token and computes its own
experts, and the ranks' outputs are added (tensor and expert parallelism without all-to-all).

Acceptance. The rank that holds the experts computes it, for rows that any legal quantiser of the wire may have sent,
from the rows before quantisation, which travel along; it returns with the answers and is summed as they are. What an
accepted result does not prove: that a library's wire carried the codes of its own quantiser, or anything about the
order of memory between ranks. Not covered: rows with NaN or infinities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from reference import experts
from reference.bounds import combine_acceptance, quantise_dequantise
from reference.codecs import Codec, Granularity, ScaleFormat
from reference.dispatch_combine import combine, dispatch
from reference.expert_gemm import Dense, grid_of
from reference.expert_numerics import ExpertNumerics, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import E2M1, E8M0_BIAS, E8M0_NAN
from reference.intervals import Interval
from reference.layouts import pack_e2m1, unpack_e2m1
from reference.quantisation import Quantised, dequantise, quantise
from reference.rounding import decode_e8m0, format_of, round_to


@dataclass
class LayerResult:
    """What the tokens of one rank get.

    Attributes:
        output: ``[n, H]`` in the element type, one legal execution.
        acceptance: ``[n, H]``, every legal result.
    """

    output: torch.Tensor
    acceptance: Interval


@dataclass
class Shared:
    """Experts that every token passes with weight one on its own rank, beside the exchange.

    Attributes:
        weights: of S experts.
        numerics: theirs; the routing weight, being one, must be AFTER_W2.
    """

    weights: ExpertWeights | Dense
    numerics: ExpertNumerics


def layer(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights | Dense,
    slot_of: torch.Tensor,
    *,
    numerics: ExpertNumerics,
    experts_per_rank: int,
    group: dist.ProcessGroup,
    wire: Codec | None = None,
    nodes: int = 1,
    accumulation_element: bool = False,
    shared: Shared | None = None,
) -> LayerResult:
    """One layer through dispatch and combine. Collective; 3 collectives, whatever the arguments.

    Args:
        rows: ``[n, H]`` in the element type; n may differ per rank and may be 0.
        ids: ``[n, k]`` int32 or int64; the owner of an expert is ``id // experts_per_rank``, and ids that have none
            contribute nothing.
        weights: ``[n, k]`` float32.
        local: this rank's experts by local slot.
        slot_of: int64 ``[ids]``, local slot on this rank, -1 where another rank holds the expert.
        numerics: rounding points of the experts.
        experts_per_rank: experts that each rank owns.
        group: process group of the W ranks.
        wire: quantiser of the rows, per token or per group, before the dispatch; then the experts' ``input_codec`` is
            not applied. A routing weight ON_INPUT goes in before it.
        nodes: rounding levels of the combine (:func:`reference.dispatch_combine.combine`).
        accumulation_element: every addition of the combine rounds to the element type.
        shared: experts of every token, added to the combined output with one more rounding.

    Raises:
        ValueError: as :func:`reference.experts.forward`, :func:`reference.dispatch_combine.dispatch` and
            :func:`reference.bounds.combine_acceptance` do; or a wire with static scales, or scales of several rows.
    """
    dtype, hidden = rows.dtype, rows.shape[1]
    on_wire, scales = _bytes_of(rows), None
    if wire is not None:
        if wire.static or wire.granularity not in (Granularity.TOKEN, Granularity.GROUP):
            kind = "static" if wire.static else "dynamic"
            raise ValueError(
                f"the wire has {kind} {wire.granularity.value} scales; give dynamic scales of a token or of its groups"
            )
        given = replace(numerics, input_codec=None)
        codes, scales = pack_wire(quantise(experts.prepare(rows, weights, given, dtype), wire), wire)
        on_wire = torch.cat([codes, on_wire], 1)
    sent = dispatch(on_wire, ids, weights, scales, experts_per_rank=experts_per_rank, group=group)
    original = sent.rows[:, -hidden * rows.element_size() :].clone(memory_format=torch.contiguous_format).view(dtype)
    original = original.reshape(-1, hidden)
    x, accepted_x = original, Interval.exact(original)
    if wire is not None:
        assert sent.scales is not None
        x = dequantise(unpack_wire(sent.rows[:, : codes.shape[1]], sent.scales, wire, hidden), wire)
        before = experts.prepared(accepted_x, sent.weights, replace(numerics, input_codec=None), dtype)
        accepted_x = quantise_dequantise(before, wire)
    dense = local if isinstance(local, Dense) else Dense(local)
    arguments = (sent.ids, sent.weights, dense, slot_of, numerics, dtype)
    answers = experts.forward(x, *arguments, quantised=wire is not None)
    accepted = experts.accepted(accepted_x, *arguments, quantised=wire is not None)
    back = combine(answers, sent, beside=_ends(accepted, dtype), nodes=nodes, group=group)
    assert back.beside is not None
    output = _added(back.terms, dtype).to(dtype) if accumulation_element else back.output
    acceptance = _summed(back.beside, back.destinations, dtype, nodes, accumulation_element)
    return _with_shared(LayerResult(output, acceptance), rows, shared)


def masked_all_reduce_layer(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights | Dense,
    slot_of: torch.Tensor,
    *,
    numerics: ExpertNumerics,
    group: dist.ProcessGroup,
    accumulation_element: bool = False,
    shared: Shared | None = None,
) -> LayerResult:
    """The layer of ranks that all have every token: own experts, then a sum over ranks. Collective; 1 collective.

    The ranks' outputs are stored in the element type and added in any order, in float32 and rounded once, or with
    ``accumulation_element`` in the element type. Arguments as for :func:`layer`; ``rows``, ``ids`` and ``weights`` are
    the same on every rank.

    Raises:
        ValueError: as :func:`reference.experts.forward` does.
    """
    dtype = rows.dtype
    dense = local if isinstance(local, Dense) else Dense(local)
    arguments = (ids, weights, dense, slot_of, numerics, dtype)
    own = experts.forward(rows, *arguments)
    ends = _ends(experts.accepted(Interval.exact(rows), *arguments), dtype)
    mine = torch.cat([own, ends], 1)
    world_size = dist.get_world_size(group)
    gathered = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(gathered, mine.contiguous(), group=group)
    terms = torch.stack(gathered).float()
    hidden = rows.shape[1]
    everywhere = torch.ones(rows.shape[0], world_size, dtype=torch.bool, device=rows.device)
    output = _added(terms[..., :hidden], dtype if accumulation_element else torch.float32)
    acceptance = _summed(terms[..., hidden:], everywhere, dtype, 1, accumulation_element)
    return _with_shared(LayerResult(round_to(output, dtype).to(dtype), acceptance), rows, shared)


def pack_wire(quantised: Quantised, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as bytes ``[n, B]`` uint8 and scales ``[n, G]``, float32 or E8M0 bytes, as a dispatch carries them."""
    packed = pack_e2m1(quantised.codes) if codec.payload is E2M1 else quantised.codes.to(torch.uint8)
    if codec.scale_format is not ScaleFormat.E8M0:
        return packed, quantised.scales.float()
    exponent = torch.frexp(quantised.scales).exponent - 1 + E8M0_BIAS
    known = quantised.scales.isfinite()
    return packed, torch.where(known, exponent, E8M0_NAN).to(torch.uint8)


def unpack_wire(packed: torch.Tensor, scales: torch.Tensor, codec: Codec, columns: int) -> Quantised:
    """What :func:`pack_wire` packed: codes ``[n, columns]``."""
    codes = unpack_e2m1(packed)[:, :columns] if codec.payload is E2M1 else packed.long()
    return Quantised(codes, decode_e8m0(scales) if codec.scale_format is ScaleFormat.E8M0 else scales.double())


def _bytes_of(rows: torch.Tensor) -> torch.Tensor:
    """``[n, H]`` as ``[n, B]`` uint8."""
    return rows.contiguous().flatten().view(torch.uint8).reshape(rows.shape[0], rows.shape[1] * rows.element_size())


def _ends(accepted: Interval, dtype: torch.dtype) -> torch.Tensor:
    """Value and ends side by side, ``[R, 3 H]``: all are numbers of the element type, so it holds them exactly."""
    return torch.cat([accepted.value, accepted.lower, accepted.upper], 1).to(dtype)


def _added(terms: torch.Tensor, accumulate: torch.dtype) -> torch.Tensor:
    """Float32 terms ``[W, n, H]`` added in the order of the ranks, each sum rounded to ``accumulate``."""
    total = terms[0]
    for term in terms[1:]:
        total = round_to(total + term, accumulate)
    return total


def _summed(ends: torch.Tensor, destinations: torch.Tensor, dtype: torch.dtype, nodes: int, element: bool) -> Interval:
    """Acceptance of the sum over ranks of the intervals ``[W, n, 3 H]`` that :func:`_ends` makes."""
    value, lower, upper = ends.double().chunk(3, -1)
    # Terms that are known exactly, and small multiples of one power of two, have one sum.
    grid = torch.where((lower == upper).all(0), grid_of(value).amin(0), 0.0)
    terms = Interval(value, lower, upper)
    return combine_acceptance(terms, destinations, dtype, nodes=nodes, element_accumulation=element, grid=grid)


def _with_shared(routed: LayerResult, rows: torch.Tensor, shared: Shared | None) -> LayerResult:
    """The shared experts' output, stored in the element type, added with one rounding.

    Raises:
        ValueError: their routing weight, one, would go elsewhere than on their output.
    """
    if shared is None:
        return routed
    if shared.numerics.weight_stage is not WeightStage.AFTER_W2:
        raise ValueError(f"shared experts with the weight {shared.numerics.weight_stage.name}; it is 1, use AFTER_W2")
    dense = shared.weights if isinstance(shared.weights, Dense) else Dense(shared.weights)
    dtype, device = rows.dtype, rows.device
    slots = torch.arange(dense.local.experts, device=device)
    ids = slots.expand(rows.shape[0], -1)
    ones = torch.ones(ids.shape, device=device)
    arguments = (ids, ones, dense, slots, shared.numerics, dtype)
    output = round_to(routed.output.float() + experts.forward(rows, *arguments).float(), dtype).to(dtype)
    acceptance = routed.acceptance + experts.accepted(Interval.exact(rows), *arguments)
    return LayerResult(output, acceptance.store(format_of(dtype)))
