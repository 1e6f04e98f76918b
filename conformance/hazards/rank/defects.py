"""Probes of defects that leave the process alive: rows, sums and weights that are not what they must be.

Scope: one observation for each hazard of :mod:`conformance.hazards.defects`, on small sizes. Collective: every rank
runs the same calls. A probe that sees nothing says so for these sizes only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from conformance.hazards.protocol import Seen
from conformance.hazards.rank.bench import Bench, seen, seen_of, told, unlike

#: Blocks across nodes, of the operators' 80.
_RDMA: dict[str, Any] = {"gpu_per_node": 2, "rdma_block_num": 8}


def intranode_replay_moves_nothing(bench: Bench) -> Seen:
    """Replay a handle with rows twice as large."""
    op, ids = bench.build(), bench.ids()
    x = bench.rows(4)
    *first, handle = bench.dispatch(op, x, None, None, ids, return_routing=True)
    before, count = first[0].clone(), int(first[4])
    bench.meet()
    new = bench.dispatch(op, 2 * x, None, None, ids, routing=handle)
    wrong = unlike(new[0][:count], 2 * before[:count].float())
    return seen(bool(wrong), f"{len(wrong)} of {count} rows of a replay are not the ones dispatched")


def low_latency_scans_eight_slots(bench: Bench) -> Seen:
    """A token of nine slots, the ninth of which alone names rank 2."""
    op = bench.misuse(bench.build, num_experts_per_rank=4, num_experts_per_token=9)
    wrong = bench.wrong_tokens(op, bench.ids([0, 1, 2, 3, 4, 5, 6, 7, 8]), 3.0, misuse=True)
    return seen(bool(wrong), told("k = 9, the ninth slot alone on rank 2", wrong, 1))


def internode_cap_aliases(bench: Bench) -> Seen:
    """Three rows from one rank where the capped R leaves room for eight."""
    op = bench.build(max_total_recv_tokens=8)  # two rows from each rank
    ids = bench.ids([2, 3], [2, 3], [2, 3])[: 3 * (bench.rank == 0)]
    n = len(ids)
    out, _, _, _, total = bench.dispatch(op, bench.rows(n), bench.weights(n), None, ids)
    got = sorted(out[: int(total), 0].tolist())
    lost = bench.rank == 1 and got != [1.0, 2.0, 3.0]
    return seen(lost, f"3 rows of rank 0 where R = 8: {'not all' if lost else 'all'} received")


def weights_disagree(bench: Bench) -> Seen:
    """Weights cut to the received rows, of which one rank has none."""
    op, ids = bench.build(), bench.ids([0, 2], [4, 1])  # nothing reaches rank 3
    x = bench.rows(2)
    out, out_weights, _, _, total = bench.dispatch(op, x, bench.weights(2), None, ids)
    count = int(total)
    combined, _ = bench.combine(op, out, out_weights[:count], ids)
    wrong = unlike(combined[:2], x.float() * 2)
    return seen(bool(wrong), told(f"weights of {count} received rows", wrong, 2))


def negative_id_is_rank_zero(bench: Bench) -> Seen:
    """A masked slot beside an expert of rank 1, sent by every rank."""
    ids = bench.ids([-1, 3])

    def look(kind: str) -> tuple[bool, str]:
        op = bench.build(kind, **(_RDMA if kind == "InterNodeV1LL" else {}))
        x = bench.rows(1)
        out, out_weights, _, _, total = bench.misuse(bench.dispatch, op, x, bench.weights(1), None, ids)
        count, wanted = int(total), 4 * (bench.rank == 1)
        combined, _ = bench.combine(op, out, out_weights, ids)
        wrong = unlike(combined[:1], x)
        return count != wanted or bool(wrong), f"{kind}: {count} rows received of {wanted}, {len(wrong)} wrong"

    return bench.each_kind(look)


def ids_past_experts(bench: Bench) -> Seen:
    """An id past the last expert beside a valid one."""
    wrong = bench.wrong_tokens(bench.build(), bench.ids([8, 3]), 1.0, misuse=True)
    return seen(bool(wrong), told("id 8 of 8 experts beside a valid one", wrong, 1))


def more_nodes_than_slots(bench: Bench) -> Seen:
    """One slot a token and two nodes."""
    ids = bench.ids([0], [6], [3], [5])

    def look(kind: str) -> tuple[bool, str]:
        op = bench.misuse(bench.build, kind, num_experts_per_token=1, **_RDMA)
        wrong = bench.wrong_tokens(op, ids, 1.0, misuse=True)
        return bool(wrong), told(f"{kind}, 2 nodes, k = 1", wrong, 4)

    return bench.each_kind(look)


def quant_members_refused(bench: Bench) -> Seen:
    """The enumeration's member in the place of its name."""
    try:
        bench.build(quant_type=bench.module.EpDispatchCombineQuantType.Fp8DirectCast)
    except ValueError as error:
        return seen(True, f"refused: {error}")
    return seen(False, "a member is taken")


