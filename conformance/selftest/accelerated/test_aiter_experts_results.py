"""AITER's double through its adapter, judged by what the contract accepts.

Scope: the declared numerics, the adapter and the double were written apart; each result must lie in the declared
interval at row counts on both sides of every switch, for every shard, with masked ids, poisoned tails and quantised
rows. A pass does not prove that AITER's kernels compute so.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from accelerated.aiter_ops import backend
from accelerated.aiter_ops.experts_numerics import OPERATORS
from accelerated.contract import Standing
from accelerated.experts import ExpertContract, ExpertOperation, ExpertProblem
from accelerated.interface import RankContext
from accelerated.standin.aiter_ops import experts_plan
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from accelerated.standin.aiter_ops.ops.flydsl.moe_common import GateMode
from accelerated.standin.aiter_ops.utility import dtypes
from conformance.rank.expert_weights import weights_of
from reference.codecs import Codec
from reference.expert_weights import ExpertWeights
from reference.experts import accepted
from reference.intervals import Interval
from reference.layouts import unpack_e2m1
from reference.rounding import decode, decode_e8m0
from reference.scales import expand

H, INNER, E = 256, 256, 4
CELLS = [(name, arch) for name in OPERATORS for arch in ("gfx942", "gfx950") if arch == "gfx950" or "mx" not in name]
#: Rows on both sides of 16 and 32, and for gpt-oss of 255.
ROWS = (1, 16, 17, 33)


@dataclasses.dataclass
class Shard:
    """One rank's experts, alone in the process."""

    operation: ExpertOperation
    contract: ExpertContract
    local: ExpertWeights
    slot_of: torch.Tensor
    hidden: int = H


