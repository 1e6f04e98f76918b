"""Experts whose results are known to the bit, for the selftests of AITER's double.

Scope: W1, rows and scales whose products and sums are exact in float32 in any order, and W2 with one power of two in
each row, so that a route's term is one element of the intermediate: every rounding that is left is the kernels' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accelerated.standin.aiter_ops import fused_moe
from accelerated.standin.aiter_ops.ops import quant, shuffle
from accelerated.standin.aiter_ops.ops.enum import QuantType
from accelerated.standin.aiter_ops.utility import dtypes

E, H, INNER = 4, 256, 128

Inner = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Layer:
    """Local experts in logical layout, rows and routes to them."""

    w1: torch.Tensor
    w2: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def expected(self, inner: Inner, bias2: torch.Tensor | None = None, *, early: bool = False) -> torch.Tensor:
        """``[M, H]`` bfloat16. ``inner`` takes the float32 products ``[M, 2 I]`` of a slot and their experts."""
        total = torch.zeros(len(self.rows), H, dtype=torch.bfloat16)
        products, row = self.rows @ self.w1.mT, torch.arange(len(self.rows))
        for slot in range(self.ids.shape[1]):
            expert, weight = self.ids[:, slot].long(), self.weights[:, slot, None]
            product = products[expert, row]
            value = (inner(product * weight if early else product, expert) @ self.w2.mT)[expert, row]
            if bias2 is not None:
                value = value + bias2[expert]
            total += (value if early else value * weight).bfloat16()
        return total


def layer(rows: int, k: int = 2, *, inner: int = INNER, seed: int = 0) -> Layer:
    """Two slots add up in one order only."""
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randint(-1, 2, (E, 2 * inner, H), generator=generator) / 32
    w2 = torch.zeros(E, H, inner)
    column = torch.randint(inner, (E, H, 1), generator=generator)
    w2.scatter_(2, column, torch.randint(0, 2, (E, H, 1), generator=generator) * 2.0 - 1.0)
    x = torch.randint(-4, 5, (rows, H), generator=generator).float()
    ids = torch.rand(rows, E, generator=generator).argsort(1)[:, :k].int()
    weights = torch.rand(rows, k, generator=generator) - 0.25
    return Layer(w1, w2, x, ids, weights)


def silu(product: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in float32."""
    gate, up = product.chunk(2, 1)
    return gate * torch.sigmoid(gate) * up


def bf16(case: Layer, **options: Any) -> torch.Tensor:
    """The call without quantisation, on all rows."""
    w1, w2 = (shuffle.shuffle_weight(each.bfloat16()) for each in (case.w1, case.w2))
    return fused_moe.fused_moe(case.rows.bfloat16(), w1, w2, case.weights, case.ids, **options)


def fp8(case: Layer, kind: Any, **options: Any) -> torch.Tensor:
    """The call with FP8 weights of scale 1/32 for W1 and 1 for W2, and rows that are codes of scale 1,
    or others on request; scales are powers of two.
    """
    blocks = kind == QuantType.per_128x128
    scales, weights = [], []
    for name, matrix, value in (("w1_scale", case.w1, 1 / 32), ("w2_scale", case.w2, 1.0)):
        rows, columns = (128, 128) if blocks else (1, matrix.shape[2])
        shape = (E, matrix.shape[1] // rows, matrix.shape[2] // columns)
        scales.append(options.pop(name, torch.full(shape, value)))
        spread = scales[-1].repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        weights.append(shuffle.shuffle_weight(codes(matrix / spread)))
    given = options.pop("rows", None)
    scale = torch.ones(len(case.rows), H // 128 if blocks else 1) if given is None else None
    return fused_moe.fused_moe(
        codes(case.rows) if given is None else given,
        weights[0],
        weights[1],
        case.weights,
        case.ids,
        quant_type=kind,
        w1_scale=scales[0],
        w2_scale=scales[1],
        a1_scale=options.pop("a1_scale", scale),
        dtype=torch.bfloat16,
        **options,
    )


def mxfp4(case: Layer, *, shuffled: bool = True, gate_mode: str = "separated", **options: Any) -> torch.Tensor:
    """The call with FP4 weights, in groups of which every scale is exact."""
    weights, scales = [], []
    for matrix in (case.w1, case.w2):
        packed, scale = quant.per_1x32_f4_quant(matrix.reshape(-1, matrix.shape[2]))
        weights.append(packed.view(E, matrix.shape[1], -1))
        scales.append(scale)
    first = shuffle.shuffle_weight(weights[0]) if shuffled else weights[0]
    scale = shuffle.shuffle_scale(scales[0])
    if gate_mode == "interleave":
        first = shuffle.shuffle_weight_a16w4(weights[0], 16, True)
        scale = shuffle.shuffle_scale_a16w4(scales[0], E, True)
    return fused_moe.fused_moe(
        options.pop("rows", case.rows.bfloat16()),
        first,
        shuffle.shuffle_weight(weights[1]) if shuffled else weights[1],
        case.weights,
        case.ids,
        quant_type=QuantType.per_1x32,
        w1_scale=scale,
        w2_scale=shuffle.shuffle_scale(scales[1]),
        dtype=options.pop("dtype", torch.bfloat16),
        gate_mode=gate_mode,
        **options,
    )


def codes(values: torch.Tensor) -> torch.Tensor:
    """FP8 of the live device; integers up to 16 and powers of two are exact."""
    encoded = values.to(dtypes.get_dtype_fp8())
    assert torch.equal(encoded.float(), values)
    return encoded


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """To tell NaN and the two zeros apart."""
    return tensor.contiguous().view(torch.uint8)
