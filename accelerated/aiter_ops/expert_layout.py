"""Weights of experts, masks and ids as AITER's fused experts take them.

Scope: AITER e4048607, aiter/fused_moe.py:458-797 and aiter/ops/shuffle.py; vLLM 0.33.0's mask, columns of shared
experts and padding with zeros. The library shuffles its own weights: a permutation of ours would follow it nowhere.
What a round trip through here does not prove: that a kernel reads the layout in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelerated.aiter_ops.library import AiterLibrary
from reference.codecs import Granularity, ScaleFormat
from reference.expert_weights import ExpertWeights
from reference.formats import E2M1, E8M0_BIAS, E8M0_NAN
from reference.layouts import pack_e2m1

#: Tiles that every kernel of the fused experts reads weights in (shuffle.py:148).
TILES = (16, 16)


@dataclass
class Held:
    """What one rank's calls pass.

    H and I are the library's, padding included.

    Attributes:
        w1: ``[n, 2 I, H]``, gate rows first, shuffled and marked as such; two elements per byte for FP4.
        w2: ``[n, H, I]``, likewise.
        w1_scale: float32 ``[n, 2 I, 1]`` or ``[n, 2 I / 128, H / 128]``, swizzled E8M0 ``[n 2 I, H / 32]`` padded to
            (256, 8), or None.
        w2_scale: likewise for ``[H, I]``.
        bias1: float32 ``[n, 2 I]``, or None.
        bias2: float32 ``[n, H]``, or None.
        mask: int32 ``[E + S + 1]``, 1 for the experts of this rank; the last is nobody's. None: this rank has all.
        hidden_pad: columns of padding at the end of H.
        intermediate_pad: at the end of I; of W1's rows, behind the gates and behind the ups.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    mask: torch.Tensor | None
    hidden_pad: int = 0
    intermediate_pad: int = 0


def lay_out(
    weights: ExpertWeights, library: AiterLibrary, mask: torch.Tensor | None, sizes: tuple[int, int] | None = None
) -> Held:
    """Weights as the library takes them; new tensors.

    Args:
        weights: of the local experts.
        library: whose shuffles are used.
        mask: see :class:`Held`.
        sizes: H and I that the library gets, None for those of the weights.

    Raises:
        ValueError: sizes below those of the weights, or that end within a group of scales.
    """
    _, hidden, inner = weights.w2.shape
    sizes = (hidden, inner) if sizes is None else sizes
    weights = padded(weights, *sizes)
    shuffle = library.part("ops.shuffle")
    return Held(
        w1=shuffle.shuffle_weight(_elements(weights.w1, weights, library.dtypes), layout=TILES),
        w2=shuffle.shuffle_weight(_elements(weights.w2, weights, library.dtypes), layout=TILES),
        w1_scale=_scales(weights.w1_scales, weights, library, shuffle),
        w2_scale=_scales(weights.w2_scales, weights, library, shuffle),
        bias1=_bias(weights.bias1),
        bias2=_bias(weights.bias2),
        mask=mask,
        hidden_pad=sizes[0] - hidden,
        intermediate_pad=sizes[1] - inner,
    )