def shards(
    name: str, arch: str, count: int, *, shared: int = 0, capacity: int = 300, sizes: tuple[int, int] = (H, INNER)
) -> list[Shard]:
    """Every rank's experts."""
    k = 1 if "stage1" in name else 2
    problem = ExpertProblem(count, *sizes, E, k, capacity, shared=shared)
    library = backend.aiter_standin(arch)
    assert library.support(problem, name).standing is not Standing.REFUSED
    declared = library.contract(problem, name)
    assert isinstance(declared, ExpertContract)
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), arch)
    session, made = library.open(context), []
    for rank in range(count):
        owned = [*range(rank * E // count, (rank + 1) * E // count), *range(E, E + shared)]
        local = weights_of(
            owned,
            hidden=sizes[0],
            intermediate=sizes[1],
            codec=declared.weight_codec,
            dtype=torch.bfloat16,
            biased=declared.biased,
            device=torch.device("cpu"),
        )
        slot_of = torch.full((E + shared,), -1)
        slot_of[owned] = torch.arange(len(owned))
        operation = cast("ExpertOperation", session.build(problem, name))
        operation.load(local, owned)
        made.append(Shard(operation, declared, local, slot_of, sizes[0]))
    return made


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter and the backend set these; they are taken back."""
    monkeypatch.setenv("AITER_BYPASS_TUNE_CONFIG", "1")
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "gfx942")
    torch.set_num_threads(1)


def inputs(rows: int, k: int, *, masked: bool, hidden: int = H) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, E, generator=generator).argsort(1)[:, :k].int()
    if masked and rows > 3:
        ids[1], ids[2, -1], ids[3] = -1, -1, 77
    x = torch.randn(rows, hidden, generator=generator)
    x[rows // 2] = 0
    return x.bfloat16(), ids, torch.randn(rows, k, generator=generator)


def decoded(codes: torch.Tensor, scales: torch.Tensor, wire: Codec) -> torch.Tensor:
    raw = codes.view(torch.uint8)
    wide = unpack_e2m1(raw) if wire.payload.bits == 4 else raw.long()
    each = scales.double() if scales.dtype == torch.float32 else decode_e8m0(scales.view(torch.uint8))
    return decode(wide, wire.payload) * expand(each, wire, *wide.shape)


def worst(shard: Shard, rows: int, *, tail: int, quantised: bool, masked: bool) -> float:
    """Largest error over bound of the valid rows; what lies behind them is poison."""
    k = 2 if shard.contract.takes_num_rows else 1
    x, ids, weights = inputs(rows, k, masked=masked, hidden=shard.hidden)
    number = torch.tensor([rows], dtype=torch.int32) if tail else None
    given = torch.cat([x, torch.full((tail, shard.hidden), torch.nan, dtype=x.dtype)])
    wide = torch.cat([ids, torch.randint(-(1 << 31), 1 << 31, (tail, k)).int()])
    heavy = torch.cat([weights, torch.full((tail, k), torch.nan)])
    values, scales = x.double(), None
    if quantised:
        given, scales = shard.operation.quantise(given)
        assert scales is not None
        assert shard.contract.wire is not None
        values = decoded(given, scales, shard.contract.wire)[:rows]
    result = shard.operation.experts(given, wide, heavy, scales=scales, num_rows=number)
    assert tuple(result.shape) == (rows + tail, shard.hidden)
    legal = accepted(
        Interval.exact(values),
        ids,
        weights,
        shard.local,
        shard.slot_of,
        shard.contract.numerics(rows + tail),
        torch.bfloat16,
        quantised=quantised,
    )
    assert bool(result[:rows].any()) or rows < 4, "an all-zero result proves nothing"
    return float(legal.error_over_bound(result[:rows]).max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "arch"), CELLS)
def test_each_shard_is_within_its_contract(name: str, arch: str, rows: int) -> None:
    for shard in shards(name, arch, 2):
        assert worst(shard, rows, tail=0, quantised=False, masked=True) <= 1


@pytest.mark.parametrize(("name", "arch"), [cell for cell in CELLS if "stage1" not in cell[0]])
def test_poison_behind_the_valid_rows(name: str, arch: str) -> None:
    """The buffer decides the kernel: 14 valid rows in one of 17 take that of 17."""
    for shard in shards(name, arch, 2):
        assert worst(shard, 14, tail=3, quantised=False, masked=True) <= 1


@pytest.mark.parametrize(("name", "arch"), [cell for cell in CELLS if OPERATORS[cell[0]].wired])
def test_rows_that_come_quantised(name: str, arch: str) -> None:
    (shard,) = shards(name, arch, 1)
    for rows, tail in ((16, 0), (17, 0), (9, 30)):
        assert worst(shard, rows, tail=tail, quantised=True, masked=False) <= 1


@pytest.mark.parametrize("rows", [255, 256])
def test_gpt_oss_on_both_sides_of_256_rows(rows: int) -> None:
    (shard,) = shards("fused_moe.mxfp4_swiglu", "gfx950", 1)
    assert worst(shard, rows, tail=0, quantised=False, masked=False) <= 1


def test_shared_experts_beside_the_routed_ones() -> None:
    first, second = shards("fused_moe.bf16", "gfx942", 2, shared=1)
    x, ids, weights = inputs(6, 2, masked=False)
    column = torch.where(torch.arange(6)[:, None] % 2 == 0, E, -1).int()
    wide, heavy = torch.cat([ids, column], 1), torch.cat([weights, torch.ones(6, 1)], 1)
    for shard in (first, second):
        got = shard.operation.experts(x, wide, heavy)
        numerics = shard.contract.numerics(6)
        legal = accepted(Interval.exact(x.double()), wide, heavy, shard.local, shard.slot_of, numerics, torch.bfloat16)
        assert float(legal.error_over_bound(got).max()) <= 1


@pytest.mark.parametrize(
    ("what", "name", "rows"),
    [
        ("mask", "fused_moe.bf16", 5),
        ("mark", "fused_moe.mxfp4", 5),
        ("scale", "fused_moe.fp8_token", 5),
        ("scale", "fused_moe.fp8_block", 40),
        ("bias", "fused_moe.mxfp4_swiglu", 5),
    ],
)
def test_what_the_bound_catches(what: str, name: str, rows: int) -> None:
    """Each of these is a defect that callers have had; the hulls are not so wide that it passes."""
    shard = shards(name, "gfx950", 2)[1]
    held = cast("object", shard.operation)._held  # type: ignore[attr-defined]
    if what == "mask":
        held.mask = torch.tensor([1, 1, 0, 0, 0], dtype=torch.int32)
    elif what == "mark":
        held.w1, held.w2 = held.w1.clone(), held.w2.clone()
    elif what == "scale":
        held.w1_scale = held.w1_scale * 2
    else:
        held.bias1 = held.bias1.flip(0)
    assert worst(shard, rows, tail=0, quantised=False, masked=True) > 1


@pytest.mark.parametrize("inner", [128, 192, 384, 640, 768])
@pytest.mark.parametrize(("name", "arch"), CELLS)
def test_the_double_chooses_what_the_contract_declares(
    name: str, arch: str, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages, tiles, parts of H and types of rows, restated twice from the same source."""
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, arch)
    operator, k = OPERATORS[name], 1 if "stage1" in name else 4
    weights = {"bf16": dtypes.bf16, "mxfp4": dtypes.fp4x2}.get(operator.scheme, dtypes.get_dtype_fp8())
    kind = {"per_128x128": "per_1x128"}.get(operator.quant_type, operator.quant_type)
    for count in (1, 4):
        sizes = ExpertProblem(count, 1024, inner, 64, k, 4096)
        if backend.aiter_standin(arch).support(sizes, name).standing is Standing.REFUSED:
            continue
        declared = backend.aiter_standin(arch).contract(sizes, name)
        assert isinstance(declared, ExpertContract)
        for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 255, 256, 257, 4096):
            call = experts_plan.Call(
                rows, k, 1024, inner, 64 // count, 64 + (count > 1), count > 1, torch.bfloat16, weights,
                getattr(ActivationType, operator.activation_type), getattr(QuantType, kind), operator.stage1,
                GateMode.SEPARATED, (True, True),
            )  # fmt: skip
            plan = experts_plan.choose(call, experts_plan.row_type(call, torch.bfloat16, False), None)
            numerics = declared.numerics(rows)
            assert (plan.tile > 0) is numerics.intermediate_any_group
            assert not plan.tile or inner // plan.tile <= numerics.inner_parts
            assert plan.cuts <= numerics.gemm1_parts
            assert (plan.rows is None) is (numerics.input_codec is None)
            assert plan.biased is declared.biased or name == "fused_moe.mxfp4"
