"""Real AITER Triton experts and routers against the reference, in a process of its own.

Scope: the declared contracts on adversarial rows, that wrong declarations are noticed, and the defects known at AITER
e4048607, each with its smallest input. Interpreted, a pass shows that the algorithm is right, not that hardware is.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from accelerated.aiter_ops import triton_experts_contract, triton_moe_library
from accelerated.aiter_ops.triton_backend import AiterTritonBackend, aiter_triton
from accelerated.aiter_ops.triton_library import LibraryError
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.aiter_ops.triton_operations import TritonSession
from accelerated.aiter_ops.triton_routing import TritonRouter
from accelerated.contract import Standing
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.interface import RankContext
from accelerated.operators import Family, RowProblem
from accelerated.routers import RouteContract, RouteResult
from conformance.rank.expert_weights import weights_of
from conformance.rank.judge_routes import judge_route
from conformance.rank.judge_rows import Answered
from conformance.selftest.reference.ranks import World
from reference.codecs import ScaleFormat, ScaleRule
from reference.expert_numerics import ExpertNumerics, GateLayout, SlotSum
from reference.experts import accepted
from reference.formats import E2M1
from reference.intervals import Interval

BF16, CPU = torch.bfloat16, torch.device("cpu")
HIDDEN, EXPERTS, TOP_K = 128, 5, 2
_GONE = "AITER no longer does this: delete the scenario, and tighten the declaration if one was widened for it"


@functools.cache
def _opened() -> tuple[AiterTritonBackend, TritonSession]:
    """Backend and session of whatever architecture the environment has AITER report."""
    warnings.simplefilter("ignore", RuntimeWarning)
    errors = []
    for arch in ("gfx942", "gfx950"):
        context = RankContext(0, 1, CPU, torch.distributed.group.WORLD, arch)  # type: ignore[arg-type]
        try:
            return aiter_triton(arch), aiter_triton(arch).open(context)
        except LibraryError as error:
            errors.append(str(error))
    raise LibraryError("; ".join(errors))


def _moe() -> TritonMoe:
    return _opened()[1].moe


def _problem(name: str, *, shards: int = 1) -> ExpertProblem:
    intermediate = triton_experts_contract.OPERATORS[name].most_intermediate or 128
    return ExpertProblem(shards, HIDDEN, intermediate, EXPERTS, TOP_K, 64)


def _offered(*, shards: int = 1) -> Iterator[str]:
    backend, _ = _opened()
    for name in triton_experts_contract.names():
        if backend.support(_problem(name, shards=shards), name).standing is not Standing.REFUSED:
            yield name


@dataclass
class _Call:
    """One call: rows, ids and weights, of which ``valid`` rows are looked at."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    owned: Sequence[int] = range(EXPERTS)
    valid: int | None = None
    over_the_wire: bool = False


def _judge(name: str, call: _Call, numerics: ExpertNumerics | None = None) -> int:
    """Elements of the result that are not accepted."""
    backend, session = _opened()
    problem = _problem(name, shards=1 if len(call.owned) == EXPERTS else 2)
    contract = backend.contract(problem, name)
    operation: Any = session.build(problem, name)
    assert isinstance(contract, ExpertContract)
    weights = weights_of(
        list(call.owned),
        hidden=HIDDEN,
        intermediate=problem.intermediate,
        codec=contract.weight_codec,
        dtype=BF16,
        biased=contract.biased,
        device=CPU,
    )
    operation.load(weights, list(call.owned))
    given, scales = operation.quantise(call.rows) if call.over_the_wire else (call.rows, None)
    count = None if call.valid is None else torch.tensor([call.valid], dtype=torch.int32)
    result = operation.experts(given, call.ids, call.weights, scales=scales, num_rows=count)
    slot_of = torch.full((EXPERTS,), -1)
    slot_of[list(call.owned)] = torch.arange(len(call.owned))
    valid = slice(0, call.valid)
    legal = accepted(
        Interval.exact(call.rows[valid]),
        call.ids[valid],
        call.weights[valid],
        weights,
        slot_of,
        numerics or contract.numerics(len(call.rows)),
        BF16,
    )
    return int((legal.error_over_bound(result[valid]) > 1).sum())


