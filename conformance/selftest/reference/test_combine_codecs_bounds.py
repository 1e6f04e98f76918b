"""The acceptance of a coded combine: sound for every legal order and fusing, a point where the codec is exact, tight.

Scope: reference/combine_bounds.py. Soundness on at least 10,000 distinct sums per codec in numpy's float32 (orders by
size, by sign, at random, along trees; products rounded or fused) and on every execution of few contributions in
fractions; it is not proven by that, the derivation in the module is. Not covered: overflow and flushed subnormals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from conformance.selftest.reference import adversary as adv
from conformance.selftest.reference import legal_combines as legal
from conformance.selftest.reference.adversary import Array
from reference.bounds import combine_acceptance
from reference.combine_numerics import CombineCodec, combine_codec
from reference.intervals import Interval

CODECS: list[CombineCodec] = [
    codec
    for codec in (
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fn"),
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fnuz"),
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fn", rounds_partials=True),
        combine_codec("fp8_direct_cast", fp8="float8_e4m3fnuz", rounds_partials=True),
        combine_codec("fp8_blockwise", fp8="float8_e4m3fn", scale_dim=4),
        combine_codec("fp8_blockwise", fp8="float8_e4m3fnuz", scale_dim=7),
        combine_codec("fp4_blockwise", fp8="float8_e4m3fn", scale_dim=4),
        combine_codec("fp4_blockwise", fp8="float8_e4m3fn", scale_dim=24),
    )
    if codec is not None
]
NAMES = [f"{c.name}-{c.payload.name}-{c.blocks or ('two levels' if c.rounds_partials else 'one')}" for c in CODECS]
_TOKENS, _FEW = 2, 12
every_codec = pytest.mark.parametrize("codec", CODECS, ids=NAMES)
scaled_codecs = pytest.mark.parametrize("codec", CODECS[4:], ids=NAMES[4:])


def _rows(codec: CombineCodec, ranks: int, random: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Contributions ``[W, n, H]`` of every family at sizes below, at and above the payload's, and who takes part."""
    for name, family in adv.families(ranks, torch.bfloat16, random):
        terms = family[:, :_TOKENS]
        if name == "subnormal" and codec.name == "fp4_blockwise":
            terms = np.where(np.arange(adv.ELEMENTS) % 2 == 0, 2.0**-125, np.clip(terms, -(2.0**-125), 2.0**-125))
        for size in (1.0,) if name in ("subnormal", "huge") else (1.0, 2.0**7, 2.0**13):
            reached = random.random((ranks, terms.shape[1])) < 0.8
            yield adv.representable(np.where(reached[..., None], terms * size, 0.0), torch.bfloat16), reached


def _acceptance(rows: Array, reached: Array, codec: CombineCodec, nodes: int = 1) -> Interval:
    terms, destinations = torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(reached.T))
    return combine_acceptance(terms, destinations, torch.bfloat16, nodes=nodes, codec=codec)


def _parts(rows: Array, codec: CombineCodec) -> tuple[Array, Array]:
    """Values and scales of what travels, float32, by the definition."""
    parts = np.array(legal.contributions(torch.from_numpy(rows), codec)).astype(np.float64).astype(np.float32)
    return parts[..., 0], parts[..., 1]


def _worst(bound: Interval, result: Array) -> float:
    return float(bound.error_over_bound(torch.from_numpy(np.ascontiguousarray(result))).max())


def _saturate(total: Array, codec: CombineCodec) -> Array:
    payload = legal.PAYLOADS[codec.payload.name]
    rounded = {x: float(legal.nearest(Fraction(x), payload)) for x in np.unique(total).tolist()}
    saturated: Array = np.vectorize(rounded.__getitem__, otypes=[np.float32])(total.astype(np.float64))
    return saturated


def _executions(rows: Array, codec: CombineCodec, nodes: int, random: np.random.Generator) -> Iterator[Array]:
    """Legal results."""
    values, scales = _parts(rows, codec)
    if not codec.rounds_partials:
        for total in adv.sums_of_products(values, scales, random):
            yield adv.to_bfloat16(total)
        return
    by_node = values.reshape(nodes, -1, *values.shape[1:])
    ways = [list(adv.orders(node, adv.add_float32, random)) for node in by_node]
    for way in range(len(ways[0])):
        partial = np.stack([_saturate(sums[(way + i) % len(sums)], codec) for i, sums in enumerate(ways)])
        yield adv.to_bfloat16(list(adv.orders(partial, adv.add_float32, random))[way])


@every_codec
def test_sound(codec: CombineCodec, record_property: Callable[[str, object], None]) -> None:
    random, seen, worst = np.random.default_rng(11), set[bytes](), 0.0
    for ranks in (1, 2, 3, 8):
        for nodes in (1, 2) if codec.rounds_partials and ranks % 2 == 0 else (1,):
            for rows, reached in _rows(codec, ranks, random):
                bound = _acceptance(rows, reached, codec, nodes)
                assert bool((bound.lower <= bound.value).all() and (bound.value <= bound.upper).all())
                for way, result in enumerate(_executions(rows, codec, nodes, random)):
                    worst = max(worst, _worst(bound, result))
                    seen |= {bytes([way, nodes]) + rows[:, t].tobytes() for t in range(rows.shape[1])}
                assert worst <= 1.0
    sums = len(seen) * adv.ELEMENTS
    record_property("sums", sums)
    record_property("error over bound", worst)
    assert sums >= 10_000


