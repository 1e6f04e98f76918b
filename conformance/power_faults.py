"""One combine's data, correct implementations of it, and others with one seeded fault each.

Scope: what :mod:`conformance.power` judges. Data are synthetic; none of these faults is a library's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from reference.codecs import STANDARD
from reference.formats import Overflow
from reference.quantisation import Quantised, dequantise, quantise
from reference.rounding import round_to_bfloat16, round_to_format

BLOCK = 128
_CODEC = STANDARD["group128_fnuz"]
#: Tokens treated at once: float64 intermediates of [tokens, k, hidden] are the largest tensors here.
_CHUNK = 16
WIRES = ("BF16", "FP8")


@dataclass(frozen=True)
class Round:
    """One combine's data, float32.

    Attributes:
        wire: key of :data:`WIRES`.
        weights: ``[T, k]``, positive, sum about 1.
        sent: ``[T, k, H]``, expert rows before the wire, numbers of BF16.
        read: ``[T, k, H]``, the rows as a correct receiver reads them.
        codes: ``[T, k, H]``, decoded FP8 codes; the rows themselves on a BF16 wire.
        scales: ``[T, k, H / 128]``; one on a BF16 wire.
        before: ``[H]``, a row of an earlier combine, in BF16.
    """

    wire: str
    weights: torch.Tensor
    sent: torch.Tensor
    read: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    before: torch.Tensor


def draw(wire: str, tokens: int, hidden: int, top_k: int, seed: int) -> Round:
    """A combine's data: normal rows, weights of a softmax.

    Raises:
        ValueError: fewer than 4 tokens, fewer than 2 experts, or a hidden size that blocks do not divide.
    """
    if tokens < 4 or top_k < 2 or hidden < 2 * BLOCK or hidden % BLOCK:
        raise ValueError(
            f"tokens, top-k, hidden are {tokens}, {top_k}, {hidden}; "
            f"give at least 4, at least 2, and a multiple of {BLOCK} from {2 * BLOCK} on"
        )
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(tokens, top_k, generator=random).softmax(1)
    sent = round_to_bfloat16(torch.randn(tokens, top_k, hidden, generator=random))
    before = round_to_bfloat16(torch.randn(hidden, generator=random) * weights[0].norm())
    ones = torch.ones(tokens, top_k, hidden // BLOCK)
    if wire == "BF16":
        return Round(wire, weights, sent, sent, sent, ones, before)
    codes, scales = zip(*(_quantised(part) for part in chunks(sent)), strict=True)
    data = Round(wire, weights, sent, sent, torch.cat(codes), torch.cat(scales), before)
    return replace(data, read=_dequantised(data.codes, data.scales))


def chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``rows``, some tokens at a time."""
    return torch.split(rows, _CHUNK)


def _quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded codes and scales of ``rows [T, k, H]``, by the reference."""
    flat = quantise(rows.flatten(0, 1), _CODEC)
    values = dequantise(Quantised(flat.codes, torch.ones_like(flat.scales)), _CODEC)
    return values.float().reshape(rows.shape), flat.scales.float().reshape(*rows.shape[:2], -1)


def _dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Code times scale in float32, ``[T, k, H]``."""
    return codes * scales.repeat_interleave(BLOCK, -1)


# Correct implementations


def store(total: torch.Tensor) -> torch.Tensor:
    """Float32 ``total`` rounded to nearest BF16."""
    return round_to_bfloat16(total).bfloat16()


def _in_order(data: Round, order: list[int]) -> torch.Tensor:
    total = torch.zeros_like(data.read[:, 0])
    for k in order:
        total = total + data.weights[:, k, None] * data.read[:, k]
    return total


def _sequential(data: Round) -> torch.Tensor:
    return store(_in_order(data, list(range(data.weights.shape[1]))))


def _reversed(data: Round) -> torch.Tensor:
    return store(_in_order(data, list(range(data.weights.shape[1]))[::-1]))


