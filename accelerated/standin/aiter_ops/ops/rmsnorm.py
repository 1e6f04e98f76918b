"""Double of ``aiter.ops.rmsnorm``: RMSNorm with residual, Gemma weights, T5 rounding and quantised outputs.

Scope: AITER e4048607's signatures, its choice between the HIP and the opus kernels, and their rounding points
(csrc/kernels/rmsnorm_quant_kernels.cu, csrc/include/opus/rmsnorm_opus_kernel.hpp). A pass against it proves nothing
about AITER's kernels.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import device, kernels, mx
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime

#: Vectors of a row that an opus thread keeps (4), times the most threads of a row (256).
_CACHED_VECTORS = 1024


def rms_norm_cu(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    """``out = rmsnorm(input) * weight`` by the opus kernel."""
    _opus(out, input, None, None, weight, epsilon)


def fused_add_rms_norm_cu(input: torch.Tensor, residual_in: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    """In place: ``residual_in`` takes the sum, ``input`` the norm; by the opus kernel."""
    assert input.is_contiguous(), "rms_norm_opus takes contiguous rows"
    _opus(input, input, residual_in, residual_in, weight, epsilon)


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> torch.Tensor:
    """A new tensor, by the HIP kernel where it can (see :func:`_hip_kernel_takes`)."""
    out = device.empty_like(input)
    if _hip_kernel_takes(input, use_model_sensitive_rmsnorm):
        _hip(out, input, None, None, weight, epsilon)
    else:
        _opus(out, input, None, None, weight, epsilon, use_model_sensitive_rmsnorm)
    return out


def rmsnorm2d_fwd(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> torch.Tensor:
    """The same as :func:`rms_norm`."""
    return rms_norm(input, weight, epsilon, use_model_sensitive_rmsnorm)


def rmsnorm2d_fwd_with_add(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    gemma_norm: bool = False,
    use_model_sensitive_rmsnorm: int = 0,
) -> None:
    """``residual_out = input + residual_in``, ``out`` its norm."""
    if _hip_kernel_takes(input, use_model_sensitive_rmsnorm):
        _hip(out, input, residual_in, residual_out, weight, epsilon, gemma_norm)
    else:
        _opus(out, input, residual_in, residual_out, weight, epsilon, use_model_sensitive_rmsnorm, gemma_norm)


def rmsnorm2d_fwd_with_dynamicquant(
    out: torch.Tensor,
    input: torch.Tensor,
    yscale: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    group_size: int = 0,
    shuffle_scale: bool = False,
) -> None:
    """The norm quantised per token, or per group; groups ignore the T5 flag."""
    _quantised(out, input, None, None, yscale, weight, epsilon, use_model_sensitive_rmsnorm, group_size, shuffle_scale)


def rmsnorm2d_fwd_with_add_dynamicquant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor,
    residual_out: torch.Tensor,
    yscale: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    group_size: int = 0,
    shuffle_scale: bool = False,
) -> None:
    """The same on the sum with the residual."""
    _quantised(
        out,
        input,
        residual_in,
        residual_out,
        yscale,
        weight,
        epsilon,
        use_model_sensitive_rmsnorm,
        group_size,
        shuffle_scale,
    )


def _hip_kernel_takes(input: torch.Tensor, use_model_sensitive_rmsnorm: int) -> bool:
    """Whether the HIP kernel takes the call (rmsnorm.py:388-398)."""
    return (
        use_model_sensitive_rmsnorm == 0 and input.dim() == 2 and input.element_size() == 2 and input.shape[-1] <= 8192
    )


def _added(
    input: torch.Tensor, residual_in: torch.Tensor | None, residual_out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 sum, and what is read back of it after the store to ``residual_out``."""
    value = device.flush(input.float())
    if residual_in is None or residual_out is None:
        return value, value
    total = device.flush(value + device.flush(residual_in.float()))
    residual_out.copy_(device.store(total, input.dtype, get_gfx_runtime()))
    return total, residual_out.float()


