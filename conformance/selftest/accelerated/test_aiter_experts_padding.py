"""Sizes that AITER's FP4 kernels have no tiles for, gpt-oss' 2880 among them: what the adapter adds and takes away.

Scope: weights, scales, biases and rows that are padded with zeros, the padding that AITER is told of, the columns of
the result that remain, and what lies within the declared interval. A pass does not prove which columns AITER's kernels
read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerated.aiter_ops import backend, expert_layout
from accelerated.aiter_ops.experts_contract import support
from accelerated.aiter_ops.experts_numerics import OPERATORS, padded_sizes
from accelerated.contract import Standing
from accelerated.experts import ExpertProblem
from accelerated.standin.aiter_ops import defects
from conformance.rank.expert_weights import weights_of
from conformance.selftest.accelerated.experts_recorder import CPU, Recorder, built
from conformance.selftest.accelerated.test_aiter_experts_results import shards, worst
from conformance.suite.cells import PlannedCell
from conformance.suite.layer_plan import expert_cells
from reference.codecs import ScaleLayout
from reference.expert_weights import ExpertWeights
from reference.layouts import logical_scales, unpack_e2m1
from reference.weight_layouts import unshuffle

FP4 = ("fused_moe.mxfp4", "fused_moe.mxfp4_swiglu")
#: Ten and three groups of 32: neither is a multiple of any tile.
SMALL = (320, 96)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter and the backend set these; they are taken back."""
    monkeypatch.setenv("AITER_BYPASS_TUNE_CONFIG", "1")
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "gfx950")
    torch.set_num_threads(1)


class Wide(Recorder):
    """Results as wide as the library makes them, NaN where a caller must not look."""

    def fused_moe(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        super().fused_moe(*args, **kwargs)
        given = self.calls[-1]
        result = torch.ones(given["topk_ids"].shape[0], given["w2"].shape[1], dtype=given["dtype"])
        result[:, result.shape[1] - given["hidden_pad"] :] = torch.nan
        return result


def called(name: str, sizes: tuple[int, int], *, quantised: bool = False) -> tuple[dict[str, Any], ExpertWeights, Any]:
    """What the library is given for three rows of ones, the weights, and the result."""
    recorder = Wide()
    operation, problem = built(name, recorder, hidden=sizes[0], intermediate=sizes[1])
    local = weights_of(
        [0, 1, 2, 3], hidden=sizes[0], intermediate=sizes[1], codec=operation._contract.weight_codec,
        dtype=torch.bfloat16, biased=operation._contract.biased, device=CPU,
    )  # fmt: skip
    operation.load(local, [0, 1, 2, 3])
    rows, scales = torch.ones(3, problem.hidden, dtype=torch.bfloat16), None
    if quantised:
        rows, scales = operation.quantise(rows)
    result = operation.experts(rows, torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2), scales=scales)
    return recorder.calls[0], local, result


@pytest.mark.parametrize(
    ("name", "sizes", "wanted"),
    [
        ("fused_moe.mxfp4_swiglu", (2880, 2880), (3072, 3072)),
        ("fused_moe.mxfp4_swiglu", (2880, 128), (3072, 256)),
        ("fused_moe.mxfp4_swiglu", SMALL, (512, 256)),
        ("fused_moe.mxfp4", (2880, 2880), (3072, 2944)),
        ("fused_moe.mxfp4", SMALL, (512, 128)),
        ("fused_moe.mxfp4", (256, 128), (256, 128)),
        ("fused_moe.bf16", (2880, 2880), (2880, 2880)),
    ],
)
def test_what_sizes_become(name: str, sizes: tuple[int, int], wanted: tuple[int, int]) -> None:
    problem = ExpertProblem(1, *sizes, 32, 4, 512)
    assert padded_sizes(problem, OPERATORS[name]) == wanted
    assert support(problem, name, "gfx950").standing is not Standing.REFUSED


def test_gpt_oss_is_claimed_on_one_rank() -> None:
    found = support(ExpertProblem(1, 2880, 2880, 128, 4, 1024), "fused_moe.mxfp4_swiglu", "gfx950")
    assert found.standing is Standing.CLAIMED


