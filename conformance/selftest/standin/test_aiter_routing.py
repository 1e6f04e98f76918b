"""Signatures, numerics and traps of the double of AITER's routers.

Scope: what callers must not rely on, and the lanes' exchanges. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from accelerated.standin import manifest
from accelerated.standin.aiter_ops import defects, device, fused_moe, routing_lanes
from accelerated.standin.aiter_ops.jit.utils import chip_info
from accelerated.standin.aiter_ops.ops import moe_op, topk

DOUBLES: dict[str, ModuleType] = {
    "aiter.ops.topk": topk,
    "aiter.ops.moe_op": moe_op,
    "aiter.fused_moe": fused_moe,
    "aiter.jit.utils.chip_info": chip_info,
}
NAN, INF = float("nan"), float("inf")
UNIT = 2.0**-24
#: A sigmoid of at most 4 in magnitude: its argument, rounded once, moves it by 4 units of 2**-24; the exponential is
#: within a unit in the last place (2); an addition and a reciprocal.
SIGMOID = 4 + 2 + 2
#: The same with an argument of which constant and product are rounded. It covers a softmax's exponential within 1 of
#: its largest, and the root of a softplus above 1: with a logarithm within a unit (2) and a constant and its product,
#: it has 15 before the root, which halves them.
SCORE = 2 * 4 + 2 + 2


@pytest.fixture(autouse=True)
def gfx942(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx942")
    for name in ("CU_NUM", "GPU_ARCHS", defects.VARIABLE):
        monkeypatch.delenv(name, raising=False)


def buffers(rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    cpu = torch.device("cpu")
    return device.empty((rows, top_k), torch.float32, cpu), device.empty((rows, top_k), torch.int32, cpu)


def softmax(logits: torch.Tensor, top_k: int, renormalise: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = buffers(len(logits), top_k)
    moe_op.topk_softmax(weights, ids, torch.empty_like(ids), logits, renormalise)
    return weights, ids


def gating(logits: torch.Tensor, top_k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = buffers(len(logits), top_k)
    topk.topk_gating(weights, ids, logits, **options)
    return weights, ids


def biased(logits: torch.Tensor, bias: torch.Tensor, *sizes: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``sizes``: groups, kept ones, k."""
    weights, ids = buffers(len(logits), sizes[2])
    options = {"need_renorm": True, "routed_scaling_factor": 2.5, **options}
    topk.biased_grouped_topk(logits, bias, weights, ids, sizes[0], sizes[1], **options)
    return weights, ids


def assert_rounded(found: torch.Tensor, wanted: torch.Tensor, roundings: int) -> None:
    """So many roundings of 2**-24 at most lie between the two, float32 and float64."""
    share = roundings * UNIT / (1 - roundings * UNIT)
    assert bool(((found.double() - wanted).abs() <= share * wanted.abs()).all())


def logits(rows: int, experts: int, seed: int = 3) -> torch.Tensor:
    """Distinct within a row, in bfloat16 as well."""
    generator = torch.Generator().manual_seed(seed)
    ladder = (torch.arange(experts) - experts // 2) / 32
    return torch.stack([ladder[torch.randperm(experts, generator=generator)] for _ in range(rows)])


def test_double_has_the_recorded_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert manifest.differences(DOUBLES, "aiter_routing") == []
    monkeypatch.delattr(topk, "moe_fused_gate")
    monkeypatch.setattr(topk.topk_gating, "__defaults__", (None, False, 1.0, "sqrtsoftplus"))
    assert manifest.differences(DOUBLES, "aiter_routing") == [
        "aiter.ops.topk:topk_gating: default of need_renorm is False, recorded True",
        "aiter.ops.topk:moe_fused_gate: missing",
    ]


def test_manifest_names_its_source() -> None:
    recorded = manifest.load_manifest("aiter_routing")
    assert recorded["commit"] == "e4048607a535ace3a2b51ded31b1c8c2d45c0879"
    for name, entry in recorded["functions"].items():
        assert entry["source"].partition(":")[0] == name.partition(":")[0].replace(".", "/") + ".py"


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64])
def test_the_last_lane_hears_of_the_largest(lanes: int) -> None:
    values = torch.stack([torch.randperm(lanes, generator=torch.Generator().manual_seed(s)) for s in range(9)]).float()
    keys = torch.arange(lanes).expand(9, -1)
    for exchange in (routing_lanes.exchange, routing_lanes.butterfly):
        for takes in (routing_lanes.larger, routing_lanes.larger_or_first, routing_lanes.unless_smaller):
            value, key = exchange(values, keys, takes)
            assert torch.equal(key[:, -1], values.argmax(1))
            assert (value[:, -1] == lanes - 1).all()


