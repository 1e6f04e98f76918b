"""What AITER declares about AllReduce + residual add + RMSNorm: which problems run, and the numerics of each path.

Scope: plain data without torch, restated from AITER e4048607; the path of a call follows from
:mod:`reference.eligibility`. CAR is csrc/include/custom_all_reduce.cuh, CC is
aiter/dist/device_communicators/communicator_cuda.py, CA is custom_all_reduce.py beside it. What a declaration does not
prove: that the hardware keeps it; none of the kernels was run to write it.

How cells stand: **claimed** is what upstream tests or serves (bfloat16 and float16 on 2, 4 and 8 ranks); **unclaimed**
is what runs without a test, or what a reading of the kernel makes doubtful; **refused** is what raises, has no kernel
of the operator's name, or goes to RCCL, whose order of additions and roundings nobody declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from accelerated.aiter_ops import contract as local
from accelerated.contract import ContractError, Standing, Support
from accelerated.operators import ROW_BYTES, Family, NormContract, RowProblem
from reference import eligibility
from reference.catalogue import Architecture, CatalogueError, architecture
from reference.codecs import Codec, Granularity, ScaleFormat, ScaleLayout, ScaleRule, ZeroScale
from reference.eligibility_rules import PLAIN, Path
from reference.formats import E2M1, FORMATS, Format, Ties
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, SumOrder, WeightProduct

#: Ranks for which AITER has a custom all-reduce, and those for which it has the fused kernels (CA:716, CC:245).
WORLD_SIZES = (2, 4, 6, 8)
FUSED_WORLD_SIZES = (2, 4, 8)
#: Columns per scale that the adapter asks for.
GROUP = 128
#: Threads that the block reduction counts as one warp, on every architecture (CAR:1598).
_REDUCTION_WARP = 32
#: Fewest threads of a row, and levels of the tree over the most of them (1,024).
_LEAST_THREADS, _MOST_LEVELS = 64, 10

_SUM_ORDER = {
    Path.PLAIN_ONE_STAGE: SumOrder.RANK,  # CAR:470
    Path.PLAIN_WRITE: SumOrder.RANK,  # CAR:613: the slots of the buffer are in rank order
    Path.PLAIN_TWO_STAGE: SumOrder.ROTATED,  # CAR:535: from the owner of the element on
    Path.PLAIN_FROM_SELF: SumOrder.ROTATED,  # custom_all_reduce_gfx1250.cuh:375: from oneself on
}


@dataclass(frozen=True)
class Operator:
    """One way to call the library.

    Attributes:
        kind: its table in :data:`reference.eligibility_rules.TABLES`.
        quantiser: "per_token", "per_group", "mxfp4", or "" for none.
        gemma: ``gemma_norm=True``.
        residual: the caller gives one. AITER has no form without; the adapter passes zeros.
        emit: ``emit_bf16=True``: the output in the element type comes back, too.
        transposed: ``transpose_scale=True``.
    """

    kind: str
    quantiser: str = ""
    gemma: bool = False
    residual: bool = True
    emit: bool = False
    transposed: bool = False


_OPERATORS = {
    "fused": Operator("norm"),
    "fused_gemma": Operator("norm", gemma=True),
    "fused_no_residual": Operator("norm", residual=False),
    "split": Operator("all_reduce"),
    "fused_per_token": Operator("per_token", "per_token"),
    "fused_per_token_emit": Operator("per_token", "per_token", emit=True),
    "fused_per_group": Operator("per_group", "per_group"),
    "fused_per_group_emit": Operator("per_group", "per_group", emit=True),
    "fused_per_group_transposed": Operator("per_group", "per_group", transposed=True),
    "fused_mxfp4": Operator("mxfp4", "mxfp4"),
    "fused_mxfp4_emit": Operator("mxfp4_emit", "mxfp4", emit=True),
}
#: Operators of the family ALLREDUCE_NORM.
OPERATORS: tuple[str, ...] = tuple(_OPERATORS)


def operator_of(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        ContractError: there is none.
    """
    if name not in _OPERATORS:
        raise ContractError(f"unknown allreduce_norm operator {name!r}; choose {', '.join(OPERATORS)}")
    return _OPERATORS[name]