@pytest.mark.parametrize("name", FP4)
def test_arguments(name: str) -> None:
    given, _, result = called(name, SMALL)
    hidden, inner = (512, 256 if "swiglu" in name else 128)
    assert (given["hidden_pad"], given["intermediate_pad"]) == (hidden - 320, inner - 96)
    assert tuple(given["hidden_states"].shape) == (3, hidden)
    assert bool(given["hidden_states"][:, :320].eq(1).all())
    assert bool(given["hidden_states"][:, 320:].eq(0).all())
    assert tuple(given["w1"].shape) == (4, 2 * inner, hidden // 2)
    assert tuple(given["w2"].shape) == (4, hidden, inner // 2)
    assert torch.equal(result, torch.ones(3, 320, dtype=torch.bfloat16))
    assert result.is_contiguous()


@pytest.mark.parametrize("name", FP4)
def test_weights_scales_and_biases(name: str) -> None:
    """Gates and ups are padded apart: an up is not taken for a gate."""
    given, local, _ = called(name, SMALL)
    hidden, inner = (512, 256 if "swiglu" in name else 128)
    live = [*range(96), *range(inner, inner + 96)]
    for which, columns, kept in (("w1", 320, live), ("w2", 96, list(range(320)))):
        codes = unpack_e2m1(unshuffle(given[which].view(torch.uint8)))
        scale = logical_scales(
            given[f"{which}_scale"].view(torch.uint8),
            ScaleLayout.SWIZZLED,
            codes.shape[0] * codes.shape[1],
            codes.shape[2] // 32,
        ).view(*codes.shape[:2], -1)
        assert torch.equal(codes[:, kept, :columns].long(), getattr(local, which).long())
        wanted = getattr(local, f"{which}_scales")
        assert torch.equal(torch.exp2(scale[:, kept, : columns // 32].double() - 127), wanted)
        codes[:, kept, :columns], scale[:, kept, : columns // 32] = 0, 127
        assert not bool(codes.any())
        assert bool(scale.eq(127).all())
    if local.bias1 is not None and local.bias2 is not None:
        assert torch.equal(given["bias1"][:, live], local.bias1)
        assert torch.equal(given["bias2"][:, :320], local.bias2)
        given["bias1"][:, live], given["bias2"][:, :320] = 0, 0
        assert not bool(given["bias1"].any() | given["bias2"].any())
        assert tuple(given["bias1"].shape) == (4, 2 * inner)
        assert tuple(given["bias2"].shape) == (4, hidden)


def test_quantised_rows_get_codes_of_zero_and_scales_of_one() -> None:
    given, _, _ = called("fused_moe.mxfp4", SMALL, quantised=True)
    codes, scales = unpack_e2m1(given["hidden_states"].view(torch.uint8)), given["a1_scale"].view(torch.uint8)
    assert (tuple(codes.shape), tuple(scales.shape)) == ((3, 512), (3, 16))
    assert bool(codes[:, :320].ne(0).all())
    assert not bool(codes[:, 320:].any())
    assert bool(scales[:, 10:].eq(127).all())


@pytest.mark.parametrize("rows", [1, 17, 257])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", FP4)
def test_results_are_within_the_contract(name: str, count: int, rows: int) -> None:
    for shard in shards(name, "gfx950", count, sizes=SMALL):
        assert worst(shard, rows, tail=0, quantised=False, masked=count > 1) <= 1
        assert worst(shard, rows, tail=3, quantised=False, masked=count > 1) <= 1


@pytest.mark.parametrize("rows", [1, 17])
def test_quantised_rows_are_within_the_contract(rows: int) -> None:
    for shard in shards("fused_moe.mxfp4", "gfx950", 2, sizes=SMALL):
        assert worst(shard, rows, tail=5, quantised=True, masked=False) <= 1


@pytest.mark.parametrize("rows", [1, 17, 257])
def test_the_width_of_gpt_oss(rows: int) -> None:
    shard = shards("fused_moe.mxfp4_swiglu", "gfx950", 2, sizes=(2880, 352))[1]
    assert worst(shard, rows, tail=2, quantised=False, masked=True) <= 1


def spoilt(weights: ExpertWeights, hidden: int, inner: int) -> ExpertWeights:
    """Padded as by :func:`expert_layout.padded`, with NaN scales in the last 128 columns of H and of a padded I."""
    whole = PADDED(weights, hidden, inner)
    assert whole.w1_scales is not None
    assert whole.w2_scales is not None
    whole.w1_scales[:, :, -4:] = torch.nan
    whole.w2_scales[:, -128:] = torch.nan
    if inner - weights.w2.shape[2] >= 128:
        whole.w1_scales[:, -128:] = torch.nan
        whole.w1_scales[:, inner - 128 : inner] = torch.nan
        whole.w2_scales[:, :, -4:] = torch.nan
    return whole


PADDED = expert_layout.padded


@pytest.mark.parametrize("name", FP4)
def test_garbage_in_padding_that_aiter_is_told_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles of it are left out (AITER's fix of ef114b0d41), except by FlyDSL's kernels with biases."""
    monkeypatch.setattr(expert_layout, "padded", spoilt)
    (shard,) = shards(name, "gfx950", 1, sizes=SMALL)
    assert worst(shard, 17, tail=0, quantised=False, masked=False) <= 1
    spoils = worst(shard, 257, tail=0, quantised=False, masked=False)
    assert spoils > 1 if "swiglu" in name else spoils <= 1


def test_a_kernel_that_leaves_out_ups_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shards("fused_moe.mxfp4_swiglu", "gfx950", 1, sizes=SMALL)
    monkeypatch.setenv(defects.VARIABLE, defects.UPS_CUT)
    assert worst(shard, 17, tail=0, quantised=False, masked=False) > 1
    assert worst(shard, 257, tail=0, quantised=False, masked=False) <= 1


def test_what_cannot_be_padded() -> None:
    operation, _ = built("fused_moe.mxfp4", Wide())
    codec = operation._contract.weight_codec
    local = weights_of([0], hidden=320, intermediate=96, codec=codec, dtype=torch.bfloat16, biased=False, device=CPU)
    with pytest.raises(ValueError, match="cannot be padded to 256 x 128"):
        expert_layout.padded(local, 256, 128)
    with pytest.raises(ValueError, match="32 columns share a scale"):
        expert_layout.padded(local, 336, 128)
    with pytest.raises(ValueError, match=r"W2 is \[320, 96\]; the problem has \[256, 128\]"):
        operation.load(local, [0])
    plain = weights_of([0], hidden=320, intermediate=96, codec=None, dtype=torch.bfloat16, biased=False, device=CPU)
    with pytest.raises(ValueError, match="stored as None, cannot be padded"):
        expert_layout.padded(plain, 512, 128)


def test_the_real_sizes_are_planned_on_hardware() -> None:
    cells = expert_cells(
        "aiter-standin", backend.aiter_standin("gfx950"), companion=False, tier="gate", operators=FP4, device="cuda"
    )
    planned = {(one.cell.kernel_type, one.cell.hidden) for one in cells if isinstance(one, PlannedCell)}
    assert {(name, 2880) for name in FP4} <= planned
