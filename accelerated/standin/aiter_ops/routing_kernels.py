"""Double of AITER's softmax, grouped and fused-gate routing kernels in float32 torch arithmetic.

Scope: csrc/kernels/topk_softmax_kernels.cu, topk_softmax_kernels_group.cu and moe_fused_gate.cu of AITER e4048607, lane
by lane where lanes may disagree; ``topk_gating`` is in :mod:`accelerated.standin.aiter_ops.gating_kernels`. Nothing
synchronises with the host. The exponential, reciprocal and logarithm instructions may be one unit off where these are
not. A pass proves nothing about AMD hardware.
"""

from __future__ import annotations

import math

import torch

from accelerated.standin.aiter_ops import defects, device, routing_lanes

Pair = tuple[torch.Tensor, torch.Tensor]

_LOWEST = -torch.finfo(torch.float32).max
#: Threads of a block of the kernels for any number of experts.
_BLOCK = 256


def read(logits: torch.Tensor) -> torch.Tensor:
    """Logits as float32, subnormals flushed."""
    return device.flush(logits.float())


def reciprocal(value: torch.Tensor) -> torch.Tensor:
    """``v_rcp_f32``: of anything too large for a normal reciprocal, 0."""
    return device.flush(1.0 / value)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``rcp(1 + exp2(-log2 e x))``, the argument rounded once."""
    argument = (x.double() * -math.log2(math.e)).float()
    return reciprocal(1.0 + device.flush(torch.exp2(argument)))


# --------------------------------------------------------------------------------------------------------- softmax
def warp_softmax(logits: torch.Tensor, top_k: int, renormalise: bool) -> Pair:
    """``topkGatingSoftmax``: a row is shared by 1 to 32 lanes; logits are ranked, and a chosen one becomes -inf.

    The first logit of a lane stays its candidate if it is NaN, and a lane whose candidate is NaN hears nothing from its
    neighbours. The row's first lane writes what it has heard.
    """
    experts = logits.shape[1]
    per_lane = min(32 if experts < 512 else 64, logits.element_size() * experts) // logits.element_size()
    chunks = read(logits).reshape(len(logits), experts // per_lane, per_lane).clone()
    names = torch.arange(experts, device=logits.device).view(1, *chunks.shape[1:]).expand_as(chunks)
    most, weights, ids = None, [], []
    for _ in range(top_k):
        value, place = routing_lanes.first_of(chunks, names, math.nan)
        value, expert = routing_lanes.exchange(
            value, names.gather(2, place.unsqueeze(2)).squeeze(2), routing_lanes.larger_or_first
        )
        if value.shape[1] == 32:
            value, expert = value[:, -1:].expand_as(value), expert[:, -1:].expand_as(expert)
        most = value if most is None else most
        weights.append(device.flush(torch.exp(value[:, 0] - most[:, 0])))
        ids.append(expert[:, 0])
        # A lane forgets the expert that it believes was chosen, if it is its own.
        chunks = chunks.masked_fill(names == expert.unsqueeze(2), -torch.inf)
    assert most is not None
    chosen, total = torch.stack(weights, 1), torch.stack(weights, 1).sum(1, keepdim=True)
    if not renormalise:
        total = total + device.flush(torch.exp(chunks - most.unsqueeze(2))).sum((1, 2)).unsqueeze(1)
    return torch.where(total != 0, device.flush(chosen * (1.0 / total)), chosen), torch.stack(ids, 1).int()


def block_softmax(logits: torch.Tensor, top_k: int, renormalise: bool) -> Pair:
    """``moeSoftmax`` and ``moeTopK``: 256 threads of a row rank float32 probabilities from -1 up; NaN ranks first."""
    x = read(logits)
    largest = x.masked_fill(x.isnan(), _LOWEST).amax(1, keepdim=True).clamp(min=_LOWEST)
    terms = device.flush(torch.exp(x - largest))
    scores = device.flush(terms * (1.0 / terms.sum(1, keepdim=True)))
    threads = -(-scores.shape[1] // _BLOCK) * _BLOCK
    padded = torch.nn.functional.pad(scores, (0, threads - scores.shape[1]), value=-1.0)
    weights, ids = [], []
    taken = torch.zeros_like(padded, dtype=torch.bool)
    for _ in range(top_k):
        value, expert = _block_argmax(padded, taken | (padded == -1.0))
        weights.append(value)
        ids.append(expert)
        taken = taken.scatter(1, expert.unsqueeze(1), True)
    chosen = torch.stack(weights, 1)
    if renormalise:
        total = chosen.sum(1, keepdim=True)
        chosen = torch.where(total != 0, device.flush(chosen * (1.0 / total)), chosen)
    return chosen, torch.stack(ids, 1).int()


def _block_argmax(scores: torch.Tensor, skipped: torch.Tensor) -> Pair:
    """Value and expert ``[M]``; a thread begins with expert 0 at -1, and skips what was chosen before."""
    rounds = scores.view(len(scores), -1, _BLOCK)
    skip = skipped.view_as(rounds)
    value = torch.full_like(rounds[:, 0], -1.0)
    key = torch.zeros_like(value, dtype=torch.int64)
    for index in range(rounds.shape[1]):
        expert = (torch.arange(_BLOCK, device=scores.device) + index * _BLOCK).expand_as(key)
        seen = torch.where(skip[:, index], value, rounds[:, index])
        expert = torch.where(skip[:, index], key, expert)
        keep = (value > seen) | ((seen == value) & (key < expert))
        value, key = torch.where(keep, value, seen), torch.where(keep, key, expert)
    waves = [
        routing_lanes.exchange(v, k, routing_lanes.unless_smaller)
        for v, k in zip(value.split(64, 1), key.split(64, 1), strict=True)
    ]
    value, key = torch.stack([v[:, -1] for v, _ in waves], 1), torch.stack([k[:, -1] for _, k in waves], 1)
    value, key = routing_lanes.exchange(value, key, routing_lanes.unless_smaller)
    return value[:, 0], key[:, 0]


def ranked_softmax(logits: torch.Tensor, top_k: int, renormalise: bool) -> Pair:
    """What stands for the assembled kernels: logits are ranked, NaN last, of equal ones the first."""
    x = read(logits)
    ids = torch.sort(x.masked_fill(x.isnan(), -torch.inf), dim=1, descending=True, stable=True).indices[:, :top_k]
    terms = device.flush(torch.exp(x - x.amax(1, keepdim=True)))
    chosen = terms.gather(1, ids)
    total = (chosen if renormalise else terms).sum(1, keepdim=True)
    return device.flush(chosen * (1.0 / total)), ids.int()


# --------------------------------------------------------------------------------------------------------- grouped
def grouped(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    kept: int,
    top_k: int,
    renormalise: bool,
    softmax: bool,
    scale: float,
) -> Pair:
    """``grouped_topk_kernel``: one wave per row; NaN is larger than nothing, and where nothing is left id k follows."""
    x, experts = read(logits), logits.shape[1]
    vector = {0: 4, 2: 2}.get(experts % 4, 1)
    scores = _softmax(x) if softmax else sigmoid(x)
    weights_of = scores.clone()
    if bias is not None:
        scores = scores + device.flush(bias.float())
    if groups > 1:
        ranks = _group_ranks(scores, groups, bias is not None, vector)
        picked = _leading(ranks, kept)
        if bias is not None:
            # The slot behind the groups' scores, into which the kernel marks a group that it did not find.
            short = (ranks > -torch.inf).sum(1) < kept
            weights_of[:, 0] = weights_of[:, 0].masked_fill(short, -torch.inf)
        group_of = torch.arange(experts, device=x.device) // vector * vector // (experts // groups)
        scores = scores.masked_fill(~(picked | (ranks == -torch.inf))[:, group_of], -torch.inf)
    weights, ids = [], []
    for index in range(top_k):
        value, expert = _wave_argmax(scores, vector, index)
        weights.append(value if bias is None else weights_of.gather(1, expert.unsqueeze(1)).squeeze(1))
        ids.append(expert)
        scores = scores.scatter(1, expert.unsqueeze(1), -torch.inf)
    chosen = torch.stack(weights, 1)
    factor = scale / chosen.sum(1, keepdim=True) if renormalise else chosen.new_tensor(scale)
    return device.flush(chosen * factor), torch.stack(ids, 1).int()


def _softmax(x: torch.Tensor) -> torch.Tensor:
    terms = device.flush(torch.exp(x - x.masked_fill(x.isnan(), -torch.inf).amax(1, keepdim=True)))
    return device.flush(terms / terms.sum(1, keepdim=True))


def _group_ranks(scores: torch.Tensor, groups: int, biased: bool, vector: int) -> torch.Tensor:
    """``[M, G]``: the largest score of each group, or the sum of its two largest."""
    by_group = scores.view(len(scores), groups, -1)
    by_group = by_group.masked_fill(by_group.isnan(), -torch.inf)
    if not biased:
        return by_group.amax(2)
    size = by_group.shape[2]
    place = torch.arange(size, device=scores.device)
    seen = place < size // vector * vector
    lanes = routing_lanes.wave_size() // groups
    if lanes > 8 and defects.present(defects.LANES_APART):
        seen &= place // vector % lanes == 0
    two = by_group.masked_fill(~seen, -torch.inf).topk(min(2, size), dim=2).values
    return two.sum(2) if size > 1 else two[:, :, 0] - torch.inf


def _leading(ranks: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` largest ``[M, G]``, of equal ones the first; -inf is never among them."""
    order = torch.sort(ranks, dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, order, True) & (ranks > -torch.inf)


