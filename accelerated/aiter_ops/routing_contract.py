"""What AITER declares about its routers: which forms each entry can express, on which problems, and what it promises.

Scope: plain data without torch, restated from AITER e4048607: ``topk_softmax`` and ``topk_sigmoid``
(aiter/ops/moe_op.py), ``topk_gating``, ``grouped_topk`` and ``biased_grouped_topk`` (aiter/ops/topk.py) and
``fused_topk`` (aiter/fused_moe.py), with the kernel that each reaches. Promised is what the entry's arguments say and
upstream's torch references compute; where a kernel is seen to do otherwise the cell is unclaimed and says so. What a
declaration does not prove: that the hardware keeps it; none of the kernels was run to write it.

How cells stand: as in :mod:`accelerated.aiter_ops.contract`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from accelerated.contract import ContractError, Standing, Support
from accelerated.operators import RowProblem
from accelerated.routers import FORMS, Always, RouteContract, RouteForm, form_of
from reference.catalogue import Architecture, CatalogueError, architecture
from reference.router_numerics import GroupScore, Ranking, Recovery, RouterNumerics, Score, Special

#: Experts of which ``topk_softmax`` has a kernel that keeps a row in one warp (topk_softmax_kernels.cu, launcher).
_WARP_EXPERTS = tuple(1 << power for power in range(10))
#: k of the assembled kernels by E (fused_moe.py:4075-4084, hsa/*/topksoftmax/topksoftmax.csv).
_ASSEMBLED = {128: (4, 6, 8), 256: (6, 8), 384: (8,), 640: (8,)}
#: E of which assembled kernels have a variant for 10,000 rows and more (asm_topksoftmax.cu).
_ASSEMBLED_LARGE = (128, 256)
#: Experts whose scores ``topk_gating`` keeps in registers beside the choices; of others it keeps the choice alone
#: (topk_gating_kernels.cuh, topk_gating_launch).
_REGISTER_EXPERTS = (64, 128, 256, 384)
#: Experts that ``topk_sigmoid`` has tiles for; a row of others is padded (Composable Kernel, 09_topk_softmax).
_TILE_EXPERTS = (8, 16, 32, 64, 128, 192)
#: Group counts of the grouped kernels (topk_softmax_kernels_group.cu, LAUNCHER2).
_GROUPS = (1, 2, 4, 8)
#: Rows per compute unit up to which ``biased_grouped_topk`` takes the grouped kernel (topk.py:189).
_ROWS_PER_CU = 212
#: Compute units of the products of an architecture, ascending: MI308X, MI300A and MI300X; MI350X.
_COMPUTE_UNITS = {"gfx942": (80, 228, 304), "gfx950": (256,)}
#: Experts of a group beyond which it takes the grouped kernel for any number of rows.
_FUSED_GATE_GROUP = 32


def _expresses(entry: str, form: RouteForm) -> bool:
    """Whether the entry has arguments for everything that the form computes."""
    numerics, plain = form.numerics, not form.biased and form.numerics.groups == 1
    softmax = numerics.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX)
    if entry in ("topk_softmax", "fused_topk"):
        return plain and softmax and numerics.scale == 1
    if entry == "topk_gating":
        return numerics.groups == 1 and (softmax or numerics.score in (Score.SIGMOID, Score.SQRT_SOFTPLUS))
    if entry == "topk_sigmoid":
        return plain and numerics.score is Score.SIGMOID and not numerics.renormalise and numerics.scale == 1
    if entry == "grouped_topk":
        by_most = numerics.groups == 1 or numerics.group_score is GroupScore.MAX
        return not form.biased and numerics.score in (Score.SOFTMAX, Score.SIGMOID) and by_most
    by_two = numerics.groups == 1 or numerics.group_score is GroupScore.TOP2
    return form.biased and numerics.score is Score.SIGMOID and by_two


ENTRIES = ("topk_softmax", "fused_topk", "topk_gating", "topk_sigmoid", "grouped_topk", "biased_grouped_topk")
#: Operators, ``<entry>.<form>``.
ROUTERS: tuple[str, ...] = tuple(
    f"{entry}.{name}" for entry in ENTRIES for name, form in FORMS.items() if _expresses(entry, form)
)


@dataclass(frozen=True)
class Switching:
    """Numerics that change above a number of rows."""

    below: RouterNumerics
    last: int
    above: RouterNumerics

    def __call__(self, rows: int) -> RouterNumerics:
        """Of a call with so many rows."""
        return self.below if rows <= self.last else self.above


def entry_of(operator: str) -> str:
    """Entry of an operator.

    Raises:
        ContractError: unknown operator.
    """
    if operator not in ROUTERS:
        raise ContractError(f"unknown route operator {operator!r}; choose one of {', '.join(ROUTERS)}")
    return operator.partition(".")[0]


@lru_cache(maxsize=4096)
def support(problem: RowProblem, operator: str, arch: str) -> Support:
    """Standing of ``problem`` on one router.

    Args:
        problem: its family is ROUTE; E is its hidden size.
        operator: a name of :data:`ROUTERS`.
        arch: gfx architecture of the catalogue.

    Returns:
        REFUSED with the first rule that the problem breaks, UNCLAIMED with what nobody exercises or what the kernel is
        seen to get wrong, or CLAIMED.
    """
    try:
        target, entry = architecture(arch), entry_of(operator)
    except (CatalogueError, ContractError) as error:
        return Support(Standing.REFUSED, str(error))
    form = form_of(operator)
    reason = next(_refusals(problem, entry, form, target), None)
    if reason is not None:
        return Support(Standing.REFUSED, reason)
    reason = next(_unclaimed(problem, entry, form, target), None)
    return Support(Standing.CLAIMED) if reason is None else Support(Standing.UNCLAIMED, reason)


@lru_cache(maxsize=4096)
def contract(problem: RowProblem, operator: str, arch: str) -> RouteContract:
    """Declared behaviour for a problem that :func:`support` does not refuse.

    No entry takes an empty call: each launches a grid of no blocks. The grouped kernels read the bias as the logits'
    element type whatever it is (topk_softmax_kernels_group.cu:318), so that it is given in that type.

    Raises:
        ContractError: unknown operator or architecture.
    """
    entry, form = entry_of(operator), form_of(operator)
    try:
        target = architecture(arch)
    except CatalogueError as error:
        raise ContractError(str(error)) from error
    bias = {"topk_gating": "float32", "biased_grouped_topk": problem.dtype}.get(entry, "") if form.biased else ""
    rows = sorted(m for m in _boundaries(problem, entry, form, target) if m < problem.capacity)
    below = _numerics(problem, entry, form, target)
    if entry == "biased_grouped_topk" and rows:
        # moe_fused_gate keeps scores apart from choices, and gives a NaN logit the score 0 (moe_fused_gate.cu:192).
        above = replace(below, recovery=Recovery.KEPT, special=Special.UNIQUE, scaled_exponent=False)
        return RouteContract(Switching(below, rows[0], above), bias, tuple(rows), takes_empty=False)
    ordered = entry == "topk_gating" and form.numerics.score is Score.SIGMOID  # upstream compares these in order
    return RouteContract(Always(below), bias, tuple(rows), takes_empty=False, descending=ordered)


def _numerics(problem: RowProblem, entry: str, form: RouteForm, arch: Architecture) -> RouterNumerics:
    """Of the form, as the kernel that the entry reaches computes it."""
    asked, softmax = form.numerics, form.numerics.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX)
    over_all = replace(asked, score=Score.SOFTMAX, ranking=Ranking.CHOICE) if softmax else asked
    if entry == "fused_topk" and _assembled(problem, asked, arch):
        # Nothing is known of it but its object code: anything that rounds like a kernel in float32.
        return replace(over_all, scaled_exponent=True, special=Special.ANYTHING)
    if entry in ("topk_softmax", "fused_topk"):
        return _softmax(problem, over_all)
    if entry == "topk_gating":
        # exp2f(x * log2 e), v_rcp_f32, and log2f(1 + e); sums are raised to 1e-20 (topk_gating_kernels.cuh).
        return replace(
            over_all,
            recovery=Recovery.KEPT if problem.hidden in _REGISTER_EXPERTS or not form.biased else Recovery.SUBTRACTED,
            scaled_exponent=True,
            softplus_error=2.0**-24,
            sum_floor=1e-20,
            special=Special.ENOUGH,
        )
    if entry == "topk_sigmoid":
        return replace(asked, scaled_exponent=True)
    # Grouped: expf for the softmax, exp2f(x * log2 e) and v_rcp_f32 for the sigmoid.
    grouped = replace(over_all, scaled_exponent=not softmax, special=Special.UNIQUE if softmax else Special.ENOUGH)
    if entry == "biased_grouped_topk" and _sorted(problem, asked, arch):
        return replace(grouped, recovery=Recovery.SUBTRACTED, special=Special.NAN_LAST)
    return grouped


def _softmax(problem: RowProblem, over_all: RouterNumerics) -> RouterNumerics:
    """``topk_softmax``: one kernel ranks logits and divides what it chose, another ranks float32 probabilities.

    A lane whose first logit is NaN hides the others of the row from its neighbours, and a chosen logit becomes -inf, so
    that ids repeat where fewer than k are finite.
    """
    special = Special.IN_RANGE
    if problem.hidden not in _WARP_EXPERTS:
        return replace(over_all, special=special)
    score = Score.CHOSEN_SOFTMAX if over_all.renormalise else Score.SOFTMAX
    return replace(over_all, score=score, ranking=Ranking.LOGIT, special=special)


def _assembled(problem: RowProblem, numerics: RouterNumerics, arch: Architecture) -> bool:
    """Whether ``fused_topk`` takes an assembled kernel (fused_moe.py:4073-4088)."""
    known = numerics.top_k in _ASSEMBLED.get(problem.hidden, ()) and problem.dtype != "float16"
    return known and arch.name in ("gfx942", "gfx950")


def _sorted(problem: RowProblem, numerics: RouterNumerics, arch: Architecture) -> bool:
    """Whether ``biased_grouped_topk`` takes the kernel of DeepSeek-V3 alone (topk_softmax_kernels_group.cu:1244)."""
    sizes = (problem.hidden, numerics.groups, numerics.groups_kept, numerics.top_k)
    return sizes == (256, 8, 4, 8) and arch.wave_size == 64


def _boundaries(problem: RowProblem, entry: str, form: RouteForm, arch: Architecture) -> Iterator[int]:
    """Row counts after which another kernel runs."""
    experts, numerics = problem.hidden, form.numerics
    if entry == "fused_topk" and _assembled(problem, numerics, arch) and experts in _ASSEMBLED_LARGE:
        yield 9999
    if entry == "topk_gating":
        yield from _gating_boundaries(experts, numerics, arch)
    if entry == "biased_grouped_topk" and experts // numerics.groups <= _FUSED_GATE_GROUP:
        yield from (units * _ROWS_PER_CU for units in _COMPUTE_UNITS.get(arch.name, (256,)))


def _gating_boundaries(experts: int, numerics: RouterNumerics, arch: Architecture) -> Iterator[int]:
    """Of ``topk_gating_launch``."""
    softmax = numerics.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX)
    if softmax and experts in (*_REGISTER_EXPERTS, 640):
        yield 1023
        if experts == 640:
            yield 2048
    elif not softmax and experts in _REGISTER_EXPERTS:
        if (experts == 64 and numerics.top_k <= 8) or (experts == 128 and arch.name == "gfx942"):
            yield 4095
    elif experts <= 128:
        yield 1023
    elif experts <= 256:
        yield 4095


def _refusals(problem: RowProblem, entry: str, form: RouteForm, arch: Architecture) -> Iterator[str]:
    """What raises, or writes nothing."""
    experts, numerics = problem.hidden, form.numerics
    if reason := form.refusal(experts):
        yield reason
    if entry == "topk_sigmoid":
        if experts > _TILE_EXPERTS[-1]:
            yield f"topk_sigmoid has no tile for {experts} experts and writes nothing; it ends at {_TILE_EXPERTS[-1]}"
        if problem.dtype == "float32":
            yield "topk_sigmoid has no kernel for float32 logits and writes nothing; give bfloat16 or float16"
    if entry in ("grouped_topk", "biased_grouped_topk") and numerics.groups not in _GROUPS:
        yield f"{entry} has kernels for {', '.join(map(str, _GROUPS))} groups, not for {numerics.groups}"
    size = experts // numerics.groups
    if numerics.groups > 1 and size % _vector(experts):
        yield f"{entry} moves {_vector(experts)} of {experts} experts at a time, which does not divide groups of {size}"
    last = min(_boundaries(problem, entry, form, arch), default=problem.capacity)
    if entry == "biased_grouped_topk" and not numerics.renormalise and problem.capacity > last:
        yield f"without renormalisation biased_grouped_topk raises beyond {last} rows; capacity is {problem.capacity}"


def _vector(experts: int) -> int:
    """Experts that the grouped kernels move at a time (topk_softmax_kernels_group.cu, LAUNCH_KERNEL)."""
    return {0: 4, 2: 2}.get(experts % 4, 1)


def _unclaimed(problem: RowProblem, entry: str, form: RouteForm, arch: Architecture) -> Iterator[str]:
    """What upstream does not test, and what its kernels are seen to get wrong there."""
    experts, numerics = problem.hidden, form.numerics
    if arch.wave_size == 32:
        yield f"AITER compiles for {arch.name}, but documents neither support nor a test of this operator there"
    if entry in ("topk_softmax", "fused_topk"):
        if problem.dtype == "float16":
            yield "upstream tests bfloat16 and float32 logits"
        if experts not in _WARP_EXPERTS and not (entry == "fused_topk" and _assembled(problem, numerics, arch)):
            yield f"{experts} experts take the kernels for any number of them, which upstream does not test"
    elif entry == "topk_gating":
        yield from _unclaimed_gating(problem, form, arch)
    elif entry == "topk_sigmoid":
        if experts not in _TILE_EXPERTS:
            yield f"{experts} experts are padded with zero scores, which win where a row's scores are all zero"
    else:
        yield from _unclaimed_grouped(problem, entry, form, arch)


def _unclaimed_gating(problem: RowProblem, form: RouteForm, arch: Architecture) -> Iterator[str]:
    numerics = form.numerics
    first = loses_ties_from(problem.hidden, numerics, arch)
    if first is not None and problem.capacity >= first:
        yield (
            f"from {first} rows on, of experts with equal choices in two lanes all are taken for chosen but one is "
            f"returned (subwarpArgmax); no row of upstream's tests has equal scores"
        )
    if problem.hidden not in _REGISTER_EXPERTS:
        yield f"upstream tests {', '.join(map(str, _REGISTER_EXPERTS))} experts, not {problem.hidden}"
    if numerics.score is Score.SIGMOID and problem.dtype == "float32":
        yield "upstream tests the sigmoid on bfloat16 and float16 logits"


def _unclaimed_grouped(problem: RowProblem, entry: str, form: RouteForm, arch: Architecture) -> Iterator[str]:
    numerics, vector = form.numerics, _vector(problem.hidden)
    lanes = arch.wave_size // numerics.groups
    if form.biased and numerics.groups > 1 and lanes > 8:
        yield (
            f"of every {lanes * vector} experts of a group only the first {vector} count for its score: {lanes} lanes "
            f"share a group, and the kernel joins no more than 8; upstream tests 8 groups and none"
        )
    tested = (1, 8) if form.biased else (8,)
    if numerics.groups not in tested:
        yield f"upstream tests {' and '.join(map(str, tested))} groups, not {numerics.groups}"
    if problem.dtype != "bfloat16":
        yield "upstream tests bfloat16 logits"
    if form.biased and not numerics.renormalise:
        yield "upstream tests it with renormalisation"
    last = min(_boundaries(problem, entry, form, arch), default=problem.capacity)
    if problem.capacity > last and numerics.scale != 1:
        yield (
            f"beyond {last} rows moe_fused_gate leaves the scale of {numerics.scale} out (moe_fused_gate.cu:391-401); "
            f"upstream tests it with a scale of 1"
        )


def loses_ties_from(experts: int, numerics: RouterNumerics, arch: Architecture) -> int | None:
    """Least number of rows at which ``topk_gating`` takes a kernel in which lanes disagree about equal choices.

    Each lane keeps its own of two equal choices: both owners drop theirs, and one is returned
    (topk_gating_kernels.cuh, subwarpArgmax and its callers).
    """
    softmax = numerics.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX)
    if softmax and experts in (*_REGISTER_EXPERTS, 640):
        return 1
    return next((last + 1 for last in _gating_boundaries(experts, numerics, arch)), None)
