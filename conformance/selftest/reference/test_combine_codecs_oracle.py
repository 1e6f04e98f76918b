"""The oracle of a coded combine: codes of the definition, ends around every legal result, and close to the bounds.

Scope: reference/combine_oracle.py and its use in reference/oracle.py. What a pass does not prove: anything about
communication.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch

from conformance.selftest.reference import legal_combines as legal
from reference.bounds import combine_acceptance
from reference.combine_numerics import CombineCodec, combine_codec
from reference.combine_oracle import coded_sum, decoded, magnitudes, nearest_code
from reference.intervals import Interval
from reference.oracle import layer_output
from reference.rounding import decode

CODECS: list[CombineCodec] = [
    codec
    for codec in (
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fn"),
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fnuz"),
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fn", rounds_partials=True),
        combine_codec("fp8_blockwise", fp8="float8_e4m3fn", scale_dim=5),
        combine_codec("fp8_blockwise", fp8="float8_e4m3fnuz", scale_dim=3),
        combine_codec("fp4_blockwise", fp8="float8_e4m3fn", scale_dim=4),
    )
    if codec is not None
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=[f"{c.name}-{c.payload.name}" for c in CODECS])
_HIDDEN = 24


def _wire(ranks: int, seed: int) -> torch.Tensor:
    """``[1, n, W, H]`` BF16 numbers in float64: rows within the payload and beyond it, some absent."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-4, 13, (20, ranks, 1), generator=generator).float())
    rows = torch.randn(20, ranks, _HIDDEN, generator=generator) * size
    rows[torch.rand(20, ranks, generator=generator) < 0.2] = 0.0
    return rows.bfloat16().double()[None]


@pytest.mark.parametrize("codec", CODECS[1:4:2] + CODECS[5:], ids=["fnuz", "fn", "e2m1"])
def test_codes(codec: CombineCodec) -> None:
    table = magnitudes(codec.payload)
    assert list(table) == decode(torch.arange(len(table)), codec.payload).tolist()
    middles = [(a + b) / 2 for a, b in pairwise(table)]
    values = [*table, *middles, *[m * (1 - 2.0**-40) for m in middles], *[m * (1 + 2.0**-40) for m in middles], 1e30]
    values += [-v for v in values]
    got = nearest_code(torch.tensor(values, dtype=torch.float64), codec.payload).tolist()
    payload = legal.PAYLOADS[codec.payload.name]
    assert got == [float(legal.nearest(Fraction(v), payload)) for v in values]


@every_codec
def test_what_travels(codec: CombineCodec) -> None:
    rows = _wire(3, 2)[0].flatten(0, 1)
    values, scales = decoded(rows, codec)
    want = torch.tensor([[[float(p) for p in part] for part in legal.coded_row(r, codec)] for r in rows.tolist()])
    assert torch.equal(torch.stack([values, scales], dim=2).float(), want)


@every_codec
def test_ends_hold_every_legal_result(codec: CombineCodec) -> None:
    wire = _wire(4, 3)
    wire[:, 1::2, 2] = wire[:, 1::2, 0] + wire[:, 1::2, 1]  # like-sized sums often lie halfway between two numbers
    wire = wire.bfloat16().double()
    reached = (wire[0] != 0).any(2)
    nodes = 2 if codec.rounds_partials else 1
    ends = coded_sum(wire, reached, codec, nodes)
    low, high = ends[1 % len(ends)], ends[2 % len(ends)]
    for token in range(wire.shape[1]):
        rows = [legal.coded_row(row, codec) for row in wire[0, token].tolist()]
        for h in range(_HIDDEN):
            column = [row[h] for row in rows]
            results = legal.legal_results([p for p, there in zip(column, reached[token], strict=True) if there])
            if codec.rounds_partials:
                results = {legal.two_levels([column[:2], column[2:]], codec)}
            assert low[token, h].item() <= float(min(results)), (token, h)
            assert float(max(results)) <= high[token, h].item(), (token, h)
            assert codec.blocks or low[token, h] == high[token, h]


@every_codec
def test_agrees_with_the_bounds(codec: CombineCodec) -> None:
    wire = _wire(4, 4)
    reached = (wire[0] != 0).any(2)
    nodes = 2 if codec.rounds_partials else 1
    ends = coded_sum(wire, reached, codec, nodes)
    terms = wire[0].transpose(0, 1).float()
    bound = combine_acceptance(terms, reached, torch.bfloat16, nodes=nodes, codec=codec)
    assert torch.equal(ends[0], bound.value)
    assert bool((ends[1 % len(ends)] <= bound.lower).all())
    assert bool((bound.upper <= ends[2 % len(ends)]).all())
    wider = (ends[1 % len(ends)] < bound.lower) | (bound.upper < ends[2 % len(ends)])
    # Wider by the rounding of a product only, which seldom reaches the next BF16 number.
    assert int(wider.sum()) * 20 <= wider.numel()


@every_codec
def test_rows_that_are_not_known_exactly(codec: CombineCodec) -> None:
    """Every coded sum of rows within their ends lies within the ends of the sum."""
    wire, generator = _wire(4, 5), torch.Generator().manual_seed(5)
    reached = (wire[0] != 0).any(2)
    width = wire.abs() * 2.0**-6 * (torch.rand(wire.shape, generator=generator) < 0.5)
    three = torch.cat([wire, (wire - width).bfloat16().double(), (wire + width).bfloat16().double()])
    nodes = 2 if codec.rounds_partials else 1
    ends = coded_sum(three, reached, codec, nodes)
    assert bool((ends[1] < ends[2]).any())
    for _ in range(30):
        at = torch.rand(wire[0].shape, generator=generator) * 1.2 - 0.1
        rows = (three[1] + at.clamp(0, 1) * (three[2] - three[1])).bfloat16().double()
        one = coded_sum(rows[None], reached, codec, nodes)
        assert bool((ends[1] <= one[1 % len(one)]).all())
        assert bool((one[2 % len(one)] <= ends[2]).all())


@every_codec
def test_a_whole_layer(codec: CombineCodec) -> None:
    """Four ranks, one of which gets nothing: the oracle's layer is the coded sum of its experts' rows."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(-40, 41, (9, _HIDDEN), generator=generator).bfloat16()
    routing = [[int(e) for e in torch.randperm(6, generator=generator)[:3] - 1] for _ in range(9)]
    nodes = 2 if codec.rounds_partials else 1
    answer = layer_output(
        rows, routing, torch.ones(9, 3), lambda ids, x: (ids.unsqueeze(1) + 1) * 8 * x, experts_per_rank=2,
        world_size=4, dtype=torch.bfloat16, nodes=nodes, grid=1.0,
        wire_sum=partial(coded_sum, codec=codec, nodes=nodes),
    )  # fmt: skip
    terms, reached = torch.zeros(4, 9, _HIDDEN), torch.zeros(9, 4) > 0
    for token, row in enumerate(routing):
        for rank in {e // 2 for e in row if e >= 0}:
            made = sum((e + 1) * 8 * rows[token].float() for e in row if e >= 0 and e // 2 == rank)
            terms[rank, token], reached[token, rank] = torch.as_tensor(made).bfloat16().float(), True
    bound = combine_acceptance(terms, reached, torch.bfloat16, nodes=nodes, codec=codec)
    expected = Interval(answer.value, answer.lower, answer.upper)
    assert torch.equal(answer.value, bound.value)
    assert float(expected.error_over_bound(bound.lower).max()) <= 1
    assert float(expected.error_over_bound(bound.upper).max()) <= 1
    assert float(expected.error_over_bound(bound.value + bound.value.abs() * 2.0**-6 + 2).min()) > 1
