"""What the adapter of AITER's fused experts refuses: weights, arguments, environments and parts that do not fit.

Scope: messages, and that a refused call reaches nothing. A pass does not prove that what is accepted fits AITER.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import pytest
import torch

from accelerated.aiter_ops import experts
from accelerated.aiter_ops.experts_contract import contract
from accelerated.aiter_ops.experts_numerics import ENVIRONMENT
from accelerated.aiter_ops.library import LibraryError, load_standin
from accelerated.experts import ExpertProblem
from conformance.selftest.accelerated.experts_recorder import (
    INNER,
    E,
    H,
    Recorder,
    built,
    call,
    fix_environment,
    library,
    loaded,
    weights,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_environment(monkeypatch)


@pytest.mark.parametrize(
    ("owned", "message"),
    [([1, 0, 2, 3], "ascending"), ([0, 0, 1, 2], "ascending"), ([0, 1, 2, 9], "ascending"), ([0, 1, 2], "for 3 ids")],
)
def test_experts_that_a_mask_cannot_name(owned: list[int], message: str) -> None:
    operation, problem = built("fused_moe.bf16", Recorder())
    with pytest.raises(ValueError, match=message):
        operation.load(weights("fused_moe.bf16", problem, [0, 1, 2, 3]), owned)


def test_weights_of_another_scheme() -> None:
    operation, problem = built("fused_moe.bf16", Recorder())
    with pytest.raises(ValueError, match="the contract says how"):
        operation.load(weights("fused_moe.fp8_token", problem, [0, 1, 2, 3]), [0, 1, 2, 3])
    alone, problem = built("fused_moe.bf16", Recorder(), shards=1)
    with pytest.raises(ValueError, match="4 of 8 experts on the only rank"):
        alone.load(weights("fused_moe.bf16", problem, [0, 1, 2, 3]), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fused_moe.bf16", {"rows": torch.ones(2, H)}, "without scales"),
        ("fused_moe.bf16", {"ids": torch.zeros(2, 2, dtype=torch.int64)}, "int32 and float32"),
        ("fused_moe.bf16", {"weights": torch.ones(2, 2, dtype=torch.bfloat16)}, "int32 and float32"),
        ("fused_moe.bf16", {"weights": torch.ones(2, 3)}, "int32 and float32"),
        ("fused_moe.bf16", {"scales": torch.ones(2, 1)}, "no wire"),
        ("fused_moe.bf16", {"num_rows": torch.ones(1, dtype=torch.int64)}, "one int32"),
        ("fused_moe.fp8_token_stage1", {"num_rows": torch.ones(1, dtype=torch.int32)}, "contract takes it"),
        ("fused_moe.fp8_token", {"rows": torch.ones(2, H, dtype=torch.uint8)}, "without scales"),
        ("fused_moe.fp8_token", {"scales": torch.ones(2, 2)}, r"the wire has \[2, 1\] of 4"),
        ("fused_moe.mxfp4", {"scales": torch.ones(2, H // 32)}, r"of 1 bytes"),
    ],
)
def test_arguments_that_the_library_would_misread(name: str, change: dict[str, Any], message: str) -> None:
    recorder = Recorder()
    operation, _ = loaded(name, recorder, [0, 1, 2, 3])
    k = 1 if "stage1" in name else 2
    arguments = {
        "rows": torch.ones(2, H, dtype=torch.bfloat16),
        "ids": torch.zeros(2, k, dtype=torch.int32),
        "weights": torch.ones(2, k),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        operation.experts(arguments.pop("rows"), arguments.pop("ids"), arguments.pop("weights"), **arguments)
    assert recorder.calls == []


def test_no_call_before_load_or_after_close() -> None:
    operation, _ = built("fused_moe.bf16", Recorder())
    with pytest.raises(RuntimeError, match="no weights"):
        call(operation)
    operation.close()
    with pytest.raises(RuntimeError, match="after close"):
        call(operation)


def test_the_environment_is_fixed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AITER_BYPASS_TUNE_CONFIG")
    built("fused_moe.bf16", Recorder())
    assert os.environ["AITER_BYPASS_TUNE_CONFIG"] == "1"
    for name, (wanted, _) in ENVIRONMENT.items():
        monkeypatch.setenv(name, wanted)
        built("fused_moe.bf16", Recorder())
        monkeypatch.setenv(name, "3")
        with pytest.raises(RuntimeError, match=f"{name} is 3"):
            built("fused_moe.bf16", Recorder())
        monkeypatch.delenv(name)


def test_a_broken_part_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_standin()
    with pytest.raises(
        LibraryError, match=r"accelerated\.standin\.aiter_ops\.ops\.nothing is broken: .*ModuleNotFound"
    ):
        real.part("ops.nothing")
    # A module that cannot be imported: what sys.modules holds for one that failed.
    monkeypatch.setitem(sys.modules, "accelerated.standin.aiter_ops.fused_moe", None)
    broken = dataclasses.replace(library(Recorder()), part=real.part)
    problem = ExpertProblem(2, H, INNER, E, 2, 64)
    with pytest.raises(LibraryError, match=r"fused_moe is broken"):
        experts.AiterExperts(broken, "fused_moe.bf16", problem, contract(problem, "fused_moe.bf16", "gfx950"))
    assert real.quant.get_hip_quant is not None
