"""Double of ``aiter.utility.fp4_utils``: the swizzle of block scales.

Scope: AITER e4048607. A pass against it proves nothing about AITER.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops.ops.shuffle import shuffle_scale


def e8m0_shuffle(scale: torch.Tensor) -> torch.Tensor:
    """E8M0 scales padded to (256, 8) and swizzled (fp4_utils.py:224)."""
    return shuffle_scale(scale)
