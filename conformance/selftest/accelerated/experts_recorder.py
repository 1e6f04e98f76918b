"""An AITER whose ``fused_moe`` writes down how it is called, and the adapter's experts over it.

Scope: arguments are bound to the recorded signature of the real function; nothing is computed. It proves nothing about
AITER.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch

from accelerated.aiter_ops import experts
from accelerated.aiter_ops.experts_contract import contract
from accelerated.aiter_ops.experts_numerics import ENVIRONMENT
from accelerated.aiter_ops.library import AiterLibrary, load_standin
from accelerated.experts import ExpertProblem
from conformance.rank.expert_weights import weights_of
from conformance.selftest.suite.runs import ROOT
from reference.expert_weights import ExpertWeights

H, INNER, E = 256, 128, 8
CPU = torch.device("cpu")


def recorded(name: str) -> inspect.Signature:
    """A function's signature as the real library was seen to have it."""
    entry = json.loads((ROOT / "fixtures" / "signatures" / "aiter_moe.json").read_text())["functions"][name]
    return inspect.Signature(
        [
            inspect.Parameter(
                each["name"], getattr(inspect.Parameter, each["kind"]), default=each.get("default", inspect._empty)
            )
            for each in entry["parameters"]
        ]
    )


class Recorder:
    """``aiter.fused_moe`` that binds its arguments and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def fused_moe(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(recorded("aiter.fused_moe:fused_moe").bind(*args, **kwargs).arguments)
        self.calls.append(given)
        return torch.full((given["topk_ids"].shape[0], H), float(len(self.calls)), dtype=given["dtype"])


def fix_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double is a gfx950, and nothing else is set."""
    monkeypatch.setenv("AITER_STANDIN_ARCH", "gfx950")
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AITER_BYPASS_TUNE_CONFIG", "1")


def library(recorder: Any) -> AiterLibrary:
    real = load_standin()
    parts = {"fused_moe": recorder}
    return AiterLibrary(
        **{name: getattr(real, name) for name in AiterLibrary.__annotations__ if name != "part"},
        part=lambda name: parts.get(name) or real.part(name),
    )


def built(name: str, recorder: Any = None, **sizes: Any) -> tuple[experts.AiterExperts, ExpertProblem]:
    base = ExpertProblem(
        shards=2, hidden=H, intermediate=INNER, experts=E, top_k=1 if "stage1" in name else 2, capacity=64
    )
    problem = dataclasses.replace(base, **sizes)
    return experts.AiterExperts(library(recorder), name, problem, contract(problem, name, "gfx950")), problem


def weights(name: str, problem: ExpertProblem, owned: list[int]) -> ExpertWeights:
    declared = contract(problem, name, "gfx950")
    return weights_of(
        owned,
        hidden=H,
        intermediate=problem.intermediate,
        codec=declared.weight_codec,
        dtype=torch.bfloat16,
        biased=declared.biased,
        device=CPU,
    )


def loaded(name: str, recorder: Any, owned: list[int], **sizes: Any) -> tuple[experts.AiterExperts, ExpertWeights]:
    operation, problem = built(name, recorder, **sizes)
    local = weights(name, problem, owned)
    operation.load(local, owned)
    return operation, local


def call(operation: experts.AiterExperts, rows: int = 3, k: int = 2, **more: Any) -> torch.Tensor:
    ids = torch.arange(rows * k, dtype=torch.int32).view(rows, k) % E
    return operation.experts(torch.ones(rows, H, dtype=torch.bfloat16), ids, torch.ones(rows, k), **more)