def _rotated(data: Round) -> torch.Tensor:
    top_k = data.weights.shape[1]
    return store(_in_order(data, [(k + top_k // 2) % top_k for k in range(top_k)]))


def _pairwise(data: Round) -> torch.Tensor:
    parts = [data.weights[:, k, None] * data.read[:, k] for k in range(data.weights.shape[1])]
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return store(parts[0])


def _fused(data: Round) -> torch.Tensor:
    total = data.weights[:, 0, None] * data.read[:, 0]
    for k in range(1, data.weights.shape[1]):
        # The product is exact in float64.
        total = (data.weights[:, k, None].double() * data.read[:, k] + total).float()
    return store(total)


Implementation = Callable[[Round], torch.Tensor]
CORRECT: dict[str, Implementation] = {
    "in order": _sequential,
    "in reverse": _reversed,
    "rotated": _rotated,
    "pairwise": _pairwise,
    "fused multiply-add": _fused,
}

# Faults, each in one otherwise sequential combine


def _random(data: Round) -> torch.Generator:
    return torch.Generator().manual_seed(data.weights.shape[0])


def _noisy_row(data: Round) -> torch.Tensor:
    output, random = _sequential(data), _random(data)
    row = output[output.shape[0] // 2]
    hit = torch.rand(row.shape, generator=random) < 0.28
    size = torch.empty(row.shape).uniform_(0.08, 0.22, generator=random)
    sign = torch.randint(0, 2, row.shape, generator=random) * 2 - 1
    row.copy_(store(row.float() + hit * size * sign))
    return output


def _dropped_term(data: Round) -> torch.Tensor:
    weights = data.weights.clone()
    weights.view(-1)[weights.argmin()] = 0
    return _sequential(replace(data, weights=weights))


def _swapped_rows(data: Round) -> torch.Tensor:
    output = _sequential(data)
    output[[1, 2]] = output[[2, 1]]
    return output


def _stale_row(data: Round) -> torch.Tensor:
    output = _sequential(data)
    output[-1] = data.before.bfloat16()
    return output


def _one_element(data: Round) -> torch.Tensor:
    output = _sequential(data)
    row = output[output.shape[0] // 3]
    typical = (row.float().abs() - row.float().square().mean().sqrt()).abs().argmin()
    row[typical] = store(row[typical].float() * 1.03)
    return output


def _block(data: Round) -> tuple[int, int]:
    """A token in the middle and the slot of its median weight."""
    token = data.weights.shape[0] // 2
    return token, int(data.weights[token].argsort()[data.weights.shape[1] // 2])


def _doubled_scale(data: Round) -> torch.Tensor:
    scales = data.scales.clone()
    token, slot = _block(data)
    scales[token, slot, 0] *= 2
    return _sequential(replace(data, read=_dequantised(data.codes, scales)))


def _neighbours_scale(data: Round) -> torch.Tensor:
    scales = data.scales.clone()
    token, slot = _block(data)
    # Two blocks whose scales differ by what blocks differ by.
    index = int(scales[token, slot].argsort()[scales.shape[2] // 2])
    scales[token, slot, index] = scales[token, slot, index - 1]
    return _sequential(replace(data, read=_dequantised(data.codes, scales)))


def _wrong_format(data: Round) -> torch.Tensor:
    """Scales for 448, as OCP FP8 has it, with codes that end at 240."""
    rows = []
    for sent in chunks(data.sent):
        scales = sent.reshape(*sent.shape[:2], -1, BLOCK).abs().amax(-1) / 448
        quotient = sent / scales.repeat_interleave(BLOCK, -1)
        codes = round_to_format(quotient, _CODEC.payload, overflow=Overflow.SATURATE).float()
        rows.append(_dequantised(codes, scales))
    return _sequential(replace(data, read=torch.cat(rows)))


def _coarse_accumulator(data: Round) -> torch.Tensor:
    total = torch.zeros_like(data.read[:, 0])
    for k in range(data.weights.shape[1]):
        total = round_to_bfloat16(total + data.weights[:, k, None] * data.read[:, k])
    return total.bfloat16()


def _truncated(data: Round) -> torch.Tensor:
    total = _in_order(data, list(range(data.weights.shape[1])))
    return (total.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


FAULTS: dict[str, Implementation] = {
    "one row, 28 % of elements off by 0.08 to 0.22": _noisy_row,
    "smallest term of one token dropped": _dropped_term,
    "two rows swapped": _swapped_rows,
    "stale row": _stale_row,
    "one element off by 3 %": _one_element,
    "one block of one term doubled": _doubled_scale,
    "BF16 accumulation": _coarse_accumulator,
    "truncation instead of rounding": _truncated,
}
FP8_FAULTS: dict[str, Implementation] = {
    "scales for 448, codes that end at 240": _wrong_format,
    "one block with its neighbour's scale": _neighbours_scale,
}