@lru_cache(maxsize=4096)
def support(problem: RowProblem, operator: str, arch: str) -> Support:
    """Standing of ``problem`` on one operator: REFUSED with the first rule broken, UNCLAIMED, or CLAIMED."""
    try:
        target, chosen = architecture(arch), operator_of(operator)
    except (CatalogueError, ContractError) as error:
        return Support(Standing.REFUSED, str(error))
    reason = next(_refusals(problem, chosen, target), None)
    if reason is not None:
        return Support(Standing.REFUSED, reason)
    reason = next(_unclaimed(problem, chosen, target), None)
    if reason is not None:
        return Support(Standing.UNCLAIMED, reason)
    return Support(Standing.CLAIMED)


@lru_cache(maxsize=4096)
def contract(problem: RowProblem, operator: str, arch: str) -> NormContract:
    """Declared behaviour for a problem that :func:`support` does not refuse.

    Raises:
        ContractError: unknown operator or architecture, or a problem that is refused.
    """
    standing = support(problem, operator, arch)
    if standing.standing is Standing.REFUSED:
        raise ContractError(f"{operator} does not run this problem: {standing.reason}")
    chosen, at = operator_of(operator), At(problem, operator, arch)
    return NormContract(
        numerics=Numerics(at),
        residual=chosen.residual,
        codec=at.codec(1) if chosen.quantiser else None,
        codecs=Codecs(at) if chosen.quantiser else None,
        element_output=not chosen.quantiser or chosen.emit,
        # On gfx1250 a rank starts its sum with its own row; two terms have one sum.
        ranks_identical=arch != "gfx1250" or problem.world_size == 2,
        boundaries=eligibility.boundaries(problem, chosen.kind, arch),
        takes_empty=False,  # no rows are 0 bytes, which no custom all-reduce takes (CA:1140)
    )