def _rows(count: int, seed: int = 0) -> _Call:
    """Rows of several magnitudes, a zero row, a row of minus zeros and one with a zero group."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, HIDDEN, generator=generator)
    rows[1::4] *= torch.exp2(torch.randint(-12, 7, (1, HIDDEN), generator=generator).float())
    rows[2::4] = torch.randint(-8, 9, (1, HIDDEN), generator=generator).float()
    rows[3], rows[4], rows[5, :32] = 0.0, -0.0, 0.0
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(count)]).int()
    return _Call(rows.to(BF16), ids, torch.randn(count, TOP_K, generator=generator))


# -------------------------------------------------------------------------------------------------------- experts
def experts_keep_their_contracts(world: World) -> None:
    for name in _offered():
        call = _rows(12)
        if not triton_experts_contract.OPERATORS[name].row_scales:
            call.rows = call.rows[:3].repeat(4, 1)  # its zero rows are a scenario below
        assert _judge(name, call) == 0, name
        # All rows to one pair of experts: the others are empty.
        assert _judge(name, replace(call, ids=torch.tensor([[4, 1]] * 12).int())) == 0, name
        assert _judge(name, _Call(call.rows[:0], call.ids[:0], call.weights[:0])) == 0, name


def masked_and_distant_experts_contribute_nothing(world: World) -> None:
    for name in _offered(shards=2):
        if name == "triton.silu_fused.bf16":
            continue  # a scenario below
        call = _rows(10)
        assert _judge(name, replace(call, owned=(1, 4))) == 0, name
        call.ids[0, 1], call.ids[4], call.ids[7, 0] = -1, -1, -1
        assert _judge(name, call) == 0, name
        assert _judge(name, replace(call, ids=torch.full_like(call.ids, -1))) == 0, name
        call.rows[8:], call.weights[8:] = torch.nan, torch.nan
        assert _judge(name, replace(call, valid=8)) == 0, name


def rows_may_come_over_the_wire(world: World) -> None:
    for name in _offered():
        if triton_experts_contract.OPERATORS[name].wire:
            assert _judge(name, replace(_rows(12), over_the_wire=True)) == 0, name


def a_wrong_declaration_is_noticed(world: World) -> None:
    backend, _ = _opened()
    call = _rows(12)
    kinds = ("fused_moe.bf16", "fp8_tensor", "fp8_block", "fused_moe.mxfp4", "gemm_a8w8.mx", "gemm_a4w4.swiglu")
    for name in (n for n in _offered() if n.endswith(kinds)):
        contract = backend.contract(_problem(name), name)
        assert isinstance(contract, ExpertContract)
        right = contract.numerics(12)
        wrong: list[ExpertNumerics] = [replace(right, limit=0.25)]
        if right.input_codec is not None and right.intermediate_codec is not None:
            # Twice or half a scale gives the same values: where it is a power of two, another rule that saturates.
            other = ScaleRule.UP if right.input_codec.payload is E2M1 else ScaleRule.DOWN
            linear = right.input_codec.scale_format is ScaleFormat.FLOAT32
            change: dict[str, Any] = {"maximum": right.input_codec.maximum * 0.75} if linear else {"scale_rule": other}
            wrong += [replace(right, input_codec=replace(right.input_codec, **change))]
            wrong += [replace(right, intermediate_codec=replace(right.intermediate_codec, **change))]
        rows = (
            call
            if triton_experts_contract.OPERATORS[name].row_scales
            else replace(call, rows=call.rows[:3].repeat(4, 1))
        )
        for numerics in wrong:
            assert _judge(name, rows, numerics) > 0, (name, numerics)


def a_rounding_of_the_slots_is_seen(world: World) -> None:
    # One expert of weight 1 + 2**-7 and integers: only the rounding before the sum tells the two declarations apart.
    backend, _ = _opened()
    name = "triton.fused_moe.bf16"
    contract = backend.contract(_problem(name), name)
    assert isinstance(contract, ExpertContract)
    once = replace(contract.numerics(12), slot_sum=SlotSum.FLOAT32)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(-8, 9, (60, HIDDEN), generator=generator).to(BF16)
    call = _Call(rows, torch.tensor([[0, 1]] * 60).int(), torch.tensor([[1.0, 1.0078125]]).repeat(60, 1))
    assert _judge(name, call) == 0
    assert _judge(name, call, once) > 0


# -------------------------------------------------------------------------------------------------------- routers
def _route(name: str, logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[str, RouteResult]:
    """What is wrong with one call, and its result; "" if nothing."""
    backend, session = _opened()
    problem = RowProblem(Family.ROUTE, 1, logits.shape[1], 512, "float32")
    contract, operation = backend.contract(problem, name), session.build(problem, name)
    assert isinstance(contract, RouteContract)
    assert isinstance(operation, TritonRouter)
    result = operation.route(logits, bias)
    given = torch.empty(0) if bias is None else bias
    mismatch, _ = judge_route(0, Answered(logits[None], None, given, 0.0, 0.0, -1, result), contract)
    return ("" if mismatch is None else str(mismatch)), result


def routers_keep_their_contracts(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, experts in (("after_k4", 72), ("sigmoid_k1", 64), ("softmax_k5_plain", 72), ("grouped_bias_e72", 72)):
        logits = torch.randn(5, experts, generator=generator) * 3
        logits[1], logits[2, experts // 2 :], logits[3] = logits[1].round(), -torch.inf, -logits[3].abs() - 1
        bias = torch.randn(experts, generator=generator) / 16 if "bias" in name else None
        assert _route(f"triton.routing.{name}", logits, bias)[0] == "", name


def ids_exist_whatever_the_logits(world: World) -> None:
    # -inf everywhere in 72 experts of 128 columns: the columns behind the last expert are not chosen.
    logits = torch.full((3, 72), -torch.inf)
    logits[1], logits[2, 0] = -torch.nan, torch.inf
    assert _route("triton.routing.after_k4", logits)[0] == ""


# ------------------------------------------------------------------------- defects known at e4048607: gone is good news
def defect_zeros_of_a_distant_expert_reach_the_next_row(world: World) -> None:
    # _triton_kernels/moe/moe_op_silu_fused.py:713-729: as many zeros as W1 has columns, into rows of half as many. Pair
    # 0 is masked and takes pair 1's row with it, and beyond the last row the kernel writes past the buffer.
    call = _Call(torch.ones(1, HIDDEN).to(BF16), torch.tensor([[-1, 0]]).int(), torch.ones(1, TOP_K))
    assert _judge("triton.fused_moe.bf16", call) == 0
    assert _judge("triton.silu_fused.bf16", call) > 0, _GONE


def defect_a_persistent_program_stops_at_a_distant_expert(world: World) -> None:
    # _triton_kernels/moe/moe_op.py:879-996: the tile number advances only where there is an expert.
    assert _persistent_misses(distant=False) == 0
    assert _persistent_misses(distant=True) > 0, _GONE


def _persistent_misses(*, distant: bool) -> int:
    """Elements that differ from the plain kernel's: two experts of two tiles each, of which the first may be elsewhere.

    There are two programs.
    """
    moe, outputs = _moe(), []
    kernel = importlib.import_module("aiter.ops.triton.moe.moe_op")
    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    pairs = torch.tensor([0] + [2] * 15 + [1] + [2] * 15, dtype=torch.int32)
    cuda: Any = torch.cuda
    properties = cuda.get_device_properties
    cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=1)
    try:
        for persistent in (False, True):
            kernel.moe_set_use_persistent_kernel(persistent)
            output = torch.full((2, 1, 128), 7.0).to(BF16)
            moe.fused_moe(
                torch.ones(2, 64).to(BF16),
                torch.ones(2, 128, 64).to(BF16),
                output,
                None,
                None,
                None,
                torch.ones(2, 1),
                torch.tensor([[0], [1]]).int(),
                pairs,
                torch.tensor([-1 if distant else 0, 1], dtype=torch.int32),
                torch.tensor([32], dtype=torch.int32),
                False,
                1,
                moe.triton_dtype[BF16],
                False,
                False,
                False,
                config=config,
            )
            outputs.append(output)
    finally:
        kernel.moe_set_use_persistent_kernel(False)
        cuda.get_device_properties = properties
    return int((outputs[0] != outputs[1]).sum())


def defect_rows_of_zeros_are_nan_per_tensor(world: World) -> None:
    # moe_op.py:116-118 quantises with a scale of 0 (_triton_kernels/quant/quant.py:50-54).
    call = _Call(torch.zeros(1, HIDDEN).to(BF16), torch.tensor([[0, 1]]).int(), torch.ones(1, TOP_K))
    assert _judge("triton.fused_moe.fp8_tensor", call) == HIDDEN, _GONE


def defect_experts_that_tie_count_once_for_their_group(world: World) -> None:
    # _triton_kernels/moe/moe_routing/topk.py:569-580: whatever equals the group's best is left out of its second best.
    logits = torch.tensor([[5.0, 5.0, 4.0, -2.0]])
    data, _, _ = _moe().routing.routing(
        logits,
        1,
        score_mode="sigmoid",
        bias=torch.zeros(4),
        use_grouped_topk=True,
        num_expert_group=2,
        topk_group=1,
    )
    assert data.expt_hist.tolist() == [0, 0, 1, 0], _GONE  # an expert of the first group is due


def defect_a_row_of_nan_changes_other_rows(world: World) -> None:
    # moe_routing/topk.py:611-615 names an expert twice, and the sort counts it once: positions of other rows move.
    logits = torch.zeros(2, 64)
    logits[0], logits[1, :9] = torch.nan, torch.arange(9.0)
    wrong, _ = _route("triton.routing.grouped_g8t4k8", logits, torch.zeros(64))
    assert "route.ids" in wrong, _GONE


def defect_no_rows_divide_by_zero(world: World) -> None:
    # moe_routing/routing.py:330-331: blocks of no rows. With a score mode it reads out of bounds instead; not run here.
    try:
        _moe().routing.routing(torch.empty(0, 64), 4)
    except ZeroDivisionError:
        return
    raise AssertionError(_GONE)


def defect_top1_stores_whole_blocks(world: World) -> None:
    # _triton_kernels/moe/moe_routing_sigmoid_top1_fused.py:123-124 store without a mask: 16 rows for one.
    root = "aiter.ops.triton._triton_kernels.moe.moe_routing_sigmoid_top1_fused"
    kernel = importlib.import_module(root)._routing_sigmoid_top1_kernel
    ids, weights = torch.full((32, 1), -7, dtype=torch.int32), torch.zeros(32, 1)
    x, w = torch.ones(1, 16).to(BF16), torch.eye(16).to(BF16)
    kernel[(1,)](x, w, ids, weights, 1, 16, 16, 16, 1, 16, 1, 1, 1, 1, 1, 16, 16, 16, 1, False)
    assert (ids[1:16] != -7).all(), _GONE


def the_tree_has_every_function(world: World) -> None:
    loaded = triton_moe_library.load()
    assert all(getattr(loaded, field) is not None for field in TritonMoe.__dataclass_fields__)
    assert {one.gate_layout for one in _contracts()} == set(GateLayout)


def _contracts() -> Iterator[ExpertContract]:
    for name in triton_experts_contract.names():
        yield triton_experts_contract.contract(_problem(name), name, "gfx950")
