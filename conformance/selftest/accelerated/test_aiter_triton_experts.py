"""What the adapters of AITER's Triton experts and routers pass on and hand back, against functions that only record.

Scope: sorting, layouts of weights, arguments by name, refusals. A pass proves nothing about AITER's arithmetic.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerated.aiter_ops import triton_experts_contract as declared
from accelerated.aiter_ops.triton_backend import aiter_triton
from accelerated.aiter_ops.triton_experts_ragged import RaggedExperts, block_map
from accelerated.aiter_ops.triton_library import TritonLibrary
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.aiter_ops.triton_operations import TritonSession
from accelerated.aiter_ops.triton_routing import TritonRouter, read_back
from accelerated.contract import ContractError, Standing
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.operators import Family, RowProblem
from accelerated.routers import RouteContract, form_of
from conformance.rank.expert_weights import weights_of
from reference import routers
from reference.expert_numerics import SWIGLU_ALPHA, SWIGLU_LIMIT
from reference.expert_weights import ExpertWeights
from reference.router_oracle import objection

H, INTERMEDIATE, E, K, M = 128, 64, 4, 2, 3
BF16 = torch.bfloat16
IDS, WEIGHTS = torch.tensor([[0, 3], [2, -1], [1, 9]]).int(), torch.rand(M, K)


class Recorder:
    """Notes every call by name and answers it with a result of the right shape."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def function(self, name: str) -> Any:
        def call(*args: Any, **given: Any) -> Any:
            self.calls.append((name, args, given))
            return getattr(self, f"_{name}", lambda *_, **__: None)(*args, **given)

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, given) for called, args, given in self.calls if called == name]

    def _align(self, ids: torch.Tensor, **given: Any) -> None:
        given["num_tokens_post_pad"].fill_(16)
        given["expert_ids"][:3] = torch.tensor([0, 1, given["num_experts"] - 1])

    def _config(self, dtype: Any, **given: Any) -> Any:
        return lambda rows: {"BLOCK_SIZE_M": 16}

    def _silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : x.shape[1] // 2]

    def _e2e_moe(self, *args: Any, **given: Any) -> Any:
        return given["C"]

    def _routing_from_topk(self, weights: torch.Tensor, ids: torch.Tensor, **given: Any) -> Any:
        pairs = torch.arange(ids.numel(), dtype=torch.int32)
        counts = torch.zeros(given["n_expts_tot"], dtype=torch.int32)
        counts[0] = ids.numel()
        return counts, pairs, pairs, weights.flatten()

    def _gemm(self, x: torch.Tensor, w: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        rows = M if "scatter_indx" in given else M * K
        return torch.zeros(rows, w.shape[2] // (2 if given.get("apply_swiglu") else 1), dtype=BF16)

    _gemm_a8w8 = _gemm_a8w8_block = _gemm_a8w4 = _gemm_a4w4 = _gemm_a16w4 = _gemm

    def _pair(self, x: torch.Tensor, *args: Any, **given: Any) -> Any:
        return x.to(torch.uint8), torch.zeros(x.shape[0], 4, dtype=torch.uint8)

    _downcast_to_mxfp = _mxfp4_quant = _act_mul_fp8 = _act_mul_mxfp4 = _pair


def session(arch: str = "gfx950") -> tuple[TritonSession, Recorder]:
    recorder = Recorder()
    functions = {field.name: recorder.function(field.name) for field in fields(TritonMoe)}
    functions |= {"triton_dtype": {BF16: "bf16"}, "routing": SimpleNamespace(ExptData=dict, RoutingData=dict)}
    pair = recorder._pair
    library = TritonLibrary(
        quant=SimpleNamespace(fused_flatten_fp8_group_quant=lambda x, **_: pair(x.flatten(1))),
        hip_free_quant=None,
        fp4=SimpleNamespace(dynamic_mxfp4_quant=pair),
        rmsnorm=None,
        add_pad=None,
        fused_add=None,
        quant_type=None,
        fp8=torch.float8_e4m3fn,
        arch=arch,
        interpreted=True,
        origin="",
    )
    return TritonSession(library, TritonMoe(**functions)), recorder


def problem(name: str = "", **sizes: Any) -> ExpertProblem:
    blocks = name in ("triton.fused_moe.fp8_block", "triton.gemm_a8w8.block")
    given = {"shards": 1, "hidden": H, "intermediate": 128 if blocks else INTERMEDIATE, "experts": E}
    return ExpertProblem(**(given | {"top_k": K, "capacity": 8} | sizes))


def loaded(name: str, owned: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Any, Recorder, ExpertWeights]:
    made, recorder = session()
    sizes = problem(name, shards=1 if len(owned) == E else 2)
    operation: Any = made.build(sizes, name)
    contract = declared.contract(sizes, name, "gfx950")
    weights = weights_of(
        owned,
        hidden=H,
        intermediate=sizes.intermediate,
        codec=contract.weight_codec,
        dtype=BF16,
        biased=contract.biased,
        device=torch.device("cpu"),
    )
    operation.load(weights, owned)
    return operation, recorder, weights


def call(operation: Any, **given: Any) -> Any:
    return operation.experts(torch.ones(M, H, dtype=BF16), IDS, WEIGHTS, **given)


@pytest.mark.parametrize("name", declared.names())
def test_every_operator_is_driven(name: str) -> None:
    operation, recorder, _ = loaded(name)
    assert call(operation).shape == (M, H)
    used = {called for called, _, _ in recorder.calls}
    assert used & ({"align"} if declared.OPERATORS[name].form is declared.Form.SORTED else {"routing_from_topk"})


def test_pairs_without_a_local_expert_are_sorted_behind_the_others() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.bf16", (1, 3))
    call(operation)
    ((slots,), given) = recorder.of("align")[0]
    assert slots.tolist() == [[2, 1], [2, 2], [0, 2]]
    assert (given["num_experts"], given["block_size"]) == (3, 16)
    assert given["sorted_token_ids"].tolist() == [M * K] * (M * K + 3 * 15)
    assert len(given["expert_ids"]) * 16 >= len(given["sorted_token_ids"])
    for _, to_kernel in recorder.of("fused_moe"):
        assert to_kernel["expert_ids"][:3].tolist() == [0, 1, -1]


def test_the_second_product_is_weighted_and_the_first_is_not() -> None:
    operation, recorder, weights = loaded("triton.fused_moe.bf16")
    call(operation)
    (first, of_first), (second, of_second) = recorder.of("fused_moe")
    assert torch.equal(first[1], weights.w1)
    assert torch.equal(second[1], weights.w2)
    assert [list(args[2].shape) for args in (first, second)] == [[M, K, 2 * INTERMEDIATE], [M, K, H]]
    assert [(one["mul_routed_weight"], one["top_k"]) for one in (of_first, of_second)] == [(False, K), (True, 1)]
    assert torch.equal(of_second["topk_weights"], WEIGHTS)
    assert (of_first["use_fp8_w8a8"], of_first["B_scale"], of_first["A_scale"]) == (False, None, None)


def test_scales_of_every_kind_reach_the_kernel() -> None:
    operation, recorder, weights = loaded("triton.fused_moe.fp8_tensor")
    call(operation)
    assert torch.equal(recorder.of("fused_moe")[0][1]["B_scale"], weights.w1_scales.float().flatten())  # type: ignore[union-attr]
    operation, recorder, weights = loaded("triton.fused_moe.fp8_block")
    call(operation)
    of_first = recorder.of("fused_moe")[0][1]
    assert (of_first["B_scale"].shape, of_first["block_shape"]) == ((E, 2, 1), [128, 128])
    operation, recorder, weights = loaded("triton.fused_moe.mxfp4")
    call(operation)
    assert weights.w1_scales is not None
    codes = recorder.of("fused_moe_mxfp4")[0][1]["B_mx_scale"]
    assert torch.equal(torch.exp2(codes.double() - 127), weights.w1_scales)


def test_the_wire_s_codes_are_not_quantised_again() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.fp8_block")
    codes, scales = torch.full((M, H), 7, dtype=torch.uint8), torch.ones(M, 1)
    operation.experts(codes, IDS, WEIGHTS, scales=scales)
    (args, given) = recorder.of("fused_moe")[0]
    assert args[0].dtype is torch.float8_e4m3fn
    assert args[0].data_ptr() == codes.data_ptr()
    assert given["A_scale"] is scales


def test_gate_and_up_are_interleaved_with_their_scales_and_biases() -> None:
    operation, _, weights = loaded("triton.gemm_a8w4.swiglu")
    assert isinstance(operation, RaggedExperts)
    assert operation.w1.shape == (E, H // 2, 2 * INTERMEDIATE)
    assert operation.w1.stride(1) == 1
    assert weights.bias1 is not None and weights.w1_scales is not None  # noqa: PT018  for mypy
    up = weights.bias1[:, INTERMEDIATE:]
    assert torch.equal(operation.bias1[:, 1::2], up)  # type: ignore[index]
    scales = operation.scale1.mT[:, 1::2]  # type: ignore[union-attr]
    assert torch.equal(torch.exp2(scales.double() - 127), weights.w1_scales[:, INTERMEDIATE:])


@pytest.mark.parametrize("name", ["triton.gemm_a8w4", "triton.gemm_a8w4.swiglu"])
def test_activation_and_routing_of_the_grouped_products(name: str) -> None:
    operation, recorder, _ = loaded(name)
    call(operation)
    (_, first), (_, second) = recorder.of("gemm_a8w4")
    swiglu = name.endswith("swiglu")
    activation = (first["apply_swiglu"], first["alpha"], first["limit"], first["swiglu_add_residual"])
    assert activation == ((True, SWIGLU_ALPHA, SWIGLU_LIMIT, True) if swiglu else (True, 1.0, None, False))
    assert "gammas" not in first
    assert torch.equal(second["gammas"], WEIGHTS.flatten())
    assert (first["bias"] is None, second["bias"] is None) == (not swiglu, not swiglu)
    assert first["routing_data"] is second["routing_data"]
    assert recorder.of("routing_from_topk")[0][1]["expert_map"].tolist() == [0, 1, 2, 3]


def test_tiles_of_experts() -> None:
    offsets, tiles, used = block_map(torch.tensor([17, 0, 3, 16], dtype=torch.int32), 36, 16)
    assert offsets.tolist() == [0, 17, 17, 20, 36]
    assert tiles.tolist() == [0, 2, 2, 3, 4]
    assert used.tolist() == [0, 1 << 16, 2, 3, -1, -1]
    assert block_map(torch.tensor([0, 2], dtype=torch.int32), 2, 16)[2].tolist() == [1, -1]


def test_rows_beyond_the_valid_ones_have_no_expert() -> None:
    operation, recorder, _ = loaded("triton.fused_moe.bf16")
    call(operation, num_rows=torch.tensor([1], dtype=torch.int32))
    assert recorder.of("align")[0][0][0].tolist() == [[0, 3], [E, E], [E, E]]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("triton.fused_moe.bf16", {"scales": torch.ones(M, 1)}, "takes no scales"),
        ("triton.e2e.bf16", {"num_rows": torch.ones(1, dtype=torch.int32)}, "takes no num_rows"),
    ],
)
def test_arguments_are_never_dropped(name: str, given: dict[str, Any], message: str) -> None:
    operation, recorder, _ = loaded(name)
    with pytest.raises(ValueError, match=message):
        call(operation, **given)
    assert recorder.calls == []


def test_what_does_not_fit_is_refused() -> None:
    operation, _, weights = loaded("triton.fused_moe.bf16")
    with pytest.raises(ValueError, match="at most 8 contiguous rows of 128"):
        operation.experts(torch.ones(9, H, dtype=BF16), IDS, WEIGHTS)
    with pytest.raises(ValueError, match="give int32 and float32"):
        operation.experts(torch.ones(M, H, dtype=BF16), IDS.long(), WEIGHTS)
    with pytest.raises(ValueError, match="3 ids for 4 experts"):
        operation.load(weights, [0, 1, 2])
    with pytest.raises(ValueError, match="takes weights stored as"):
        loaded("triton.fused_moe.mxfp4")[0].load(weights, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("name", "arch", "sizes", "reason"),
    [
        ("triton.gemm_a4w4", "gfx942", {}, "is for gfx950"),
        ("triton.fused_moe.fp8_block", "gfx950", {"hidden": 192}, "multiples of 128"),
        ("triton.e2e.bf16", "gfx950", {"intermediate": 128}, "rounds every 64 columns"),
        ("triton.e2e.bf16", "gfx950", {"shards": 2}, "has to hold every expert"),
        ("triton.gemm_a8w4", "gfx950", {"capacity": 4097}, "at most 4096 pairs"),
        ("triton.fused_moe.bf16", "gfx950", {"dtype": "float32"}, "takes bfloat16 or float16"),
        ("triton.nothing", "gfx950", {}, "is no Triton experts operator"),
    ],
)
def test_what_cannot_run(name: str, arch: str, sizes: dict[str, Any], reason: str) -> None:
    backend = aiter_triton(arch)
    asked = problem(name, **sizes)
    support = backend.support(asked, name)
    assert support.standing is Standing.REFUSED
    assert reason in support.reason
    with pytest.raises(ContractError) as refused:
        backend.contract(asked, name)
    assert reason in str(refused.value)


@pytest.mark.parametrize(("arch", "count"), [("gfx942", 6), ("gfx950", 14)])
def test_what_is_offered(arch: str, count: int) -> None:
    backend = aiter_triton(arch)
    names = [n for n in backend.operators["experts"] if backend.support(problem(n), n).standing is not Standing.REFUSED]
    assert len(names) == count
    for name in names:
        contract = backend.contract(problem(name), name)
        assert isinstance(contract, ExpertContract)
        assert contract.weight_codec is None or contract.weight_codec.payload is not None


# -------------------------------------------------------------------------------------------------------- routers
def route_problem(experts: int = 64, dtype: str = "float32") -> RowProblem:
    return RowProblem(Family.ROUTE, 1, experts, 8, dtype)


def test_ids_and_weights_are_read_back() -> None:
    # Pairs 0 to 3 of two rows go to experts 2, 0, 0, 1.
    gather = torch.tensor([1, 2, 3, 0], dtype=torch.uint16)
    scatter = torch.tensor([3, 0, 1, 2], dtype=torch.uint16)
    found = read_back(torch.tensor([2, 1, 1]).int(), gather, scatter, torch.tensor([0.1, 0.2, 0.3, 0.4]), 2)
    assert found.ids.tolist() == [[2, 0], [0, 1]]
    assert found.ids.dtype is torch.int32
    assert torch.allclose(found.weights, torch.tensor([[0.4, 0.1], [0.2, 0.3]]))
    # A histogram that is short by one leaves a pair without an expert, and the gather's end unwritten.
    unwritten = torch.tensor([1, 2, 3, 2], dtype=torch.uint16)
    short = read_back(torch.tensor([2, 1, 0]).int(), unwritten, scatter, torch.zeros(4), 2)
    assert short.ids.tolist() == [[-1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("form", "experts", "wanted"),
    [
        ("softmax_k8", 64, {"sm_first": False}),
        ("softmax_k5_plain", 64, {"sm_first": True}),
        ("after_k4", 64, {"sm_first": False}),
        ("sigmoid_k1", 64, {"score_mode": "sigmoid", "renorm": False, "routed_scaling_factor": 1.0}),
        ("sqrtsoftplus_bias_k6", 64, {"score_mode": "sqrtsoftplus", "renorm": True, "routed_scaling_factor": 1.5}),
        (
            "grouped_bias_e72",
            72,
            {
                "score_mode": "sigmoid",
                "renorm": False,
                "routed_scaling_factor": 2.5,
                "use_grouped_topk": True,
                "num_expert_group": 2,
                "topk_group": 1,
            },
        ),
    ],
)
def test_what_a_form_asks_of_the_router(form: str, experts: int, wanted: dict[str, Any]) -> None:
    made, recorder = session()
    name = f"triton.routing.{form}"
    top_k = form_of(name).numerics.top_k
    pairs = torch.arange(2 * top_k, dtype=torch.int32)
    data = SimpleNamespace(expt_hist=torch.ones(experts, dtype=torch.int32), gate_scal=torch.zeros(2 * top_k))

    def answer(*args: Any, **given: Any) -> Any:
        recorder.calls.append(("routing", args, given))
        return data, pairs, pairs

    made.moe.routing.routing = answer
    operation: Any = made.build(route_problem(experts), name)
    assert isinstance(operation, TritonRouter)
    biased = "bias" in form
    bias = torch.zeros(experts) if biased else None
    result = operation.route(torch.zeros(2, experts), bias)
    ((args, given),) = recorder.of("routing")
    assert (args[1], result.ids.shape) == (top_k, (2, top_k))
    assert given.pop("bias", None) is bias
    assert given == wanted
    with pytest.raises(ValueError, match="takes no bias" if not biased else "needs bias"):
        operation.route(torch.zeros(2, experts), None if biased else torch.zeros(experts))
    with pytest.raises(ValueError, match="at most 8 contiguous rows"):
        operation.route(torch.zeros(9, experts), bias)


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("triton.routing.grouped_g8t4k8", route_problem(320), "at most 256"),
        ("triton.routing.sigmoid_bias_k6", route_problem(64, "bfloat16"), "modelled for float32"),
        ("triton.routing.grouped_bias_e72", route_problem(64), "the form is for 72"),
        ("triton.routing.none", route_problem(), "is no Triton router"),
    ],
)
def test_routers_that_cannot_run(name: str, asked: RowProblem, reason: str) -> None:
    support = aiter_triton("gfx950").support(asked, name)
    assert support.standing is Standing.REFUSED
    assert reason in support.reason


