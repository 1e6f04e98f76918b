"""Scenarios on four ranks: contents, order, state and sums of dispatch and combine, expectations derived by hand.

Scope: EPR = 2, so expert e lives on rank e // 2. Passing proves that the double keeps the written contract, nothing
about MoRI itself.
"""

from __future__ import annotations

import torch

from conformance.selftest.standin.ranks import build, indices, rows, weights

IDS = indices([0, 1], [2, 5], [7, 6], [-1, 3])  # token -> ranks {0}, {1, 2}, {3}, {1}
HELD = {0: [0], 1: [1, 3], 2: [1], 3: [2]}  # rank -> tokens of every source


def contents(rank: int, world: int) -> None:
    op = build(rank, world)
    out, out_weights, scales, out_ids, total = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
    wanted = sorted(16 * source + token for source in range(world) for token in HELD[rank])
    count = int(total)
    position = op.get_dispatch_src_token_pos().tolist()
    assert sorted(position) == wanted  # stride W * M = 16
    for row, (source, token) in enumerate(map(op.decode_send_flat_idx, position)):
        assert torch.equal(out[row], rows(source, 4)[token])
        assert torch.equal(out_weights[row], weights(source, 4)[token])
        assert torch.equal(out_ids[row], IDS[token])
    assert scales is None
    assert (out.shape, out_weights.shape, out_ids.shape) == ((16, 8), (16, 2), (16, 2))
    assert out[count:].isnan().all()
    assert out_weights[count:].isnan().all()
    assert (out_ids[count:] > 1 << 24).all()
    combined, combined_weights = op.combine(out * (rank + 1), out_weights, IDS)
    factor = torch.tensor([[1.0], [2 + 3], [4], [2]])
    assert torch.equal(combined.float(), rows(rank, 4).float() * factor)
    assert combined_weights is not None
    assert torch.equal(combined_weights, weights(rank, 4) * torch.tensor([[1.0], [2], [1], [1]]))
    assert (int(total), op.get_dispatch_src_token_pos().numel()) == (0, 0)


def persistent_stale_and_permuted(rank: int, world: int) -> None:
    op = build(rank, world)
    everywhere = indices(*[[2 * (rank % 2), 6]] * 4)
    first, first_weights, *_ = op.dispatch(rows(rank, 4), weights(rank, 4), None, everywhere)
    old, old_weights = first.clone(), first_weights.clone()
    order = op.get_dispatch_src_token_pos().tolist()
    op.combine(first, None, everywhere)
    second, second_weights, _, _, total = op.dispatch(rows(rank, 1), None, None, everywhere[:1])
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second[int(total) :].nan_to_num(), old[int(total) :].nan_to_num())
    if rank == 3:  # 16 rows, then 4; weights=None leaves the old ones in place
        assert (len(order), int(total)) == (16, 4)
        assert order != sorted(order)
        assert not old_weights.isnan().any()
    assert torch.equal(second_weights.nan_to_num(), old_weights.nan_to_num())
    op.combine(second, None, everywhere[:1])
    op.dispatch(rows(rank, 4), weights(rank, 4), None, everywhere)
    assert rank != 3 or op.get_dispatch_src_token_pos().tolist() != order
    op.reset()
    assert int(total) == (16 if rank == 3 else 8 if rank in (0, 1) else 0)


