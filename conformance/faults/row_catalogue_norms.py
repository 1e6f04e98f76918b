"""Seeded faults of norms and of AllReduce + norm, with their minima; see :mod:`conformance.faults.row_catalogue`.

Scope: plain data without torch. The minima do not say how likely a fault is to be met.
"""

from __future__ import annotations

from conformance.faults.row_fault import MinimalCall, RowFault, RowMinimum, added, norm, one, reduce

NORMS = (
    # In the plain form a row of ones has the root mean square 1 and hides where epsilon is added.
    norm("epsilon_outside", "epsilon is added to the root", "", "rmsnorm", "norm.output", one("one_hot")),
    norm(
        "gemma_without_one",
        "Gemma's weight is not raised by one",
        "",
        "rmsnorm_add_gemma",
        "norm.output",
        added("zero", "one_hot"),
    ),
    norm(
        "norm_of_rounded",
        "the rounded sum is normalised where the float32 sum is declared",
        "#1507",
        "rmsnorm_add",
        "norm.output",
        added("one_hot", "normal"),
    ),
    norm(
        "norm_of_unrounded",
        "the float32 sum is normalised where the rounded sum is declared",
        "",
        "rmsnorm_add_t5",
        "norm.output",
        added("one_hot", "normal"),
    ),
    norm(
        "residual_rounded_twice",
        "residual out is rounded to 11 bits first",
        "#2011, #1965",
        "rmsnorm_add",
        "norm.residual",
        added("ones", "normal"),
        arch="gfx950",
    ),
    # fl(1 / sqrt(1 + eps)) is just below 1, a number of bfloat16: either is legal where truncation is, and only 1 where
    # rounding is.
    norm(
        "truncated_store",
        "results are truncated where rounding is declared",
        "",
        "rmsnorm",
        "norm.output",
        one("ones"),
        arch="gfx950",
    ),
    norm(
        "rounded_store",
        "results are rounded where truncation is declared",
        "",
        "rmsnorm",
        "norm.output",
        one("integers"),
    ),
    norm(
        "outputs_swapped",
        "output and residual out are in each other's buffer",
        "#1522",
        "rmsnorm_add",
        "norm.residual",
        added("zero", "one_hot"),
    ),
    norm(
        "last_vector_not_squared",
        "columns beyond the last whole vector are left out of the mean square",
        "",
        "rmsnorm",
        "norm.output",
        one("one_hot"),
    ),
    norm(
        "registers_only_squared",
        "columns that the registers do not hold are left out of the mean square",
        "",
        "rms_norm_cu",
        "norm.output",
        one("integers", hidden=8200),
    ),
    norm(
        "quantised_from_rounded",
        "the fused quantiser sees the rounded output where the float32 one is declared",
        "#1658",
        "rmsnorm_dynamicquant",
        "norm.scales",
        one("one_hot"),
    ),
    norm(
        "weight_of_call_before",
        "a call takes the weight of the one before",
        "",
        "rmsnorm",
        "norm.output",
        RowMinimum((MinimalCall(weight="twos"), MinimalCall(("one_hot",)))),
    ),
)

REDUCTIONS = (
    reduce(
        "sum_kept_float32",
        "the sum over ranks is not rounded before the residual is added",
        "#2586",
        "fused",
        "norm.residual",
        added("normal", "one_hot", ranks=2),
    ),
    reduce(
        "last_rank_missing",
        "the last rank's addend is missing",
        "",
        "fused",
        "norm.residual",
        added("one_hot", "zero", ranks=2),
    ),
    # Two addends have one sum; more differ in float32 where large ones cancel.
    reduce(
        "order_by_rank",
        "every rank begins its sum with its own addend",
        "",
        "fused",
        "norm.ranks",
        added("wide", "zero", ranks=4),
    ),
    # 20 rows of 8 KiB are the fewest that take the two-stage kernel, and fill five blocks of each of four ranks.
    reduce(
        "partition_tail",
        "what does not fill a block of every rank is reduced by nobody",
        "#1487",
        "split",
        "norm.residual",
        added("zero", "zero", rows=21, hidden=4096, ranks=4),
    ),
    reduce(
        "others_of_call_before",
        "other ranks' rows are those of the call before",
        "#4346, #2890, #807",
        "fused",
        "norm.ranks",
        RowMinimum((MinimalCall(residual=("zero",)), MinimalCall(("one_hot",), residual=("zero",))), 32, 2),
    ),
    reduce(
        "zeros_of_warm_up",
        "a call outside a capture is taken for a warm-up and gives zeros",
        "",
        "fused",
        "norm.residual",
        added("zero", "one_hot", ranks=2),
    ),
    # 128 rows of 1 KiB are the limit; residual out of the other kernel is rounded to nearest.
    reduce(
        "limit_exclusive",
        "the largest input of the one-stage kernel takes the two-stage one",
        "vllm-project/vllm#42409",
        "fused_per_token",
        "norm.residual",
        added("one_hot", "normal", rows=128, hidden=512, ranks=2),
    ),
    reduce(
        "last_warp_not_squared",
        "the threads of a warp that is not full are left out of the mean square",
        "",
        "fused",
        "norm.output",
        added("zero", "one_hot", ranks=2),
    ),
    reduce(
        "groups_of_64",
        "the group that the caller asks for is not looked at",
        "",
        "fused_per_group",
        "quantise.layout",
        added("zero", "zero", hidden=128, ranks=2),
    ),
    # The stride of a dimension of size 1 says nothing, here and where a sum is compiled.
    reduce(
        "never_transposed",
        "scales that are to lie in columns lie in rows",
        "#4506, #4131",
        "fused_per_group_transposed",
        "quantise.layout",
        added("zero", "zero", rows=2, hidden=256, ranks=2),
    ),
    RowFault(
        "strided_when_compiled",
        "a compiled call returns a sum with other strides than an eager one",
        "#3977, #4066, #4131",
        "split",
        "compiled.layout",
        added("zero", "zero", rows=2, ranks=2),
        "compiled",
    ),
    reduce(
        "uninitialised_residual",
        "the form without a residual adds memory that nobody cleared",
        "vllm-project/vllm#41972",
        "fused_no_residual",
        "norm.output",
        RowMinimum((MinimalCall(),), 32, 2),
    ),
)
