"""What AITER's Triton expert kernels promise, operator by operator, without torch.

Scope: standing and numerics of whole experts calls (W1, activation, W2, weighted sum) composed of AITER's Triton
kernels the way its own tests and callers compose them, on gfx942 (E4M3 FNUZ) and gfx950 (E4M3 FN). Two forms: sorted
(``moe_align_block_size_triton`` before a kernel that reads an expert per block of rows) and ragged (routing data
before a grouped GEMM that gathers and scatters). Sources: ROCm/aiter e4048607, aiter/ops/triton/moe/ and its kernels
in aiter/ops/triton/_triton_kernels/moe/; claims follow op_tests/triton_tests/moe/. What a right declaration does not
prove: that the kernels keep it. Where a kernel is plainly wrong (rows next to those of a masked pair, zeroed) the
declaration says what is right, so that the suite finds it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerated.aiter_ops import triton_contract
from accelerated.contract import ContractError, Standing, Support
from accelerated.experts import ExpertContract, ExpertProblem
from reference.codecs import Codec, Granularity, PayloadRule, ScaleFormat, ScaleRule
from reference.expert_numerics import SWIGLU_LIMIT, Activation, ExpertNumerics, GateLayout, SlotSum
from reference.formats import BFLOAT16, E2M1, E4M3FN, FLOAT16, Format

#: Row counts below which moe_config_utils.py:13-14 takes the small and the medium tile sizes.
SMALL_M, MEDIUM_M = 256, 1024
#: Most (token, slot) pairs of fused_routing_from_topk (fusions/fused_routing_from_topk.py).
RAGGED_PAIRS = 4096
#: Columns of I of one program of e2e_moe at the tile sizes of upstream's test (BLOCK_SIZE_N = 128, half of it gates).
E2E_COLUMNS = 64

_ELEMENTS: dict[str, Format] = {"bfloat16": BFLOAT16, "float16": FLOAT16}
_HALVES = ("bfloat16", "float16")


class Form(enum.Enum):
    """How the rows of an expert are found."""

    SORTED = "pairs sorted by expert and padded to blocks"
    RAGGED = "routing data: histogram, offsets, gather and scatter"


@dataclass(frozen=True)
class Operator:
    """One experts operator.

    Attributes:
        form: how rows are found.
        input_codec: quantiser of the rows, for an FP8 type, or None.
        intermediate_codec: quantiser of the activation's result, or None.
        weight_codec: how W1 and W2 are stored, or None.
        gemm1_store: ``W1 x`` is stored in the element type.
        intermediate_store: the activation's result is stored in the element type (before a quantiser, if any).
        swiglu: gpt-oss' activation, with biases.
        interleaved: gate and up lie side by side.
        multiple: H and I have to be a multiple of this.
        most_intermediate: the largest I, or 0; with the reason.
        row_scales: scales are of a row or less, so that rows do not know of each other.
        wire: rows come quantised from a dispatch.
        local_only: why no expert may be elsewhere and no id masked, or empty.
        takes_empty: a call with no rows is legal.
        dtypes: element types of upstream's tests.
        only: the single architecture, or empty.
        untested: why upstream claims nothing, or empty.
    """

    form: Form
    input_codec: Callable[[Format], Codec] | None = None
    intermediate_codec: Callable[[Format], Codec] | None = None
    weight_codec: Callable[[Format], Codec] | None = None
    gemm1_store: bool = True
    intermediate_store: bool = True
    swiglu: bool = False
    interleaved: bool = False
    multiple: int = 1
    most_intermediate: int = 0
    row_scales: bool = True
    wire: bool = False
    local_only: str = ""
    takes_empty: bool = True
    dtypes: tuple[str, ...] = _HALVES
    only: str = ""
    untested: str = ""


def _of(name: str) -> Callable[[Format], Codec]:
    """Codec of one of the library's own quantisers or fused norms."""
    found = triton_contract.OPERATORS[name].codec
    assert found is not None
    return found


def _weights(granularity: Granularity, group: int = 0, block_rows: int = 0) -> Callable[[Format], Codec]:
    return lambda fp8: Codec(fp8, granularity, fp8.max, group=group, block_rows=block_rows)


def _mx_weights(payload: Format) -> Callable[[Format], Codec]:
    return lambda _: _mx_up(payload)


def _mx_up(payload: Format) -> Codec:
    # quant_moe.py (kernels):96-115: amax / max in float32, up to a power of two; x times its reciprocal.
    return Codec(
        payload,
        Granularity.GROUP,
        payload.max,
        ScaleRule.UP,
        group=32,
        scale_format=ScaleFormat.E8M0,
        payload_rule=PayloadRule.RECIPROCAL,
    )


# activation.py:283-301 (kernels) hands float32 to the quantiser of fused_fp8_quant.py:24-39, which has floors.
_FLOORED = _of("triton.rms_fp8_group_quant")


