"""One black-box observation for each hazard of the MoRI double that leaves the process alive, on four ranks.

Scope: each function runs a few collective calls and says on each rank whether the defect was seen there; the name is
the hazard's with underscores. EPR = 2 unless said otherwise. They are sized for the double; they prove nothing about
MoRI.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import ops
from conformance.selftest.standin.ranks import build, indices, rows, weights

IDS = indices([0, 2], [5, 4], [7, 1], [3, 3])  # token -> ranks {0, 1}, {2}, {3, 0}, {1}
EVEN = indices([0, 2], [4, 6], [0, 4], [2, 6])
FACTOR = torch.tensor([[2.0], [1], [2], [1]])
Op = ops.EpDispatchCombineOp


def _sum(op: Op, rank: int, ids: torch.Tensor, factor: torch.Tensor | float, scale: float = 1.0) -> bool:
    """Whether one identity round comes back as anything but ``scale * factor * x``."""
    x, k = rows(rank, len(ids)) * scale, ids.size(1)
    out, out_weights, *_ = op.dispatch(x, weights(rank, len(ids), k), None, ids)
    combined, _ = op.combine(out, out_weights, ids)
    return not torch.equal(combined[: len(ids)].float(), x.float() * factor)


def _changes_dispatch_output(op: Op, rank: int, n: int, ids: torch.Tensor) -> bool:
    """Whether combine writes into what dispatch returned, which nothing may do before the next dispatch."""
    out, *_ = op.dispatch(rows(rank, n), weights(rank, n, ids.size(1)), None, ids)
    if op.config.kernel_type == ops.EpDispatchCombineKernelType.AsyncLL:
        op.dispatch_recv()
    before = out.clone()
    op.combine(before, None, ids)
    if op.config.kernel_type == ops.EpDispatchCombineKernelType.AsyncLL:
        op.combine_recv()
    return not torch.equal(out.nan_to_num(), before.nan_to_num())


def _refused(call: object, *arguments: object, **options: object) -> bool:
    try:
        call(*arguments, **options)  # type: ignore[operator]
    except ValueError:
        return True
    return False


def intranode_replay_moves_nothing(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    *first, handle = op.dispatch(rows(rank, 4), None, None, IDS, return_routing=True)
    before = first[0].clone()
    dist.barrier()
    new = op.dispatch(2 * rows(rank, 4), None, None, IDS, routing=handle)
    return not torch.equal(new[0][: int(new[4])], 2 * before[: int(new[4])])


def low_latency_scans_eight_slots(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "IntraNodeLL", num_experts_per_rank=4, num_experts_per_token=9)
    return _sum(op, rank, indices([0, 1, 2, 3, 4, 5, 6, 7, 8]), 3.0)


def capped_push_overruns_staging(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, max_total_recv_tokens=4)  # every rank receives its own four rows, which fit
    return _changes_dispatch_output(op, rank, 4, indices(*[[2 * rank, 2 * rank]] * 4))


def internode_cap_aliases(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "InterNode", max_total_recv_tokens=8)
    return _sum(op, rank, indices(*[[2, 3]] * (3 if rank == 0 else 0)).view(-1, 2), 1.0)


def weights_disagree(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op, ids = build(rank, world), indices([0, 2], [4, 1])  # nothing reaches rank 3
    out, out_weights, _, _, total = op.dispatch(rows(rank, 2), weights(rank, 2), None, ids)
    combined, _ = op.combine(out, out_weights[: int(total)], ids)
    return not torch.equal(combined[:2].float(), rows(rank, 2).float() * 2)


def negative_id_is_rank_zero(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "AsyncLL")
    *_, total = op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([-1, 3]))
    op.dispatch_recv()
    far = build(rank, world, "InterNodeV1LL", gpu_per_node=2, rdma_block_num=8)
    legacy = build(rank, world, "InterNode")
    wrong = [_sum(other, rank, indices([-1, 3]), 1.0) for other in (far, legacy)]
    assert legacy.config.num_experts_per_rank == 2
    return int(total) != [0, 4, 0, 0][rank] and (wrong[1] or rank == 0)


def ids_past_experts(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    found = [_sum(build(rank, world, kind), rank, indices([8, 3]), 1.0) for kind in ("InterNodeV1", "InterNodeV1LL")]
    assert found[0] == found[1]
    return found[0]


def more_nodes_than_slots(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    sizes = {"gpu_per_node": 2, "rdma_block_num": 8, "num_experts_per_token": 1}
    return _sum(build(rank, world, "InterNodeV1", **sizes), rank, indices([0], [6], [3], [5]), 1.0)


def push_fence(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    return [_sum(op, rank, IDS, FACTOR, scale) for scale in (1.0, 2.0)][1]


def quant_members_refused(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    member = ops.EpDispatchCombineQuantType.Fp8DirectCast
    return _refused(build, rank, world, quant_type=member)


def low_latency_needs_three_warps(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "IntraNodeLL")
    out, *_ = op.dispatch(rows(rank, 1), None, None, indices([2 * rank, 2 * rank]), warp_per_block=2)
    return bool(out[0].isnan().any())


def async_weights_unwritten(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "AsyncLL")
    out, out_weights, *_ = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
    op.dispatch_recv()
    _, combined_weights = op.combine(out, out_weights, IDS)
    op.combine_recv()
    assert combined_weights is not None
    return not torch.equal(combined_weights, weights(rank, 4) * FACTOR)


def fp4_odd_block(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setenv("MORI_GPU_ARCHS", "gfx950")
    patch.setenv("MORI_FP8_COMBINE_SCALE_DIM", "3")
    op, ids = build(rank, world, quant_type="fp4_blockwise", hidden_dim=33), indices([2 * rank, 2 * rank])
    x = torch.cat([torch.full((1, 11), 6.0), torch.full((1, 11), 0.5), torch.full((1, 11), 6.0)], 1).bfloat16()
    x[0, 10] = 1.0
    out, *_ = op.dispatch(x, None, None, ids)
    combined, _ = op.combine(out, None, ids)
    return not torch.equal(combined[:1], x)


def rdma_block_split(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    return _sum(build(rank, world, "InterNodeV1", gpu_per_node=2, rdma_block_num=0), rank, indices([0, 6]), 2.0)


def ragged_chunks(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    sizes = {"gpu_per_node": 2, "rdma_block_num": 8, "max_num_inp_token_per_rank": 100}
    return _sum(build(rank, world, "InterNodeV1", **sizes), rank, indices(*[[0, 6]] * 100), 2.0)


def blockwise_staging_overrun(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    seen = [
        _changes_dispatch_output(build(rank, world, kind, quant_type="fp8_blockwise"), rank, 4, EVEN)
        for kind in ("IntraNodeLL", "AsyncLL")
    ]
    assert seen[0] == seen[1]
    assert not _changes_dispatch_output(build(rank, world, quant_type="fp8_blockwise"), rank, 4, EVEN)
    return seen[0]


def wave32_mask_shift(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setenv("MORI_GPU_ARCHS", "gfx1250")
    patch.setenv("MORI_EP_COMM", "shmem")
    far, near = (rank + 2) % 4 * 2, 2 * rank
    ids = indices([far, far], [near, near], [far, far])
    op = build(rank, world, "InterNodeV1", gpu_per_node=2, rdma_block_num=8)
    assert not _sum(build(rank, world, "InterNodeV1LL", gpu_per_node=2, rdma_block_num=8), rank, ids, 1.0)
    return _sum(op, rank, ids, 1.0)


def handle_dispatches_race(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    for _ in range(2):
        *_, handle = op.dispatch(rows(rank, 4), None, None, IDS, return_routing=True)
    flat = handle.disp_dest_tok_id_map[:8]
    flat = flat[flat < 64]
    seen = torch.zeros(64, dtype=torch.int64).index_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    dist.all_reduce(seen)
    return bool((seen > 1).any())


def gfx125x_scale_vectors(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setenv("MORI_GPU_ARCHS", "gfx1250")
    op = build(rank, world, scale_dim=5, scale_type_size=4)
    scales = torch.ones(1, 5)
    _, _, out_scales, _, _ = op.dispatch(rows(rank, 1), None, scales, indices([2 * rank, 2 * rank]))
    return not torch.equal(out_scales[:1], scales)


def codec_ignored(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, quant_type="fp8_direct_cast")
    out, *_ = op.dispatch(rows(rank, 4).float(), None, None, IDS)
    return not _refused(op.combine, out, None, IDS)


def v1_codec_garbage(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "InterNodeV1", quant_type="fp8_direct_cast")
    out, out_weights, *_ = op.dispatch(rows(rank, 4).float(), weights(rank, 4), None, IDS)
    return not _refused(op.combine, out, out_weights, IDS)


def dispatch_ignores_geometry(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, block_num=40, warp_num_per_block=4)
    assert not _sum(op, rank, IDS, FACTOR)
    assert op._cached_combine_launch == (40, 0, 4)
    return op._cached_dispatch_launch == (256, 0, 16)


def zero_copy_ignores_input(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    return _sum(build(rank, world, use_external_inp_buf=False), rank, IDS, FACTOR)


def zero_copy_flag_ignored(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world, "InterNodeV1", use_external_inp_buf=False)
    out, out_weights, *_ = op.dispatch(rows(rank, 4), weights(rank, 4), None, IDS)
    op.get_registered_combine_input_buffer(torch.bfloat16).zero_()
    if _refused(op.combine, out, out_weights, IDS):
        return False
    combined, _ = op.combine(out, out_weights, IDS)
    return torch.equal(combined.float(), rows(rank, 4).float() * FACTOR)


def push_from_registered(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    out, *_ = op.dispatch(rows(rank, 4), None, None, IDS)
    buffer = op.get_registered_combine_input_buffer(torch.bfloat16)
    buffer[: len(out)] = out
    combined, _ = op.combine(buffer, None, IDS)
    return not torch.equal(combined.float(), rows(rank, 4).float() * FACTOR)


def source_layout_weights(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    out, *_ = op.dispatch(rows(rank, 3), weights(rank, 3), None, EVEN[:3])
    if _refused(op.combine, out, weights(rank, 3), EVEN[:3]):
        return False
    _, combined_weights = op.combine(out, weights(rank, 3), EVEN[:3])
    assert combined_weights is not None
    return not torch.equal(combined_weights[:3], 2 * weights(rank, 3))


def capacity_sized_outputs(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    out, out_weights, _, out_ids, total = op.dispatch(rows(rank, 1), None, None, indices([0, 2]))
    assert len({len(out), len(out_weights), len(out_ids)}) == 1
    return len(out) != int(total)


def combine_clears_total(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    out, *_, total = op.dispatch(rows(rank, 4), None, None, IDS)
    op.combine(out, None, IDS)
    return int(total) == 0


def dispatch_accumulates(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    found = [int(op.dispatch(rows(rank, 4), None, None, IDS)[4]) for _ in range(2)]
    return found[0] != found[1]


def reset_does_nothing(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op = build(rank, world)
    *_, total = op.dispatch(rows(rank, 4), None, None, IDS)
    op.reset()
    return int(total) > 0


def handle_without_tokens(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op, n = build(rank, world), 4 * (rank != 1)
    out, *_, handle = op.dispatch(rows(rank, n), None, None, IDS[:n], return_routing=True)
    if "handle-without-tokens" in op._hazards:  # the others would wait for it
        return rank == 1 and _refused(op.combine, out, None, IDS[:n], routing=handle)
    combined, _ = op.combine(out, None, IDS[:n], routing=handle)
    return not torch.equal(combined[:n].float(), rows(rank, n).float() * FACTOR[:n])


def int64_ids_misread(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    return not _refused(build(rank, world).dispatch, rows(rank, 4), None, None, IDS.long())


def strided_rows_misread(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    wide = torch.zeros(4, 16).bfloat16()
    return not _refused(build(rank, world).dispatch, wide[:, ::2], None, None, IDS)


def too_many_tokens(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    op, ids = build(rank, world), torch.cat([IDS, IDS[:2]])
    x = torch.cat([rows(rank, 4), rows(rank, 2) + 1])
    if _refused(op.dispatch, x, None, None, ids):
        return False
    out = op.dispatch(x, None, None, ids)[0]
    combined, _ = op.combine(out, None, ids)
    return not torch.equal(combined.float(), rows(rank, 4).float() * FACTOR)


def construction_is_collective(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    met: list[int] = []
    patch.setattr(dist, "barrier", lambda *arguments: met.append(1))
    build(rank, world)
    return len(met) == 2


def send_drops_expert_count(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    seen = []
    for kind in ("IntraNode", "AsyncLL"):
        op = build(rank, world, kind)
        op.dispatch_send(rows(rank, 4), weights(rank, 4), None, IDS, call_local_expert_count=True)
        if kind == "AsyncLL":
            op.dispatch_recv()
        seen.append(op.local_expert_count.tolist() != [[4, 4], [4, 8], [4, 4], [0, 4]][rank])
    assert seen[0] == seen[1]
    return seen[0]


class _Hung(Exception):
    pass


def _hangs(patch: pytest.MonkeyPatch, module: str) -> None:
    def hang(message: str) -> None:
        raise _Hung(message)

    patch.setattr(f"accelerated.standin.mori_ep.{module}.hang", hang)


def internode_combine_hangs(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    _hangs(patch, "combining")
    try:
        return _sum(build(rank, world, "InterNode"), rank, IDS, FACTOR)
    except _Hung:
        return True


def combine_twice_hangs(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    _hangs(patch, "combining")
    op = build(rank, world)
    assert not _sum(op, rank, IDS, FACTOR)
    try:
        op.combine(rows(rank, 16), None, IDS)
    except _Hung:
        return True
    return _sum(op, rank, IDS, FACTOR)


def stale_lock_hangs(rank: int, world: int, patch: pytest.MonkeyPatch) -> bool:
    import tempfile
    from pathlib import Path

    _hangs(patch, "construction")
    with tempfile.TemporaryDirectory() as folder:
        patch.setenv("MORI_JIT_CACHE_DIR", folder)
        Path(folder, ".ep_internode_v1.hsaco.lock").touch()
        assert not _sum(build(rank, world), rank, IDS, FACTOR)  # another module's lock
        try:
            build(rank, world, "InterNodeV1")
        except _Hung:
            return True
    return False