def test_lanes_keep_their_own_of_equal_values() -> None:
    keys = torch.arange(8).unsqueeze(0)
    _, key = routing_lanes.butterfly(torch.tensor([[1.0, 5, 1, 1, 1, 1, 5, 1]]), keys, routing_lanes.larger)
    assert (int(key[0, 1]), int(key[0, 6])) == (1, 6)
    _, key = routing_lanes.butterfly(torch.tensor([[1.0, 5, 1, 1, 1, 1, 5, 1]]), keys, routing_lanes.larger_or_first)
    assert key.unique().tolist() == [1]
    value, _ = routing_lanes.exchange(torch.tensor([[NAN, 5, 1, 1]]), keys[:, :4], routing_lanes.larger_or_first)
    assert value[0, 0].isnan(), "a lane with NaN hears nothing"


@pytest.mark.parametrize("experts", [1, 2, 16, 64, 72, 256, 300, 512, 640])
@pytest.mark.parametrize("bits", [32, 16])
def test_softmax_of_ordinary_rows(experts: int, bits: int) -> None:
    dtype = torch.float32 if bits == 32 else torch.bfloat16 if experts <= 256 else torch.float16
    given, top_k = logits(5, experts).to(dtype), min(experts, 6)
    wanted = given.double().softmax(1).topk(top_k, dim=1)
    for renormalise in (False, True):
        weights, ids = softmax(given, top_k, renormalise)
        assert torch.equal(ids.long(), wanted.indices)
        scaled = wanted.values / wanted.values.sum(1, keepdim=True) if renormalise else wanted.values
        # Differences of logits are exact. Above and below: an exponential within a unit in the last place (2), stored
        # as a probability; the additions, a reciprocal and a product.
        assert_rounded(weights, scaled, 2 * (2 + 1) + (top_k if renormalise else experts) - 1 + 2)


def test_ids_repeat_where_too_few_logits_are_finite() -> None:
    for experts, wanted in ((64, [5, 0, 0]), (512, [5, 0, 0]), (72, [5, 0, 1]), (1024, [5, 0, 1])):
        given = torch.full((1, experts), -INF)
        given[0, 5] = 1.0
        assert softmax(given, 3)[1].tolist() == [wanted], "a power of two up to 512 has the kernel that repeats"
    all_nan = torch.full((1, 128), NAN)
    assert gating(all_nan, 4, score_func="sigmoid")[1].tolist() == [[0, 64, 0, 0]], "a lane has two experts"
    assert biased(all_nan, torch.zeros(128), 1, 1, 4)[1].tolist() == [[0, 1, 2, 3]]
    one = all_nan.clone()
    one[0, 1] = 0.0
    assert biased(one, torch.zeros(128), 1, 1, 4)[1].tolist() == [[1, 1, 2, 3]]


