"""Rows as codes and values for codecs: tags in bytes, scales of their own, what a codec must meet in every row.

Scope: conformance/rank/elements.py and the codes, scales and replays of conformance/rank/inputs.py, on the CPU. A pass
does not prove that a codec treats these values right.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import msgspec
import pytest
import torch

from accelerated.wires import scale_shape
from conformance.cases import MAX_REPLAYED, Case, Cell, Explicit, Round, Values, narrow_sizes
from conformance.rank.elements import BEYOND, WITNESSES, elements, table
from conformance.rank.experts import LocalExperts, dense_experts
from conformance.rank.inputs import Inputs, read_tags, round_inputs, stamp_of
from reference.bounds import combine_acceptance
from reference.combine_numerics import combine_codec
from reference.problem import COMBINE_CODECS

CPU = torch.device("cpu")
WIRES = ("fp8_token", "fp8_group", "mxfp4", "fp8_tensor", "fp8_raw3x4", "fp8_raw5x1", "fp8_raw1x1")
PLAIN = Cell("round_trip", "any", "any", 2, 1, 256, 4, 2, 64, "bfloat16", "drained")
CODECS = [("fp8_direct_cast", 0), ("fp8_blockwise", 4), ("fp4_blockwise", 4)]


def draw(
    cell: Cell, values: Values, tokens: int = 40, *, seed: int = 3, hidden: int = 0, replayed: bool = False
) -> Inputs:
    routing = (tuple((t % 4, (t + 1) % 4) for t in range(tokens)), ())
    case = Case(cell, (Round(Explicit(routing), values, seed, hidden=hidden),))
    return round_inputs(case, 0, 0, routing, CPU, replayed=replayed)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("values", ["integers", "normal", "bits", "edges"])
def test_codes_carry_tags_and_scales_of_their_own(wire: str, values: Values) -> None:
    cell = msgspec.structs.replace(PLAIN, wire=wire)
    inputs = draw(cell, values)
    packed = 2 if wire == "mxfp4" else 1
    assert (inputs.rows.dtype, tuple(inputs.rows.shape)) == (torch.uint8, (40, 256 // packed))
    assert read_tags(inputs.rows).tolist() == [[0, token, 0] for token in range(40)]
    groups, size = scale_shape(cell.problem())
    if not groups:
        assert inputs.scales is None
        return
    assert inputs.scales is not None
    assert (tuple(inputs.scales.shape), inputs.scales.element_size()) == ((40, groups), size)
    assert len(torch.unique(inputs.scales.view(torch.uint8), dim=0)) == 40, "scales of another row are told apart"


def test_codes_hold_every_byte_nan_codes_among_them() -> None:
    rows = draw(msgspec.structs.replace(PLAIN, wire="fp8_token"), "integers").rows[:, 4:]
    assert set(rows.flatten().tolist()) == set(range(256))
    assert bool(rows.view(torch.float8_e4m3fn).isnan().any())
    assert bool(rows.view(torch.float8_e4m3fnuz).isnan().any())


def test_elements_of_packed_codes_begin_with_the_low_nibble() -> None:
    cell = msgspec.structs.replace(PLAIN, wire="mxfp4")
    got = elements(torch.tensor([[0x1F, 0x20]], dtype=torch.uint8), cell, "integers", torch.float32)
    assert got.tolist() == [[15 % 17 - 8.0, 1 - 8.0, 0 - 8.0, 2 - 8.0]]
    plain = torch.ones(1, 2, dtype=torch.bfloat16)
    assert elements(plain, PLAIN, "integers", torch.bfloat16) is plain


@pytest.mark.parametrize("bits", [4, 8])
def test_tables_hold_bfloat16_numbers(bits: int) -> None:
    kinds: tuple[Values, ...] = ("integers", "normal", "wide", "bits", "edges")
    for kind in kinds:
        values = table(kind, bits)
        assert values.shape == (1 << bits,)
        assert torch.equal(values.bfloat16().float(), values)
        assert bool(values.isfinite().all())


@pytest.mark.parametrize("fp8", ["float8_e4m3fn", "float8_e4m3fnuz"])
@pytest.mark.parametrize(("codec", "blocks"), CODECS)
@pytest.mark.parametrize("wire", ["", "fp8_token", "mxfp4"])
def test_no_row_of_edges_survives_a_codec(codec: str, blocks: int, wire: str, fp8: str) -> None:
    """What a silent fallback returns lies outside of the acceptance in every row, with every expert and weight."""
    cell = msgspec.structs.replace(PLAIN, wire=wire, codec=codec, scale_dim=blocks)
    made = combine_codec(codec, fp8=fp8, scale_dim=blocks)
    inputs = draw(cell, "edges")
    x = elements(inputs.rows, cell, "edges", torch.bfloat16)
    answers = LocalExperts(cell, 0, CPU)(x, inputs.ids.clamp(max=1), inputs.weights, scaling=True).float().unsqueeze(0)
    reached = torch.ones(40, 1, dtype=torch.bool)
    coded, plain = (combine_acceptance(answers, reached, torch.bfloat16, codec=one) for one in (made, None))
    apart = (coded.upper < plain.lower) | (coded.lower > plain.upper)
    assert bool(apart.any(1).all())
    assert bool((answers[0].abs().amax(1) > 448).all()), "something saturates in every row"


def test_edges_have_blocks_of_every_class() -> None:
    cell = msgspec.structs.replace(PLAIN, codec="fp8_blockwise", scale_dim=4)
    blocks = draw(cell, "edges").rows.float().reshape(40, 4, 64)[:, 1:3]
    largest = blocks.abs().amax(2)
    assert bool((largest == 0).any()), "zeros"
    assert bool(((largest > 0) & (largest < 2.0**-7)).any()), "subnormals only"
    assert bool(((largest > 240) & (largest <= 600)).any()), "both sides of the largest code"
    assert bool((largest > 1000).any()), "far beyond"
    first = draw(cell, "edges").rows.float()[:, 4:64]
    assert bool((first.abs() < 240).all()), "the witnesses' block has no scale"
    assert first[0, : len(WITNESSES)].tolist() == list(WITNESSES)
    assert draw(cell, "edges").rows[:, -1].tolist() == [BEYOND] * 40


def test_a_replay_has_inputs_of_its_own() -> None:
    cell = msgspec.structs.replace(PLAIN, modes=("handle",))
    first, second = draw(cell, "normal"), draw(cell, "normal", replayed=True)
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.rows[:, 4:], second.rows[:, 4:])
    assert not torch.equal(first.weights, second.weights)
    assert read_tags(second.rows)[:, 2].unique().tolist() == [MAX_REPLAYED]
    stamps = {stamp_of(i, run, replayed=r) for i in range(MAX_REPLAYED) for run in range(16) for r in (False, True)}
    assert len(stamps) == 256


def test_narrow_sizes_suit_wire_and_codec() -> None:
    assert narrow_sizes(PLAIN) == (8, 128, 255)
    for wire, (codec, blocks) in product(("", *WIRES), [("", 0), *CODECS]):
        cell = msgspec.structs.replace(PLAIN, wire=wire, codec=codec, scale_dim=blocks)
        for hidden in narrow_sizes(cell):
            assert 8 <= hidden < 256
            assert replace(cell.problem(), hidden=hidden).hidden == hidden
            assert draw(cell, "edges", hidden=hidden).rows.shape[1] in (hidden, hidden // 2)
    assert narrow_sizes(msgspec.structs.replace(PLAIN, wire="fp8_group")) == (128,)


def test_scaling_experts_agree_with_the_dense_formula() -> None:
    inputs = draw(PLAIN, "edges")
    x = inputs.rows.float()
    got = sum(LocalExperts(PLAIN, rank, CPU)(x, inputs.ids, inputs.weights, scaling=True) for rank in range(2))
    want = sum(inputs.weights[:, j : j + 1] * dense_experts(inputs.ids[:, j], x, scaling=True) for j in range(2))
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, torch.as_tensor(want))
    assert set(COMBINE_CODECS) == {name for name, _ in CODECS}