def _rows_floored(fp8: Format) -> Codec:
    # The same quantiser takes rows in bfloat16, in which its floor of 1e-10 is rounded.
    return replace(_FLOORED(fp8), amax_floor=1.71875 * 2.0**-34)


_BLOCKS = _weights(Granularity.BLOCK, 128, 128)
_MXFP8, _MXFP4 = _mx_weights(E4M3FN), _mx_weights(E2M1)
_FP8_UNTESTED = "upstream's test leaves FP8 out, noting that it is inaccurate (test_moe.py)"
_BLOCK_UNTESTED = "upstream has no test of block scales"
_CDNA4 = "gfx950"

OPERATORS: dict[str, Operator] = {
    # moe_op.py:751-768 (kernels): a float32 accumulator, times the routing weight, stored in compute_type; the
    # activation is utils/moe_common.py, the sum over slots the caller's.
    "triton.fused_moe.bf16": Operator(Form.SORTED),
    "triton.fused_moe.fp8_tensor": Operator(
        Form.SORTED,
        _of("triton.per_tensor"),
        _of("triton.per_tensor"),
        _weights(Granularity.TENSOR),
        row_scales=False,
        local_only="its scale is of all rows of the buffer, whether or not an expert here takes them",
        untested=_FP8_UNTESTED,
    ),
    "triton.fused_moe.fp8_block": Operator(
        Form.SORTED,
        _rows_floored,
        _FLOORED,
        _BLOCKS,
        intermediate_store=False,
        multiple=128,
        wire=True,
        untested=_BLOCK_UNTESTED,
    ),
    # moe_op_silu_fused.py:809-827 (kernels) rounds W1 x to compute_type before the activation, as if it were stored.
    "triton.silu_fused.bf16": Operator(Form.SORTED),
    # moe_op_e2e.py:267-274 (kernels): the activation sees float32; there is no test of expert -1.
    "triton.e2e.bf16": Operator(
        Form.SORTED,
        gemm1_store=False,
        most_intermediate=E2E_COLUMNS,
        local_only="it reads W1 at any number that a block has for its expert, -1 too",
        dtypes=("bfloat16",),
    ),
    "triton.fused_moe.mxfp4": Operator(
        Form.SORTED,
        _of("triton.per_1x32_fp4"),
        _of("triton.per_1x32_fp4"),
        _MXFP4,
        intermediate_store=False,
        multiple=32,
        dtypes=("bfloat16",),
        only=_CDNA4,
    ),
    "triton.fused_moe.mxfp4_bf16": Operator(
        Form.SORTED,
        weight_codec=_MXFP4,
        multiple=32,
        only=_CDNA4,
        untested="upstream tests MXFP4 activations only (test_moe_mx.py)",
    ),
    # _swiglu on adjacent columns of the float32 accumulator (activations.py, kernels), then a store in bfloat16.
    "triton.gemm_a8w8.mx": Operator(
        Form.RAGGED, _MXFP8, _MXFP8, _MXFP8, gemm1_store=False, interleaved=True, multiple=32, only=_CDNA4
    ),
    "triton.gemm_a8w8.block": Operator(
        Form.RAGGED,
        _rows_floored,
        _FLOORED,
        _BLOCKS,
        intermediate_store=False,
        multiple=128,
        wire=True,
        dtypes=("bfloat16",),
    ),
    "triton.gemm_a8w4": Operator(
        Form.RAGGED, _MXFP8, _MXFP8, _MXFP4, gemm1_store=False, interleaved=True, multiple=32, only=_CDNA4
    ),
    "triton.gemm_a8w4.swiglu": Operator(
        Form.RAGGED, _MXFP8, _MXFP8, _MXFP4, gemm1_store=False, swiglu=True, interleaved=True, multiple=32, only=_CDNA4
    ),
    "triton.gemm_a4w4": Operator(
        Form.RAGGED,
        _of("triton.per_1x32_fp4"),
        _of("triton.per_1x32_fp4"),
        _MXFP4,
        gemm1_store=False,
        interleaved=True,
        multiple=32,
        only=_CDNA4,
    ),
    "triton.gemm_a4w4.swiglu": Operator(
        Form.RAGGED,
        _of("triton.per_1x32_fp4"),
        _of("triton.per_1x32_fp4"),
        _MXFP4,
        gemm1_store=False,
        swiglu=True,
        interleaved=True,
        multiple=32,
        only=_CDNA4,
    ),
    "triton.gemm_a16w4.swiglu": Operator(
        Form.RAGGED,
        weight_codec=_MXFP4,
        gemm1_store=False,
        swiglu=True,
        interleaved=True,
        multiple=32,
        dtypes=("bfloat16",),
        only=_CDNA4,
    ),
}


