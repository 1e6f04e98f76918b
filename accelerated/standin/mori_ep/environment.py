"""What the double assumes about its machine: element types with kernels, launch fallbacks, communicator, device.

Scope: constants and environment variables as the real library reads them. It proves nothing about the device.
"""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep.jit_config import is_gfx125x

#: Element types with compiled kernels; any other is a KeyError before the launch.
DTYPE_SUFFIX = {
    getattr(torch, name): suffix
    for name, suffix in (
        ("float32", "f32"),
        ("bfloat16", "bf16"),
        ("float8_e4m3fn", "fp8_ocp"),
        ("float8_e4m3fnuz", "fp8_fnuz"),
        ("float4_e2m1fn_x2", "fp4"),
    )
    if hasattr(torch, name)
}

#: Blocks, RDMA blocks and warps of AUTO mode without a tuning table.
AUTO_GEOMETRY = {"InterNodeV1": (96, 64, 8), "InterNodeV1LL": (256, 128, 8)}

#: Lock that a compilation of one module's kernels holds in ``MORI_JIT_CACHE_DIR`` (python/mori/jit/core.py).
LOCK_FILE = ".{}.hsaco.lock"

#: Blocks of a row of a blockwise codec where ``MORI_FP8_COMBINE_SCALE_DIM`` names no positive number.
DEFAULT_SCALE_DIM = 56


def combine_scale_dim() -> int:
    """Return S from the environment (src/ops/dispatch_combine/dispatch_combine.cpp)."""
    text = os.environ.get("MORI_FP8_COMBINE_SCALE_DIM", "")
    if re.fullmatch(r"\s*\+?[0-9]+", text, re.ASCII) and 0 < int(text) < 2**31:
        return int(text)
    return DEFAULT_SCALE_DIM


def communicator() -> str:
    """Return "cco" or "shmem": what carries the symmetric buffers (python/mori/ops/dispatch_combine.py)."""
    forced = os.environ.get("MORI_EP_COMM", "").strip().lower()
    return forced or ("cco" if is_gfx125x() else "shmem")


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Act on the GPU where NCCL serves one in the group, else on the CPU."""
    if group is not None and "cuda:nccl" in str(dist.get_backend_config(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
