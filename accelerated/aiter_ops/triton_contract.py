"""What AITER's Triton quantisers and norms promise, operator by operator, without torch.

Scope: standing and numerics of the operators named ``triton.*`` on gfx942 (E4M3 FNUZ, 240) and gfx950 (E4M3 FN, 448).
Sources: ROCm/aiter e4048607, aiter/ops/triton/{quant,normalization}/ and their kernels in aiter/ops/triton/
_triton_kernels/{quant,normalization}/, aiter/ops/quant.py, aiter/utility/fp4_utils.py; claims follow
op_tests/triton_tests/. What a right declaration does not prove: that the kernels keep it. Where a kernel is plainly
wrong (a zero row that comes back as NaN) the declaration says what is right, so that the suite finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerated.contract import ContractError, Standing, Support
from accelerated.operators import ROW_BYTES, Family, NormContract, QuantContract, RowProblem
from reference.codecs import (
    Codec,
    Granularity,
    PayloadRule,
    ScaleFormat,
    ScaleLayout,
    ScaleRule,
    ZeroScale,
)
from reference.formats import E2M1, E4M3FN, E4M3FNUZ, Format
from reference.norm_numerics import NormInput, NormNumerics, WeightProduct

#: FP8 type of each architecture (aiter/utility/dtypes.py:11-21 and aiter/ops/triton/utils/types.py:14-34 agree here).
FP8: dict[str, Format] = {"gfx942": E4M3FNUZ, "gfx950": E4M3FN}
#: Elements of one Triton block, the most a kernel that holds a row in one block can take.
BLOCK_LIMIT = 1 << 20
#: rms_norm takes another kernel above this many rows, if rows are short (normalization/rmsnorm.py:156-158).
LARGE_M, SMALL_N = 8192, 2048


# All norms multiply (x * r) * w in float32; rmsnorm2d_fwd_with_add* add in the element type and go on from that
# (normalization/rmsnorm.py:402-409, 908-915), the others add in float32. Fused quantisers see float32.
_UNROUNDED = NormNumerics(norm_input=NormInput.UNROUNDED, product=WeightProduct.NORM_FIRST)
_ROUNDED = NormNumerics(norm_input=NormInput.ROUNDED, product=WeightProduct.NORM_FIRST)


@dataclass(frozen=True)
class Operator:
    """One Triton operator.

    Attributes:
        family: quantiser or norm.
        codec: quantiser for an FP8 type, or None.
        numerics: rounding points of a norm.
        residual: a norm that adds a residual.
        element_output: a norm that also returns the output in the element type.
        multiple: columns have to be a multiple of this.
        dtypes: element types of upstream's tests.
        archs: architectures that upstream tests on.
        only: the single architecture on which the operator makes sense, or empty.
        takes_out: results go where the caller says.
        takes_empty: a call with no rows is legal.
        untested: why upstream claims nothing for FP8 here, or empty.
    """

    family: Family
    codec: Callable[[Format], Codec] | None = None
    numerics: NormNumerics = _UNROUNDED
    residual: bool = False
    element_output: bool = True
    multiple: int = 1
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    archs: tuple[str, ...] = ("gfx942", "gfx950")
    only: str = ""
    takes_out: bool = False
    takes_empty: bool = True
    untested: str = ""


def _static(fp8: Format) -> Codec:
    # quant.py:26-29: x * (1 / scale), then a cast.
    return Codec(fp8, Granularity.TENSOR, fp8.max, static=True, payload_rule=PayloadRule.RECIPROCAL)


def _tensor(fp8: Format) -> Codec:
    # quant.py:50-51: m / DTYPE_MAX in float32 (a bfloat16 m is promoted by the division), maximum by an atomic.
    return Codec(fp8, Granularity.TENSOR, fp8.max, payload_rule=PayloadRule.RECIPROCAL, zero_codes_defined=False)


def _token(fp8: Format) -> Codec:
    # quant.py:72-77: no floor, so the scale of a zero row is 0. Any finite code would dequantise to 0; NaN does not.
    return Codec(fp8, Granularity.TOKEN, fp8.max, payload_rule=PayloadRule.RECIPROCAL, zero_codes_defined=False)


def _group(fp8: Format) -> Codec:
    # per_block_quant_wrapper((1, 128)) views the rows as rows of 128 (aiter/ops/quant.py:331-347).
    return Codec(
        fp8, Granularity.GROUP, fp8.max, group=128, payload_rule=PayloadRule.RECIPROCAL, zero_codes_defined=False
    )


def _floored_group(layout: ScaleLayout) -> Callable[[Format], Codec]:
    # fused_fp8_quant.py:35-38: max(amax, 1e-10) / DTYPE_MAX, clamped payload.
    return lambda fp8: Codec(
        fp8,
        Granularity.GROUP,
        fp8.max,
        group=128,
        amax_floor=1e-10,
        payload_rule=PayloadRule.RECIPROCAL,
        scale_layout=layout,
    )


def _dynamic_norm(fp8: Format) -> Codec:
    # rmsnorm.py:29-34: a zero scale becomes 1.
    return Codec(fp8, Granularity.TOKEN, fp8.max, zero_scale=ZeroScale.ONE, payload_rule=PayloadRule.RECIPROCAL)


def _mxfp4(layout: ScaleLayout) -> Callable[[Format], Codec]:
    # quant.py:110-119: amax rounded to one mantissa bit, ties away, and 2**(floor(log2) - 2).
    return lambda _: Codec(
        E2M1,
        Granularity.GROUP,
        E2M1.max,
        group=32,
        scale_format=ScaleFormat.E8M0,
        scale_rule=ScaleRule.EVEN,
        payload_rule=PayloadRule.RECIPROCAL,
        scale_layout=layout,
    )


def _mxfp8(payload: Format) -> Callable[[Format], Codec]:
    # quant.py:393-401 rounds amax with FP4's constant 0x200000, not with that of FP8's three mantissa bits.
    return lambda _: Codec(
        payload,
        Granularity.GROUP,
        payload.max,
        group=32,
        scale_format=ScaleFormat.E8M0,
        scale_rule=ScaleRule.EVEN_ONE_BIT,
        payload_rule=PayloadRule.RECIPROCAL,
    )


_HALVES = ("bfloat16", "float16")
_INT8_ONLY = "upstream tests its int8 output only"
_ROW, _COLUMN = ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR
_BYTES, _SWIZZLED = ScaleLayout.TRANSPOSED_BYTES, ScaleLayout.SWIZZLED

OPERATORS: dict[str, Operator] = {
    "triton.per_tensor_static": Operator(Family.QUANTISE, _static, takes_out=True),
    "triton.per_tensor": Operator(Family.QUANTISE, _tensor, takes_out=True),
    "triton.per_token": Operator(Family.QUANTISE, _token, takes_out=True),
    "triton.per_1x128": Operator(Family.QUANTISE, _group, multiple=128),
    # quant.py:190-216 sizes its blocks by the rows and then divides by them: no rows are a ZeroDivisionError.
    "triton.mxfp4": Operator(Family.QUANTISE, _mxfp4(_COLUMN), multiple=4, dtypes=("bfloat16",), takes_empty=False),
    "triton.per_1x32_fp4": Operator(Family.QUANTISE, _mxfp4(_ROW), multiple=4, dtypes=("bfloat16",)),
    "triton.per_1x32_fp4_shuffled": Operator(
        Family.QUANTISE, _mxfp4(_SWIZZLED), multiple=4, dtypes=(), untested="upstream tests it unshuffled only"
    ),
    "triton.mxfp8": Operator(Family.QUANTISE, _mxfp8(E4M3FN), multiple=32, dtypes=_HALVES),
    "triton.mxfp8_fnuz": Operator(
        Family.QUANTISE,
        _mxfp8(E4M3FNUZ),
        multiple=32,
        only="gfx942",
        untested="its docstring calls FNUZ canonical, upstream tests FN only",
    ),
    "triton.rms_norm": Operator(Family.NORM, numerics=_UNROUNDED),
    "triton.rmsnorm_add": Operator(Family.NORM, numerics=_ROUNDED, residual=True),
    "triton.fused_rmsnorm": Operator(Family.NORM, numerics=_UNROUNDED, dtypes=("bfloat16",)),
    "triton.fused_rmsnorm_add": Operator(Family.NORM, numerics=_UNROUNDED, residual=True, dtypes=("bfloat16",)),
    "triton.rmsnorm_pad": Operator(Family.NORM, numerics=_UNROUNDED),
    "triton.add_rmsnorm_pad": Operator(Family.NORM, numerics=_UNROUNDED, residual=True),
    "triton.rmsnorm_dynamicquant": Operator(Family.NORM, _dynamic_norm, _UNROUNDED, untested=_INT8_ONLY),
    "triton.rmsnorm_add_dynamicquant": Operator(
        Family.NORM, _dynamic_norm, _ROUNDED, residual=True, element_output=False, untested=_INT8_ONLY
    ),
    "triton.rms_fp8_group_quant": Operator(Family.NORM, _floored_group(_ROW), _UNROUNDED, dtypes=_HALVES),
    "triton.rms_fp8_group_quant_strided": Operator(Family.NORM, _floored_group(_COLUMN), _UNROUNDED, dtypes=_HALVES),
    "triton.rms_fp8_group_quant_transposed": Operator(Family.NORM, _floored_group(_BYTES), _UNROUNDED, dtypes=_HALVES),
    "triton.add_rms_fp8_group_quant": Operator(
        Family.NORM, _floored_group(_ROW), _UNROUNDED, residual=True, dtypes=_HALVES
    ),
    "triton.rms_mxfp4": Operator(Family.NORM, _mxfp4(_ROW), _UNROUNDED, multiple=2, dtypes=_HALVES, archs=("gfx950",)),
    "triton.rms_mxfp4_shuffled": Operator(
        Family.NORM, _mxfp4(_SWIZZLED), _UNROUNDED, multiple=2, dtypes=_HALVES, archs=("gfx950",)
    ),
    "triton.add_rms_mxfp4": Operator(
        Family.NORM, _mxfp4(_ROW), _UNROUNDED, residual=True, multiple=2, dtypes=_HALVES, archs=("gfx950",)
    ),
    "triton.rms_mxfp8": Operator(
        Family.NORM, _mxfp8(E4M3FN), _UNROUNDED, element_output=False, multiple=32, dtypes=_HALVES
    ),
}


def names(family: Family) -> tuple[str, ...]:
    """Operators of one family, in order."""
    return tuple(name for name, operator in OPERATORS.items() if operator.family is family)


def support(problem: RowProblem, name: str, arch: str) -> Support:
    """Standing of ``name`` at ``problem``: refused where it cannot run, claimed where upstream tests the like."""
    operator = OPERATORS.get(name)
    if operator is None:
        return Support(Standing.REFUSED, f"{name!r} is no Triton operator; choose one of {', '.join(OPERATORS)}")
    if arch not in FP8:
        return Support(Standing.REFUSED, f"no FP8 type is declared for {arch}; choose one of {', '.join(FP8)}")
    if problem.family is not operator.family:
        return Support(Standing.REFUSED, f"{name} is of family {operator.family.value}, not {problem.family.value}")
    if operator.only and arch != operator.only:
        return Support(Standing.REFUSED, f"{name} is for {operator.only}, not {arch}")
    if problem.hidden % operator.multiple:
        return Support(Standing.REFUSED, f"hidden is {problem.hidden}; {name} takes multiples of {operator.multiple}")
    if problem.hidden > BLOCK_LIMIT:
        return Support(Standing.REFUSED, f"hidden is {problem.hidden}; a Triton block holds at most {BLOCK_LIMIT}")
    if operator.untested:
        return Support(Standing.UNCLAIMED, operator.untested)
    if arch not in operator.archs:
        return Support(Standing.UNCLAIMED, f"upstream tests {name} on {' and '.join(operator.archs)} only")
    if problem.dtype not in operator.dtypes:
        return Support(Standing.UNCLAIMED, f"upstream tests {name} with {', '.join(operator.dtypes)} only")
    return Support(Standing.CLAIMED)


def contract(problem: RowProblem, name: str, arch: str) -> QuantContract | NormContract:
    """Declared behaviour.

    ``triton.per_tensor`` raises the scale buffer to amax by an atomic maximum, so a buffer that is not zeroed keeps an
    older, larger scale (quant.py:51); upstream does not say so. The adapter zeroes it, also one that the caller gives.

    Raises:
        ContractError: :func:`support` refuses the problem.
    """
    standing = support(problem, name, arch)
    if standing.standing is Standing.REFUSED:
        raise ContractError(standing.reason)
    operator = OPERATORS[name]
    codec = operator.codec(FP8[arch]) if operator.codec else None
    if operator.family is Family.QUANTISE:
        assert codec is not None
        return QuantContract(codec, takes_out=operator.takes_out, takes_empty=operator.takes_empty)
    numerics = replace(operator.numerics, square_additions=square_additions(problem))
    two_kernels = name == "triton.rms_norm" and problem.hidden <= SMALL_N
    return NormContract(
        numerics=lambda rows: numerics,
        residual=operator.residual,
        codec=codec,
        element_output=operator.element_output,
        boundaries=(LARGE_M,) if two_kernels else (),
    )


def square_additions(problem: RowProblem) -> int:
    """Most float32 additions between one square and the mean square, compiled or interpreted.

    A row, filled up with zeros to a power of two, is one block; rows above 64 KiB are several, which add one each. In a
    block the threads of 1 to 16 waves of 64 add their shares, then come 6 levels over lanes and up to 4 over waves, for
    which the shares are smaller. The interpreter sums with numpy: 8 accumulators over runs of 128 (15 additions, 3 to
    join them), then one level for every doubling.
    """
    padded = 1 << (problem.hidden - 1).bit_length()
    block = min(padded, 65536 // ROW_BYTES[problem.dtype])
    return max(block // 64, 16) + 8 + -(-problem.hidden // block) - 1
