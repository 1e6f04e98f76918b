"""Double of ``aiter.jit.utils.chip_info``: which gfx architecture is there, and which one the build is for.

Scope: the two answers may differ, as upstream. It proves nothing about the device that is really present.
"""

from __future__ import annotations

import os

#: Names the architecture to act as; the real function would ask rocminfo.
ARCH_VARIABLE = "AITER_STANDIN_ARCH"
#: Compute units of the largest product of an architecture, where ``CU_NUM`` does not say.
_COMPUTE_UNITS = {"gfx942": 304}
#: Assumed when nothing names an architecture.
DEFAULT_ARCH = "gfx942"


def get_gfx() -> str:
    """Architecture built for: the last entry of ``GPU_ARCHS``, else the live device (chip_info.py:46-68)."""
    wanted = os.environ.get("GPU_ARCHS", "native")
    return get_gfx_runtime() if wanted == "native" else wanted.split(";")[-1]


def get_gfx_runtime() -> str:
    """Architecture of the live device, whatever ``GPU_ARCHS`` says (chip_info.py:72)."""
    return os.environ.get(ARCH_VARIABLE, DEFAULT_ARCH).partition(":")[0]


def get_cu_num() -> int:
    """Compute units of the live device, or ``CU_NUM`` (chip_info.py:138-165)."""
    return int(os.environ.get("CU_NUM", "0")) or _COMPUTE_UNITS.get(get_gfx_runtime(), 256)