def _few(codec: CombineCodec, count: int, seed: int) -> tuple[torch.Tensor, list[list[list[legal.Part]]]]:
    """``[c, n, H]`` random BF16 rows, like-sized and not, at the payload's end, and their parts."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-3, 12, (count, _FEW, 1), generator=generator).float())
    rows = (torch.randn(count, _FEW, 48, generator=generator) * size).bfloat16().float()
    return rows, legal.contributions(rows, codec)


@scaled_codecs
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_execution_of_few(
    codec: CombineCodec, count: int, record_property: Callable[[str, object], None]
) -> None:
    rows, parts = _few(codec, count, 5)
    bound = combine_acceptance(rows, torch.ones(_FEW, count) > 0, torch.bfloat16, codec=codec)
    same = 0
    for token in range(_FEW):
        for element in range(48):
            results = legal.legal_results([parts[c][token][element] for c in range(count)])
            low, high = Fraction(bound.lower[token, element].item()), Fraction(bound.upper[token, element].item())
            assert low <= min(results), (token, element)
            assert max(results) <= high, (token, element)
            unscaled = codec.name == "fp8_blockwise" and all(parts[c][token][element][1] == 1 for c in range(count))
            assert low == high or not unscaled, (token, element)
            same += (low, high) == (min(results), max(results))
    record_property("share that is no wider than the legal results", same / (_FEW * 48))
    # One contribution has one result.
    assert same == _FEW * 48 or count > 1


@pytest.mark.parametrize("codec", CODECS[:4], ids=NAMES[:4])
def test_a_point_without_scales(codec: CombineCodec) -> None:
    for count, nodes in [(1, 1), (3, 1), (4, 1)] + [(4, 2), (4, 4), (6, 2)] * codec.rounds_partials:
        rows, parts = _few(codec, count, 9)
        bound = combine_acceptance(rows, torch.ones(_FEW, count) > 0, torch.bfloat16, nodes=nodes, codec=codec)
        for token in range(_FEW):
            for element in range(0, 48, 5):
                column = [parts[c][token][element] for c in range(count)]
                per_node = [column[i : i + count // nodes] for i in range(0, count, count // nodes)]
                wanted = {legal.two_levels(per_node, codec)} if codec.rounds_partials else legal.legal_results(column)
                low, high = bound.lower[token, element].item(), bound.upper[token, element].item()
                assert wanted == {Fraction(low)} == {Fraction(high)}


def test_sixty_four_ranks_are_exact_without_scales() -> None:
    for codec in CODECS[:2]:
        rows = torch.full((64, 1, 2), codec.payload.max)
        rows[1:, :, 1], rows[0, :, 1] = codec.payload.smallest, codec.payload.max
        bound = combine_acceptance(rows, torch.ones(1, 64) > 0, torch.bfloat16, codec=codec)
        assert torch.equal(bound.lower, bound.upper)


def test_intervals_without_scales() -> None:
    codec = CODECS[0]
    low, high = torch.tensor([[[1.0, 440.0, -0.5]]]), torch.tensor([[[1.0625, 600.0, 0.5]]])
    terms = Interval(low.double(), low.double(), high.double())
    bound = combine_acceptance(terms, torch.ones(1, 1) > 0, torch.bfloat16, codec=codec)
    assert bound.lower.tolist() == [[1.0, 448.0, -0.5]]
    assert bound.upper.tolist() == [[1.0, 448.0, 0.5]]


def test_refused() -> None:
    terms, reached, scaled = torch.ones(2, 1, 8), torch.ones(1, 2) > 0, CODECS[4]
    with pytest.raises(
        ValueError, match=r"^dtype is torch.float32 with element_accumulation=False and codec fp8_direct"
    ):
        combine_acceptance(terms, reached, torch.float32, codec=CODECS[0])
    with pytest.raises(
        ValueError, match=r"^dtype is torch.bfloat16 with element_accumulation=True and codec fp8_direct"
    ):
        combine_acceptance(terms, reached, torch.bfloat16, element_accumulation=True, codec=CODECS[0])
    with pytest.raises(ValueError, match=r"^nodes is 2 with fp8_blockwise, which rounds no partial sums; pass nodes=1"):
        combine_acceptance(terms, reached, torch.bfloat16, nodes=2, codec=scaled)
    with pytest.raises(ValueError, match=r"^terms hold numbers that bfloat16 does not"):
        combine_acceptance(terms + 2.0**-20, reached, torch.bfloat16, codec=scaled)
    ends = Interval(terms.double(), terms.double(), terms.double() + 1)
    with pytest.raises(ValueError, match=r"^terms are intervals with fp8_blockwise, whose scales need exact ones"):
        combine_acceptance(ends, reached, torch.bfloat16, codec=scaled)
