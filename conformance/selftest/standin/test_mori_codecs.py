"""Arithmetic of the double's combine codecs against numpy and ml_dtypes, element by element.

Scope: rounding, scales, packing and the order of operations, on rows made to hit ties, saturation and the scale rule.
Equality proves nothing about a GPU's conversion instructions.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from accelerated.standin.mori_ep import codecs
from accelerated.standin.mori_ep.codecs import Codec
from accelerated.standin.mori_ep.environment import combine_scale_dim

OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
TYPES = {OCP: (ml_dtypes.float8_e4m3fn, 448.0), FNUZ: (ml_dtypes.float8_e4m3fnuz, 240.0)}
F32 = np.float32


def _every_bfloat16() -> torch.Tensor:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()]


@pytest.mark.parametrize("flavour", [OCP, FNUZ])
def test_fp8_rounds_to_nearest_even_and_saturates(flavour: torch.dtype) -> None:
    values = _every_bfloat16()
    kind, largest = TYPES[flavour]
    wanted = np.clip(values.numpy(), -largest, largest).astype(kind).view(np.uint8)
    assert np.array_equal(codecs.to_fp8(values, flavour).view(torch.uint8).numpy(), wanted)


def test_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    values = torch.cat([_every_bfloat16(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    wanted = np.clip(values.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    found = codecs.to_e2m1(values)
    assert np.array_equal(codecs.from_e2m1(found).numpy(), wanted.astype(F32))
    assert torch.equal(found & 7, codecs.to_e2m1(-values) & 7)


def test_multiply_add_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randint(1, 16, (4000,), generator=generator) * 0.125).float()
    scales = torch.rand(4000, generator=generator) + 0.5
    total = torch.randn(4000, generator=generator) * torch.tensor([1.0, 1e8, 1e-8, 4.0]).repeat(1000)
    # Products half way between two float32, and a total too small for float64 to remember.
    codes, scales = torch.cat([codes, torch.full((2,), 1.125)]), torch.cat([scales, torch.full((2,), 1 + 2.0**-21)])
    total = torch.cat([total, torch.tensor([2.0**-100, -(2.0**-100)])])
    wanted = [_once(*map(float, triple)) for triple in zip(codes, scales, total, strict=True)]
    found = codecs.multiply_add(codes, scales, total)
    assert found.tolist() == wanted
    assert (found != codes * scales + total).any()


def _once(a: float, b: float, c: float) -> float:
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = F32(float(exact))
    around = [np.nextafter(near, F32(-np.inf)), near, np.nextafter(near, F32(np.inf))]
    return float(min(around, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(np.uint32) & 1)))


def _rows(block: int, hidden: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(block * 1000 + hidden)
    rows = torch.randn(3, hidden, generator=generator)
    rows[1] *= 300  # most blocks scale
    rows[2, : block + 1] = 0  # a block of zeros
    rows[0, -1] = 1000.0
    return rows.bfloat16()


def _reference(codec: Codec, row: list[float], odd: bool, empty: bool) -> tuple[list[float], list[float]]:
    """Dequantised code and scale of each element, one by one in numpy float32."""
    hidden, block = len(row), -(-len(row) // codec.scale_dim)
    fp8 = codec.name == "fp8_blockwise"
    kind, largest = TYPES[codec.flavour] if fp8 else (ml_dtypes.float4_e2m1fn, 6.0)
    scales, inverse = [], []
    for start in range(0, codec.scale_dim * block, block):
        amax = F32(max((abs(value) for value in row[start : start + block]), default=0.0))
        if fp8:
            over = amax > largest
            scales.append(amax * (F32(1) / F32(largest)) if over else F32(1))
            inverse.append(F32(largest) / amax if over else F32(1))
        else:
            scales.append(amax / F32(6) if amax > 0 else F32(1))
            inverse.append(F32(6) / amax if amax > 0 else F32(0))
    values = []
    for index, value in enumerate(row):
        owner = index // block
        if odd and index % 2 == 0 and index + 1 < hidden and (index + 1) // block != owner:
            owner += 1
        if empty and index == hidden - 1 and hidden % 2 and codec.scale_dim * block - hidden >= block:
            owner = codec.scale_dim - 1
        scaled = np.clip(F32(value) * inverse[owner], -largest, largest)
        values.append(float(F32(scaled).astype(kind)))
    return values, [float(scales[index // block]) for index in range(hidden)]


@pytest.mark.parametrize(("scale_dim", "hidden"), [(4, 32), (4, 30), (5, 64), (56, 63), (3, 16), (3, 33)])
@pytest.mark.parametrize("name", ["fp8_blockwise", "fp4_blockwise"])
@pytest.mark.parametrize("flavour", [OCP, FNUZ])
@pytest.mark.parametrize(("odd", "empty"), [(True, True), (False, True), (True, False), (False, False)])
def test_blockwise_codes_and_scales(
    name: str, flavour: torch.dtype, scale_dim: int, hidden: int, odd: bool, empty: bool
) -> None:
    codec = Codec(name, flavour, scale_dim, odd, empty)
    rows = _rows(codec.block(hidden), hidden)
    wire = codec.encode(rows)
    values, scales = codec.decode(wire, hidden)
    assert scales is not None
    for row, value, scale in zip(rows.float().tolist(), values.tolist(), scales.tolist(), strict=True):
        four = name == "fp4_blockwise"
        assert (value, scale) == _reference(codec, row, odd and four, empty and four)


def test_the_first_scale_is_negative_where_a_block_is_scaled() -> None:
    codec = Codec("fp8_blockwise", OCP, 4)
    rows = torch.zeros(3, 16).bfloat16()
    rows[1, 9], rows[2, 9] = 448.0, 450.0  # the bound itself is not scaled
    scales = codec.encode(rows)[:, 16:].contiguous().view(torch.float32)
    assert scales.tolist()[:2] == [[1.0] * 4] * 2
    assert scales[2].tolist() == [-1.0, 1.0, float(torch.tensor(450.0) * (1.0 / torch.tensor(448.0))), 1.0]


def test_fast_kernels_fuse_and_the_generic_one_does_not() -> None:
    codec = Codec("fp8_blockwise", OCP, 1)
    generator = torch.Generator().manual_seed(1)
    values = codecs.to_fp8(torch.randn(2, 1, 500, generator=generator), OCP).float()
    scales = torch.rand(2, 1, 500, generator=generator) + 0.5
    fused, apart = codec.fold(values, scales, True), codec.fold(values, scales, False)
    product = values[0] * scales[0]
    assert torch.equal(apart, product + values[1] * scales[1])
    assert torch.equal(fused, codecs.multiply_add(values[1], scales[1], product))
    assert not torch.equal(fused, apart)
    assert torch.equal(Codec("fp4_blockwise", OCP, 1).fold(values, scales, False), fused)


@pytest.mark.parametrize(
    ("hidden", "top_k", "world", "weights", "scale_dim", "ending"),
    [
        (7168, 8, 8, False, 56, "_noweight_block128_vec8"),
        (7168, 9, 8, False, 56, "_noweight_block128_vec8_top9"),
        (7168, 8, 5, False, 28, "_noweight_block256_vec8"),
        (7168, 8, 8, True, 56, ""),
        (7168, 8, 4, False, 56, ""),
        (7168, 7, 8, False, 56, ""),
        (4096, 8, 8, False, 56, ""),  # blocks of 74
        (128 * 3, 8, 8, False, 3, ""),  # not a multiple of 512
    ],
)
def test_kernel_names(hidden: int, top_k: int, world: int, weights: bool, scale_dim: int, ending: str) -> None:
    for name in ("fp8_blockwise", "fp4_blockwise"):
        found, fast = codecs.kernel_name(Codec(name, OCP, scale_dim), hidden, top_k, world, weights)
        assert found == f"EpCombineIntraNodeKernel_bf16_nop2p_{name}{ending}"
        assert fast == bool(ending)


@pytest.mark.parametrize(
    ("text", "wanted"), [("", 56), ("7", 7), (" +7", 7), ("0", 56), ("-1", 56), ("7 ", 56), ("x", 56), ("1e3", 56)]
)
def test_number_of_blocks_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, wanted: int) -> None:
    monkeypatch.setenv("MORI_FP8_COMBINE_SCALE_DIM", text)
    assert combine_scale_dim() == wanted
    monkeypatch.delenv("MORI_FP8_COMBINE_SCALE_DIM")
    assert combine_scale_dim() == 56


def test_flavour_follows_the_architecture() -> None:
    assert codecs.fp8_type("gfx942") == FNUZ
    assert {codecs.fp8_type(arch) for arch in ("gfx950", "gfx1250")} == {OCP}
