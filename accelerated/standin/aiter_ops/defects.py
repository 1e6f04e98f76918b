"""Defects seen in the source of AITER e4048607 that the double shows only when asked.

Scope: wrong results of kernels that every call can reach, so that a double which always showed them could be used for
nothing else. :data:`VARIABLE` names those to show, separated by commas. None was confirmed on hardware.
"""

from __future__ import annotations

import os

#: Names the defects to show.
VARIABLE = "AITER_STANDIN_DEFECTS"
#: Of experts with equal choices in two lanes both are taken for chosen and one is returned
#: (csrc/include/topk_gating_kernels.cuh, subwarpArgmax).
TIES_LOST = "ties-lost"
#: A group shared by more than 8 lanes is ranked by its first lane's experts alone
#: (csrc/kernels/topk_softmax_kernels_group.cu, lane_steps).
LANES_APART = "lanes-apart"
#: CK-Tile's split first stage leaves out twice the padding at the end of W1's gates and ups: ups that are none
#: (aiter/fused_moe.py:2817, ck_tile/ops/flatmm/kernel/moe_flatmm_kernel.hpp).
UPS_CUT = "ups-cut"

NAMES = (TIES_LOST, LANES_APART, UPS_CUT)


def present(name: str) -> bool:
    """Whether the double shows a defect.

    Raises:
        ValueError: the variable names a defect that there is none of.
    """
    shown = [each for each in os.environ.get(VARIABLE, "").split(",") if each]
    unknown = sorted(set(shown) - set(NAMES))
    if unknown:
        raise ValueError(f"{VARIABLE} names {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    return name in shown
