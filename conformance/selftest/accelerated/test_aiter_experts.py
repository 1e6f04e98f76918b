"""What the adapter of AITER's fused experts passes, argument by argument, and the layout of what it loads.

Scope: a library that writes down its calls, bound to the recorded signatures of the real functions; weights are
shuffled by the double and read back by the specification's own inverse. A pass does not prove that AITER computes with
them.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.aiter_ops import expert_layout
from accelerated.aiter_ops.experts_numerics import OPERATORS
from accelerated.aiter_ops.library import load_standin
from conformance.selftest.accelerated.experts_recorder import (
    INNER,
    E,
    H,
    Recorder,
    built,
    call,
    fix_environment,
    loaded,
)
from reference.codecs import ScaleLayout
from reference.layouts import logical_scales, unpack_e2m1
from reference.weight_layouts import unshuffle


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_environment(monkeypatch)


@pytest.mark.parametrize(
    ("name", "kind", "activation", "early", "limit"),
    [
        ("fused_moe.bf16", "No", "Silu", False, None),
        ("fused_moe.bf16_gelu", "No", "Gelu", False, None),
        ("fused_moe.fp8_token", "per_Token", "Silu", False, None),
        ("fused_moe.fp8_token_stage1", "per_Token", "Silu", True, None),
        ("fused_moe.fp8_block", "per_128x128", "Silu", False, None),
        ("fused_moe.mxfp4", "per_1x32", "Silu", False, None),
        ("fused_moe.mxfp4_swiglu", "per_1x32", "Swiglu", False, 7.0),
    ],
)
def test_every_argument(name: str, kind: str, activation: str, early: bool, limit: float | None) -> None:
    recorder = Recorder()
    operation, local = loaded(name, recorder, [4, 5, 6, 7])
    count = None if early else torch.tensor([2], dtype=torch.int32)
    result = call(operation, k=1 if early else 2, num_rows=count)
    assert torch.equal(result, torch.ones(3, H, dtype=torch.bfloat16))
    (given,), enum = recorder.calls, load_standin().enum
    assert given["hidden_states"].dtype == torch.bfloat16
    assert (given["activation"], given["quant_type"]) == (
        getattr(enum.ActivationType, activation),
        getattr(enum.QuantType, kind),
    )
    assert (given["doweight_stage1"], given["swiglu_limit"], given["gate_mode"]) == (early, limit, "separated")
    assert (given["dtype"], given["num_local_tokens"], given["a1_scale"]) == (torch.bfloat16, count, None)
    assert given["expert_mask"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert given["expert_mask"].dtype == given["topk_ids"].dtype == torch.int32
    assert given["topk_weight"].dtype == torch.float32
    assert given["w1"].is_shuffled
    assert given["w2"].is_shuffled
    whole = expert_layout.padded(local, H, 2 * INNER) if activation == "Swiglu" else local
    for bias in ("bias1", "bias2"):
        wanted = getattr(whole, bias)
        assert given[bias] is None if wanted is None else torch.equal(given[bias], wanted)
    # CK-Tile takes 256 columns of the intermediate at a time.
    assert (given["hidden_pad"], given["intermediate_pad"]) == (0, 128 if activation == "Swiglu" else 0)
    # Everything else is left to the library.
    assert set(given) <= {
        "hidden_states", "w1", "w2", "topk_weight", "topk_ids", "expert_mask", "activation", "quant_type",
        "doweight_stage1", "w1_scale", "w2_scale", "a1_scale", "num_local_tokens", "dtype", "bias1", "bias2",
        "swiglu_limit", "gate_mode", "hidden_pad", "intermediate_pad",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "shapes"),
    [
        ("fused_moe.bf16", torch.bfloat16, None),
        ("fused_moe.fp8_token", torch.float8_e4m3fn, [(4, 2 * INNER, 1), (4, H, 1)]),
        ("fused_moe.fp8_block", torch.float8_e4m3fn, [(4, 2, 2), (4, 2, 1)]),
        ("fused_moe.mxfp4", torch.float4_e2m1fn_x2, [(1024, 8), (1024, 8)]),
    ],
)
def test_loaded_weights_read_back(name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]] | None) -> None:
    recorder = Recorder()
    operation, local = loaded(name, recorder, [0, 1, 2, 3])
    call(operation)
    given = recorder.calls[0]
    for which, stored, scales in (("w1", local.w1, local.w1_scales), ("w2", local.w2, local.w2_scales)):
        laid = given[which]
        assert laid.dtype == dtype
        if local.codec is None:
            assert torch.equal(unshuffle(laid), stored)
            assert given[f"{which}_scale"] is None
            continue
        codes = unshuffle(laid.view(torch.uint8))
        assert torch.equal(unpack_e2m1(codes) if codes.shape != stored.shape else codes.long(), stored.long())
        assert scales is not None
        assert shapes is not None
        scale = given[f"{which}_scale"]
        assert tuple(scale.shape) == shapes[which == "w2"]
        if scale.dtype == torch.float32:
            assert torch.equal(scale.double().view(scales.shape), scales)
            continue
        assert scale.dtype == torch.float8_e8m0fnu
        logical = logical_scales(scale.view(torch.uint8), ScaleLayout.SWIZZLED, *scales.flatten(0, 1).shape)
        assert torch.equal(torch.exp2(logical.double() - 127), scales.flatten(0, 1))


def test_ids_that_aiter_cannot_look_up_become_the_sentinel() -> None:
    recorder = Recorder()
    operation, _ = loaded("fused_moe.bf16", recorder, [0, 1, 2, 3])
    ids = torch.tensor([[-1, 0], [7, 8], [9, -(1 << 31)], [(1 << 31) - 1, 3]], dtype=torch.int32)
    kept, given = ids.clone(), torch.rand(4, 2)
    operation.experts(torch.ones(4, H, dtype=torch.bfloat16), ids, given)
    assert recorder.calls[0]["topk_ids"].tolist() == [[8, 0], [7, 8], [8, 8], [8, 3]]
    assert torch.equal(recorder.calls[0]["topk_weight"], given)
    assert torch.equal(ids, kept)


def test_one_rank_gets_neither_mask_nor_sentinel() -> None:
    recorder = Recorder()
    operation, _ = loaded("fused_moe.bf16", recorder, list(range(E)), shards=1)
    call(operation)
    assert recorder.calls[0]["expert_mask"] is None
    assert recorder.calls[0]["topk_ids"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_shared_experts_are_in_the_mask_of_every_rank() -> None:
    """vLLM 0.33.0: E + S + 1 entries, the last is nobody's, and a column of it beside the shared ones."""
    for owned, mask in (([0, 1], [1, 1, 0, 0, 1, 0]), ([2, 3], [0, 0, 1, 1, 1, 0])):
        recorder = Recorder()
        operation, _ = loaded("fused_moe.bf16", recorder, [*owned, 4], experts=4, shared=1)
        ids = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32)
        operation.experts(torch.ones(2, H, dtype=torch.bfloat16), ids, torch.ones(2, 3))
        assert recorder.calls[0]["expert_mask"].tolist() == mask
        assert recorder.calls[0]["topk_ids"].tolist() == [[0, 2, 4, 5], [1, 3, 5, 5]]
        assert recorder.calls[0]["topk_weight"][:, 3].tolist() == [0, 0]