def padded(weights: ExpertWeights, hidden: int, inner: int) -> ExpertWeights:
    """Weights, scales and biases of ``hidden`` columns and ``inner`` intermediate ones: added codes and biases are 0,
    added scales 1. A padded channel is activated to 0 and a padded column of the result is 0.

    Raises:
        ValueError: less than the weights have, or codes whose groups the padding would split or mix.
    """
    _, old_hidden, old_inner = weights.w2.shape
    if (hidden, inner) == (old_hidden, old_inner):
        return weights
    codec = weights.codec
    grouped = codec is not None and codec.granularity is Granularity.GROUP
    if hidden < old_hidden or inner < old_inner or not grouped:
        raise ValueError(
            f"weights of {old_hidden} x {old_inner}, stored as {codec}, cannot be padded to {hidden} x {inner}"
        )
    assert codec is not None
    if any(size % codec.group for size in (old_hidden, old_inner, hidden, inner)):
        raise ValueError(
            f"{old_hidden} x {old_inner} padded to {hidden} x {inner}; {codec.group} columns share a scale, give "
            "multiples of them"
        )
    scaled = (hidden // codec.group, inner // codec.group)
    return ExpertWeights(
        _halves(weights.w1, inner, hidden),
        _grown(weights.w2, hidden, inner),
        codec,
        None if weights.w1_scales is None else _halves(weights.w1_scales, inner, scaled[0], 1.0),
        None if weights.w2_scales is None else _grown(weights.w2_scales, hidden, scaled[1], 1.0),
        None if weights.bias1 is None else _halves(weights.bias1[..., None], inner, 1)[..., 0],
        None if weights.bias2 is None else _grown(weights.bias2[..., None], hidden, 1)[..., 0],
    )


def _grown(tensor: torch.Tensor, rows: int, columns: int, value: float = 0.0) -> torch.Tensor:
    """``[..., rows, columns]`` with ``value`` behind the end of both."""
    missing = (0, columns - tensor.shape[-1], 0, rows - tensor.shape[-2])
    return torch.nn.functional.pad(tensor, missing, value=value)


def _halves(tensor: torch.Tensor, inner: int, columns: int, value: float = 0.0) -> torch.Tensor:
    """``[n, 2 inner, columns]``, gates and ups padded apart."""
    return _grown(
        tensor.reshape(tensor.shape[0], 2, tensor.shape[1] // 2, tensor.shape[2]), inner, columns, value
    ).flatten(1, 2)


def _elements(stored: torch.Tensor, weights: ExpertWeights, dtypes: Any) -> torch.Tensor:
    """Elements or codes ``[n, N, K]`` in the type of the library."""
    if weights.codec is None:
        return stored.contiguous()
    if weights.codec.payload is E2M1:
        return pack_e2m1(stored).view(dtypes.fp4x2)
    return stored.to(torch.uint8).contiguous().view(dtypes.fp8)


def _scales(
    scales: torch.Tensor | None, weights: ExpertWeights, library: AiterLibrary, shuffle: Any
) -> torch.Tensor | None:
    if weights.codec is None or scales is None:
        return None
    if weights.codec.scale_format is not ScaleFormat.E8M0:
        return scales.to(torch.float32).contiguous()
    if weights.codec.granularity is not Granularity.GROUP:
        raise ValueError(f"E8M0 scales per {weights.codec.granularity.value}; AITER's MX kernels have them per group")
    swizzled: torch.Tensor = shuffle.shuffle_scale(e8m0_codes(scales).flatten(0, 1))
    return swizzled.view(library.dtypes.fp8_e8m0)


def _bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.to(torch.float32).contiguous()


def e8m0_codes(scales: torch.Tensor) -> torch.Tensor:
    """Bytes of powers of two, uint8 of the same shape; 255 for NaN.

    Raises:
        ValueError: a scale that no byte stands for.
    """
    significand, exponent = torch.frexp(scales.double())
    codes = torch.where(scales.isnan(), E8M0_NAN, exponent.long() - 1 + E8M0_BIAS)
    wrong = ~scales.isnan() & ((significand != 0.5) | (codes < 0) | (codes >= E8M0_NAN))
    if bool(wrong.any()):
        raise ValueError(
            f"scale {float(scales[wrong][0])} is no power of two from 2**-127 to 2**127; E8M0 has no other"
        )
    return codes.to(torch.uint8)


def expert_mask(owned: Sequence[int], experts: int, device: torch.device) -> torch.Tensor:
    """Mask of a rank that has ``owned`` of ``experts`` global ids, shared ones included: int32, one longer, the last 0.

    vLLM 0.33.0 gives the sentinel that masked columns point at a place of its own behind all experts.

    Raises:
        ValueError: ids that are not ascending, repeated, or no experts. AITER takes a local index from the sum of the
            mask before it, so that weights in another order would be taken for each other.
    """
    ids = list(owned)
    if ids != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] >= experts:
        raise ValueError(
            f"owned is {ids}; AITER numbers a rank's experts in ascending order of their ids: give each of 0 to "
            f"{experts - 1} that the rank has once, ascending, with the weights in that order"
        )
    mask = torch.zeros(experts + 1, dtype=torch.int32)
    mask[ids] = 1
    return mask.to(device)


def padded_rows(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows, codes or E8M0 scales ``[M, columns]``: elements and FP4 codes get zeros, scales the byte of 1, which leaves
    codes of 0 what they are. No host sync; ``rows`` themselves if nothing is missing.
    """
    missing = columns - rows.shape[1]
    if not missing:
        return rows
    if rows.element_size() > 1:
        return torch.nn.functional.pad(rows, (0, missing))
    value = E8M0_BIAS if rows.dtype == torch.float8_e8m0fnu else 0
    return torch.nn.functional.pad(rows.view(torch.uint8), (0, missing), value=value).view(rows.dtype)


def only_known(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Ids ``[M, k]`` int32 with the sentinel ``experts`` in the place of -1 and of every other id that is no expert's.

    AITER's sort looks each id up in the mask without a check. No host sync.
    """
    wanted = ids.to(torch.int32)
    return torch.where((wanted >= 0) & (wanted < experts), wanted, experts)


def with_fake_column(ids: torch.Tensor, weights: torch.Tensor, sentinel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``[M, k + 1]``, the last column masked on every rank."""
    column = ids.new_full((ids.shape[0], 1), sentinel)
    return torch.cat([ids, column], 1), torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)


def with_shared_columns(
    ids: torch.Tensor, weights: torch.Tensor, *, experts: int, shared: int, rank: int, shards: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``[M, k + S]``: row i's shared experts are added by rank ``i % shards`` alone, with weight 1.

    For a layout in which every rank has every row (vLLM 0.33.0, tensor and expert parallelism without all-to-all); the
    other ranks' columns hold -1.
    """
    row = torch.arange(ids.shape[0], device=ids.device)[:, None]
    names = torch.arange(experts, experts + shared, device=ids.device, dtype=ids.dtype)[None]
    columns = torch.where(row % shards == rank, names, -1).to(ids.dtype)
    return torch.cat([ids, columns], 1), torch.cat([weights, torch.ones_like(columns, dtype=weights.dtype)], 1)