def test_a_nan_hides_its_lane_from_the_softmax_alone() -> None:
    given = logits(1, 64)
    best = given[0].topk(3).indices.tolist()
    given[0, best[0] // 8 * 8] = NAN  # the first logit of the float32 lane that has the best
    assert softmax(given, 3)[1][0].tolist() != best
    assert gating(given, 3, score_func="sigmoid")[1][0].tolist() == best
    given = logits(1, 64)
    given[0, 0], given[0, 20] = NAN, 9.0
    weights, ids = softmax(given, 8)
    assert weights.isnan().all(), "the row's first lane has it"
    assert int(ids[0, 0]) == 0
    assert 20 not in ids, "the other lanes took it for chosen"


def test_a_bias_is_read_as_the_logits_type() -> None:
    given, bias = logits(4, 64).bfloat16(), torch.linspace(-4, 4, 64)
    right = biased(given, bias.bfloat16(), 1, 1, 6)[1]
    wrong = biased(given, bias, 1, 1, 6)[1]
    assert not torch.equal(right, wrong)
    with pytest.raises(RuntimeError, match=r"a bias of 64 torch\.bfloat16 is read past as 64 torch\.float32"):
        biased(given.float(), bias.bfloat16(), 1, 1, 6)
    with pytest.raises(AssertionError, match=r"torch\.float16 logits go with no torch\.bfloat16 bias"):
        gating(given.half(), 6, correction_bias=bias.bfloat16())


def test_deepseeks_kernel_recovers_weights_by_subtraction() -> None:
    given, bias = logits(3, 256), torch.full((256,), 2.0**22)
    weights, _ = biased(given, bias, 8, 4, 8)
    general, general_ids = biased(given, bias, 1, 1, 8)
    score = given.double().sigmoid().gather(1, general_ids.long())
    # Above and below a sigmoid; 7 additions, a quotient and a product.
    assert_rounded(general, 2.5 * score / score.sum(1, keepdim=True), 2 * SIGMOID + 7 + 2)
    steps = [set((each / each.amin(1, keepdim=True)).flatten().tolist()) for each in (weights, general)]
    assert steps[0] <= {1.0, 2.0}, "a score and 2**22 are one of two numbers"
    assert len(steps[1]) > 2
    plain = biased(given, torch.zeros(256), 8, 4, 8, need_renorm=False)
    # Without renormalisation the scale is left out.
    assert_rounded(plain[0], given.double().sigmoid().gather(1, plain[1].long()), SIGMOID)


def test_many_rows_lose_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CU_NUM", "1")
    given, bias = logits(213, 256), torch.linspace(-1, 1, 256)
    few = biased(given[:212], bias, 8, 4, 8)
    many = biased(given, bias, 8, 4, 8)
    assert [sorted(row) for row in few[1].tolist()] == [sorted(row) for row in many[1][:212].tolist()]
    # 7 additions, a reciprocal or quotient and at most two products.
    assert_rounded(few[0].double().sum(1), torch.full((212,), 2.5), 10)
    assert_rounded(many[0].double().sum(1), torch.ones(213), 10)
    with pytest.raises(AssertionError, match="moe_fused_gate always renormalises"):
        biased(given, bias, 8, 4, 8, need_renorm=False)
    # 64 experts of a group are too many for it.
    assert_rounded(biased(given[:, :128], bias[:128], 2, 1, 8)[0].double().sum(1), torch.full((213,), 2.5), 10)


def test_defects_show_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = torch.zeros(1, 64)
    tied[0, [3, 40]] = 2.0
    tied[0, 9] = 1.0
    groups = torch.zeros(1, 72)
    groups[0, 40:46] = 3.0  # the second group's best are not among its first four
    by_softmax = {"score_func": "softmax"}
    assert gating(tied, 2, **by_softmax)[1].tolist() == [[3, 40]]
    assert set(biased(groups, torch.zeros(72), 2, 1, 6)[1][0].tolist()) == set(range(40, 46))
    monkeypatch.setenv(defects.VARIABLE, f"{defects.TIES_LOST},{defects.LANES_APART}")
    assert gating(tied, 2, **by_softmax)[1].tolist() == [[40, 9]], "expert 3 was struck out, too"
    assert set(biased(groups, torch.zeros(72), 2, 1, 6)[1][0].tolist()) <= set(range(36))
    monkeypatch.setenv(defects.VARIABLE, "ties")
    with pytest.raises(ValueError, match="names ties; choose from ties-lost, lanes-apart"):
        gating(tied, 2, **by_softmax)


def test_buffers() -> None:
    given = logits(5, 128).bfloat16()
    weights, ids = fused_moe.fused_topk(given, given, 8, True)
    assert weights.shape == ids.shape == (5, 8)
    assert weights.untyped_storage().nbytes() == 8 * 8 * 4, "padded to four rows for the assembled kernels"
    assert fused_moe.fused_topk(given, given, 7, True)[0].untyped_storage().nbytes() == 5 * 7 * 4
    wide = (torch.full((5, 18), 7.0), torch.full((5, 18), 7, dtype=torch.int32))
    order = torch.empty(5, 8, dtype=torch.int32)
    moe_op.topk_softmax(wide[0][:, :8], wide[1][:, :8], order, given, True)
    assert torch.equal(wide[1][:, :8], ids)
    assert (wide[0][:, 8:] == 7).all()
    assert order[:2].tolist() == [[0, 5, 10, 15, 20, 25, 30, 35], [1, 6, 11, 16, 21, 26, 31, 36]]
    untouched = buffers(5, 1)
    moe_op.topk_sigmoid(*untouched, given.float())
    assert untouched[0].isnan().all(), "float32 logits: nothing is written and nothing raised"
    with pytest.raises(RuntimeError, match="a grid of no blocks"):
        softmax(given[:0], 8)
    with pytest.raises(RuntimeError, match="no kernel has 16 groups"):
        biased(given, torch.zeros(128, dtype=torch.bfloat16), 16, 4, 8)


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus", "softmax"])
@pytest.mark.parametrize(("experts", "rows"), [(64, 4096), (72, 1024), (128, 1024), (256, 5)])
def test_gating_kernels_agree_on_ordinary_rows(function: str, experts: int, rows: int) -> None:
    given = logits(5, experts)
    few = gating(given, 6, score_func=function, correction_bias=None if rows == 5 else torch.zeros(experts))
    many = gating(given.repeat(rows // 5 + 1, 1)[:rows], 6, score_func=function)
    given = given.double()
    scores = {"sigmoid": given.sigmoid(), "softmax": given.softmax(1)}
    score = scores.get(function, torch.nn.functional.softplus(given).sqrt()).topk(6, dim=1)
    assert torch.equal(few[1].long(), score.indices)
    assert torch.equal(many[1][-1], few[1][(rows - 1) % 5])
    wanted = score.values / score.values.sum(1, keepdim=True)
    # Above and below a score; 5 additions, a quotient and a product.
    assert_rounded(few[0], wanted, 2 * SCORE + 5 + 2)
    assert_rounded(many[0][-1], wanted[(rows - 1) % 5], 2 * SCORE + 5 + 2)
