"""AITER's Triton functions that write down how they are called, and a session of the adapters over them.

Scope: results of the right shape that hold nothing. They prove nothing about AITER.
"""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch

from accelerated.aiter_ops.triton_library import TritonLibrary
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.aiter_ops.triton_operations import TritonSession

#: Slots of a row and rows of a call.
K, M = 2, 3
BF16 = torch.bfloat16


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
