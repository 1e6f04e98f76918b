"""Scenarios on four ranks: ids that mean nothing, misread inputs, byte-exact formats, refusals.

Scope: EPR = 2, so expert e lives on rank e // 2. Passing proves that the double keeps the written contract, nothing
about MoRI itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import ops, shmem
from conformance.selftest.standin.ranks import build, indices, rows, weights


def _identity_round(op: ops.EpDispatchCombineOp, rank: int, ids: torch.Tensor) -> tuple[int, float]:
    """Return (rows received, combined value / sent value) of one token per rank."""
    out, out_weights, _, _, total = op.dispatch(rows(rank, 1), weights(rank, 1), None, ids)
    if op.config.kernel_type == ops.EpDispatchCombineKernelType.AsyncLL:
        op.dispatch_recv()
    count = int(total)
    combined, _ = op.combine(out, out_weights, ids)
    if op.config.kernel_type == ops.EpDispatchCombineKernelType.AsyncLL:
        op.combine_recv()
    return count, float(combined[0, 0] / rows(rank, 1)[0, 0])


def negative_ids(rank: int, world: int) -> None:
    dropped, as_rank_zero = ([0, 4, 0, 0], [1, 1, 1, 1]), ([4, 4, 0, 0], [2, 2, 2, 2])
    for kind, per_node, (totals, factors) in (
        ("IntraNode", 4, dropped),
        ("IntraNodeLL", 4, dropped),
        ("InterNodeV1", 4, dropped),
        ("InterNodeV1", 2, dropped),
        ("InterNodeV1LL", 4, dropped),
        ("InterNode", 4, as_rank_zero),
        ("AsyncLL", 4, as_rank_zero),
        ("InterNodeV1LL", 2, ([2, 4, 0, 0], [1, 1, 2, 2])),  # seen from node 1 only
    ):
        op = build(rank, world, kind, gpu_per_node=per_node, rdma_block_num=8)
        found = _identity_round(op, rank, indices([-1, 3]))
        assert found == (totals[rank], factors[rank]), (kind, per_node, found)
    op = build(rank, world, "InterNodeV1LL", gpu_per_node=2, rdma_block_num=8)
    found = _identity_round(op, rank, indices([-1, 5]))  # the extra row on rank 0 is on a node that nothing names
    assert found == ([2, 0, 4, 0][rank], 1.0)


def ids_past_the_experts(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL", "InterNode"):
        assert _identity_round(build(rank, world, kind), rank, indices([8, 3])) == ([0, 4, 0, 0][rank], 1.0)
    for kind in ("InterNodeV1", "InterNodeV1LL"):  # sent as wanted, but a stale map entry joins the sum
        count, factor = _identity_round(build(rank, world, kind), rank, indices([8, 3]))
        assert count == [0, 4, 0, 0][rank]
        assert factor != 1.0


def low_latency_scans_eight_slots(rank: int, world: int) -> None:
    ids = indices([0, 1, 2, 3, 4, 5, 6, 7, 8, 12])  # EPR = 4: slots 0..7 name ranks 0 and 1 only
    sizes = {"num_experts_per_rank": 4, "num_experts_per_token": 10}
    for kind, totals, factor in (("IntraNodeLL", [4, 4, 0, 0], 2), ("IntraNode", [4, 4, 4, 4], 4)):
        op = build(rank, world, kind, **sizes)
        out, _, _, out_ids, total = op.dispatch(rows(rank, 1), weights(rank, 1, 10), None, ids)
        assert int(total) == totals[rank]
        assert (out_ids[: int(total)] == ids).all()
        combined, _ = op.combine(out, None, ids)
        assert torch.equal(combined[:1].float(), rows(rank, 1).float() * factor)


def low_latency_needs_three_warps(rank: int, world: int) -> None:
    ids = indices([0, 2], [4, 6])
    scales = torch.full((2, 3), 7, dtype=torch.uint8)
    for warps, payload_missing, scales_missing in ((1, True, True), (2, True, False), (3, False, False)):
        op = build(rank, world, "IntraNodeLL", scale_dim=3, scale_type_size=1)
        out, _, out_scales, out_ids, total = op.dispatch(rows(rank, 2), None, scales, ids, warp_per_block=warps)
        assert int(total) == 4
        assert out_scales is not None
        assert bool(out[:4].isnan().all()) == payload_missing
        assert bool((out_scales[:4] != 7).all()) == scales_missing
        assert (out_ids[:4] < 8).all()
        op.combine(out, None, ids)


def rdma_blocks(rank: int, world: int) -> None:
    ids = indices([0, 6])  # rank 0 on node 0, rank 3 on node 1
    for kind in ("InterNodeV1", "InterNodeV1LL"):
        for blocks, totals, factor in ((0, [2, 0, 0, 2], 1), (80, [2, 0, 0, 2], 1), (40, [4, 0, 0, 4], 2)):
            op = build(rank, world, kind, gpu_per_node=2, rdma_block_num=blocks)
            out, out_weights, _, _, total = op.dispatch(rows(rank, 1), weights(rank, 1), None, ids)
            sources = {pos // 16 for pos in op.get_dispatch_src_token_pos().tolist()}
            near, far = ({0, 1}, {2, 3}) if rank < 2 else ({2, 3}, {0, 1})
            wanted = {0: near, 80: far, 40: near | far}[blocks]
            assert (int(total), sources) == (totals[rank], wanted if totals[rank] else set())
            combined, _ = op.combine(out, out_weights, ids)
            assert torch.equal(combined[:1].float(), rows(rank, 1).float() * factor)


def combine_reads_indices_across_nodes(rank: int, world: int) -> None:
    ids, wrong = indices([0, 6], [2, 4]), indices([0, 2], [4, 6])
    for kind in ("InterNodeV1", "InterNodeV1LL"):
        for per_node in (4, 2):
            op = build(rank, world, kind, gpu_per_node=per_node, rdma_block_num=8)
            out, out_weights, *_ = op.dispatch(rows(rank, 2), weights(rank, 2), None, ids)
            combined, _ = op.combine(out, out_weights, wrong)
            right = torch.equal(combined[:2].float(), 2 * rows(rank, 2).float())
            assert right == (per_node == 4)


def misread_inputs(rank: int, world: int) -> None:
    op = build(rank, world)
    wide = torch.tensor([[1, 5], [3, 3]], dtype=torch.int64)  # in memory, as int32: 1 0 5 0 3 0 3 0
    _, _, _, out_ids, total = op.dispatch(rows(rank, 2), None, None, wide)
    assert int(total) == [8, 0, 4, 0][rank]
    assert {tuple(row) for row in out_ids[: int(total)].tolist()} == [{(1, 0), (5, 0)}, set(), {(5, 0)}, set()][rank]
    op.combine(torch.zeros(16, 8).bfloat16(), None, wide)
    strided = torch.arange(32).bfloat16().view(2, 16)[:, ::2]  # read as 0..7 and 8..15
    out, *_ = op.dispatch(strided, None, None, indices([0, 0], [0, 0]))
    if rank == 0:
        found = {tuple(row) for row in out[:8].tolist()}
        assert found == {tuple(map(float, range(8))), tuple(map(float, range(8, 16)))}


def formats_move_verbatim(rank: int, world: int) -> None:
    ids = indices([0, 2], [4, 6])
    for name, scale_dim in (("float32", 0), ("float8_e4m3fn", 3), ("float8_e4m3fnuz", 3), ("float4_e2m1fn_x2", 3)):
        dtype = getattr(torch, name)
        op = build(rank, world, hidden_dim=16, scale_dim=scale_dim, scale_type_size=4)
        for hidden in (16, 5):
            size = hidden * dtype.itemsize
            byte = torch.arange(2 * size, dtype=torch.uint8).view(2, size) + 50 * rank
            scales = torch.tensor([[rank, 0.5, -1.0], [rank, 2.5, 1.0]])
            out, _, out_scales, _, total = op.dispatch(byte.view(dtype), weights(rank, 2), scales, ids)
            assert (out.dtype, out.shape) == (dtype, (16, hidden))
            for row, pos in enumerate(op.get_dispatch_src_token_pos().tolist()):
                source, token = pos // 16, pos % 16
                wanted = torch.arange(2 * size, dtype=torch.uint8).view(2, size) + 50 * source
                assert torch.equal(out[row].view(torch.uint8), wanted[token])
                if scale_dim:
                    assert out_scales is not None
                    assert out_scales[row].tolist() == [source, [0.5, 2.5][token], [-1.0, 1.0][token]]
            assert (out_scales is None) == (scale_dim == 0)
            op.combine(torch.zeros(16, hidden), None, ids)
            assert int(total) == 0


def gfx125x_moves_whole_vectors_of_scales(rank: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORI_GPU_ARCHS", "gfx1250")
        for kind, moved in (("IntraNode", 16), ("IntraNodeLL", 20)):
            op = build(rank, world, kind, scale_dim=5, scale_type_size=4)
            scales = torch.arange(40, dtype=torch.uint8).view(torch.float32).view(2, 5)
            ids = indices([0, 1], [0, 2])
            out, _, out_scales, _, _ = op.dispatch(rows(rank, 2), weights(rank, 2), scales, ids)
            position = op.get_dispatch_src_token_pos().tolist()
            assert out_scales is not None
            for row, token in enumerate(at % 16 for at in position):
                found, sent = out_scales.view(torch.uint8)[row], scales.view(torch.uint8)[token]
                assert torch.equal(found[:moved], sent[:moved])
                assert found[moved:].tolist() == [255] * (20 - moved), "what is left of a row stays stale"
            op.combine(out, None, ids)
            assert rank > 1 or len(position) == (8 if rank == 0 else 4)


def expert_count(rank: int, world: int) -> None:
    op = build(rank, world)
    ids = indices([0, 0], [2, 5], [7, -1])
    _, _, _, out_ids, total = op.dispatch(rows(rank, 3), None, None, ids, call_local_expert_count=True)
    wanted = [[8, 0], [4, 0], [0, 4], [0, 4]][rank]
    assert op.local_expert_count.tolist() == wanted
    again = torch.full((2,), 9, dtype=torch.int32)
    ops.launch_local_expert_count(op.config, out_ids.data_ptr(), total.data_ptr(), again.data_ptr())
    assert again.tolist() == wanted


def legacy_positions(rank: int, world: int) -> None:
    op = build(rank, world, "InterNode")
    op.dispatch(rows(rank, 2), weights(rank, 2), None, indices([0, 1], [0, 3]))
    found = op.get_dispatch_src_token_pos()
    assert (found.dtype, found.device.type) == (torch.int32, "cpu")
    wanted = {0: [4 * s + t for s in range(4) for t in (0, 1)], 1: [4 * s + 1 for s in range(4)]}
    assert sorted(found.tolist()) == wanted.get(rank, [])  # stride M = 4


def capped_receive(rank: int, world: int) -> None:
    op = build(rank, world, max_total_recv_tokens=8)
    assert (op.max_num_tokens_to_recv(), op.max_num_tokens_to_recv_per_rank()) == (8, 2)
    assert (op.max_num_tokens_to_send(), op.max_num_tokens_to_send_per_rank()) == (16, 4)
    out, _, _, _, total = op.dispatch(rows(rank, 4), None, None, indices(*[[0, 1]] * 4))
    assert (out.size(0), int(total)) == (8, 16 if rank == 0 else 0)


def refusals(rank: int, world: int) -> None:
    op, low = build(rank, world), build(rank, world, "IntraNodeLL")
    x, ids = rows(rank, 2), indices([0, 2], [4, 6])
    handle = ops.EpDispatchRoutingHandle.from_tensors([ids] * 5, 2)
    with pytest.raises(AssertionError):
        op.dispatch_recv()
    with pytest.raises(AssertionError):
        op.combine_recv()
    with pytest.raises(KeyError):
        op.dispatch(x.half(), None, None, ids)
    with pytest.raises(KeyError):
        op.dispatch_recv()  # the refused type is remembered
    with pytest.raises(ValueError):
        low.dispatch(x, None, None, ids, routing=handle, return_routing=True)
    with pytest.raises(NotImplementedError, match="IntraNodeLL"):
        low.dispatch(x, None, None, ids, return_routing=True)
    with pytest.raises(NotImplementedError, match="IntraNodeLL"):
        low.combine(x, None, ids, routing=handle)
    out, *_ = op.dispatch(x, None, None, ids)
    with pytest.raises(ValueError, match="3 rows"):
        op.combine(out.half(), None, indices([0, 1], [0, 1], [0, 1]))
    with pytest.raises(KeyError):
        op.combine(out.double(), None, ids)
    op.combine(out, None, ids, call_reset=True)
    for receive in (op.dispatch_recv, op.combine_recv):
        with pytest.raises(ValueError):
            receive()
    for refused in (
        lambda: op.dispatch_standard_moe(x, None, None, ids),
        lambda: op.combine_standard_moe(x, None, ids),
        lambda: op.convert_dispatch_output(x, ids),
        lambda: op.convert_combine_input(x, ids, ids),
    ):
        with pytest.raises(RuntimeError):
            refused()


def refused_configurations(rank: int, world: int) -> None:
    assert build(rank, world, quant_type=" FP8_direct_cast ")._fp8_blockwise_combine_scale_dim == 0
    for wrong in ("int8", "fp4_blockwise", ops.EpDispatchCombineQuantType.None_):
        with pytest.raises(ValueError):
            build(rank, world, quant_type=wrong)
    with pytest.raises(ValueError):
        build(rank, world, kernel_type=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORI_EP_LAUNCH_CONFIG_MODE", "FAST")
        with pytest.raises(ValueError):
            build(rank, world)
        patch.setenv("MORI_EP_LAUNCH_CONFIG_MODE", "AUTO")
        assert build(rank, world, "InterNodeV1LL").get_launch_config() == (256, 128, 8)
        patch.setenv("MORI_GPU_ARCHS", "gfx1250")
        with pytest.raises(ValueError):
            build(rank, world, max_num_inp_token_per_rank=16385, hidden_dim=1)
    assert build(rank, world).get_launch_config(True, 5, 6, 7) == (5, 6, 7)


def shmem_lifetime(rank: int, world: int) -> None:
    assert (shmem.shmem_mype(), shmem.shmem_npes()) == (rank, world)
    assert shmem.shmem_torch_process_group_init("default") == 0
    shmem.shmem_barrier_all()
    with pytest.raises(RuntimeError):
        shmem.shmem_torch_process_group_init("nobody registered this")
    op = build(rank, world)
    assert shmem.shmem_finalize() == 0
    del op
    with pytest.MonkeyPatch.context() as patch:  # the cco communicator needs no shmem
        patch.setenv("MORI_GPU_ARCHS", "gfx1250")
        assert _identity_round(build(rank, world), rank, indices([0, 2])) == ([4, 4, 0, 0][rank], 2.0)
    dist.barrier()
