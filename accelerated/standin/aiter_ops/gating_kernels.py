"""Double of AITER's ``topk_gating`` kernels in float32 torch arithmetic.

Scope: csrc/include/topk_gating_kernels.cuh of AITER e4048607: which kernel a call takes, its scores, NaN logits last,
the weight kept beside the choice or recovered from it, the floor of the sum. Of equal choices within a lane the first
wins here, where a sorting network leaves it open. A pass proves nothing about AMD hardware.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import defects, device, routing_lanes
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime
from accelerated.standin.aiter_ops.routing_kernels import Pair, read, reciprocal

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
#: What the sum of chosen weights, and that of a softmax, is raised to.
SUM_FLOOR = 1e-20
_REGISTER_EXPERTS = (64, 128, 256, 384)


def gating(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, renormalise: bool, scale: float, function: str
) -> Pair:
    """``topk_gating_launch``."""
    x, softmax = read(logits), function == "softmax"
    score = _softmax(x) if softmax else _score(x, function)
    offset = None if bias is None else device.flush(bias.float())
    choice = score if offset is None else score + offset
    # A NaN logit has a score of its own in the softmax, which its flag keeps from being chosen.
    choice = choice.masked_fill(x.isnan() if softmax else choice.isnan(), -torch.inf)
    name, lanes = _kernel(logits.shape[1], top_k, len(logits), softmax)
    if name == "cursor":
        ids, values = _by_cursor(choice, score, top_k)
    else:
        agree = name == "wave" or not defects.present(defects.TIES_LOST)
        ids, values = _by_rounds(choice, score, top_k, lanes, name == "scan", agree)
        if offset is not None and name in ("wave", "rows"):
            values = torch.where(ids < 0, -torch.inf, choice.gather(1, ids.clamp(min=0)) - offset[ids.clamp(min=0)])
        # A lane that finds nothing left names the round it is in.
        ids = torch.where(ids < 0, torch.arange(top_k, device=ids.device), ids)
    factor = scale / values.sum(1, keepdim=True).clamp(min=SUM_FLOOR) if renormalise else values.new_tensor(scale)
    return device.flush(values * factor), ids.int()


def _score(x: torch.Tensor, function: str) -> torch.Tensor:
    if function == "sigmoid":
        return reciprocal(1.0 + device.flush(torch.exp2(-x * LOG2E)))
    x = torch.where(x > torch.finfo(torch.float32).max, torch.finfo(torch.float32).max, x)
    soft = torch.log2(1.0 + device.flush(torch.exp2(x * LOG2E))) * LN2
    return torch.where(x > 20.0, x, device.flush(soft)).sqrt()


def _softmax(x: torch.Tensor) -> torch.Tensor:
    """NaN logits are left out, and of +inf ones each has as much as the largest."""
    known = x.masked_fill(x.isnan(), -torch.inf)
    away = known - known.amax(1, keepdim=True)
    terms = torch.where(away.isnan(), 1.0, device.flush(torch.exp2(away * LOG2E)))
    return device.flush(terms * reciprocal(terms.sum(1, keepdim=True).clamp(min=SUM_FLOOR)))


def _kernel(experts: int, top_k: int, rows: int, softmax: bool) -> tuple[str, int]:
    """Kernel and lanes of a row.

    ``cursor``: each lane sorts its experts. ``scan``: each lane scans consecutive ones. ``rows``: several rows share a
    wave and its memory. ``wave``: one row does.
    """
    wave = routing_lanes.wave_size()
    if softmax and experts in (*_REGISTER_EXPERTS, 640) and (experts != 640 or rows <= 2048):
        return "scan", wave // _scanned_rows(experts, top_k, rows)
    if not softmax and experts in _REGISTER_EXPERTS:
        if rows >= 4096 and experts == 64 and top_k <= 8:
            return "strided", wave // 8
        if rows >= 4096 and experts == 128 and top_k <= 16 and get_gfx_runtime() == "gfx942":
            return "strided", wave // 4
        return "cursor", wave
    for most_k, most_experts, least_rows, together in ((8, 64, 1024, 8), (16, 128, 1024, 4), (32, 256, 4096, 2)):
        if top_k <= most_k and experts <= most_experts and rows >= least_rows:
            return "rows", wave // together
    return "wave", wave


def _scanned_rows(experts: int, top_k: int, rows: int) -> int:
    """Rows that one wave scans."""
    if rows < 1024 or top_k > 16 or experts == 384:
        return 1
    if experts == 640:
        return 2 if top_k <= 8 else 1
    if top_k > 8:
        return 4
    if experts == 64:
        return 16 if top_k <= 4 else 8
    return 8 if experts == 128 else 4


def _by_cursor(choice: torch.Tensor, score: torch.Tensor, top_k: int) -> Pair:
    """``topk_gating_kernel_opt``: lanes offer their largest, the first of equal lanes wins; ids may repeat at the end.

    A lane with nothing left offers expert 0 at -inf.
    """
    lanes = routing_lanes.wave_size()
    count = len(choice)
    offered = choice.view(count, -1, lanes).transpose(1, 2)
    order = torch.sort(offered, dim=2, descending=True, stable=True).indices
    values = torch.nn.functional.pad(offered.gather(2, order), (0, 1), value=-torch.inf)
    names = order * lanes + torch.arange(lanes, device=choice.device).view(1, lanes, 1)
    names = torch.nn.functional.pad(names, (0, 1), value=-1)
    cursor = torch.zeros(count, lanes, 1, dtype=torch.int64, device=choice.device)
    ids, weights = [], []
    for _ in range(top_k):
        value, name = values.gather(2, cursor).squeeze(2), names.gather(2, cursor).squeeze(2)
        winner = (value == value.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
        expert = name.clamp(min=0).gather(1, winner)
        won = name == expert
        ids.append(expert)
        weights.append(torch.where(won.any(1, keepdim=True), score.gather(1, expert), 0.0))
        cursor = cursor + won.unsqueeze(2).long()
    return torch.cat(ids, 1), torch.cat(weights, 1)


def _by_rounds(
    choice: torch.Tensor, score: torch.Tensor, top_k: int, lanes: int, consecutive: bool, agree: bool
) -> Pair:
    """The other kernels: in each round the largest choice wins and is struck out; id -1 where nothing is left.

    A lane has consecutive experts, or every ``lanes``-th. With ``agree`` all lanes name the same winner, of equal
    choices the first. Without, each lane keeps its own of two equal ones, all owners strike theirs out, and lane k
    names the winner of round k.
    """
    count, experts = choice.shape
    per_lane = -(-experts // lanes)
    names = torch.arange(per_lane * lanes, device=choice.device)
    names = names.view(lanes, per_lane) if consecutive else names.view(per_lane, lanes).T
    left = torch.nn.functional.pad(choice, (0, per_lane * lanes - experts), value=-torch.inf)[:, names]
    names = names.expand(count, -1, -1)
    ids, weights = [], []
    for index in range(top_k):
        value, place = routing_lanes.first_of(left, names, -torch.inf)
        expert = torch.where(place < 0, -1, names.gather(2, place.clamp(min=0).unsqueeze(2)).squeeze(2))
        takes = routing_lanes.larger_or_first if agree else routing_lanes.larger
        _, expert = routing_lanes.butterfly(value, expert, takes)
        named = expert[:, index % lanes]
        ids.append(named)
        weights.append(torch.where(named < 0, -torch.inf, score.gather(1, named.clamp(min=0).unsqueeze(1)).squeeze(1)))
        left = left.masked_fill(names == expert.unsqueeze(2), -torch.inf)
    return torch.stack(ids, 1), torch.stack(weights, 1)
