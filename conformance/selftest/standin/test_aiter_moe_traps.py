"""Traps of AITER's ``fused_moe`` and ``moe_sorting`` that the double reproduces.

Scope: what callers must not rely on, and what they get when they do. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from accelerated.standin.aiter_ops import defects, experts_plan, fused_moe
from accelerated.standin.aiter_ops.jit.utils import chip_info
from accelerated.standin.aiter_ops.ops import shuffle
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from conformance.selftest.standin.moe_inputs import INNER, E, H, bf16, bits, fp8, layer, mxfp4

CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "bf16": bf16,
    "token": partial(fp8, kind=QuantType.per_Token),
    "block": partial(fp8, kind=QuantType.per_128x128),
    "mxfp4": mxfp4,
}


@pytest.fixture(autouse=True)
def _arch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx950")


@pytest.mark.parametrize("scheme", CALLS)
@pytest.mark.parametrize("count", [0, 3, 40])
def test_rows_from_the_count_on_are_uninitialised_and_not_read(scheme: str, count: int) -> None:
    case, call = layer(40), CALLS[scheme]
    whole = call(case)
    # Only the first element counts, and rows behind it may hold anything.
    number = torch.tensor([count, -2], dtype=torch.int32)
    case.rows[count:] = 16.0
    case.ids[count:], case.weights[count:] = 1 << 30, torch.nan
    found = call(case, num_local_tokens=number)
    assert torch.equal(found[:count], whole[:count])
    assert found[count:].isnan().all()


def test_masked_routes_add_nothing_and_a_row_without_others_is_zero() -> None:
    case, shard = layer(40), torch.tensor([0, 1, 0, 1, 0], dtype=torch.int32)
    whole = bf16(case)
    parts = []
    for mask in (shard, torch.tensor([1, 0, 1, 0, 0], dtype=torch.int32)):
        local = layer(40)
        local.w1, local.w2 = case.w1[mask[:E] == 1], case.w2[mask[:E] == 1]
        parts.append(bf16(local, expert_mask=mask))
        remote = (mask[case.ids.long()] == 0).all(1)
        assert remote.any()
        assert parts[-1][remote].eq(0).all()
    # Two slots: where both lie on one rank the other adds 0, else both are rounded before the sum.
    assert torch.equal(parts[0] + parts[1], whole)
    fake = layer(40)
    fake.ids = torch.cat((case.ids, torch.full((40, 1), E, dtype=torch.int32)), 1)
    fake.weights = torch.cat((case.weights, torch.full((40, 1), torch.nan)), 1)
    assert torch.equal(bf16(fake, expert_mask=torch.tensor([1, 1, 1, 1, 0], dtype=torch.int32)), whole)


def test_a_map_in_the_place_of_the_mask_gives_wrong_experts_or_garbage() -> None:
    case = layer(40)
    slots = torch.tensor([-1, 0, 1, -1], dtype=torch.int32)
    local = layer(40)
    local.w1, local.w2 = case.w1[1:3], case.w2[1:3]
    right = bf16(local, expert_mask=torch.tensor([0, 1, 1, 0], dtype=torch.int32))
    found = bf16(local, expert_mask=slots)
    # The sums before each id are 0, -1, -1, 0: 0 and 3 are taken for local expert 0, 1 is left out, 2 reads before it.
    assert found[(case.ids == 2).any(1)].isnan().all()
    clean = (case.ids != 2).all(1)
    assert not found[clean].isnan().any()
    assert not torch.equal(found[clean], right[clean])
    of_others = clean & ((case.ids == 0) | (case.ids == 3)).any(1)
    assert found[of_others].ne(0).any(1).all(), "-1 counts as local"


def test_an_id_that_the_mask_does_not_reach_spoils_its_row() -> None:
    case, wrong = layer(40), layer(40)
    wrong.ids[3, 0], wrong.ids[5, 1] = -1, E
    for options in ({}, {"expert_mask": torch.ones(E, dtype=torch.int32)}):
        found, whole = bf16(wrong, **options), bf16(case)
        assert found[3].isnan().all()
        assert found[5].isnan().all()
        rest = torch.tensor([row not in (3, 5) for row in range(40)])
        assert torch.equal(found[rest], whole[rest])


def test_of_a_repeated_id_the_last_slot_is_left() -> None:
    case = layer(6)
    case.ids[:, 1] = case.ids[:, 0]
    once = layer(6, 1)
    once.ids, once.weights = case.ids[:, 1:], case.weights[:, 1:].contiguous()
    assert torch.equal(bf16(case), bf16(once))


def test_ids_of_another_type_are_not_sorted_at_all() -> None:
    case = layer(6)
    case.ids = case.ids.long()
    assert bf16(case).isnan().all()


def test_a_mask_of_another_type_is_read_as_int32() -> None:
    case = layer(40)
    mask = torch.ones(E, dtype=torch.int64)
    # Read as 1, 0, 1, 0: the sums before are 0, 1, 1, 2.
    local = layer(40)
    local.w1, local.w2 = case.w1[:2], case.w2[:2]
    halves = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    assert torch.equal(bf16(local, expert_mask=mask), bf16(local, expert_mask=halves))


def test_the_order_of_three_additions_changes_from_call_to_call() -> None:
    case = layer(8, 3)
    found = torch.stack([bits(bf16(case)) for _ in range(8)])
    assert (found != found[0]).any()
    pair = layer(8, 2)
    assert torch.equal(bf16(pair), bf16(pair)), "two terms have one sum"


def test_a_lost_mark_changes_how_fp4_is_read_and_nothing_else() -> None:
    case = layer(6)
    first, second = (shuffle.shuffle_weight(each.bfloat16()) for each in (case.w1, case.w2))
    arguments = (case.rows.bfloat16(), first, second, case.weights, case.ids)
    lost = fused_moe.fused_moe(arguments[0], first.clone(), second.view(E, H, INNER), *arguments[3:])
    assert torch.equal(lost, fused_moe.fused_moe(*arguments)), "CK's kernels without FP4 know one layout only"
    plain = fused_moe.fused_moe(arguments[0], case.w1.bfloat16(), case.w2.bfloat16(), *arguments[3:])
    assert not torch.equal(plain, lost), "unshuffled weights are read as shuffled"
    right, real = mxfp4(case), fused_moe.fused_moe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_moe, "fused_moe", lambda x, w1, w2, *a, **k: real(x, w1.clone(), w2.clone(), *a, **k))
        assert not torch.equal(mxfp4(case), right)
        patch.setattr(fused_moe, "fused_moe", lambda x, w1, w2, *a, **k: real(x, w1.clone(), w2, *a, **k))
        assert torch.equal(mxfp4(case), right), "one mark is enough for FlyDSL"


def test_what_is_silently_ignored() -> None:
    case, bias = layer(6), torch.full((E, H), 3.0)
    assert torch.equal(bf16(case, bias1=bias.half(), bias2=bias, swiglu_limit=0.1), bf16(case))
    assert torch.equal(bf16(case, block_size_M=128, splitk=4, hidden_pad=128), bf16(case))
    # FlyDSL knows Swiglu, Situv2 and Silu; it clamps, where CK-Tile does not ask.
    assert torch.equal(mxfp4(case, activation=ActivationType.Gelu), mxfp4(case))
    assert not torch.equal(mxfp4(case, swiglu_limit=0.5), mxfp4(case))
    swiglu = partial(mxfp4, case, activation=ActivationType.Swiglu)
    assert torch.equal(swiglu(swiglu_limit=0.5), swiglu())


def test_kernels_that_do_not_exist() -> None:
    case = layer(6)
    silent = mxfp4(case, activation=ActivationType.Swiglu, dtype=torch.float16)
    assert silent.eq(0).all(), "CK-Tile launches nothing for float16"
    with pytest.raises(RuntimeError, match="no kernel"):
        mxfp4(case, gate_mode="interleave")
    with pytest.raises(RuntimeError, match="no kernel"):
        mxfp4(layer(256), activation=ActivationType.Swiglu, shuffled=False)
    with pytest.raises(ZeroDivisionError):
        mxfp4(layer(6, 1), expert_mask=torch.ones(E, dtype=torch.int32))


def test_errors_of_the_entry() -> None:
    case = layer(6)
    first, second = (shuffle.shuffle_weight(each.bfloat16()) for each in (case.w1, case.w2))
    rows, scale = case.rows.bfloat16(), torch.ones(6, 1)
    with pytest.raises(AssertionError, match="neither I nor 2 I"):
        fused_moe.fused_moe(rows, first[:, :96], second, case.weights, case.ids)
    with pytest.raises(AssertionError, match="bfloat16 or float16"):
        bf16(case, dtype=torch.float32)
    with pytest.raises(AssertionError, match="come with a1_scale"):
        fp8(case, QuantType.per_Token, a1_scale=None)
    with pytest.raises(ValueError, match="scale"):
        fp8(case, QuantType.per_Token, rows=rows, a1_scale=scale)
    with pytest.raises(TypeError, match="float32"):
        mxfp4(case, bias1=torch.zeros(E, 2 * INNER, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="float32 routing weights"):
        fused_moe.fused_moe(rows, first, second, case.weights.bfloat16(), case.ids)
    with pytest.raises(AttributeError, match="value"):
        fused_moe.fused_moe(rows, first, second, case.weights, case.ids, None, 0)
    with pytest.raises(RuntimeError, match="null pointer"):
        fused_moe.fused_moe(
            case.rows.to(torch.float8_e4m3fn),
            first.to(torch.float8_e4m3fn),
            second.to(torch.float8_e4m3fn),
            case.weights,
            case.ids,
            quant_type=QuantType.per_Token,
            a1_scale=scale,
            dtype=torch.bfloat16,
        )


def test_a_zero_weight_hides_a_spoilt_row_only_where_the_quantiser_clears_it() -> None:
    case = layer(6, 1)
    case.weights[2] = 0
    spoilt = case.rows.bfloat16()
    spoilt[2] = torch.nan
    assert mxfp4(case, rows=spoilt)[2].eq(0).all()
    assert fp8(case, QuantType.per_Token, rows=case.rows.bfloat16())[2].eq(0).all()
    case.rows[2] = torch.nan
    assert bf16(case)[2].isnan().all()


def test_padding_columns_are_neither_read_nor_written() -> None:
    case = layer(6)
    garbage = layer(6)
    garbage.w1[:, :, -128:] = torch.inf
    found = mxfp4(garbage, activation=ActivationType.Swiglu, hidden_pad=128, intermediate_pad=64)
    case.rows[:, -128:] = 0
    wanted = mxfp4(case, activation=ActivationType.Swiglu, intermediate_pad=64)
    wanted[:, -128:] = 0
    assert torch.equal(found, wanted)
    assert experts_plan.skipped(experts_plan.Plan("ck_2stages"), (128, 64), (False, False)) == (0, 0, 0, 0)


def test_flydsl_leaves_out_whole_tiles_of_padding_where_there_is_no_bias() -> None:
    """128 at a time; of H what the last tile of 256 has, of the intermediate one tile; the rest is fresh memory."""
    plan = experts_plan.Plan("flydsl", pads=(128, 128), last=(256, 256), clears=False)
    for pads, wanted in {
        (192, 128): (128, 128, 128, 128),
        (300, 500): (0, 384, 256, 256),
        (127, 64): (0, 0, 0, 0),
    }.items():
        assert experts_plan.skipped(plan, pads, (False, False)) == wanted
        assert experts_plan.skipped(plan, pads, (True, False)) == (0, 0, *wanted[2:])
        assert experts_plan.skipped(plan, pads, (False, True)) == (*wanted[:2], 0, 0)
    case, garbage = layer(6, inner=256), layer(6, inner=256)
    for dead in (slice(128, 256), slice(384, 512)):
        case.w1[:, dead], garbage.w1[:, dead] = 0, torch.inf
    case.w2[:, :, 128:] = 0
    found = mxfp4(garbage, intermediate_pad=128)
    assert torch.equal(found, mxfp4(case, intermediate_pad=128))
    assert torch.equal(found, mxfp4(case))
    # Less than a tile is read, and so is what no tile wrote: two tiles of padding, one left out.
    garbage = layer(6, inner=256)
    garbage.w1[:, 192:256] = torch.inf
    assert mxfp4(garbage, intermediate_pad=64).isnan().any()
    assert mxfp4(layer(6, inner=640), intermediate_pad=256).isnan().any()


def test_ck_tile_leaves_out_padding_before_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    case, bias = layer(6), torch.full((E, 2 * INNER), 0.5)
    for dead in (slice(64, 128), slice(192, 256)):
        case.w1[:, dead] = 0
    call = partial(mxfp4, activation=ActivationType.Swiglu, bias1=bias)
    assert torch.equal(call(case, intermediate_pad=64), call(case))
    # A quarter of W1's rows, cut off at its end: 64 ups that are none of the padding.
    monkeypatch.setenv(defects.VARIABLE, defects.UPS_CUT)
    found = call(case, intermediate_pad=64)
    case.w1[:, 128:192] = 0
    assert torch.equal(found, call(case))


@pytest.mark.parametrize("scheme", CALLS)
def test_nothing_synchronises_with_the_host(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    # On the meta device there is nothing to read: any look at a value raises.
    real, case = fused_moe.fused_moe, layer(40)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        there: Any = value.to("meta")
        there.is_shuffled = getattr(value, "is_shuffled", False)
        return there

    def entry(*given: Any, **options: Any) -> torch.Tensor:
        return real(*map(moved, given), **{name: moved(value) for name, value in options.items()})

    monkeypatch.setattr(fused_moe, "fused_moe", entry)
    mask, count = (torch.ones(n, dtype=torch.int32) for n in (E, 1))
    found = CALLS[scheme](case, expert_mask=mask, num_local_tokens=count)
    assert (found.shape, found.is_meta) == ((40, H), True)
    ids, weights, mask, count = map(moved, (case.ids, case.weights, mask, count))
    outputs = fused_moe.moe_sorting(ids, weights, E, H, torch.bfloat16, 32, mask, count)
    assert all(each.is_meta for each in outputs)