@dataclass(frozen=True)
class At:
    """One operator at one problem on one architecture."""

    problem: RowProblem
    operator: str
    arch: str

    def route(self, rows: int) -> eligibility.Route:
        """What a call with ``rows`` rows takes."""
        return eligibility.path(self.problem, rows, operator_of(self.operator).kind, self.arch)

    def numerics(self, rows: int) -> NormNumerics:
        """Rounding points of a call with ``rows`` rows.

        All fused kernels sum in rank order and round the sum to the element type (CAR:1285-1328 and 2009). Stores go
        through opus, which truncates to bfloat16 on gfx942 (opus.hpp:1219); ``vec += res`` does not (CAR:2838).

        Raises:
            ContractError: nothing is declared for the path.
        """
        operator, route = operator_of(self.operator), self.route(rows)
        if route.path in PLAIN:
            return self._plain(route.path, operator.gemma)
        truncates = self.arch == "gfx942" and self.problem.dtype == "bfloat16"
        own_quantiser = bool(operator.quantiser) and not route.separate_quantiser
        numerics = NormNumerics(
            gemma=operator.gemma,
            quantised_from=QuantisedFrom.FLOAT32 if own_quantiser else QuantisedFrom.ROUNDED,
            store=Ties.TRUNCATE if truncates else Ties.EVEN,
            may_flush=True,
            square_additions=self._square_additions(),
        )
        if own_quantiser and (route.path is not Path.ONE_STAGE or operator.quantiser == "mxfp4"):
            numerics = replace(numerics, norm_input=NormInput.ROUNDED)  # CAR:2247, 2843 and 3091
            if route.path is not Path.ONE_STAGE and truncates:
                numerics = replace(numerics, residual_store=Ties.EVEN)
        elif route.path is Path.SPLIT:
            numerics = replace(numerics, product=WeightProduct.WEIGHT_FIRST)  # CAR:1434, x * w * denom
        return numerics

    def codec(self, rows: int) -> Codec:
        """Quantiser of a call with ``rows`` rows: the kernel's epilogue, or the one that the fallback calls."""
        operator = operator_of(self.operator)
        fp8 = FORMATS[architecture(self.arch).fp8.dtype]
        own = not self.route(rows).separate_quantiser
        if operator.quantiser == "per_token":
            return _epilogue(fp8, 0) if own else self._local("hip.per_token")
        if operator.quantiser == "per_group":
            codec = _epilogue(fp8, GROUP) if own else self._local("hip.per_1x128")
            # The fallback copies its scales into a tensor of the same strides (CC:550-555).
            return replace(codec, scale_layout=ScaleLayout.COLUMN_MAJOR) if operator.transposed else codec
        # Fused: ties away from zero and rows of scales (CAR:1680, 1768). Fallback: Triton's, to even and columns.
        ties, layout = (Ties.AWAY, ScaleLayout.ROW_MAJOR) if own else (Ties.EVEN, ScaleLayout.COLUMN_MAJOR)
        return Codec(
            E2M1,
            Granularity.GROUP,
            E2M1.max,
            ScaleRule.EVEN,
            group=32,
            scale_format=ScaleFormat.E8M0,
            ties=ties,
            may_flush=own,
            scale_layout=layout,
        )

    def _square_additions(self) -> int:
        """Additions of a square in any of the fused kernels: those of its 16 bytes, of its thread, of the tree.

        A row has 64 to 1,024 threads, each with 16 bytes of it at a time (CAR:1409-1416, 1575, 1603-1640).
        """
        pack = 16 // ROW_BYTES[self.problem.dtype]
        return pack + max(1, -(-self.problem.hidden // pack // _LEAST_THREADS)) + _MOST_LEVELS

    def _plain(self, path: Path, gemma: bool) -> NormNumerics:
        if path not in _SUM_ORDER:
            raise ContractError(f"{self.operator} on {self.problem}: no numerics are declared for {path.value}")
        sizes = replace(self.problem, family=Family.NORM, world_size=1)
        norm = local.contract(sizes, "rmsnorm_add_gemma" if gemma else "rmsnorm_add", self.arch)
        assert isinstance(norm, NormContract)
        return replace(norm.numerics(1), sum_order=_SUM_ORDER[path], quantised_from=QuantisedFrom.ROUNDED)

    def _local(self, quantiser: str) -> Codec:
        sizes = replace(self.problem, family=Family.QUANTISE, world_size=1)
        declared = local.contract(sizes, quantiser, self.arch)
        assert declared.codec is not None
        return declared.codec


@dataclass(frozen=True)
class Numerics:
    """``NormContract.numerics`` of an operator at a problem."""

    at: At

    def __call__(self, rows: int) -> NormNumerics:
        """See :meth:`At.numerics`."""
        return self.at.numerics(rows)


@dataclass(frozen=True)
class Codecs:
    """``NormContract.codecs`` of an operator at a problem."""

    at: At

    def __call__(self, rows: int) -> Codec:
        """See :meth:`At.codec`."""
        return self.at.codec(rows)


def _epilogue(fp8: Format, group: int) -> Codec:
    """FP8 epilogue of the fused kernels: correctly rounded divisions, scale 1 for zeros (CAR:1840 and 1923, 1129)."""
    return Codec(
        fp8,
        Granularity.GROUP if group else Granularity.TOKEN,
        fp8.max,
        group=group,
        zero_scale=ZeroScale.ONE,
        may_flush=True,
    )


def _segments(problem: RowProblem, operator: Operator, arch: str) -> Iterator[tuple[int, eligibility.Route]]:
    """First row count of every path up to the capacity, and the path."""
    firsts = [1, *(m + 1 for m in eligibility.boundaries(problem, operator.kind, arch))]
    return ((m, eligibility.path(problem, m, operator.kind, arch)) for m in firsts)


def _refusals(problem: RowProblem, operator: Operator, arch: Architecture) -> Iterator[str]:
    """Reasons why the library cannot run the problem, most general first."""
    if problem.family is not Family.ALLREDUCE_NORM:
        yield f"family is {problem.family.value}; this operator is of {Family.ALLREDUCE_NORM.value}"
    ranks, pack = problem.world_size, 16 // ROW_BYTES[problem.dtype]
    if ranks not in WORLD_SIZES:
        yield (
            f"world_size is {ranks}; AITER disables its custom all-reduce unless it is one of "
            f"{', '.join(map(str, WORLD_SIZES))} (custom_all_reduce.py:716, 816)"
        )
    if arch.name == "gfx1250":
        if ranks > 4:
            yield f"world_size is {ranks}; on gfx1250 there are four at most (custom_all_reduce.py:828)"
        if operator.kind != "all_reduce":
            yield "gfx1250's all-reduce module has no fused operator; the call would run another class's kernels"
    if operator.kind != "all_reduce" and ranks not in FUSED_WORLD_SIZES:
        yield (
            f"world_size is {ranks}; AITER has no fused kernel for it and falls back to separate ones, or throws "
            "for FP8 per token (communicator_cuda.py); use split"
        )
    if problem.hidden % pack:
        yield (
            f"hidden is {problem.hidden}; the kernels move 16 bytes at a time, which is a multiple of {pack} elements "
            "(custom_all_reduce.cuh:4107)"
        )
    if operator.quantiser and ROW_BYTES[problem.dtype] != 2:
        routes = [route for _, route in _segments(problem, operator, arch.name)]
        # The per-token kernel is compiled for float32, the quantiser that its fallback calls is not.
        if operator.quantiser != "per_token" or any(route.separate_quantiser for route in routes):
            yield f"dtype is {problem.dtype}; the quantising kernels have no such rows; give bfloat16 or float16"
    if operator.quantiser == "per_group" and problem.hidden % GROUP:
        yield f"hidden is {problem.hidden}; rows are cut into groups of {GROUP}, in the fallback, too"
    for first, route in _segments(problem, operator, arch.name):
        if route.path is Path.THROWS:
            yield _throws(problem, first, pack)
        if route.path is Path.RCCL:
            yield (
                f"capacity is {problem.capacity}; from {first} rows on the input exceeds 64 MiB and goes to RCCL "
                "(custom_all_reduce.py:1148), whose additions are declared nowhere; "
                f"give a capacity of at most {first - 1}"
            )


def _throws(problem: RowProblem, first: int, pack: int) -> str:
    packs = problem.hidden // pack
    if packs < 64:
        what = f"rows of {packs} packs, where 64 are the fewest ({64 * pack} columns)"
        remedy = f"give a capacity of at most {first - 1}"
    elif packs > 2048:
        what, remedy = f"rows of {packs} packs, where 2048 are the most", f"give at most {2048 * pack} columns"
    else:
        what, remedy = (
            f"rows of {packs} packs in the MXFP4 kernel, where 1024 are the most",
            f"give at most {1024 * pack} columns",
        )
    return f"hidden is {problem.hidden}; calls with {first} rows throw at {what} (custom_all_reduce.cuh); {remedy}"


def _unclaimed(problem: RowProblem, operator: Operator, arch: Architecture) -> Iterator[str]:
    """What runs without a test upstream, or looks doubtful in the kernel."""
    packs = problem.row_bytes // 16
    if arch.name == "gfx1250":
        yield "upstream has a proof of concept of the all-reduce on gfx1250, and no test of what follows it"
    if problem.world_size == 6:
        yield "upstream tests 2, 4 and 8 ranks"
    if problem.dtype == "float32":
        yield "upstream tests float16 and bfloat16"
    if problem.hidden > 16384:
        yield f"hidden is {problem.hidden}; the fused kernels end at 16384 and upstream does not test the fallback"
    if operator.quantiser == "mxfp4" and problem.hidden % 32:
        yield f"hidden is {problem.hidden}; upstream tests multiples of 32"
    for first, route in _segments(problem, operator, arch.name):
        own = bool(operator.quantiser) and not route.separate_quantiser
        if route.path is Path.SPLIT and packs % problem.world_size:
            yield (
                f"from {first} rows on each rank reduces m * {packs} // {problem.world_size} packs, so that the last "
                "ones are reduced by nobody where that is no whole number (custom_all_reduce.cuh:1287)"
            )
        if own and operator.quantiser != "mxfp4" and route.path is not Path.ONE_STAGE and packs % _REDUCTION_WARP:
            yield (
                f"from {first} rows on the block has {packs} threads, not padded to {_REDUCTION_WARP}, and the last "
                "warp is left out of the mean square (custom_all_reduce.cuh:1605, 2868, 3001)"
            )
