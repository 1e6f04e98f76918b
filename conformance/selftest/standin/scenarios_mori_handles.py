"""Scenarios on four ranks: routing handles, cached and replayed, on IntraNode and InterNodeV1.

Scope: EPR = 2, so expert e lives on rank e // 2. Passing proves that the double keeps the written contract, nothing
about MoRI itself.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.standin.mori_ep import ops
from conformance.selftest.standin.ranks import build, indices, rows, weights

IDS = indices([0, 2], [5, 4], [7, 1], [-1, 3])  # token -> ranks {0, 1}, {2}, {3, 0}, {1}
RANKS = [[0, 1], [2], [3, 0], [1]]
FACTOR = torch.tensor([[2.0], [1], [2], [1]])
KINDS = (("IntraNode", 4), ("InterNodeV1", 4), ("InterNodeV1", 2))
Handle = ops.EpDispatchRoutingHandle


def _build(rank: int, world: int, kind: str, per_node: int, **changes: object) -> ops.EpDispatchCombineOp:
    return build(rank, world, kind, gpu_per_node=per_node, rdma_block_num=8, **changes)


def _ids(rank: int) -> torch.Tensor:
    """Another order of tokens on every rank."""
    return IDS.roll(rank, 0).contiguous()


def tensors_say_where_rows_went(rank: int, world: int) -> None:
    for kind, per_node in KINDS:
        op = _build(rank, world, kind, per_node)
        result = op.dispatch(rows(rank, 4), weights(rank, 4), None, _ids(rank), return_routing=True)
        out, total, handle = result[0], result[4], result[5]
        sizes = [tensor.numel() for tensor in handle.tensors()]
        nodes = world // per_node
        assert sizes == [32, nodes * 8, nodes * 4, 1, 32]
        assert all(tensor.dtype == torch.int32 for tensor in handle.tensors())
        assert (handle.cur_rank_num_token, total.data_ptr()) == (4, handle.total_recv_token_num.data_ptr())
        assert int(total) == [8, 8, 4, 4][rank]
        assert op.get_dispatch_src_token_pos().numel() == 0  # counted in the handle only
        source = handle.disp_tok_id_to_src_tok_id_local[: int(total)]
        for row, flat in enumerate(source.tolist()):
            assert torch.equal(out[row], rows(flat // 16, 4)[flat % 16])
        found = [
            [flat // 16 for flat in slots if flat < 64 and flat // 16 // per_node == rank // per_node]
            for slots in handle.disp_dest_tok_id_map[:8].view(4, 2).tolist()
        ]
        here = [[owner for owner in owners if owner // per_node == rank // per_node] for owners in RANKS]
        assert [sorted(owners) for owners in found] == [sorted(here[(token - rank) % 4]) for token in range(4)]


def replay_moves_a_new_payload(rank: int, world: int) -> None:
    for kind, per_node in KINDS:
        op = _build(rank, world, kind, per_node, scale_dim=2, scale_type_size=4)
        ids, scales = _ids(rank), torch.tensor([[rank, 1.0]] * 4)
        first = op.dispatch(rows(rank, 4), weights(rank, 4), scales, ids, return_routing=True)
        held, old = first[5], first[0].clone()
        before = [tensor.clone() for tensor in held.tensors()]
        stashed = Handle.from_tensors([tensor.clone() for tensor in held.tensors()], 4)
        new = op.dispatch(rows(rank, 4) * 2, weights(rank, 4) + 1, scales + 1, ids, routing=stashed)
        assert len(new) == 5
        assert all(torch.equal(*pair) for pair in zip(before, stashed.tensors(), strict=True))
        count = int(new[4])
        if kind == "IntraNode":  # the defect: nothing is moved
            assert torch.equal(new[0].nan_to_num(), old.nan_to_num())
            continue
        for row, flat in enumerate(stashed.disp_tok_id_to_src_tok_id_local[:count].tolist()):
            source, token = flat // 16, flat % 16
            assert torch.equal(new[0][row], 2 * rows(source, 4)[token])
            assert torch.equal(new[1][row], (weights(source, 4) + 1)[token])
            assert new[2][row].tolist() == [source + 1, 2]
            assert torch.equal(new[3][row], _ids(source)[token])
        combined, combined_weights = op.combine(new[0], new[1], ids, routing=stashed)
        factor = FACTOR.roll(rank, 0)
        assert combined_weights is not None
        assert torch.equal(combined.float(), 2 * rows(rank, 4).float() * factor)
        assert torch.equal(combined_weights, (weights(rank, 4) + 1) * factor)
        assert int(stashed.total_recv_token_num) == count  # combine leaves a handle's counter


def handles_outlive_other_rounds(rank: int, world: int) -> None:
    for kind, per_node in KINDS:
        op = _build(rank, world, kind, per_node)
        ids, other = _ids(rank), indices([6, 6], [0, 1], [2, 4])
        *first, one = op.dispatch(rows(rank, 4), weights(rank, 4), None, ids, return_routing=True)
        kept = first[0].clone()
        op.combine(first[0], first[1], ids, routing=one)
        *second, two = op.dispatch(rows(rank, 3), weights(rank, 3), None, other, return_routing=True)
        answer = second[0].clone()
        plain = op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([0, 0]))
        combined, _ = op.combine(plain[0], plain[1], indices([0, 0]))
        assert torch.equal(combined[:1], rows(rank, 1))
        combined, _ = op.combine(answer * 3, second[1], other, routing=two)
        assert torch.equal(combined[:3].float(), rows(rank, 3).float() * torch.tensor([[3.0], [3], [6]]))
        combined, _ = op.combine(kept * (rank + 1), first[1], ids, routing=one)
        wanted = torch.tensor([[3.0], [3], [5], [2]]).roll(rank, 0)
        assert torch.equal(combined.float(), rows(rank, 4).float() * wanted), (kind, per_node)


def refused_handles(rank: int, world: int) -> None:
    op = _build(rank, world, "IntraNode", 4)
    ids = _ids(rank)
    *_, handle = op.dispatch(rows(rank, 4), None, None, ids, return_routing=True)
    with pytest.raises(ValueError, match="exclude each other"):
        op.dispatch(rows(rank, 4), None, None, ids, routing=handle, return_routing=True)
    with pytest.raises(ValueError, match="input has 3 rows"):
        op.dispatch(rows(rank, 3), None, None, ids, routing=handle)
    with pytest.raises(ValueError, match="indices has 3 rows"):
        op.dispatch(rows(rank, 4), None, None, ids[:3], routing=handle)
    with pytest.raises(ValueError, match="for 0 tokens"):
        op.dispatch(rows(rank, 4), None, None, ids, routing=Handle.from_tensors(handle.tensors()))
    with pytest.raises(ValueError, match="3 rows"):
        op.combine(rows(rank, 16), None, ids[:3], routing=handle)
    n = 0 if rank == 1 else 4
    *_, handle = op.dispatch(rows(rank, n), None, None, ids[:n], return_routing=True)
    assert handle.cur_rank_num_token == n
    if rank == 1:
        with pytest.raises(ValueError, match="for 0 tokens"):
            op.combine(rows(rank, 16), None, ids[:0], routing=handle)
        with pytest.raises(ValueError, match="for 0 tokens"):
            op.dispatch(rows(rank, 0), None, None, ids[:0], routing=handle)


def expert_count_with_a_handle(rank: int, world: int) -> None:
    op = _build(rank, world, "InterNodeV1", 2)
    ids = indices([0, 0], [2, 5], [7, -1])
    op.dispatch(rows(rank, 3), weights(rank, 3), None, ids, call_local_expert_count=True, return_routing=True)
    assert op.local_expert_count.tolist() == [[8, 0], [4, 0], [0, 4], [0, 4]][rank]


def large_rows_keep_their_layout(rank: int, world: int) -> None:
    op = _build(rank, world, "InterNodeV1", 2, hidden_dim=1024, max_num_inp_token_per_rank=256)
    ids = torch.randint(0, 8, (200 + rank, 2), generator=torch.Generator().manual_seed(rank), dtype=torch.int32)
    sent = [torch.randn(200 + r, 1024, generator=torch.Generator().manual_seed(9 + r)).bfloat16() for r in range(world)]
    x = sent[rank]
    w = torch.rand(200 + rank, 2)
    *_, handle = op.dispatch(x, w, None, ids, return_routing=True)
    new = op.dispatch(2 * x, w, None, ids, routing=handle)
    for row, flat in enumerate(handle.disp_tok_id_to_src_tok_id_local[: int(new[4])].tolist()):
        assert torch.equal(new[0][row], 2 * sent[flat // 1024][flat % 1024])
    combined, _ = op.combine(new[0], new[1], ids, routing=handle)
    distinct = (ids[:, :1] // 2 != ids[:, 1:] // 2).float() + 1
    assert torch.equal(combined[: len(x)], (2 * x.float() * distinct).bfloat16())
