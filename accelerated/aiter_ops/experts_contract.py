"""What AITER declares about its fused experts: which problems run, and what a call promises.

Scope: plain data without torch, restated from AITER e4048607 (FM is aiter/fused_moe.py); kernels and rounding points
are in :mod:`accelerated.aiter_ops.experts_numerics`. What a declaration does not prove: that the hardware keeps it; no
kernel was run to write it.

How cells stand: **claimed** is what upstream tests or serving ships; **unclaimed** is what it compiles but neither
tests nor guards; **refused** is what raises or is known to go wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from accelerated.aiter_ops.experts_numerics import (
    COMPUTE_UNITS,
    OPERATORS,
    Choice,
    Operator,
    masked,
)
from accelerated.contract import ContractError, Standing, Support
from accelerated.experts import ExpertContract, ExpertProblem, Selection
from accelerated.sorting import SortContract
from reference.catalogue import Architecture, CatalogueError, architecture
from reference.expert_numerics import Activation, GateLayout
from reference.formats import FORMATS

#: The sort packs a token into 24 bits and a slot into 8 (csrc/include/moe_sorting_opus.h:273).
_MOST_ROWS, _MOST_SLOTS = 1 << 24, 255
#: Names of the sort (FM:341).
SORTS = ("moe_sorting",)


@lru_cache(maxsize=4096)
def support(problem: ExpertProblem, name: str, arch: str) -> Support:
    """Standing of ``problem`` on one operator.

    Args:
        problem: sizes.
        name: a key of :data:`OPERATORS`.
        arch: gfx architecture of the catalogue.

    Returns:
        REFUSED with the first rule that the problem breaks, UNCLAIMED with what nobody exercises, or CLAIMED.
    """
    try:
        operator, target = _known(name, arch)
    except ContractError as error:
        return Support(Standing.REFUSED, str(error))
    choice = Choice(problem, operator, target.name, FORMATS[target.fp8.dtype])
    reason = next(_refusals(choice), None)
    if reason is not None:
        return Support(Standing.REFUSED, reason)
    reason = next(_unclaimed(choice), None)
    return Support(Standing.UNCLAIMED, reason) if reason is not None else Support(Standing.CLAIMED)


@lru_cache(maxsize=4096)
def contract(problem: ExpertProblem, name: str, arch: str) -> ExpertContract:
    """Declared behaviour for a problem that :func:`support` does not refuse.

    Raises:
        ContractError: unknown operator or architecture.
    """
    operator, target = _known(name, arch)
    choice = Choice(problem, operator, target.name, FORMATS[target.fp8.dtype])
    boundaries = choice.boundaries()
    sizes = {0, 1, problem.capacity, *boundaries, *(count + 1 for count in boundaries)}
    kinds = {choice(rows) for rows in sizes}
    # Atomics add in any order: with two terms there is only one, unless they are made of more.
    steady = problem.top_k + problem.shared <= 2 and all(
        kind.inner_parts == 1 and kind.gemm1_parts <= 2 for kind in kinds
    )
    return ExpertContract(
        numerics=choice,
        boundaries=boundaries,
        gate_layout=GateLayout.SEPARATED,
        selection=Selection.MASK,
        wire=choice(problem.capacity).input_codec if operator.wired else None,
        biased=operator.biased,
        # The sort has one word for a token and an expert (moe_sorting_opus.h:1022): of two slots one is left.
        takes_duplicates=False,
        # It looks ids up in the mask unchecked (moe_sorting_opus.h:953): without a mask nothing can be dropped.
        drops_masked=masked(problem),
        takes_remote=masked(problem),
        takes_num_rows=not operator.stage1,
        # As vLLM 0.33.0 does, the adapter answers a call without rows itself: the quantisers launch an empty grid.
        takes_empty=True,
        deterministic=steady,
        rows_alone=steady,
        # One weight that is not zero: its expert adds ``inner_parts`` terms, and two have one order.
        one_term_bits=all(kind.inner_parts <= 2 and kind.gemm1_parts <= 2 for kind in kinds),
    )


@lru_cache(maxsize=4096)
def sort_support(problem: ExpertProblem, name: str, arch: str) -> Support:
    """Standing of ``problem`` on one of :data:`SORTS`."""
    if name not in SORTS or arch not in COMPUTE_UNITS:
        choices = f"{', '.join(SORTS)} on {' or '.join(COMPUTE_UNITS)}"
        return Support(Standing.REFUSED, f"{name} on {arch}; AITER's contract holds for {choices}")
    reason = next(_unpackable(problem), None)
    if reason is None and problem.dtype == "float32":
        reason = "dtype is float32; the sort clears a buffer for experts that return bfloat16 or float16"
    return Support(Standing.REFUSED, reason) if reason is not None else Support(Standing.CLAIMED)


def sort_contract(problem: ExpertProblem, name: str) -> SortContract:
    """Declared behaviour of a sort: blocks of 32 (FM:61) and a buffer for atomics (FM:216-224).

    Raises:
        ContractError: unknown sort.
    """
    if name not in SORTS:
        raise ContractError(f"unknown sort {name!r}; choose one of {', '.join(SORTS)}")
    return SortContract(block=32, masked=masked(problem))


def _known(name: str, arch: str) -> tuple[Operator, Architecture]:
    if name not in OPERATORS:
        raise ContractError(f"unknown experts operator {name!r}; choose one of {', '.join(OPERATORS)}")
    try:
        return OPERATORS[name], architecture(arch)
    except CatalogueError as error:
        raise ContractError(str(error)) from error


def _refusals(choice: Choice) -> Iterator[str]:
    """Reasons why the library cannot run the problem."""
    sizes, operator, scheme = choice.problem, choice.operator, choice.operator.scheme
    hidden, inner = sizes.hidden, sizes.intermediate
    if choice.arch == "gfx1250":
        yield (
            "AITER turns every activation to FP4 or FP8 on gfx1250 (FM:799-803) and has kernels for interleaved FP4 "
            "weights alone there; use gfx942 or gfx950"
        )
    if choice.arch not in COMPUTE_UNITS:
        yield f"AITER has no fused experts for {choice.arch}; use gfx942 or gfx950"
    if scheme == "mxfp4" and choice.arch != "gfx950":
        yield f"{choice.arch} has no FP4 matrix cores; upstream runs per_1x32 on gfx950 only (test_moe_2stage.py:103)"
    if sizes.dtype == "float32":
        yield "dtype is float32; fused_moe returns bfloat16 or float16 and asserts it (FM:753)"
    if operator.activation is Activation.SWIGLU and sizes.dtype == "float16":
        yield (
            "dtype is float16; CK-Tile has no such kernel, launches nothing and leaves the output zero "
            "(csrc/ck_tile_gemm_moe_2stages/moe_cktile2stages.cu:352)"
        )
    if operator.stage1 and (sizes.top_k != 1 or sizes.shared):
        yield (
            f"{sizes.top_k} + {sizes.shared} columns with the routing weight before the activation; that is for one "
            f"expert per token (vLLM 0.33.0 asserts top_k = 1)"
        )
    yield from _unpackable(sizes)
    if sizes.experts < sizes.shards:
        yield f"{sizes.experts} experts on {sizes.shards} ranks; AITER's weights hold at least one expert"
    yield from _size_refusals(choice, hidden, inner)


def _unpackable(sizes: ExpertProblem) -> Iterator[str]:
    """More rows or slots than an entry of the sort has bits for."""
    if sizes.top_k + sizes.shared >= _MOST_SLOTS or sizes.capacity >= _MOST_ROWS:
        yield (
            f"{sizes.capacity} rows of {sizes.top_k + sizes.shared} slots; the sort packs fewer than {_MOST_ROWS} and "
            f"{_MOST_SLOTS} into one word"
        )


def _size_refusals(choice: Choice, hidden: int, inner: int) -> Iterator[str]:
    """Sizes that no kernel takes: tiles of CK (csrc/ck_gemm_moe_2stages_codegen/gen_instances.py) and the assembly."""
    scheme = choice.operator.scheme
    multiples: dict[str, tuple[int, int]] = {
        # Checkpoints have a scale for each 32; what is missing to a tile is padded.
        "mxfp4": (32, 32),
        # 64 elements of K in one tile, 64 or 128 of N
        "bf16": (64, 64),
        "fp8_token": (128, 64),
        # scales of 128 x 128; the first stage takes 256 elements of K with few rows
        "fp8_block": (256, 128),
    }
    for name, size, multiple in (
        ("hidden", hidden, multiples[scheme][0]),
        ("intermediate", inner, multiples[scheme][1]),
    ):
        if size % multiple:
            yield f"{name} is {size}; the kernels of {scheme} take multiples of {multiple}"
    two_stage_only = not choice.fuses
    if scheme == "fp8_token" and two_stage_only and inner % 128:
        yield f"intermediate is {inner}; without a one-stage kernel the second stage takes multiples of 128"
    if scheme == "fp8_token" and choice.fuses and not choice.tiles:
        yield (
            f"intermediate is {inner}, a multiple of none of the one-stage kernels' tiles: 'No suitable kernel found' "
            f"(csrc/py_itfs_cu/asm_fmoe.cu:295)"
        )


def _unclaimed(choice: Choice) -> Iterator[str]:
    """What upstream compiles without a test or a guard."""
    sizes, scheme = choice.problem, choice.operator.scheme
    if sizes.dtype == "float16":
        yield "dtype is float16; upstream's tests default to bfloat16, and atomics in float16 overflow at 65504"
    if scheme == "bf16" and (sizes.hidden % 128 or sizes.intermediate % 128):
        yield f"{sizes.hidden} x {sizes.intermediate}; upstream tests multiples of 128"
    if scheme == "fp8_token" and (sizes.hidden % 256 or sizes.intermediate % 128):
        yield f"{sizes.hidden} x {sizes.intermediate}; upstream tests hidden in multiples of 256, intermediate of 128"
    if scheme == "mxfp4" and choice.operator.activation is not Activation.SWIGLU:
        if choice.padded != (sizes.hidden, sizes.intermediate):
            yield (
                f"{sizes.hidden} x {sizes.intermediate}, padded to {choice.padded[0]} x {choice.padded[1]}; upstream "
                "tests FP4 rows without padding (op_tests/test_moe_2stage.py:1147)"
            )
        if choice.padded[1] % 256:
            yield f"intermediate is {choice.padded[1]}; without FlyDSL, CK takes multiples of 256 only"
    if choice.operator.activation is Activation.SWIGLU and masked(sizes):
        yield "biases under a mask: upstream tests gpt-oss on one rank, and took biases by global id before 88b2eca607"