def low_latency_needs_three_warps(bench: Bench) -> Seen:
    """Two warps a block, in a buffer that holds the row of a dispatch before."""
    op, mine = bench.build(), bench.ids([2 * bench.rank, 2 * bench.rank])
    for warps in (-1, 2):  # the first leaves a row in the buffer that a lost one would show
        x = bench.rows(1) * (1 if warps < 0 else 2)
        out, *_ = bench.misuse(bench.dispatch, op, x, None, None, mine, warp_per_block=warps)
        received = out[:1].clone()
        bench.combine(op, out, None, mine)
        bench.meet()
    wrong = unlike(received, x)
    return seen(bool(wrong), f"with 2 warps a block the received row is {'not ' if wrong else ''}the one sent")


def async_weights_unwritten(bench: Bench) -> Seen:
    """Weights given to the combine of AsyncLL."""
    op, ids, given = bench.build(), bench.ids(), bench.weights(4)
    out, out_weights, *_ = bench.dispatch(op, bench.rows(4), given, None, ids)
    _, combined = bench.misuse(bench.combine, op, out, out_weights, ids)
    if combined is None:
        return seen(True, "combine was given weights and returned none")
    wrong = unlike(combined[:4], given * bench.factor())
    return seen(bool(wrong), f"{len(wrong)} of 4 returned weight rows are not the sums")


def async_blockwise_width(bench: Bench) -> Seen:
    """Nine blocks of 129 elements, each of one magnitude, the first past the largest code: its rows have scales."""
    hidden, width, tokens = 1160, 129, 8
    op = bench.build(
        quant_type="fp8_blockwise", hidden_dim=hidden, num_experts_per_token=8, max_num_inp_token_per_rank=tokens
    )
    block = torch.arange(hidden, device=bench.device) // width
    x = torch.where(block % 2 == 0, 3840.0, 1.0).bfloat16().expand(tokens, -1).contiguous()
    mine = bench.ids(*[[2 * bench.rank] * 8] * tokens)
    out, *_ = bench.dispatch(op, x, bench.weights(tokens, 8), None, mine)
    # A warp for each token: parts of a row that are not whole vectors take the other path.
    combined, _ = bench.combine(op, out.clone(), None, mine, recv=(tokens, 1))
    # Half a step of E4M3 is a sixteenth; the neighbour's scale is off by eight or more.
    off = ~((combined[0].float() - x[0].float()).abs() <= x[0].float() / 16)
    places = [int(i) for i in off.nonzero().flatten()]
    text = f"h = {hidden} in 9 blocks: {len(places)} elements wrong"
    return seen(bool(places), f"{text}, the first at {places[0]}" if places else text)


def fp4_odd_block(bench: Bench) -> Seen:
    """Neighbouring blocks of 11 elements with scales of 1 and 1/12."""
    values = torch.cat([torch.full((11,), 6.0), torch.full((11,), 0.5), torch.full((11,), 6.0)])
    values[10] = 1.0
    return _fp4(bench, values, "three blocks of 11 elements")


def fp4_empty_block(bench: Bench) -> Seen:
    """33 elements in blocks of 4, and a block more than they fill."""
    return _fp4(bench, torch.full((33,), 6.0), "33 elements in ten blocks of 4, the last one empty")


def _fp4(bench: Bench, values: torch.Tensor, what: str) -> Seen:
    """Values that E2M1 holds at the scale of their block come back as they are."""
    op, mine = bench.build(quant_type="fp4_blockwise", hidden_dim=33), bench.ids([2 * bench.rank, 2 * bench.rank])
    x = values.bfloat16().unsqueeze(0).to(bench.device)
    out, *_ = bench.dispatch(op, x, None, None, mine)
    combined, _ = bench.combine(op, out, None, mine)
    wrong = [int(i) for i in (combined[0].float() != x[0].float()).nonzero().flatten()]
    return seen(bool(wrong), f"{what}: elements {wrong or 'none'} wrong")


def rdma_block_split(bench: Bench) -> Seen:
    """No block, then all blocks, for what crosses nodes."""

    def look(kind: str, blocks: int) -> tuple[bool, str]:
        op = bench.misuse(bench.build, kind, block_num=80, gpu_per_node=2, rdma_block_num=blocks)
        wrong = bench.wrong_tokens(op, bench.ids([0, 6]), 2.0, misuse=True)
        return bool(wrong), told(f"{kind}, {blocks} of 80 blocks across nodes", wrong, 1)

    parts = [bench.each_kind(partial(look, blocks=blocks)) for blocks in (0, 80)]
    return seen_of([(bool(part.times), part.text) for part in parts])


def wave32_mask_shift(bench: Bench) -> Seen:
    """A token that stays on its node between two that leave it."""
    far, near = (bench.rank + 2) % 4 * 2, 2 * bench.rank
    ids = bench.ids([far, far], [near, near], [far, far])  # the second token of the chunk stays on its node
    wrong = bench.wrong_tokens(bench.build(**_RDMA), ids, 1.0)
    return seen(bool(wrong), told("a gap in a chunk", wrong, 3))


def gfx125x_scale_vectors(bench: Bench) -> Seen:
    """Scales of a vector of 16 bytes and 4 more."""
    op, mine = bench.build(scale_dim=5, scale_type_size=4), bench.ids([2 * bench.rank, 2 * bench.rank])
    scales = torch.arange(1.0, 6.0, device=bench.device).unsqueeze(0)
    _, _, received, _, _ = bench.dispatch(op, bench.rows(1), None, scales, mine)
    wrong = (received[0] != scales[0]).nonzero().flatten().tolist()
    return seen(bool(wrong), f"20 bytes of scales: {wrong or 'none'} of 5 wrong")