def _wave_argmax(scores: torch.Tensor, vector: int, default: int) -> Pair:
    """Value and expert ``[M]`` that the last lane of a wave ends with; ``default`` at -inf where nothing is left."""
    wave = routing_lanes.wave_size()
    count, experts = scores.shape
    vectors = experts // vector
    rounds = -(-vectors // wave)
    fill = (0, rounds * wave * vector - experts)
    values = torch.nn.functional.pad(scores, fill, value=-torch.inf).view(count, rounds, wave, vector)
    names = torch.arange(rounds * wave * vector, device=scores.device).view(1, rounds, wave, vector)
    values = values.transpose(1, 2).reshape(count, wave, rounds * vector)
    names = names.transpose(1, 2).reshape(1, wave, rounds * vector).expand(count, -1, -1)
    value, place = routing_lanes.first_of(values, names, -math.inf)
    expert = torch.where(place < 0, default, names.gather(2, place.clamp(min=0).unsqueeze(2)).squeeze(2))
    value, expert = routing_lanes.exchange(value, expert, routing_lanes.larger)
    return value[:, -1], expert[:, -1]


def sorted_groups(logits: torch.Tensor, bias: torch.Tensor, renormalise: bool, scale: float) -> Pair:
    """``grouped_topk_opt_sort_kernel``: 256 experts, 4 of 8 groups, 8 chosen, NaN last.

    Those above the eighth largest come in order of their place, then those equal to it. Weights are choices less their
    bias, and without renormalisation the scale is left out.
    """
    offset = device.flush(bias.float())
    choices = sigmoid(read(logits)) + offset
    choices = choices.masked_fill(choices.isnan(), -torch.inf)
    groups = _above_then_equal(choices.view(-1, 8, 32).topk(2, dim=2).values.sum(2), 4)
    names = (groups.unsqueeze(2) * 32 + torch.arange(32, device=logits.device)).flatten(1)
    ids = names.gather(1, _above_then_equal(choices.gather(1, names), 8))
    weights = choices.gather(1, ids) - offset[ids]
    if renormalise:
        weights = weights * scale * reciprocal(weights.sum(1, keepdim=True))
    return device.flush(weights), ids.int()


def _above_then_equal(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places ``[M, count]`` of the largest values: above the last of them first, then equal to it, both ascending."""
    pivot = values.topk(count, dim=1).values[:, -1:]
    rank = torch.where(values > pivot, 0, torch.where(values == pivot, 1, 2))
    return torch.sort(rank, dim=1, stable=True).indices[:, :count]


def fused_gate(logits: torch.Tensor, bias: torch.Tensor, groups: int, kept: int, top_k: int) -> Pair:
    """``moe_fused_gate``: a NaN logit has score 0, ties go to the first expert, and no scale reaches a weight."""
    x = read(logits)
    scores = device.flush(1.0 / (1.0 + torch.exp(-x))).masked_fill(x.isnan(), 0.0)
    choices = (scores + device.flush(bias.float())).view(len(x), groups, -1)
    size = choices.shape[2]
    ranks = choices.topk(min(2, size), dim=2).values.sum(2) + (_LOWEST if size == 1 else 0.0)
    # The smallest groups are left out one by one, of equal ones the first.
    out = torch.sort(ranks, dim=1, stable=True).indices[:, : groups - kept]
    left = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, out, True)
    ranked = choices.masked_fill(left.unsqueeze(2), -torch.inf).flatten(1)
    ids = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    return device.flush(weights / weights.sum(1, keepdim=True)), ids.int()


def tile_sigmoid(logits: torch.Tensor, top_k: int) -> Pair:
    """``topk_sigmoid``'s tile kernel, of equal scores the first; what it does with NaN is not doubled."""
    scores = sigmoid(read(logits))
    order = torch.sort(scores.masked_fill(scores.isnan(), -torch.inf), dim=1, descending=True, stable=True).indices
    return scores.gather(1, order[:, :top_k]), order[:, :top_k].int()
