"""Double of ``mori.jit.config``: which gfx architecture to act as.

Scope: reads two environment variables. It proves nothing about the device that is really present.
"""

from __future__ import annotations

import os

SUPPORTED_ARCHS = ("gfx942", "gfx950", "gfx1250")

#: Assumed when nothing names an architecture; the real function would probe the machine and raise without a GPU.
DEFAULT_ARCH = "gfx942"


def detect_gpu_arch(rocm_path: str = "/opt/rocm") -> str:
    """Return the first supported architecture named in ``MORI_GPU_ARCHS``, else :data:`DEFAULT_ARCH`.

    Args:
        rocm_path: accepted as in the real signature; the double probes no files.

    Source of semantics: python/mori/jit/config.py.
    """
    del rocm_path
    wanted = os.environ.get("MORI_GPU_ARCHS", "")
    return next((arch for arch in SUPPORTED_ARCHS if arch in wanted), DEFAULT_ARCH)


def is_gfx125x() -> bool:
    """Whether the assumed architecture takes the gfx125x paths (wave32, cco communicator by default)."""
    return detect_gpu_arch().startswith("gfx125")


def wave_size() -> int:
    """Return the lanes of a wave: ``MORI_WAVE_SIZE`` where it is a number, else 32 on gfx12 and 64 on gfx9."""
    forced = os.environ.get("MORI_WAVE_SIZE", "")
    try:
        return int(forced)
    except ValueError:
        return 32 if detect_gpu_arch().startswith("gfx12") else 64
