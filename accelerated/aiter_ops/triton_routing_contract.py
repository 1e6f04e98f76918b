"""What AITER's Triton routers promise, operator by operator, without torch.

Scope: standing and numerics of ``triton.routing.<form>``: top-k and the sort by expert, read back as ids and weights.
``routing_sigmoid_top1`` is not among them: it multiplies hidden states by the router's matrix, so there are no logits
to give it. Sources: ROCm/aiter e4048607, aiter/ops/triton/moe/moe_routing/{routing,topk}.py and their kernels; claims
follow op_tests/triton_tests/moe/test_moe_routing.py. What a right declaration does not prove: that the kernels keep it.
Where a kernel is plainly wrong (two experts of a group that score alike count as one) the declaration says what is
right.
"""

from __future__ import annotations

from dataclasses import replace

from accelerated.contract import ContractError, Standing, Support
from accelerated.operators import RowProblem
from accelerated.routers import FORMS, Always, RouteContract, form_of
from reference.formats import BFLOAT16, FLOAT16, Format
from reference.router_numerics import Ranking, Recovery, RouterNumerics, Score

#: Most experts in groups (topk.py:41).
GROUPED_EXPERTS = 256
#: Rows up to which pairs are sorted by another kernel (routing.py:330), and one row per program in topk (topk.py:205).
FUSED_SORT, WIDE_TOPK = 16, 256
ARCHS = ("gfx942", "gfx950")

_STORED: dict[str, Format | None] = {"float32": None, "bfloat16": BFLOAT16, "float16": FLOAT16}


def names() -> tuple[str, ...]:
    """Operators, in order."""
    return tuple(f"triton.routing.{form}" for form in FORMS)


def support(problem: RowProblem, name: str, arch: str) -> Support:
    """Standing of ``name`` at ``problem``: refused where it cannot run, claimed where upstream tests the like."""
    if name not in names():
        return Support(Standing.REFUSED, f"{name!r} is no Triton router; choose one of {', '.join(names())}")
    if arch not in ARCHS:
        return Support(Standing.REFUSED, f"nothing is declared for {arch}; choose one of {', '.join(ARCHS)}")
    form, experts = form_of(name), problem.hidden
    reason = form.refusal(experts)
    if not reason and form.numerics.groups > 1 and experts > GROUPED_EXPERTS:
        reason = f"{experts} experts; groups are chosen among at most {GROUPED_EXPERTS}"
    if not reason and _narrowed(form.numerics, form.biased) and problem.dtype != "float32":
        reason = f"dtype is {problem.dtype}; {name} rounds scores with their bias to it, which is modelled for float32"
    if reason:
        return Support(Standing.REFUSED, reason)
    if arch != "gfx950":
        return _unclaimed("gfx950")
    return Support(Standing.CLAIMED) if problem.dtype == "float32" else _unclaimed("float32")


def _unclaimed(what: str) -> Support:
    return Support(Standing.UNCLAIMED, f"upstream tests it with {what} only")


def _narrowed(numerics: RouterNumerics, biased: bool) -> bool:
    """Whether choices, or weights before a renormalisation, are rounded to the logits' type (kernels/topk.py:260)."""
    return numerics.groups == 1 and (biased or numerics.score is Score.SQRT_SOFTPLUS)


def contract(problem: RowProblem, name: str, arch: str) -> RouteContract:
    """Declared behaviour; the bias is float32.

    No rows are not taken: blocks of no rows are a division by zero (routing.py:331), and with a score mode, where one
    row is the least, that row is read from a bitmatrix without rows (kernels/bitmatrix.py:124).

    Raises:
        ContractError: :func:`support` refuses the problem.
    """
    standing = support(problem, name, arch)
    if standing.standing is Standing.REFUSED:
        raise ContractError(standing.reason)
    form = form_of(name)
    grouped = form.numerics.groups > 1
    boundaries = (FUSED_SORT,) if grouped else (FUSED_SORT, WIDE_TOPK)
    return RouteContract(
        Always(_numerics(form.numerics, form.biased, _STORED[problem.dtype])),
        bias_dtype="float32" if form.biased else "",
        boundaries=boundaries,
        takes_empty=False,
    )


def _numerics(of: RouterNumerics, biased: bool, stored: Format | None) -> RouterNumerics:
    """What the kernels make of a form: weights come back in the logits' type (topk.py:93, 231)."""
    # kernels/topk.py:270, 634: the sum plus 1e-20.
    of = replace(of, scaled_exponent=True, weight_store=stored, sum_added=1e-20 if of.renormalise else 0.0)
    if of.score is Score.SOFTMAX and of.groups == 1:
        if of.renormalise:
            # The softmax over the chosen logits, which is the softmax over all of them, renormalised.
            return replace(of, score=Score.CHOSEN_SOFTMAX, ranking=Ranking.LOGIT, sum_added=0.0)
        # torch's softmax before the top-k, in the logits' type (routing.py:322-323).
        return replace(of, score_store=stored, weight_store=None)
    if biased and of.groups == 1:
        # kernels/topk.py:258-260: score plus bias minus bias.
        return replace(of, recovery=Recovery.SUBTRACTED)
    return of


def arguments(form: RouterNumerics) -> dict[str, object]:
    """Arguments of ``routing`` beside logits, k and bias."""
    if form.score is Score.CHOSEN_SOFTMAX or (form.score is Score.SOFTMAX and form.groups == 1):
        return {"sm_first": not form.renormalise}
    modes = {Score.SIGMOID: "sigmoid", Score.SQRT_SOFTPLUS: "sqrtsoftplus", Score.SOFTMAX: "softmax"}
    given: dict[str, object] = {
        "score_mode": modes[form.score],
        "renorm": form.renormalise,
        "routed_scaling_factor": form.scale,
    }
    if form.groups > 1:
        given |= {"use_grouped_topk": True, "num_expert_group": form.groups, "topk_group": form.groups_kept}
    return given
