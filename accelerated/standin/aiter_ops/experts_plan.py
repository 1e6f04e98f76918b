"""Which of AITER's MoE kernels a call reaches, and what each of them does to the numbers.

Scope: the selection of AITER e4048607 without a tuned row (aiter/fused_moe.py:769-803, 1281-1307, 2369-2760): as
``AITER_BYPASS_TUNE_CONFIG=1`` has it, with FlyDSL installed, as its distribution requires. A pass proves nothing
about tuned configurations or about which kernel is the faster one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from accelerated.standin.aiter_ops.ops.flydsl.moe_common import GateMode
from accelerated.standin.aiter_ops.utility import dtypes

#: Clamp of Swiglu where the caller gives none, and always in CK-Tile's epilogues.
SWIGLU_LIMIT = 7.0
#: Rows times slots up to which the MX quantiser of the intermediate sorts as well, and clears rows of weight 0.
_FUSED_SORT = 8192
#: Row counts from which on one buffer size stands for all larger ones, down to the next.
_TIERS = (32768, 131072)
#: Activations and FP8 quantisers of the kernels that do both stages at once, gate and up fused.
_ONE_STAGE: dict[tuple[str, int, bool], tuple[int, ...]] = {
    ("gfx942", QuantType.per_Token.value, False): (ActivationType.Silu.value, ActivationType.Gelu.value),
    ("gfx942", QuantType.per_1x128.value, False): (ActivationType.Silu.value,),
    ("gfx950", QuantType.per_Token.value, False): (ActivationType.Silu.value, ActivationType.Gelu.value),
    ("gfx950", QuantType.per_Token.value, True): (ActivationType.Silu.value,),
    ("gfx950", QuantType.per_1x128.value, False): (ActivationType.Silu.value, ActivationType.Gelu.value),
}


#: Tiles of I of the one-stage kernels for blocks of 32 rows (hsa/<arch>/fmoe/*/fmoe_bf16_*Fp8_g1u1_*.csv).
_TILES = {
    ("gfx942", QuantType.per_Token.value): (128, 192, 256, 320, 384, 448, 512),
    ("gfx950", QuantType.per_Token.value): (128, 192, 256, 320, 384, 448, 512),
    ("gfx942", QuantType.per_1x128.value): (128, 256),
    ("gfx950", QuantType.per_1x128.value): (128, 256, 384),
}
_UNITS = {"gfx942": 304, "gfx950": 256}


@dataclass(frozen=True)
class Call:
    """What the selection looks at.

    Attributes:
        rows: M, valid or not.
        k: columns of the ids.
        hidden: H.
        inner: I.
        local: experts whose weights are here.
        experts: length of the mask, or as many as are here.
        masked: there is a mask.
        dtype: of the result.
        weights: type of W1.
        activation: an ``ActivationType``.
        quant: a ``QuantType``, remapped.
        stage1: the routing weight is applied before the activation.
        gate: where gate and up lie.
        shuffled: marks of W1 and of W2.
    """

    rows: int
    k: int
    hidden: int
    inner: int
    local: int
    experts: int
    masked: bool
    dtype: torch.dtype
    weights: torch.dtype
    activation: Any
    quant: Any
    stage1: bool
    gate: GateMode
    shuffled: tuple[bool, bool]


@dataclass(frozen=True)
class Plan:
    """Numerics of the kernels chosen.

    Attributes:
        name: of the kernels, for messages.
        rows: type to which rows and intermediate are quantised, or None.
        tile: columns of I that one work group of a one-stage kernel sees: it requantises them in float32, and adds
            its share of ``W2 h`` to the result; 0: two stages, the intermediate is rounded to the result's type.
        reads_shuffled: whether the kernels for W1 and W2 read them as shuffled.
        interleaved: W1's gate and up rows alternate in sixteens.
        cuts: parts of H summed apart before the activation; 1: float32 throughout.
        cut_type: to which each part is rounded.
        cut_sum: type in which they are added.
        biased: biases are added; else they are ignored.
        limit: gate and up are clamped to it, or None.
        activation: that takes the place of the caller's, or None.
        reduce: terms are written apart and then added, in place of atomic additions.
        pads: multiples of columns of padding that the kernels write and read around, see :func:`skipped`; None: they
            know no padding.
        last: columns of H and of I in the last tile, of which alone W1 and W2 leave out any, and nothing where there is
            a bias; None: no such limits.
        clears: what W1 does not write is 0 before the bias; else it is whatever was in memory.
        tkw1: scales that came with the rows are ignored.
        drops_zeros: a route of weight 0 adds 0, whatever its row holds (quant_kernels.cu:1811).
        absent: nothing is launched, and the result stays 0 (moe_cktile2stages.cu:324-370).
    """

    name: str
    rows: torch.dtype | None = None
    tile: int = 0
    reads_shuffled: tuple[bool, bool] = (True, True)
    interleaved: bool = False
    cuts: int = 1
    cut_type: torch.dtype = torch.float32
    cut_sum: torch.dtype = torch.float32
    biased: bool = False
    limit: float | None = None
    activation: Any = None
    reduce: bool = False
    pads: tuple[int, int] | None = None
    last: tuple[int, int] | None = None
    clears: bool = True
    tkw1: bool = False
    drops_zeros: bool = False
    absent: bool = False


def padded_rows(m: int) -> int:
    """Next power of two below 32768, then 32768 and 131072 (fused_moe.py:1340)."""
    if m < _TIERS[0]:
        return 1 << max(m - 1, 0).bit_length()
    return _TIERS[1] if m >= _TIERS[1] else _TIERS[0]


def skipped(plan: Plan, pads: tuple[int, int], biased: tuple[bool, bool]) -> tuple[int, int, int, int]:
    """Columns at the end that W1 does not read (of H) or write (of I), and W2 not read (of I) or write (of H).

    Args:
        plan: of the call.
        pads: columns of padding in H and in I.
        biased: whether W1 and W2 have a bias; FlyDSL's kernels skip nothing there (fused_moe.py:1388).
    """
    if plan.pads is None:
        return 0, 0, 0, 0
    write, read = plan.pads
    (hidden, inner), (first, second) = pads, biased
    found = hidden // read * read, inner // write * write, inner // read * read, hidden // write * write
    if plan.last is None:
        return found
    # mixed_moe_gemm_2stage_common.py:956 takes the rest of a tile, :4962 at most one.
    ends = hidden % plan.last[0] // read * read, min(plan.last[1], found[2])
    return (0 if first else ends[0], 0 if first else found[1], 0 if second else ends[1], 0 if second else found[3])


def row_type(call: Call, hidden: torch.dtype, scaled: bool) -> torch.dtype:
    """Type in which the rows enter the GEMMs (fused_moe.py:759-803)."""
    if call.quant == QuantType.per_1x128 and hidden == dtypes.get_dtype_fp8() and scaled:
        return dtypes.get_dtype_fp8()
    if call.quant != QuantType.per_1x32 or call.weights == dtypes.get_dtype_fp8():
        return call.weights
    if call.activation == ActivationType.Swiglu and call.gate == GateMode.SEPARATED:
        return dtypes.bf16 if call.rows < _bound("GPTOSS_SWIGLU_MXFP4_BF16_BOUND") else dtypes.fp4x2
    if call.activation == ActivationType.Swiglu or call.gate == GateMode.INTERLEAVE:
        if get_gfx() != "gfx950" or call.rows < _bound("AITER_BF16_FP8_MOE_BOUND"):
            return dtypes.bf16
        return dtypes.get_dtype_fp8()
    return dtypes.fp4x2


def choose(call: Call, rows: torch.dtype, limit: float | None) -> Plan:
    """Plan of a call whose rows enter as ``rows``.

    Raises:
        RuntimeError: no kernel, as upstream finds out when it looks for one.
        NotImplementedError: AITER has kernels, the double has not.
    """
    if call.quant == QuantType.per_1x32:
        return _mx(call, rows, limit)
    if call.activation not in (ActivationType.Silu, ActivationType.Gelu):
        raise NotImplementedError(f"the double has {call.activation!r} with per_1x32 only")
    if call.quant == QuantType.No:
        if call.weights not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"no kernel: weights of {call.weights} without quantisation")
        return Plan("ck_2stages")
    if call.quant not in (QuantType.per_Token, QuantType.per_1x128):
        raise NotImplementedError(f"the double has no {call.quant!r}")
    if call.weights != dtypes.get_dtype_fp8():
        if call.weights in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            raise RuntimeError(f"no kernel: weights of {call.weights} on {get_gfx()}")
        raise NotImplementedError(f"the double has FP8 weights with {call.quant!r}, not {call.weights}")
    if _one_stage(call):
        return Plan("asm", call.weights, _tile(call), tkw1=call.stage1)
    cuts = key_cuts(call) if call.quant == QuantType.per_1x128 else 0
    if cuts > 1:
        # Parts go through float16 and meet in float32 (gemm_moe_ck2stages.h:336, fused_moe.py:3867).
        return Plan("ck_2stages split", call.weights, cuts=cuts, cut_type=torch.float16)
    return Plan("ck_2stages", call.weights)


def _one_stage(call: Call) -> bool:
    """fused_moe.py:2380-2402."""
    fused = _ONE_STAGE.get((get_gfx(), call.quant.value, call.stage1), ())
    if call.activation.value not in fused or call.dtype != dtypes.bf16:
        return False
    token = padded_rows(call.rows)
    if call.quant == QuantType.per_1x128:
        return token > 32 and call.inner % 128 == 0
    return token > 16 or call.inner % 128 != 0


def _tile(call: Call) -> int:
    """Columns of I per work group: fewest rounds over the compute units, then fewest idle (asm_fmoe.cu:243).

    Raises:
        RuntimeError: I is a multiple of no tile.
    """
    blocks = -(-(call.rows * call.k + call.experts * 32 - call.k) // 32)
    tiles = _TILES[get_gfx(), call.quant.value]
    ranked = [
        (-(-groups // _units()), -groups % _units(), tile)
        for tile in tiles
        if call.inner % tile == 0 and (groups := call.inner // tile * blocks)
    ]
    if not ranked:
        raise RuntimeError(f"no kernel: I = {call.inner} is a multiple of none of {tiles}")
    return min(ranked)[2]


def key_cuts(call: Call) -> int:
    """Parts of H with few rows, 0 for one (``get_ksplit``, fused_moe.py:1252). A mask takes one column off.

    Raises:
        ZeroDivisionError: one column and a mask, as upstream.
    """
    forced = int(os.environ.get("AITER_KSPLIT", "0"))
    if forced:
        return forced
    slots = padded_rows(call.rows) * (call.k - call.masked)
    groups = -(-call.inner // 128) * slots
    if slots > call.local or groups >= _units():
        return 0
    for cuts in range((_units() + groups - 1) // groups, 1, -1):
        if call.hidden % cuts == 0 and call.hidden // cuts % 256 == 0:
            return cuts
    return 0


def _units() -> int:
    """Compute units of a whole device (aiter/jit/utils/build_targets.py:39)."""
    return int(os.environ.get("CU_NUM", _UNITS.get(get_gfx(), 256)))


def _mx(call: Call, rows: torch.dtype, limit: float | None) -> Plan:
    """Kernels of FP4 weights (fused_moe.py:2610-2870)."""
    if call.weights != dtypes.fp4x2:
        raise NotImplementedError(f"the double has FP4 weights with per_1x32, not {call.weights}")
    if call.activation in (ActivationType.Situv2, ActivationType.No):
        raise NotImplementedError(f"the double has no {call.activation!r}")
    marked, swiglu = any(call.shuffled), call.activation == ActivationType.Swiglu
    quantised = rows if rows != dtypes.bf16 else None
    clears = quantised is not None and call.rows * call.k <= _FUSED_SORT
    cuts = key_cuts(call)
    if swiglu and call.gate != GateMode.SEPARATED:
        return _cktile(Plan("cktile interleaved", quantised, interleaved=True, drops_zeros=clears), call)
    if quantised is not None and marked and not call.stage1:
        return Plan(
            "flydsl",
            quantised,
            interleaved=quantised != dtypes.fp4x2,
            biased=True,
            limit=limit or (SWIGLU_LIMIT if swiglu else None),
            # Everything but Swiglu and Situv2 is taken for Silu (fused_moe.py:1438).
            activation=ActivationType.Swiglu if swiglu else ActivationType.Silu,
            pads=(128, 128),
            last=(256, 128 if call.inner % 256 else 256),
            clears=False,
            drops_zeros=clears,
            reduce=os.environ.get("AITER_FLYDSL_FORCE_REDUCE", "0") == "1",
        )
    if swiglu and quantised is None:
        # The kernel does not look at the mark: it reads shuffled weights.
        return _cktile(Plan("cktile split", cuts=max(cuts, 2), cut_type=call.dtype, cut_sum=call.dtype), call)
    if marked and cuts > 1 and not swiglu:
        raise NotImplementedError("the double has no CK-Tile kernel of Silu or Gelu")
    if swiglu or quantised != dtypes.fp4x2:
        raise RuntimeError(f"no kernel: rows of {rows}, FP4 weights and {call.activation!r}")
    return Plan("ck_2stages", quantised, reads_shuffled=call.shuffled, drops_zeros=clears)


def _cktile(plan: Plan, call: Call) -> Plan:
    """What CK-Tile's kernels have in common; those of float16 results do not exist, and their place is silent."""
    return replace(plan, biased=True, limit=SWIGLU_LIMIT, pads=(64, 128), absent=call.dtype == torch.float16)


def _bound(variable: str) -> int:
    return int(os.environ.get(variable, "256"))
