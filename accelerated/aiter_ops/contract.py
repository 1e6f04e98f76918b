"""What AITER declares about its quantisers and norms: which problems run, and what their calls promise.

Scope: plain data without torch, restated from AITER e4048607 (file and line with each rule); the numerics are in
:mod:`accelerated.aiter_ops.numerics`. What a declaration does not prove: that the hardware keeps it; none of the HIP
kernels was run to write it.

How cells stand: **claimed** is what upstream tests, documents or ships in serving; **unclaimed** is what it compiles
but neither tests nor guards; **refused** is what raises or is known to write out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from accelerated.aiter_ops import numerics
from accelerated.contract import ContractError, Standing, Support
from accelerated.operators import ROW_BYTES, Family, NormContract, QuantContract, RowProblem
from reference.catalogue import Architecture, CatalogueError, architecture
from reference.formats import E2M1, FORMATS
from reference.norm_numerics import NormNumerics

#: Operators by family; those of ALLREDUCE_NORM are in :mod:`accelerated.aiter_ops.allreduce_contract`.
QUANTISERS: tuple[str, ...] = tuple(numerics.QUANTISERS)
NORMS: tuple[str, ...] = tuple(numerics.NORMS)

#: Hidden sizes whose norm kernel holds 24 elements per thread, which divides no group
#: (rmsnorm_quant_kernels.cu, ADD_RMSNORM_QUANT_KERNEL_DISPATCH).
_THREADS_OF_24 = range(4097, 6145)
#: Elements beyond which ``blockIdx.x * cols`` wraps in 32 bits (quant_kernels.cu:191, 282, 412).
_WRAPPING_ELEMENTS = 1 << 32
#: Most rows of which the opus launcher packs as many into a block as fit 1,024 threads (rmsnorm.h, pick_dims).
_OPUS_FEW_ROWS = 255


@dataclass(frozen=True)
class Always:
    """Numerics that do not depend on the number of rows."""

    numerics: NormNumerics

    def __call__(self, rows: int) -> NormNumerics:
        """The same for every call."""
        return self.numerics


@lru_cache(maxsize=4096)
def support(problem: RowProblem, operator: str, arch: str) -> Support:
    """Standing of ``problem`` on one quantiser or norm.

    Args:
        problem: sizes; its family is QUANTISE or NORM.
        operator: a name of :data:`QUANTISERS` or :data:`NORMS`.
        arch: gfx architecture of the catalogue.

    Returns:
        REFUSED with the first rule that the problem breaks, UNCLAIMED with what nobody exercises, or CLAIMED.
    """
    try:
        target = architecture(arch)
        _check_name(problem.family, operator)
    except (CatalogueError, ContractError) as error:
        return Support(Standing.REFUSED, str(error))
    refusals = _quantiser_refusals if problem.family is Family.QUANTISE else _norm_refusals
    reason = next(refusals(problem, operator, target), None)
    if reason is not None:
        return Support(Standing.REFUSED, reason)
    reason = next(_unclaimed(problem, operator, target), None)
    if reason is not None:
        return Support(Standing.UNCLAIMED, reason)
    return Support(Standing.CLAIMED)


@lru_cache(maxsize=4096)
def contract(problem: RowProblem, operator: str, arch: str) -> QuantContract | NormContract:
    """Declared behaviour for a problem that :func:`support` does not refuse.

    Raises:
        ContractError: unknown operator or architecture.
    """
    try:
        target = architecture(arch)
    except CatalogueError as error:
        raise ContractError(str(error)) from error
    _check_name(problem.family, operator)
    fp8 = FORMATS[target.fp8.dtype]
    if problem.family is Family.QUANTISE:
        quantiser = numerics.QUANTISERS[operator]
        return QuantContract(
            codec=quantiser.codec(fp8, problem.hidden),
            takes_num_rows=quantiser.takes_num_rows,
            takes_out=quantiser.takes_out,
            takes_empty=quantiser.takes_empty,
        )
    norm = numerics.NORMS[operator]
    opus = norm.takes_opus(problem)
    return NormContract(
        numerics=Always(norm.numerics(problem, target)),
        residual=norm.residual,
        codec=norm.codec(problem, fp8),
        element_output=not norm.quantised,
        in_place=norm.in_place,
        boundaries=(_OPUS_FEW_ROWS,) if opus and problem.capacity > _OPUS_FEW_ROWS else (),
        # The opus entries return early; the others launch an empty grid, which HIP calls an invalid configuration.
        takes_empty=opus,
    )


def _check_name(family: Family, operator: str) -> None:
    """Raise ContractError unless the family is one of ours and has the operator."""
    if family is Family.ALLREDUCE_NORM:
        raise ContractError(f"{family.value} is declared in accelerated.aiter_ops.allreduce_contract")
    choices = QUANTISERS if family is Family.QUANTISE else NORMS
    if operator not in choices:
        raise ContractError(f"unknown {family.value} operator {operator!r}; choose one of {', '.join(choices)}")


def _quantiser_refusals(problem: RowProblem, operator: str, arch: Architecture) -> Iterator[str]:
    """Reasons why the library cannot quantise the problem."""
    codec = numerics.QUANTISERS[operator].codec(FORMATS[arch.fp8.dtype], problem.hidden)
    hip = operator.startswith("hip.")
    if hip and ROW_BYTES[problem.dtype] != 2:
        yield f"dtype is {problem.dtype}; the quantising kernels have no such rows; give bfloat16 or float16"
    if hip and codec.payload is E2M1 and arch.name == "gfx942":
        yield ("dynamic_per_group_scaled_quant is built without fp4x2 on gfx942 (aiter/jit/core.py:938)")
    if codec.group and problem.hidden % codec.group:
        yield (
            f"hidden is {problem.hidden}; {operator} cuts rows into groups of {codec.group}, which must divide it: "
            "per_group_quant_hip and per_1x32_f4_quant would let groups cross rows, the others raise"
        )


def _norm_refusals(problem: RowProblem, operator: str, arch: Architecture) -> Iterator[str]:
    """Reasons why the library cannot normalise the problem."""
    norm = numerics.NORMS[operator]
    if not norm.group:
        return
    if ROW_BYTES[problem.dtype] != 2:
        yield f"dtype is {problem.dtype}; the quantising kernels have no such rows; give bfloat16 or float16"
    if problem.hidden > numerics.HIP_NORM_COLUMNS:
        yield (
            f"hidden is {problem.hidden}; norms with grouped scales end at {numerics.HIP_NORM_COLUMNS} "
            "(aiter/ops/rmsnorm.py:531)"
        )
    if problem.hidden in _THREADS_OF_24:
        yield (
            f"hidden is {problem.hidden}; from 4097 to 6144 a thread holds 24 elements and the library raises "
            f"' group_size not support: {norm.group}'"
        )
    if problem.hidden % norm.group:
        yield f"hidden is {problem.hidden}; the kernel writes scales out of bounds unless {norm.group} divides it"


def _unclaimed(problem: RowProblem, operator: str, arch: Architecture) -> Iterator[str]:
    """What upstream compiles without a test or a guard."""
    if operator == "torch.per_tensor":
        yield "per_tensor_quant divides 0 by 0 on an all-zero tensor; upstream tests it on random data only"
    if operator.startswith("torch."):
        return
    if problem.hidden % 8:
        opus = problem.family is Family.NORM and numerics.NORMS[operator].takes_opus(problem)
        words = (
            "" if opus else "the kernels move whole 4-byte words, so that a row's end may meet the next one's start; "
        )
        yield f"hidden is {problem.hidden}; {words}upstream tests multiples of 128"
    if operator.startswith("hip.per_t") and problem.hidden * problem.capacity > _WRAPPING_ELEMENTS:
        yield f"{problem.capacity} rows of {problem.hidden} exceed 2**32 elements, where the kernel's row offset wraps"
    if arch.wave_size == 32:
        yield f"AITER compiles for {arch.name}, but documents neither support nor a test of this operator there"
