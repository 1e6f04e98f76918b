"""Scenarios on four ranks: what combine returns with a codec on, per kernel type, and where it refuses or ignores one.

Scope: EPR = 2; every token goes to ranks 0 to 3, so the expectation is the codec's own arithmetic, folded by hand. The
arithmetic itself is tested apart. Passing proves nothing about MoRI.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.standin.mori_ep import ops
from accelerated.standin.mori_ep.codecs import Codec, to_fp8
from conformance.selftest.standin.ranks import build, indices, rows, weights

OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
IDS = indices([0, 2, 4, 6], [6, 4, 2, 0], [1, 3, 5, 7])
HIDDEN = 32


def _answer(rank: int, token_of_row: torch.Tensor, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Expert rows that every rank can compute for every other: ``[rows, HIDDEN]``."""
    key = (source * 16 + token_of_row).unsqueeze(1) * 64 + rank * 1000 + torch.arange(HIDDEN)
    return ((key * 2654435761 % 4093).float() / 4093 - 0.5).mul(torch.where(key % 7 == 0, 2000.0, 4.0)).to(dtype)


def _round(op: ops.EpDispatchCombineOp, rank: int, dtype: torch.dtype, **options: object) -> torch.Tensor:
    """One dispatch and combine; returns ``[3, HIDDEN]``."""
    x = torch.zeros(3, HIDDEN, dtype=dtype)
    out, out_weights, *_ = op.dispatch(x, weights(rank, 3, 4), None, IDS)
    split = op.config.kernel_type == ops.EpDispatchCombineKernelType.AsyncLL
    if split:
        op.dispatch_recv()
    position = op.get_dispatch_src_token_pos().long()
    answers = torch.full_like(out, float("nan"))
    stride = 4 if op.config.kernel_type == ops.EpDispatchCombineKernelType.InterNode else 16
    answers[: len(position)] = _answer(rank, position % stride, position // stride, dtype)
    combined, combined_weights = op.combine(answers, None if split else out_weights, IDS, **options)  # type: ignore[arg-type]
    if split:
        op.combine_recv()
    else:
        assert combined_weights is not None
        assert torch.equal(combined_weights[:3], 4 * weights(rank, 3, 4))
    return combined[:3]


def _terms(rank: int, dtype: torch.dtype, order: list[list[int]]) -> torch.Tensor:
    """``[slots, 3, HIDDEN]``: the answers to this rank's tokens, in slot order."""
    token, source = torch.arange(3), torch.full((3,), rank)
    by_rank = torch.stack([_answer(owner, token, source, dtype) for owner in range(4)])
    return torch.stack([torch.stack([by_rank[order[t][slot], t] for t in range(3)]) for slot in range(4)])


SLOTS = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]


