"""Double of ``aiter.ops.shuffle``: weights and block scales in the order in which the MoE kernels read them.

Scope: AITER e4048607's permutations (aiter/ops/shuffle.py), the mark ``is_shuffled`` that a view or a copy loses, and
padding that nobody writes; gfx1250's own layouts and int4 are not doubled. The way back (:func:`unshuffled`,
:func:`unshuffled_scales`), which AITER has not, serves the double's kernels. A pass proves nothing about AITER.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.standin.aiter_ops import device, mx
from accelerated.standin.aiter_ops.utility import dtypes

#: Lanes of a wavefront.
_WAVE = 64


def shuffle_weight(
    x: torch.Tensor,
    layout: tuple[int, int] = (16, 16),
    use_int4: bool = False,
    is_guinterleave: bool = False,
    gate_up: bool = False,
    pad_k_to: int = 0,
) -> torch.Tensor:
    """``x [..., N, K]`` permuted in tiles of ``layout``, marked ``is_shuffled`` (shuffle.py:148).

    Raises:
        AssertionError: N or K does not fill the tiles.
        NotImplementedError: ``pad_k_to`` with int4 or interleaved gate and up, as upstream; int4 at all, as here.
        ValueError: ``pad_k_to`` is negative.
    """
    kind = x.dtype
    if kind == dtypes.fp4x2:
        x = x.view(torch.uint8)
    width = x.shape[-1]
    if pad_k_to:
        x = _padded(x, pad_k_to, use_int4, is_guinterleave)
    if use_int4:
        raise NotImplementedError("the double has no int4 weights")
    if is_guinterleave:
        result = _interleaved(x, layout, gate_up)
    else:
        rows, columns = layout[0], layout[1] * 2
        assert x.shape[-2] % rows == 0, f"{x.shape[-2]} rows do not fill tiles of {rows}"
        assert x.shape[-1] % columns == 0, f"rows of {x.shape[-1]} elements do not fill tiles of {columns}"
        pack = 16 // x.element_size()
        tiles = x.view(-1, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns // pack, pack)
        result = tiles.permute(0, 1, 3, 4, 2, 5)
    shuffled: Any = result.contiguous().view(x.shape).view(kind)
    shuffled.is_shuffled = True
    if pad_k_to:
        shuffled.aiter_original_k, shuffled.aiter_padded_k = width, x.shape[-1]
    returned: torch.Tensor = shuffled
    return returned


def shuffle_weight_a16w4(src: torch.Tensor, NLane: int, gate_up: bool) -> torch.Tensor:
    """Packed FP4 weights ``[E, N, K / 2]``; with ``gate_up`` 16 gate rows alternate with 16 up rows."""
    return shuffle_weight(src, layout=(NLane, 16), is_guinterleave=True, gate_up=gate_up)


def moe_shuffle_weight(
    src: torch.Tensor,
    experts_cnt: int | None = None,
    is_guinterleave: bool = False,
    gate_up: bool = False,
    layout: tuple[int, int] = (16, 16),
) -> torch.Tensor:
    """The weights' shuffle of this architecture (gfx942 and gfx950 agree)."""
    del experts_cnt
    return shuffle_weight(src, layout=layout, is_guinterleave=is_guinterleave, gate_up=gate_up)


