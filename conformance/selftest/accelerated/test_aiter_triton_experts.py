"""What the adapters of AITER's Triton experts pass on and hand back, against functions that only record.

Scope: sorting, layouts of weights, arguments by name, refusals. A pass proves nothing about AITER's arithmetic.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerated.aiter_ops import triton_experts_contract as declared
from accelerated.aiter_ops.triton_backend import aiter_triton
from accelerated.aiter_ops.triton_experts_ragged import RaggedExperts, block_map
from accelerated.contract import ContractError, Standing
from accelerated.experts import ExpertContract, ExpertProblem
from conformance.rank.expert_weights import weights_of
from conformance.selftest.accelerated.triton_recorder import BF16, K, M, Recorder, session
from reference.expert_numerics import SWIGLU_ALPHA, SWIGLU_LIMIT
from reference.expert_weights import ExpertWeights

H, INTERMEDIATE, E = 128, 64, 4
IDS, WEIGHTS = torch.tensor([[0, 3], [2, -1], [1, 9]]).int(), torch.rand(M, K)


def problem(name: str = "", **sizes: Any) -> ExpertProblem:
    blocks = name in ("triton.fused_moe.fp8_block", "triton.gemm_a8w8.block")
    given = {"shards": 1, "hidden": H, "intermediate": 128 if blocks else INTERMEDIATE, "experts": E}
    return ExpertProblem(**(given | {"top_k": K, "capacity": 8} | sizes))


def loaded(name: str, owned: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Any, Recorder, ExpertWeights]:
    made, recorder = session()
    sizes = problem(name, shards=1 if len(owned) == E else 2)
    operation: Any = made.build(sizes, name)
    contract = declared.contract(sizes, name, "gfx950")
    weights = weights_of(
        owned,
        hidden=H,
        intermediate=sizes.intermediate,
        codec=contract.weight_codec,
        dtype=BF16,
        biased=contract.biased,
        device=torch.device("cpu"),
    )
    operation.load(weights, owned)
    return operation, recorder, weights


def call(operation: Any, **given: Any) -> Any:
    return operation.experts(torch.ones(M, H, dtype=BF16), IDS, WEIGHTS, **given)


@pytest.mark.parametrize("name", declared.names())
def test_every_operator_is_driven(name: str) -> None:
    operation, recorder, _ = loaded(name)
    assert call(operation).shape == (M, H)
    used = {called for called, _, _ in recorder.calls}
    assert used & ({"align"} if declared.OPERATORS[name].form is declared.Form.SORTED else {"routing_from_topk"})


def test_pairs_without_a_local_expert_are_sorted_behind_the_others() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.bf16", (1, 3))
    call(operation)
    ((slots,), given) = recorder.of("align")[0]
    assert slots.tolist() == [[2, 1], [2, 2], [0, 2]]
    assert (given["num_experts"], given["block_size"]) == (3, 16)
    assert given["sorted_token_ids"].tolist() == [M * K] * (M * K + 3 * 15)
    assert len(given["expert_ids"]) * 16 >= len(given["sorted_token_ids"])
    for _, to_kernel in recorder.of("fused_moe"):
        assert to_kernel["expert_ids"][:3].tolist() == [0, 1, -1]


def test_the_second_product_is_weighted_and_the_first_is_not() -> None:
    operation, recorder, weights = loaded("triton.fused_moe.bf16")
    call(operation)
    (first, of_first), (second, of_second) = recorder.of("fused_moe")
    assert torch.equal(first[1], weights.w1)
    assert torch.equal(second[1], weights.w2)
    assert [list(args[2].shape) for args in (first, second)] == [[M, K, 2 * INTERMEDIATE], [M, K, H]]
    assert [(one["mul_routed_weight"], one["top_k"]) for one in (of_first, of_second)] == [(False, K), (True, 1)]
    assert torch.equal(of_second["topk_weights"], WEIGHTS)
    assert (of_first["use_fp8_w8a8"], of_first["B_scale"], of_first["A_scale"]) == (False, None, None)


def test_scales_of_every_kind_reach_the_kernel() -> None:
    operation, recorder, weights = loaded("triton.fused_moe.fp8_tensor")
    call(operation)
    assert torch.equal(recorder.of("fused_moe")[0][1]["B_scale"], weights.w1_scales.float().flatten())  # type: ignore[union-attr]
    operation, recorder, weights = loaded("triton.fused_moe.fp8_block")
    call(operation)
    of_first = recorder.of("fused_moe")[0][1]
    assert (of_first["B_scale"].shape, of_first["block_shape"]) == ((E, 2, 1), [128, 128])
    operation, recorder, weights = loaded("triton.fused_moe.mxfp4")
    call(operation)
    assert weights.w1_scales is not None
    codes = recorder.of("fused_moe_mxfp4")[0][1]["B_mx_scale"]
    assert torch.equal(torch.exp2(codes.double() - 127), weights.w1_scales)


def test_the_wire_s_codes_are_not_quantised_again() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.fp8_block")
    codes, scales = torch.full((M, H), 7, dtype=torch.uint8), torch.ones(M, 1)
    operation.experts(codes, IDS, WEIGHTS, scales=scales)
    (args, given) = recorder.of("fused_moe")[0]
    assert args[0].dtype is torch.float8_e4m3fn
    assert args[0].data_ptr() == codes.data_ptr()
    assert given["A_scale"] is scales


def test_gate_and_up_are_interleaved_with_their_scales_and_biases() -> None:
    operation, _, weights = loaded("triton.gemm_a8w4.swiglu")
    assert isinstance(operation, RaggedExperts)
    assert operation.w1.shape == (E, H // 2, 2 * INTERMEDIATE)
    assert operation.w1.stride(1) == 1
    assert weights.bias1 is not None and weights.w1_scales is not None  # noqa: PT018  for mypy
    up = weights.bias1[:, INTERMEDIATE:]
    assert torch.equal(operation.bias1[:, 1::2], up)  # type: ignore[index]
    scales = operation.scale1.mT[:, 1::2]  # type: ignore[union-attr]
    assert torch.equal(torch.exp2(scales.double() - 127), weights.w1_scales[:, INTERMEDIATE:])


@pytest.mark.parametrize("name", ["triton.gemm_a8w4", "triton.gemm_a8w4.swiglu"])
def test_activation_and_routing_of_the_grouped_products(name: str) -> None:
    operation, recorder, _ = loaded(name)
    call(operation)
    (_, first), (_, second) = recorder.of("gemm_a8w4")
    swiglu = name.endswith("swiglu")
    activation = (first["apply_swiglu"], first["alpha"], first["limit"], first["swiglu_add_residual"])
    assert activation == ((True, SWIGLU_ALPHA, SWIGLU_LIMIT, True) if swiglu else (True, 1.0, None, False))
    assert "gammas" not in first
    assert torch.equal(second["gammas"], WEIGHTS.flatten())
    assert (first["bias"] is None, second["bias"] is None) == (not swiglu, not swiglu)
    assert first["routing_data"] is second["routing_data"]
    assert recorder.of("routing_from_topk")[0][1]["expert_map"].tolist() == [0, 1, 2, 3]


def test_tiles_of_experts() -> None:
    offsets, tiles, used = block_map(torch.tensor([17, 0, 3, 16], dtype=torch.int32), 36, 16)
    assert offsets.tolist() == [0, 17, 17, 20, 36]
    assert tiles.tolist() == [0, 2, 2, 3, 4]
    assert used.tolist() == [0, 1 << 16, 2, 3, -1, -1]
    assert block_map(torch.tensor([0, 2], dtype=torch.int32), 2, 16)[2].tolist() == [1, -1]


def test_rows_beyond_the_valid_ones_have_no_expert() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.bf16")
    call(operation, num_rows=torch.tensor([1], dtype=torch.int32))
    assert recorder.of("align")[0][0][0].tolist() == [[0, 3], [E, E], [E, E]]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("triton.fused_moe.bf16", {"scales": torch.ones(M, 1)}, "takes no scales"),
        ("triton.e2e.bf16", {"num_rows": torch.ones(1, dtype=torch.int32)}, "takes no num_rows"),
    ],
)
def test_arguments_are_never_dropped(name: str, given: dict[str, Any], message: str) -> None:
    operation, recorder, _ = loaded(name)
    with pytest.raises(ValueError, match=message):
        call(operation, **given)
    assert recorder.calls == []


def test_what_does_not_fit_is_refused() -> None:
    operation, _, weights = loaded("triton.fused_moe.bf16")
    with pytest.raises(ValueError, match="at most 8 contiguous rows of 128"):
        operation.experts(torch.ones(9, H, dtype=BF16), IDS, WEIGHTS)
    with pytest.raises(ValueError, match="give int32 and float32"):
        operation.experts(torch.ones(M, H, dtype=BF16), IDS.long(), WEIGHTS)
    with pytest.raises(ValueError, match="3 ids for 4 experts"):
        operation.load(weights, [0, 1, 2])
    with pytest.raises(ValueError, match="takes weights stored as"):
        loaded("triton.fused_moe.mxfp4")[0].load(weights, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("name", "arch", "sizes", "reason"),
    [
        ("triton.gemm_a4w4", "gfx942", {}, "is for gfx950"),
        ("triton.fused_moe.fp8_block", "gfx950", {"hidden": 192}, "multiples of 128"),
        ("triton.e2e.bf16", "gfx950", {"intermediate": 128}, "rounds every 64 columns"),
        ("triton.e2e.bf16", "gfx950", {"shards": 2}, "has to hold every expert"),
        ("triton.gemm_a8w4", "gfx950", {"capacity": 4097}, "at most 4096 pairs"),
        ("triton.fused_moe.bf16", "gfx950", {"dtype": "float32"}, "takes bfloat16 or float16"),
        ("triton.nothing", "gfx950", {}, "is no Triton experts operator"),
    ],
)
def test_what_cannot_run(name: str, arch: str, sizes: dict[str, Any], reason: str) -> None:
    backend = aiter_triton(arch)
    asked = problem(name, **sizes)
    support = backend.support(asked, name)
    assert support.standing is Standing.REFUSED
    assert reason in support.reason
    with pytest.raises(ContractError) as refused:
        backend.contract(asked, name)
    assert reason in str(refused.value)


@pytest.mark.parametrize(("arch", "count"), [("gfx942", 6), ("gfx950", 14)])
def test_what_is_offered(arch: str, count: int) -> None:
    backend = aiter_triton(arch)
    names = [n for n in backend.operators["experts"] if backend.support(problem(n), n).standing is not Standing.REFUSED]
    assert len(names) == count
    for name in names:
        contract = backend.contract(problem(name), name)
        assert isinstance(contract, ExpertContract)
        assert contract.weight_codec is None or contract.weight_codec.payload is not None