def test_what_upstream_claims_of_routers() -> None:
    name = "triton.routing.after_k4"
    standing = {
        (arch, dtype): aiter_triton(arch).support(route_problem(64, dtype), name).standing
        for arch in ("gfx942", "gfx950")
        for dtype in ("float32", "bfloat16")
    }
    assert [asked for asked, found in standing.items() if found is Standing.CLAIMED] == [("gfx950", "float32")]
    contract = aiter_triton("gfx950").contract(route_problem(), name)
    assert isinstance(contract, RouteContract)
    assert (contract.boundaries, contract.takes_empty) == ((16, 256), False)


def test_what_is_added_to_the_sum_of_a_renormalisation() -> None:
    # Every score is about 8.8e-27, less than the 1e-20 that the kernels add to their sum.
    name = "triton.routing.grouped_g8t4k8"
    contract = aiter_triton("gfx950").contract(route_problem(), name)
    assert isinstance(contract, RouteContract)
    numerics = contract.numerics(1)
    logits, bias = torch.full((1, 64), -60.0), torch.zeros(64)
    weights, ids = routers.route(logits, bias, numerics)
    assert float(weights.max()) < 1e-5
    for declared_so, right in ((numerics, True), (replace(numerics, sum_added=0.0), False)):
        accepted, judged = routers.accepted_weights(logits, bias, ids, declared_so)
        assert bool(judged.all())
        assert bool((accepted.error_over_bound(weights) <= 1).all()) is right
        found = objection(logits[0].tolist(), bias.tolist(), ids[0].tolist(), weights[0].tolist(), declared_so)
        assert (found is None) is right