def _sum(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def direct_cast(rank: int, world: int) -> None:
    for arch, flavour in (("gfx942", FNUZ), ("gfx950", OCP)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MORI_GPU_ARCHS", arch)
            for kind in ("IntraNode", "IntraNodeLL", "AsyncLL"):
                op = _build(rank, world, kind, "fp8_direct_cast")
                found = _round(op, rank, torch.bfloat16)
                wanted = _sum(to_fp8(_terms(rank, torch.bfloat16, SLOTS).float(), flavour).float()).bfloat16()
                assert torch.equal(found, wanted), kind
                assert not hasattr(op, "_last_combine_kernel_name")
                assert op._fp8_blockwise_combine_scale_dim == 0


def direct_cast_rounds_node_sums_again(rank: int, world: int) -> None:
    coded = to_fp8(_terms(rank, torch.bfloat16, SLOTS).float(), FNUZ).float()
    owner = torch.tensor(SLOTS).t().unsqueeze(2)
    for kind in ("InterNodeV1", "InterNodeV1LL"):
        for per_node in (4, 2, 1):
            op = _build(rank, world, kind, "fp8_direct_cast", gpu_per_node=per_node, rdma_block_num=8)
            found = _round(op, rank, torch.bfloat16)
            partials = [
                to_fp8(_sum(coded.masked_fill(owner // per_node != node, 0.0)), FNUZ).float()
                for node in range(world // per_node)
            ]
            assert torch.equal(found, _sum(torch.stack(partials)).bfloat16()), (kind, per_node)
            assert torch.equal(found, _sum(coded).bfloat16()) == (per_node == 1)


def blockwise(rank: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORI_GPU_ARCHS", "gfx950")
        patch.setenv("MORI_FP8_COMBINE_SCALE_DIM", "4")
        for name, kinds in (
            ("fp8_blockwise", ("IntraNode", "IntraNodeLL", "AsyncLL")),
            ("fp4_blockwise", ("IntraNode", "IntraNodeLL")),
        ):
            codec = Codec(name, OCP, 4)
            terms = _terms(rank, torch.bfloat16, SLOTS)
            values, scales = codec.decode(codec.encode(terms.view(-1, HIDDEN)), HIDDEN)
            assert scales is not None
            wanted = codec.fold(values.view(4, 3, HIDDEN), scales.view(4, 3, HIDDEN), False).bfloat16()
            for kind in kinds:
                op = _build(rank, world, kind, name)
                assert op._fp8_blockwise_combine_scale_dim == 4
                patch.setenv("MORI_FP8_COMBINE_SCALE_DIM", "8")  # read in construction only
                assert torch.equal(_round(op, rank, torch.bfloat16), wanted), (name, kind)
                patch.setenv("MORI_FP8_COMBINE_SCALE_DIM", "4")
                name_seen = getattr(op, "_last_combine_kernel_name", None)
                assert name_seen == (None if kind == "AsyncLL" else f"EpCombineIntraNodeKernel_bf16_nop2p_{name}")


def blockwise_refusals_come_in_combine(rank: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORI_GPU_ARCHS", "gfx950")
        cases = [("InterNode", "fp8_blockwise"), ("InterNodeV1", "fp8_blockwise"), ("InterNodeV1LL", "fp8_blockwise")]
        for kind, name in (*cases, ("AsyncLL", "fp4_blockwise"), ("InterNodeV1", "fp4_blockwise")):
            op = _build(rank, world, kind, name)
            op.dispatch(rows(rank, 3, HIDDEN), weights(rank, 3, 4), None, IDS)
            with pytest.raises(ValueError, match=f"not for {kind}"):
                op.combine(rows(rank, 12, HIDDEN).float(), None, IDS, use_external_inp_buf=0)  # the type comes first
        for kind in ("IntraNode", "IntraNodeLL", "AsyncLL"):
            op = _build(rank, world, kind, "fp8_blockwise")
            op.dispatch(rows(rank, 3, HIDDEN), weights(rank, 3, 4), None, IDS)
            with pytest.raises(ValueError, match=r"not torch\.float32"):
                op.combine(rows(rank, 12, HIDDEN).float(), None, IDS, use_external_inp_buf=0)
            with pytest.raises(ValueError, match="zero-copy"):
                op.combine(rows(rank, 12, HIDDEN), None, IDS, use_external_inp_buf=0)
    with pytest.raises(ValueError, match="gfx950"):
        _build(rank, world, "IntraNode", "fp4_blockwise")


def direct_cast_is_ignored(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL", "AsyncLL", "InterNode"):
        dtype = torch.bfloat16 if kind == "InterNode" else torch.float32
        op = _build(rank, world, kind, "fp8_direct_cast")
        order = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
        assert torch.equal(_round(op, rank, dtype), _sum(_terms(rank, dtype, order).float()).to(dtype)), kind
    op = _build(rank, world, "IntraNode", "fp8_direct_cast")
    buffer = op.get_registered_combine_input_buffer(torch.bfloat16, HIDDEN)
    op.dispatch(torch.zeros(3, HIDDEN).bfloat16(), None, None, IDS)
    position = op.get_dispatch_src_token_pos().long()
    buffer[: len(position)] = _answer(rank, position % 16, position // 16, torch.bfloat16)
    combined, _ = op.combine(buffer * 0, None, IDS, use_external_inp_buf=0)
    assert torch.equal(combined[:3], _sum(_terms(rank, torch.bfloat16, SLOTS).float()).bfloat16())


def direct_cast_writes_nothing_for_other_types(rank: int, world: int) -> None:
    for kind in ("InterNodeV1", "InterNodeV1LL"):
        op = _build(rank, world, kind, "fp8_direct_cast")
        assert _round(op, rank, torch.float32).isnan().all(), kind


def _build(rank: int, world: int, kind: str, codec: str, **changes: object) -> ops.EpDispatchCombineOp:
    sizes = {"hidden_dim": HIDDEN, "num_experts_per_token": 4, "max_num_inp_token_per_rank": 4}
    return build(rank, world, kind, quant_type=codec, **{**sizes, **changes})