def _hip_norm(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    gemma: bool,
) -> torch.Tensor:
    """``(s * rsqrt(mean(s^2) + eps)) * w`` in float32, unrounded; eps is a double there."""
    total, _ = _added(input, residual_in, residual_out)
    inverse = torch.rsqrt((device.mean_square(total).double() + epsilon).float())
    return device.flush(device.flush(total * inverse) * (weight.float() + (1.0 if gemma else 0.0)))


def _hip(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    gemma: bool = False,
) -> None:
    normed = _hip_norm(input, residual_in, residual_out, weight, epsilon, gemma)
    out.copy_(device.store(normed, out.dtype, get_gfx_runtime()))


def _opus_norm(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    t5: bool,
    gemma: bool,
) -> torch.Tensor:
    """The same in the opus kernel's order: a row longer than the registers hold is read back rounded."""
    assert input.dtype in (torch.float16, torch.bfloat16, torch.float32), f"rms_norm_opus has no rows of {input.dtype}"
    assert weight.dtype == input.dtype, f"rms_norm_opus: the weight is {weight.dtype}, the rows are {input.dtype}"
    assert weight.shape[-1] == input.shape[-1], f"{weight.shape[-1]} weights, rows of {input.shape[-1]}"
    total, rounded = _added(input, residual_in, residual_out)
    if t5:
        total = rounded
    inverse = torch.rsqrt(device.mean_square(total) + torch.tensor(epsilon, device=input.device))
    vector = 16 // input.element_size()
    cached = _CACHED_VECTORS * (vector if input.shape[-1] % vector == 0 else 1)
    read = torch.cat((total[..., :cached], rounded[..., cached:]), -1)
    normed = device.flush(read * inverse)
    if t5:
        normed = device.store(normed, input.dtype, get_gfx_runtime()).float()
    return device.flush(normed * (weight.float() + (1.0 if gemma else 0.0)))


def _opus(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    model_sensitive: int = 0,
    gemma: bool = False,
) -> None:
    assert out.dtype == input.dtype, f"rms_norm_opus: out is {out.dtype}, the rows are {input.dtype}"
    assert out.is_contiguous(), "rms_norm_opus writes contiguous rows"
    normed = _opus_norm(input, residual_in, residual_out, weight, epsilon, model_sensitive != 0, gemma)
    out.copy_(device.store(normed, out.dtype, get_gfx_runtime()))


def _quantised(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    yscale: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    model_sensitive: int,
    group: int,
    shuffle: bool,
) -> None:
    largest = device.largest(out.dtype)
    if group == 0 and not shuffle and not _hip_kernel_takes(input, model_sensitive):
        normed = _opus_norm(input, residual_in, residual_out, weight, epsilon, model_sensitive != 0, False)
        scale = device.flush(normed.abs().amax(-1, keepdim=True) / torch.tensor(largest, device=input.device))
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        kernels.write(out, device.fp8_codes(device.flush(normed * inverse), out.dtype))
        yscale.copy_(scale.view(yscale.shape))
        return
    assert input.shape[-1] <= 8192, f"rows of {input.shape[-1]}; grouped scales end at 8192"
    if 4096 < input.shape[-1] <= 6144 and group % 24:
        raise RuntimeError(f"add_rmsnorm_quant group_size not support: {group}")
    normed = _hip_norm(input, residual_in, residual_out, weight, epsilon, False)
    blocks = normed.view(input.shape[0], -1, group or input.shape[-1])
    amax = blocks.abs().amax(2, keepdim=True).clamp(min=kernels.FLOOR)
    scale = device.flush(amax * mx.reciprocal(largest, input.device))
    kernels.write(out, device.fp8_codes(device.flush(blocks * device.flush(1.0 / scale)), out.dtype))
    kernels.place_scales(yscale, scale.squeeze(2), group, shuffle)