def total_accumulates(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL"):
        op = build(rank, world, kind)
        once = len(HELD[rank]) * world
        for repeat in (1, 2, 3):
            out, out_weights, _, _, total = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
            assert int(total) == repeat * once
        op.combine(out, out_weights, IDS)
        assert int(total) == 0


def asynchronous_phases(rank: int, world: int) -> None:
    op = build(rank, world, "AsyncLL")
    ids = indices([0, 1], [2, 5], [7, 6])
    x, w = rows(rank, 3), weights(rank, 3)
    for _ in range(2):
        out, out_weights, _, _, total = op.dispatch_send(x, w, None, ids)
    assert int(total) == 0
    assert out.isnan().all()
    op.dispatch_recv()
    op.dispatch_send(x, w, None, ids)
    op.dispatch_recv(call_local_expert_count=True)
    assert int(total) == world  # every rank holds one token of every source; reset, not accumulated
    sources = [pos // 16 for pos in op.get_dispatch_src_token_pos().tolist()]
    assert sources == sorted(sources)
    assert op.local_expert_count.tolist() == [[4, 4], [4, 0], [0, 4], [4, 4]][rank]
    combined, combined_weights = op.combine_send(out, out_weights, ids)
    assert combined.isnan().all()
    op.combine_recv()
    assert torch.equal(combined[:3].float(), x.float() * torch.tensor([[1.0], [2], [1]]))
    assert combined_weights is not None
    assert combined_weights.isnan().all()
    assert int(total) == world


def node_levels_round_twice(rank: int, world: int) -> None:
    sizes = {"num_experts_per_rank": 1, "num_experts_per_token": 4, "rdma_block_num": 8}
    ids, x, w = indices([0, 1, 2, 3]), rows(rank, 1), weights(rank, 1, 4)
    for kind, per_node, wanted in (
        ("IntraNode", 4, 258.0),  # 256 + 1 + 1 + 0 is a bfloat16
        ("InterNodeV1", 4, 258.0),
        ("InterNodeV1", 2, 256.0),  # 256 + 1 rounds to 256, 1 + 0 to 1, and 257 to 256
        ("InterNodeV1LL", 2, 256.0),
    ):
        op = build(rank, world, kind, gpu_per_node=per_node, **sizes)
        out, out_weights, *_ = op.dispatch(x, w, None, ids)
        answer = torch.full_like(out, [256.0, 1.0, 1.0, 0.0][rank])
        combined, combined_weights = op.combine(answer, out_weights, ids)
        assert (combined[:1] == wanted).all(), (kind, per_node, combined[0, 0])
        assert combined_weights is not None
        assert torch.equal(combined_weights[:1], 4 * w)


def fold_order(rank: int, world: int) -> None:
    ids = indices([0, 2, 4, 1])  # ranks 0, 1, 2, 0
    for kind, wanted in (("IntraNode", 1.0), ("IntraNodeLL", 0.0)):
        op = build(rank, world, kind, num_experts_per_token=4)
        out, *_ = op.dispatch(rows(rank, 1).float(), None, None, ids)
        answer = torch.full_like(out, [1e8, -1e8, 1.0, 5.0][rank])
        combined, _ = op.combine(answer, None, ids)  # (1e8 - 1e8) + 1, or (-1e8 + 1) + 1e8
        assert (combined[:1] == wanted).all(), kind


def zero_tokens(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL", "InterNode", "InterNodeV1", "InterNodeV1LL"):
        op = build(rank, world, kind)
        for tokens in (4 * (rank != 1), 0, 4):
            ids = IDS[:tokens].clamp(min=2)
            out, out_weights, _, _, total = op.dispatch(rows(rank, tokens), weights(rank, tokens), None, ids)
            assert rank != 0 or int(total) == 0
            combined, _ = op.combine(out, out_weights, ids)
            factor = torch.tensor([[1.0], [2], [1], [1]])[:tokens]
            assert torch.equal(combined[:tokens].float(), rows(rank, tokens).float() * factor)


def large_rows_travel_ragged(rank: int, world: int) -> None:
    tokens = 512 - 100 * rank
    op = build(rank, world, hidden_dim=256, max_num_inp_token_per_rank=512)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, 256, generator=generator).bfloat16()
    ids = torch.randint(-1, 9, (tokens, 2), generator=generator, dtype=torch.int32)
    w = torch.rand(tokens, 2, generator=generator)
    distinct = [len({i // 2 for i in row if 0 <= i < 8}) for row in ids.tolist()]
    factor = torch.tensor(distinct, dtype=torch.float32).unsqueeze(1)
    for _ in range(2):
        out, out_weights, _, _, total = op.dispatch(x, w, None, ids)
        assert len(set(op.get_dispatch_src_token_pos().tolist())) == int(total)
        combined, combined_weights = op.combine(out, out_weights, ids)
        assert torch.equal(combined[:tokens], (x.float() * factor).bfloat16())
        assert combined_weights is not None
        assert torch.equal(combined_weights[:tokens], w * factor)


def registered_buffer(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL"):
        op = build(rank, world, kind, use_external_inp_buf=False)
        out, out_weights, _, _, total = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
        buffer = op.get_registered_combine_input_buffer(torch.bfloat16)
        assert buffer.shape == (16, 8)
        assert buffer.isnan().all()
        buffer[: int(total)] = 2 * out[: int(total)]
        combined, _ = op.combine(torch.zeros_like(out), out_weights, IDS)
        assert torch.equal(combined.float(), rows(rank, 4).float() * torch.tensor([[2.0], [4], [2], [2]]))
        out, *_ = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
        combined, _ = op.combine(out, None, IDS, use_external_inp_buf=1)
        assert torch.equal(combined[0], rows(rank, 4)[0])


def weights_disagree(rank: int, world: int) -> None:
    ids = indices([0, 2], [4, 1])  # nothing reaches rank 3, whose slice of the weights is empty
    x, w, factor = rows(rank, 2), weights(rank, 2), torch.tensor([[2.0], [2]])
    for external in (1, 0):
        op = build(rank, world)
        out, out_weights, _, _, total = op.dispatch(x, w, None, ids)
        op.get_registered_combine_input_buffer(torch.bfloat16).copy_(out)
        combined, combined_weights = op.combine(out, out_weights[: int(total)], ids, use_external_inp_buf=external)
        right = torch.equal(combined[:2].float(), x.float() * factor)
        assert right == (rank != 3 or not external)
        assert (combined_weights is None) == (rank == 3)
