"""AITER's sort through its adapter: the double against the specification's model, and what the adapter passes.

A pass does not prove that AITER's kernels sort so.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, cast

import pytest
import torch

from accelerated.aiter_ops import backend
from accelerated.experts import ExpertProblem
from accelerated.interface import RankContext
from accelerated.operators import Family
from accelerated.sorting import SortContract, SortOperation, SortResult
from accelerated.standin.aiter_ops import fused_moe
from conformance.selftest.suite.runs import ROOT
from reference.problem import ProblemError
from reference.sorting import Sorted, sort

H, E, K = 48, 12, 3


def built(monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> tuple[SortOperation, SortContract]:
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "gfx942")
    library = backend.aiter_standin("gfx942")
    assert library.operators[Family.SORT.value] == ("moe_sorting",)
    base = ExpertProblem(shards=3, hidden=H, intermediate=64, experts=E, top_k=K, capacity=300)
    problem = dataclasses.replace(base, **sizes)
    declared = library.contract(problem, "moe_sorting")
    assert isinstance(declared, SortContract)
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), "gfx942")
    return cast("SortOperation", library.open(context).build(problem, "moe_sorting")), declared


def defined(found: SortResult, block: int) -> Sorted:
    """The part of a library's result that means anything."""
    total, rows = found.totals.tolist()
    return Sorted(found.entries[:total].long(), found.weights[:total], found.experts[: total // block].long(), rows)


def inputs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, E, generator=generator).argsort(1)[:, :K].int()
    if rows > 3:
        ids[1], ids[2, 0], ids[3, 1] = -1, -7, 99
    return ids, torch.rand(rows, K, generator=generator) - 0.5


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("owned", [[0, 1, 2, 3], [1, 4, 9], [11], list(range(E))])
def test_against_the_model(rows: int, owned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    operation, declared = built(monkeypatch)
    operation.place(owned)
    slot_of = torch.full((E,), -1)
    slot_of[owned] = torch.arange(len(owned))
    ids, weights = inputs(rows, rows)
    for count in (None, 0, rows // 2, rows):
        given = ids.clone()
        if count is not None:
            given[count:] = torch.randint(-(1 << 31), 1 << 31, given[count:].shape).int()
        number = None if count is None else torch.tensor([count], dtype=torch.int32)
        found = operation.sort(given, weights, num_rows=number)
        wanted, got = sort(ids, weights, slot_of, declared.block, num_rows=count), defined(found, declared.block)
        assert got.rows == wanted.rows
        for name in ("entries", "weights", "experts"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        assert found.output is not None
        assert not found.output[: wanted.rows].any()


def test_one_rank_sorts_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, declared = built(monkeypatch, shards=1)
    assert not declared.masked
    operation.place(range(E))
    ids = torch.rand(20, E).argsort(1)[:, :K].int()
    weights = torch.rand(20, K)
    got, wanted = defined(operation.sort(ids, weights), 32), sort(ids, weights, torch.arange(E), 32)
    assert torch.equal(got.entries, wanted.entries)
    with pytest.raises(ValueError, match="3 of 12 experts on the only rank"):
        operation.place([0, 1, 2])


def test_what_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def recording(*args: Any) -> tuple[Any, ...]:
        made.append(args)
        return tuple(torch.zeros(1) for _ in range(5))

    monkeypatch.setattr(fused_moe, "moe_sorting", recording)
    operation, _ = built(monkeypatch, shared=1)
    operation.place([2, 3, 12])
    weights = torch.rand(1, 3)
    operation.sort(torch.tensor([[-1, 2, 13]], dtype=torch.int32), weights, num_rows=torch.ones(1, dtype=torch.int32))
    file = ROOT / "fixtures" / "signatures" / "aiter_moe.json"
    real = json.loads(file.read_text())["functions"]["aiter.fused_moe:moe_sorting"]["parameters"]
    given = dict(zip([each["name"] for each in real], made[0], strict=False))
    assert given.pop("topk_ids").tolist() == [[13, 2, 13]]
    assert given.pop("expert_mask").tolist() == [0, 0, 1, 1, *[0] * 8, 1, 0]
    assert given.pop("topk_weights") is weights
    assert given.pop("num_local_tokens").tolist() == [1]
    assert given == {"num_experts": 14, "model_dim": H, "moebuf_dtype": torch.bfloat16, "block_size": 32}


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, _ = built(monkeypatch)
    ids, weights = inputs(2, 0)
    with pytest.raises(RuntimeError, match="call place first"):
        operation.sort(ids, weights)
    operation.place([0])
    with pytest.raises(ValueError, match="give int32"):
        operation.sort(ids.long(), weights)
    with pytest.raises(ValueError, match="ascending"):
        operation.place([1, 0])
    operation.close()
    with pytest.raises(RuntimeError, match="closed"):
        operation.sort(ids, weights)
    with pytest.raises(ProblemError, match="block is 0"):
        SortContract(block=0)
