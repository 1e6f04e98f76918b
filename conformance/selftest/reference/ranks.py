"""Gloo ranks for the tests of the distributed path: one spawn runs many scenarios.

Scope: start, run, collect. A scenario is a function of a :class:`World` that asserts; its failure on a rank is reported
as that rank's traceback. It proves nothing by itself.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

DEADLINE = 120.0


@dataclass
class World:
    """What a scenario gets: its rank, the number of ranks, and the group."""

    rank: int
    size: int
    group: dist.ProcessGroup


def scenarios_of(module: str) -> list[str]:
    """Names of the scenarios that a module defines: its public functions, in order."""
    found = vars(importlib.import_module(module))
    return [n for n, f in found.items() if not n.startswith("_") and getattr(f, "__module__", "") == module]


def run(size: int, modules: Sequence[str], folder: Path) -> list[dict[str, str]]:
    """Run every scenario of ``modules`` on ``size`` ranks; {scenario: error or ""} of every rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    ranks = [context.Process(target=_rank, args=(rank, size, list(modules), str(folder))) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [_collect(folder / f"rank{rank}.jsonl") for rank in range(size)]


def failures(reports: list[dict[str, str]], modules: Sequence[str]) -> str:
    """What went wrong, scenario by scenario and rank by rank; "" if every scenario passed on every rank."""
    missing = "the rank ended or hung before its end"
    found = [
        f"{name} on rank {rank}: {report.get(name, missing)}"
        for module in modules
        for name in scenarios_of(module)
        for rank, report in enumerate(reports)
        if report.get(name, missing)
    ]
    return "\n".join(found)


def _collect(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: error for line in lines for name, error in json.loads(line).items()}


def _rank(rank: int, size: int, modules: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    with Path(folder, f"rank{rank}.jsonl").open("w", encoding="utf-8") as report:
        store = dist.FileStore(f"{folder}/store", size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        group = dist.group.WORLD
        assert group is not None
        for module, name in [(owner, name) for owner in modules for name in scenarios_of(owner)]:
            error = ""
            try:
                getattr(importlib.import_module(module), name)(World(rank, size, group))
            except Exception:  # noqa: BLE001  reported to the driver, which fails the test
                error = traceback.format_exc()
            report.write(json.dumps({name: error}) + "\n")
            report.flush()
        dist.destroy_process_group()
