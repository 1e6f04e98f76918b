"""Seeded faults of routers, with their minima; see :mod:`conformance.faults.row_catalogue`.

Scope: plain data without torch. The minima do not say how likely a fault is to be met.
"""

from __future__ import annotations

from conformance.faults.row_fault import MinimalCall, RowFault, RowMinimum
from conformance.row_cases import Kind, Weight

_V3, _SOFTMAX = "biased_grouped_topk.grouped_g8t4k8", "topk_softmax.softmax_k8"


def _one(*kinds: Kind, rows: int = 1, experts: int = 32, bias: Weight = "ones") -> RowMinimum:
    """One call; the bias is "ones" where there is none."""
    return RowMinimum((MinimalCall(kinds, rows, weight=bias),), experts)


def _route(name: str, description: str, source: str, operator: str, check: str, minimum: RowMinimum) -> RowFault:
    return RowFault(name, description, source, operator, f"route.{check}", minimum, "route")


ROUTES = (
    # Scores of equal logits are equal: only a bias makes weights with it differ from those without.
    _route(
        "bias_in_weight",
        "weights are made of the biased choices",
        "",
        _V3,
        "weights",
        _one("zero", bias="small"),
    ),
    # Equal logits: groups are ranked by the bias alone, and its largest element is not in the group of its largest two.
    _route(
        "groups_by_largest",
        "groups are ranked by their largest choice instead of the sum of two",
        "",
        _V3,
        "choice",
        _one("zero", bias="small"),
    ),
    # Half of the experts are kept, and eight of those have choices above zero unless every bias is below -1.
    _route(
        "excluded_groups_at_zero",
        "experts of other groups stay candidates with 0, as in biased_grouped_topk_torch",
        "ROCm/aiter aiter/ops/topk.py:247",
        _V3,
        "choice",
        _one("zero", bias="negative"),
    ),
    _route(
        "scale_left_out",
        "weights lack the routed scaling factor, as of moe_fused_gate",
        "ROCm/aiter csrc/kernels/moe_fused_gate.cu:391",
        _V3,
        "weights",
        _one("zero", bias="zeros"),
    ),
    _route(
        "not_renormalised",
        "weights are not divided by their sum",
        "",
        _V3,
        "weights",
        _one("zero", bias="zeros"),
    ),
    _route(
        "ids_repeat_under_nan",
        "a row with a NaN logit has an expert twice",
        "vllm-project/vllm#39593",
        _V3,
        "ids",
        _one("nan", bias="zeros"),
    ),
    _route(
        "nan_spoils_next_row",
        "the row after one with a NaN logit has other experts",
        "",
        _V3,
        "rows",
        _one("nan", "zero", rows=2, bias="zeros"),
    ),
    # The shortest row that is no power of two.
    _route(
        "ids_of_padding",
        "a row of -inf has ids of columns that pad it to a power of two",
        "ROCm/aiter aiter/ops/triton/_triton_kernels/moe/moe_routing/topk.py",
        "topk_gating.sigmoid_k1",
        "ids",
        _one("all_masked", experts=384),
    ),
    # One expert is above all others by less than a unit of bfloat16.
    _route(
        "ranked_by_bfloat16",
        "experts are ranked by rounded probabilities",
        "",
        _SOFTMAX,
        "choice",
        _one("one_hot"),
    ),
    # Fewer kinds of logits than experts: the eighth and the ninth are equal, and some are less.
    _route(
        "tie_broken_outside",
        "of two equal experts the lowest-ranked of all is chosen",
        "",
        _SOFTMAX,
        "choice",
        _one("integers"),
    ),
    _route(
        "weights_in_other_order",
        "weights and ids are in opposite orders",
        "",
        _SOFTMAX,
        "weights",
        _one("one_hot"),
    ),
)