def names() -> tuple[str, ...]:
    """Operators, in order."""
    return tuple(OPERATORS)


def support(problem: ExpertProblem, name: str, arch: str) -> Support:
    """Standing of ``name`` at ``problem``: refused where it cannot run, claimed where upstream tests the like."""
    operator = OPERATORS.get(name)
    if operator is None:
        return Support(
            Standing.REFUSED, f"{name!r} is no Triton experts operator; choose one of {', '.join(OPERATORS)}"
        )
    if arch not in triton_contract.FP8:
        known = ", ".join(triton_contract.FP8)
        return Support(Standing.REFUSED, f"no FP8 type is declared for {arch}; choose one of {known}")
    reason = _refusal(problem, operator, name, arch)
    if reason:
        return Support(Standing.REFUSED, reason)
    if operator.untested:
        return Support(Standing.UNCLAIMED, operator.untested)
    if problem.dtype not in operator.dtypes:
        return Support(Standing.UNCLAIMED, f"upstream tests {name} with {', '.join(operator.dtypes)} only")
    return Support(Standing.CLAIMED)


def _refusal(problem: ExpertProblem, operator: Operator, name: str, arch: str) -> str:
    """Why the operator cannot run, or empty."""
    if operator.only and arch != operator.only:
        return f"{name} is for {operator.only}, not {arch}"
    narrow = operator.form is Form.RAGGED or operator.wire
    if problem.dtype != "bfloat16" and (narrow or problem.dtype not in _ELEMENTS):
        return f"dtype is {problem.dtype}; {name} takes bfloat16" + ("" if narrow else " or float16")
    for what, size in (("hidden", problem.hidden), ("intermediate", problem.intermediate)):
        if size % operator.multiple:
            return f"{what} is {size}; {name} takes multiples of {operator.multiple}"
    if operator.most_intermediate and problem.intermediate > operator.most_intermediate:
        return (
            f"intermediate is {problem.intermediate}; {name} rounds every {operator.most_intermediate} columns of it "
            f"to the element type apart, which no field of the numerics says"
        )
    if operator.local_only and problem.shards > 1:
        return f"shards is {problem.shards}; {name} has to hold every expert: {operator.local_only}"
    pairs = problem.capacity * problem.top_k
    if problem.shared:
        return f"{problem.shared} fused shared experts; the Triton kernels are given routed ones only"
    if operator.form is Form.RAGGED and pairs > RAGGED_PAIRS:
        return f"capacity times top_k is {pairs}; routing data are made of at most {RAGGED_PAIRS} pairs"
    return ""


def contract(problem: ExpertProblem, name: str, arch: str) -> ExpertContract:
    """Declared behaviour.

    ``moe_align_block_size_triton`` counts -1 in the histogram of the expert before the first
    (moe_align_block_size.py:60-62, kernels), so the adapter gives such pairs a number of their own behind the experts,
    and where the kernels are told an expert they get -1 for it, upon which they write zeros.

    Raises:
        ContractError: :func:`support` refuses the problem.
    """
    standing = support(problem, name, arch)
    if standing.standing is Standing.REFUSED:
        raise ContractError(standing.reason)
    operator = OPERATORS[name]
    found = _numerics(operator, problem, triton_contract.FP8[arch])
    sorts = operator.form is Form.SORTED and name != "triton.e2e.bf16"
    return ExpertContract(
        numerics=lambda rows: found,
        boundaries=(SMALL_M - 1, MEDIUM_M - 1) if sorts else (),
        gate_layout=GateLayout.INTERLEAVED if operator.interleaved else GateLayout.SEPARATED,
        wire=found.input_codec if operator.wire else None,
        biased=operator.swiglu,
        drops_masked=not operator.local_only,
        takes_num_rows=not operator.local_only,
        takes_empty=operator.takes_empty,
        rows_alone=operator.row_scales,
    )


def _numerics(operator: Operator, problem: ExpertProblem, fp8: Format) -> ExpertNumerics:
    element = _ELEMENTS[problem.dtype]

    def codec(of: Callable[[Format], Codec] | None) -> Codec | None:
        return of(fp8) if of else None

    # Blocks of 128 columns are scaled apart, each by two scales: product, scales, and an addition per block.
    blocks = -(-max(problem.hidden, problem.intermediate) // 128)
    return ExpertNumerics(
        activation=Activation.SWIGLU if operator.swiglu else Activation.SILU,
        limit=SWIGLU_LIMIT if operator.swiglu else None,
        input_codec=codec(operator.input_codec),
        weight_codec=codec(operator.weight_codec),
        gemm1_store=element if operator.gemm1_store else None,
        intermediate_store=element if operator.intermediate_store else None,
        intermediate_codec=codec(operator.intermediate_codec),
        slot_sum=SlotSum.ROUNDED_TERMS,
        scale_roundings=4 + blocks,
    )