def shuffle_scale(
    src: torch.Tensor, experts_cnt: int | None = None, is_guinterleave: bool = False, gate_up: bool = False
) -> torch.Tensor:
    """E8M0 scales ``[E N, K / 32]``, padded to (256, 8) and swizzled; float32 ones are left as they are.

    With ``is_guinterleave`` each expert is permuted by itself, and only K / 32 is padded, with ones.

    Raises:
        AssertionError: no matrix.
        ValueError: ``is_guinterleave`` without ``experts_cnt``.
    """
    if src is None or src.dtype == torch.float32:
        return src
    assert src.ndim == 2, f"scales have {src.ndim} dimensions; a matrix is wanted"
    if not is_guinterleave:
        return mx.swizzle(src.view(torch.uint8)).view(src.dtype)
    if experts_cnt is None:
        raise ValueError("experts_cnt says where one expert's scales end; is_guinterleave wants it")
    scales = src.view(torch.uint8)
    missing = -scales.shape[1] % 8
    scales = torch.nn.functional.pad(scales, (0, missing), value=0x7F)
    rows, groups = scales.shape
    per_expert = rows // experts_cnt
    if gate_up:
        tiles = scales.view(experts_cnt, 2, per_expert // 32, 16, groups // 8, 2, 4).permute(0, 2, 4, 6, 3, 5, 1)
    else:
        tiles = scales.view(experts_cnt, per_expert // 32, 2, 16, groups // 8, 2, 4).permute(0, 1, 4, 6, 3, 5, 2)
    return tiles.contiguous().view(rows, groups).view(src.dtype)


def shuffle_scale_a16w4(src: torch.Tensor, experts_cnt: int, gate_up: bool) -> torch.Tensor:
    """Scales of :func:`shuffle_weight_a16w4`'s weights."""
    return shuffle_scale(src, experts_cnt=experts_cnt, is_guinterleave=True, gate_up=gate_up)


def moe_shuffle_scale(
    src: torch.Tensor, experts_cnt: int | None = None, is_guinterleave: bool = False, gate_up: bool = False
) -> torch.Tensor:
    """The scales' shuffle of this architecture (gfx942 and gfx950 agree)."""
    return shuffle_scale(src, experts_cnt=experts_cnt, is_guinterleave=is_guinterleave, gate_up=gate_up)


def unshuffled(weights: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """``[E, N, K]`` as a kernel reads it from shuffled memory; not part of AITER.

    Args:
        weights: contiguous, of any type; what was not shuffled comes out permuted.
        interleaved: gate and up rows alternate in sixteens; they come out apart.
    """
    experts, rows, columns = weights.shape
    pack = 16 // weights.element_size()
    if rows % (32 if interleaved else 16) or columns % (2 * pack):
        raise RuntimeError(f"no kernel: weights {rows} x {columns} of {weights.dtype} do not fill shuffled tiles")
    if interleaved:
        tiles = weights.view(experts, rows // 32, 2, columns // pack, 16, pack).permute(0, 2, 1, 4, 3, 5)
    else:
        tiles = weights.view(experts, rows // 16, columns // pack, 16, pack).permute(0, 1, 3, 2, 4)
    return tiles.reshape(experts, rows, columns)


def unshuffled_scales(scales: torch.Tensor, experts: int, rows: int, groups: int, *, interleaved: bool) -> torch.Tensor:
    """Bytes ``[E, rows, groups]`` as a kernel reads them from ``scales``, of any shape and type; not part of AITER.

    What lies behind the end of ``scales`` is whatever memory holds.
    """
    raw = scales.contiguous().view(torch.uint8).view(-1)
    width = mx.padded(1, groups)[1]
    if interleaved:
        if rows % 32:
            raise RuntimeError(f"no kernel: {rows} rows of an expert do not fill interleaved tiles of 32")
        raw = _at_least(raw, experts * rows * width)
        tiles = raw.view(experts, rows // 32, width // 8, 4, 16, 2, 2).permute(0, 6, 1, 4, 2, 5, 3)
        return tiles.reshape(experts, rows, width)[:, :, :groups]
    height = mx.padded(experts * rows, 1)[0]
    tiles = _at_least(raw, height * width).view(height // 32, width // 8, 4, 16, 2, 2).permute(0, 5, 3, 1, 4, 2)
    return tiles.reshape(height, width)[: experts * rows, :groups].view(experts, rows, groups)


def _interleaved(x: torch.Tensor, layout: tuple[int, int], gate_up: bool) -> torch.Tensor:
    """Tiles of ``[E, N, K]`` in lanes of a wavefront, gate and up side by side on request."""
    lanes, pack = layout
    experts, rows, columns = x.shape
    deep = _WAVE // lanes
    if gate_up:
        tiles = x.view(experts, 2, rows // 2 // lanes, lanes, columns // (deep * pack), deep, pack)
        return tiles.permute(0, 2, 1, 4, 5, 3, 6)
    return x.view(experts, rows // lanes, lanes, columns // (deep * pack), deep, pack).permute(0, 1, 3, 4, 2, 5)


def _padded(x: torch.Tensor, multiple: int, use_int4: bool, interleave: bool) -> torch.Tensor:
    """Zero columns up to a multiple."""
    if multiple < 0:
        raise ValueError(f"pad_k_to is {multiple}; it cannot be negative")
    if use_int4 or interleave:
        raise NotImplementedError("pad_k_to pads neither int4 weights nor interleaved gate and up")
    missing = -x.shape[-1] % multiple
    if not missing:
        return x
    return torch.cat((x, torch.zeros(*x.shape[:-1], missing, dtype=x.dtype, device=x.device)), -1)


def _at_least(raw: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` bytes from the start of ``raw``, whatever its own length is."""
    if raw.numel() < count:
        raw = torch.cat((raw, device.empty((count - raw.numel(),), torch.uint8, raw.device)))
    return raw[:count]
