"""Codes, scales and packing of a coded combine are those of the definition, bit for bit.

Scope: reference/combine_codecs.py against fractions: every BF16 number without a scale; blocks with largest magnitudes
at, just above and far above what the payload holds, zero and subnormal blocks, ties, NaN, odd rows, blocks longer than
the row and empty ones. What a pass does not prove: anything about sums; see test_combine_codecs_bounds.py.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from conformance.selftest.reference.legal_combines import FLOAT32, PAYLOADS, coded_row, nearest
from reference.combine_codecs import CodedRows, add_product, code_rows, decode_rows
from reference.combine_numerics import CombineCodec, combine_codec
from reference.problem import Problem, ProblemError

FLAVOURS = ("float8_e4m3fn", "float8_e4m3fnuz")


def codec_of(name: str, fp8: str = "float8_e4m3fn", blocks: int = 0, *, partials: bool = False) -> CombineCodec:
    codec = combine_codec(name, fp8=fp8, scale_dim=blocks, rounds_partials=partials)
    assert codec is not None
    return codec


def _every_bfloat16() -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()]


def _adversarial(codec: CombineCodec, hidden: int, seed: int) -> torch.Tensor:
    """Rows whose blocks have the largest magnitudes that matter, filled up with ties, signs, zeros and tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    top = float(PAYLOADS[codec.payload.name].top or 0)
    above = torch.tensor(top).bfloat16().view(torch.int16).add(1).view(torch.bfloat16).item()
    largest = [top, -top, above, -above, 2 * top, 1000.0, 3e38, 1.0, 7.0, 2.0**-20, 2.0**-120, 0.0]
    of_block = torch.tensor(largest)[torch.randint(len(largest), (48, codec.blocks), generator=generator)]
    amax = of_block.repeat_interleave((hidden + codec.blocks - 1) // codec.blocks, 1)[:, :hidden]
    # Multiples of 1/64 of the largest magnitude make ties of both payloads; the others are anything.
    sixtyfourths = torch.randint(-64, 65, amax.shape, generator=generator) / 64
    anything = torch.rand(amax.shape, generator=generator) * 2 - 1
    kind = torch.randint(4, amax.shape, generator=generator)
    part = torch.where(kind == 0, 1.0, torch.where(kind == 1, anything, sixtyfourths))
    return (amax * part).bfloat16()


def _decoded(rows: torch.Tensor, codec: CombineCodec) -> list[list[list[float]]]:
    values, scales = decode_rows(code_rows(rows, codec), codec, rows.shape[1])
    scales = torch.ones_like(values) if scales is None else scales
    return torch.stack([values, scales], dim=2).tolist()


def _wanted(rows: torch.Tensor, codec: CombineCodec) -> list[list[list[float]]]:
    return [[[float(v), float(s)] for v, s in coded_row(row, codec)] for row in rows.double().tolist()]


@pytest.mark.parametrize("fp8", FLAVOURS)
def test_every_bfloat16_by_direct_cast(fp8: str) -> None:
    every, codec = _every_bfloat16(), codec_of("fp8_direct_cast", fp8)
    values, scales = decode_rows(code_rows(every[None], codec), codec, len(every))
    assert scales is None
    assert values[0].tolist() == [float(nearest(Fraction(x), PAYLOADS[fp8])) for x in every.tolist()]
    infinite = torch.tensor([[torch.inf, -torch.inf]], dtype=torch.bfloat16)
    assert decode_rows(code_rows(infinite, codec), codec, 2)[0].tolist() == [[codec.payload.max, -codec.payload.max]]


SHAPES = [(1, 1), (7, 3), (63, 8), (65, 5), (100, 7), (130, 56), (128, 4), (10, 56), (64, 1)]


@pytest.mark.parametrize("fp8", FLAVOURS)
@pytest.mark.parametrize(("hidden", "blocks"), SHAPES)
def test_fp8_blocks(fp8: str, hidden: int, blocks: int) -> None:
    codec = codec_of("fp8_blockwise", fp8, blocks)
    rows = _adversarial(codec, hidden, hidden)
    found = _decoded(rows, codec)
    assert found == _wanted(rows, codec)
    scales = {scale for row in found for _, scale in row}
    assert len(scales) > 1 or hidden == 1, "nothing is scaled"


@pytest.mark.parametrize(("hidden", "blocks"), [(2, 1), (63, 8), (63, 2), (100, 10), (128, 4), (130, 65), (64, 40)])
def test_fp4_blocks(hidden: int, blocks: int) -> None:
    codec = codec_of("fp4_blockwise", blocks=blocks)
    rows = _adversarial(codec, hidden, hidden)
    assert _decoded(rows, codec) == _wanted(rows, codec)


def test_every_fraction_of_a_block_in_fp4_and_fp8() -> None:
    generator = torch.Generator().manual_seed(7)
    every = _every_bfloat16()
    for name, largest in [("fp4_blockwise", x) for x in (6.0, 1.0, 3.140625, 2.0**-125, 3.3e38)] + [
        ("fp8_blockwise", x) for x in (450.0, 896.0, 1e6, 3.3e38)
    ]:
        below = every[every.abs() <= largest]
        picked = below[torch.randint(len(below), (1500,), generator=generator)]
        near = (torch.rand(1500, generator=generator) * largest).bfloat16()
        row = torch.cat([picked, near, torch.tensor([largest, -largest]).bfloat16()])[None]
        codec = codec_of(name, blocks=1)
        assert _decoded(row, codec) == _wanted(row, codec), (name, largest)


def test_nan_counts_in_no_largest_magnitude() -> None:
    rows = torch.tensor([[torch.nan, 900.0, 3.0, 0.0], [torch.nan, torch.nan, 500.0, 0.3]], dtype=torch.bfloat16)
    codec = codec_of("fp8_blockwise", blocks=2)
    values, scales = decode_rows(code_rows(rows, codec), codec, 4)
    want = torch.tensor(_wanted(rows, codec))
    kept = ~rows.isnan()
    assert torch.equal(values[kept], want[..., 0][kept])
    assert scales is not None
    assert torch.equal(scales, want[..., 1])
    assert values.isnan().tolist() == rows.isnan().tolist()


def test_what_travels() -> None:
    rows = torch.tensor([[1.0, -6.0, 3.0, 0.5, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    four = code_rows(rows, codec_of("fp4_blockwise", blocks=2))
    assert four.codes.tolist() == [[0x2 | 0xF << 4, 0x5 | 0x1 << 4, 0, 0]]  # the even element in the low nibble
    assert four.scales is not None
    assert four.scales.tolist() == [[-1.0, 1.0]]
    eight = codec_of("fp8_blockwise", blocks=2)
    large = torch.tensor([[1.0, 2.0, 896.0, 0.0], [1.0, 2.0, 448.0, 0.0]], dtype=torch.bfloat16)
    coded = code_rows(large, eight)
    assert coded.scales is not None
    assert coded.scales.tolist() == [[-1.0, 2.0], [1.0, 1.0]]  # the first row says that it is scaled
    # Without that sign, scales are not looked at.
    values, scales = decode_rows(CodedRows(coded.codes, coded.scales.abs()), eight, 4)
    assert values[0].tolist() == [1.0, 2.0, 448.0, 0.0]
    assert scales is not None
    assert bool((scales == 1).all())


def test_no_rows() -> None:
    for codec in (
        codec_of("fp8_direct_cast"),
        codec_of("fp8_blockwise", blocks=3),
        codec_of("fp4_blockwise", blocks=2),
    ):
        values, _ = decode_rows(code_rows(torch.empty(0, 8, dtype=torch.bfloat16), codec), codec, 8)
        assert values.shape == (0, 8)


def test_a_product_is_added_in_one_rounding_or_two() -> None:
    generator = torch.Generator().manual_seed(8)
    bits = torch.randint(1 << 23, 1 << 24, (2, 4000), generator=generator).float()
    total, scale = torch.ldexp(bits, torch.tensor([[-23], [-48]]) - torch.randint(0, 3, (2, 4000), generator=generator))
    total[::3], total[1::3] = 1.0, -total[1::3]  # a power of two, below which the spacing is half
    value = torch.tensor([0.5, 0.625, 1.0, 1.5, 1.875, 3.0, 6.0, 9.0])[torch.randint(8, (4000,), generator=generator)]
    # A product that is not half a unit of 1, but rounds to it.
    total[0], value[0], scale[0] = 1.0, 1.5, 2.0**-24 / 1.5
    found = {fused: add_product(total, value, scale, fused=fused).tolist() for fused in (True, False)}
    for i, (a, v, s) in enumerate(zip(total.tolist(), value.tolist(), scale.tolist(), strict=True)):
        product = Fraction(v) * Fraction(s)
        rounded = nearest(product, FLOAT32)
        assert Fraction(found[True][i]) == nearest(Fraction(a) + product, FLOAT32)
        assert Fraction(found[False][i]) == nearest(Fraction(a) + rounded, FLOAT32)
    assert found[True][0] != found[False][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "fp8"}, r"^codec is 'fp8'; choose one of fp8_direct_cast, fp8_blockwise, fp4_blockwise"),
        ({"codec": "fp8_blockwise"}, r"^scale_dim is 0 with codec 'fp8_blockwise'; give at least 1$"),
        ({"codec": "fp8_direct_cast", "scale_dim": 4}, r"^scale_dim is 4 with codec 'fp8_direct_cast'; give 0$"),
        ({"codec": "fp8_blockwise", "scale_dim": -1}, r"^scale_dim is -1 with codec 'fp8_blockwise'; give at least 1$"),
        ({"scale_dim": 4}, r"^scale_dim is 4 with codec ''; give 0$"),
        ({"codec": "fp8_blockwise", "scale_dim": 1.5}, r"^scale_dim is 1.5; it must be an integer of at least 0$"),
        (
            {"codec": "fp8_direct_cast", "dtype": "float32"},
            r"^dtype is 'float32' with codec 'fp8_direct_cast'; combine",
        ),
        ({"codec": "fp4_blockwise", "scale_dim": 22}, r"^scale_dim is 22 with hidden = 64: blocks of 3 elements, but"),
        ({"codec": "fp4_blockwise", "scale_dim": 40, "hidden": 63}, r"^scale_dim is 40 .* 32 blocks of 2 hold the row"),
    ],
)
def test_refused_problems(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Problem(**{"world_size": 2, "hidden": 64, "experts": 4, "top_k": 2, "capacity": 8} | changes)  # type: ignore[arg-type]


def test_refused_rows_and_declarations() -> None:
    eight, four = codec_of("fp8_blockwise", blocks=2), codec_of("fp4_blockwise", blocks=2)
    with pytest.raises(ValueError, match=r"^rows are torch.float32; a combine codes bfloat16 rows"):
        code_rows(torch.ones(1, 4), eight)
    with pytest.raises(ValueError, match=r"^a block of fp8_blockwise holds an infinity"):
        code_rows(torch.tensor([[torch.inf, 1.0]], dtype=torch.bfloat16), eight)
    with pytest.raises(
        ValueError, match=r"^a block of fp4_blockwise has the largest magnitude 1.17549e-38, of which 6"
    ):
        code_rows(torch.tensor([[2.0**-126, 0.0, 1.0, 1.0]], dtype=torch.bfloat16), four)
    with pytest.raises(ProblemError, match=r"blocks of 3 elements, but fp4_blockwise packs pairs"):
        code_rows(torch.ones(1, 6, dtype=torch.bfloat16), four)
    with pytest.raises(ProblemError, match=r"^fp8 is 'float16'; use float8_e4m3fn or float8_e4m3fnuz"):
        codec_of("fp8_direct_cast", "float16")
    with pytest.raises(ProblemError, match=r"^rounds_partials with fp8_blockwise; no kernel re-rounds"):
        codec_of("fp8_blockwise", blocks=2, partials=True)
    with pytest.raises(ProblemError, match=r"^blocks is 3 with scale rule NONE; give"):
        codec_of("fp8_direct_cast", blocks=3)
    assert combine_codec("", fp8="float8_e4m3fn") is None