def test_shared_columns_of_one_token_are_real_on_one_rank() -> None:
    ids, given = torch.zeros(5, 2, dtype=torch.int32), torch.rand(5, 2)
    real = torch.zeros(5, 2, dtype=torch.int64)
    for rank in range(3):
        wide, weight = expert_layout.with_shared_columns(ids, given, experts=8, shared=2, rank=rank, shards=3)
        assert wide.dtype == torch.int32
        assert torch.equal(wide[:, :2], ids)
        assert torch.equal(weight, torch.cat([given, torch.ones(5, 2)], 1))
        assert wide[:, 2:].tolist() == [[8, 9] if row % 3 == rank else [-1, -1] for row in range(5)]
        real += (wide[:, 2:] >= 0).long()
    assert torch.equal(real, torch.ones_like(real))


def test_a_single_column_under_a_mask_gets_a_fake_one() -> None:
    recorder = Recorder()
    operation, _ = loaded("fused_moe.fp8_block", recorder, [0, 1, 2, 3], top_k=1)
    call(operation, k=1)
    assert recorder.calls[0]["topk_ids"].tolist() == [[0, 8], [1, 8], [2, 8]]
    operation, _ = loaded("fused_moe.fp8_token_stage1", recorder, [0, 1, 2, 3])
    call(operation, k=1)
    assert recorder.calls[1]["topk_ids"].tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("name", "codes", "scales"),
    [
        ("fused_moe.fp8_token", (torch.float8_e4m3fn, H), (torch.float32, 1)),
        ("fused_moe.fp8_block", (torch.float8_e4m3fn, H), (torch.float32, H // 128)),
        ("fused_moe.mxfp4", (torch.float4_e2m1fn_x2, H // 2), (torch.float8_e8m0fnu, H // 32)),
    ],
)
def test_quantised_rows(name: str, codes: tuple[torch.dtype, int], scales: tuple[torch.dtype, int]) -> None:
    recorder = Recorder()
    operation, _ = loaded(name, recorder, [0, 1, 2, 3])
    rows = torch.linspace(-3, 3, 3 * H).view(3, H).bfloat16()
    for count in (3, 0):
        found, scale = operation.quantise(rows[:count])
        assert scale is not None
        assert (found.dtype, tuple(found.shape)) == (codes[0], (count, codes[1]))
        assert (scale.dtype, tuple(scale.shape)) == (scales[0], (count, scales[1]))
    found, scale = operation.quantise(rows)
    assert scale is not None
    ids, weight = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    # As bytes, or in the library's own types: the same call.
    plain = scale if scale.dtype == torch.float32 else scale.view(torch.uint8)
    operation.experts(found.view(torch.uint8), ids, weight, scales=plain)
    operation.experts(found, ids, weight, scales=scale)
    for given in recorder.calls:
        assert (given["hidden_states"].dtype, given["a1_scale"].dtype) == (codes[0], scales[0])
        assert torch.equal(given["hidden_states"].view(torch.uint8), found.view(torch.uint8))
        assert torch.equal(given["a1_scale"].view(torch.uint8), scale.view(torch.uint8))


def test_no_rows_launch_nothing() -> None:
    recorder = Recorder()
    operation, _ = loaded("fused_moe.fp8_token", recorder, [0, 1, 2, 3])
    result = call(operation, rows=0)
    assert (tuple(result.shape), result.dtype, recorder.calls) == ((0, H), torch.bfloat16, [])


def test_without_a_wire_rows_stay_as_they_are() -> None:
    operation, _ = built("fused_moe.mxfp4_swiglu", Recorder())
    rows = torch.ones(2, H, dtype=torch.bfloat16)
    assert operation.quantise(rows) == (rows, None)


def test_loading_again_replaces_mask_and_weights() -> None:
    recorder = Recorder()
    operation, local = loaded("fused_moe.bf16", recorder, [0, 1, 2, 3])
    operation.load(local.pick([3, 2, 1, 0]), [1, 3, 5, 7])
    call(operation)
    assert recorder.calls[0]["expert_mask"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert torch.equal(unshuffle(recorder.calls[0]["w1"])[0], local.w1[3])


@pytest.mark.parametrize("scale", [0.0, 3.0, -2.0, 2.0**-128, 2.0**128])
def test_scales_that_no_e8m0_byte_stands_for(scale: float) -> None:
    with pytest.raises(ValueError, match="E8M0 has no other"):
        expert_layout.e8m0_codes(torch.tensor([1.0, scale], dtype=torch.float64))


def test_e8m0_codes() -> None:
    scales = torch.tensor([2.0**-127, 2.0**-1, 1.0, 2.0**127, torch.nan], dtype=torch.float64)
    assert expert_layout.e8m0_codes(scales).tolist() == [0, 126, 127, 254, 255]


def test_every_operator_is_here() -> None:
    assert set(OPERATORS) == {
        "fused_moe.bf16",
        "fused_moe.bf16_gelu",
        "fused_moe.fp8_token",
        "fused_moe.fp8_token_stage1",
        "fused_moe.fp8_block",
        "fused_moe.mxfp4",
        "fused_moe.mxfp4_swiglu",
    }
