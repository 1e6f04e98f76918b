"""Rank processes for the tests of the MoRI double: one spawn runs many scenarios over gloo.

Scope: start, run, collect. A scenario is a function of (rank, world) that asserts; its failure on a rank is reported as
that rank's traceback. It proves nothing by itself.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import ops, shmem

DEADLINE = 100.0


def run(world: int, module: str, scenarios: Sequence[str], folder: Path, join: bool = True) -> list[dict[str, str]]:
    """Run ``scenarios`` of ``module`` in order on ``world`` ranks; return {scenario: error or ""} of every rank.

    The entry "exit" is the exit code, "stderr" what the rank printed there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    ranks = [
        context.Process(target=_rank, args=(rank, world, module, list(scenarios), str(folder), join))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [_collect(rank, process.exitcode, folder) for rank, process in enumerate(ranks)]


def _collect(rank: int, code: int | None, folder: Path) -> dict[str, str]:
    lines = (folder / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    found = {name: error for line in lines for name, error in json.loads(line).items()}
    stderr = (folder / f"rank{rank}.stderr").read_text(encoding="utf-8")
    return {**found, "exit": str(code), "stderr": stderr}


def _rank(rank: int, world: int, module: str, scenarios: list[str], folder: str, join: bool) -> None:
    stderr = os.open(f"{folder}/rank{rank}.stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(stderr, 2)
    torch.set_num_threads(1)
    with Path(folder, f"rank{rank}.jsonl").open("w", encoding="utf-8") as report:
        store = torch._C._distributed_c10d.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=10))
        torch._C._distributed_c10d._register_process_group("default", dist.group.WORLD)  # type: ignore[arg-type]
        if join:
            shmem.shmem_torch_process_group_init("default")
        functions = importlib.import_module(module)
        for name in scenarios:
            error = ""
            try:
                getattr(functions, name)(rank, world)
            except Exception:  # noqa: BLE001 - reported to the driver, which fails the test
                error = traceback.format_exc()
            report.write(json.dumps({name: error}) + "\n")
            report.flush()
        dist.destroy_process_group()


def build(rank: int, world: int, kind: str = "IntraNode", **changes: object) -> ops.EpDispatchCombineOp:
    """Build an operator: hidden 8, two experts per rank, top-2, capacity 4, bfloat16, one node, with ``changes``."""
    sizes: dict[str, object] = {
        "data_type": torch.bfloat16,
        "rank": rank,
        "world_size": world,
        "hidden_dim": 8,
        "scale_dim": 0,
        "scale_type_size": 0,
        "max_token_type_size": 4,
        "max_num_inp_token_per_rank": 4,
        "num_experts_per_rank": 2,
        "num_experts_per_token": 2,
        "kernel_type": getattr(ops.EpDispatchCombineKernelType, kind),
        "gpu_per_node": world,
        **changes,
    }
    return ops.EpDispatchCombineOp(ops.EpDispatchCombineConfig(**sizes))  # type: ignore[arg-type]


def rows(rank: int, tokens: int, hidden: int = 8) -> torch.Tensor:
    """Return ``[tokens, hidden]`` bfloat16 with the value 16 * rank + token + 1 everywhere."""
    value = torch.arange(tokens) + 16 * rank + 1
    return value.unsqueeze(1).expand(-1, hidden).bfloat16().contiguous()


def indices(*wanted: Sequence[int]) -> torch.Tensor:
    """Return the int32 index rows."""
    return torch.tensor(wanted, dtype=torch.int32)


def weights(rank: int, tokens: int, k: int = 2) -> torch.Tensor:
    """Return ``[tokens, k]`` float32, distinct over ranks, tokens and slots."""
    return (torch.arange(tokens * k, dtype=torch.float32).view(tokens, k) + 100 * rank) / 64
