"""Speed of the whole engine beside the floor that gloo sets, in one run: ``python -m conformance.benchmark``.

The case is a small dispatch and combine (16 tokens per rank, hidden 256) judged as in a gate run. The floor is, per
implementation that the case runs, one count exchange, one packed payload exchange and one return exchange over gloo in
the same number of processes, and nothing else. ``reference`` runs one implementation (it is judged by the oracle),
``mori-standin`` two (itself and the reference). Ratios of one run mean something; seconds of two runs do not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from conformance.cases import Case, Cell, Explicit, Recipe, Round, expand
from conformance.engine.driver import Driver
from conformance.engine.pool import PRELOAD, Pool, PoolKey, stop_forkserver

TOKENS, HIDDEN, TOP_K = 16, 256, 4
BACKENDS = (("reference", "one-level", 1), ("mori-standin", "IntraNode", 2))


def small_case(backend: str, kernel_type: str, world_size: int, seed: int) -> Case:
    """The benchmark's case: uniform routing, every rank at its capacity of 16 tokens."""
    cell = Cell(
        check="round_trip",
        backend=backend,
        kernel_type=kernel_type,
        world_size=world_size,
        nodes=1,
        hidden=HIDDEN,
        experts=4 * world_size,
        top_k=TOP_K,
        capacity=TOKENS,
        dtype="bfloat16",
        mode="drained",
    )
    # Small cases are explicit in a run too.
    rows = expand(cell, Recipe("uniform", (TOKENS,) * world_size, 0, seed))
    return Case(cell, (Round(Explicit(rows), "integers", seed),))


def engine_rate(driver: Driver, backend: str, kernel_type: str, world_size: int, cases: int) -> float:
    """Cases per second through the engine, after warm-up."""
    batch = [small_case(backend, kernel_type, world_size, seed) for seed in range(cases + 5)]
    for case in batch[:5]:
        driver.run(case)
    started = time.perf_counter()
    for case in batch[5:]:
        outcome = driver.run(case)
        if not outcome.passed:
            raise RuntimeError(f"the benchmark's case failed: {outcome.text}")
    return cases / (time.perf_counter() - started)


def _floor_rank(rank: int, world_size: int, store: str, rounds: int, report: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    file_store = dist.FileStore(store, world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world_size)
    counts, received = torch.zeros(world_size, dtype=torch.int64), torch.zeros(world_size, dtype=torch.int64)
    # Rows a token makes: each of its slots hits a given rank with equal chance.
    rows = round(TOKENS * (1 - (1 - 1 / world_size) ** TOP_K))
    row_bytes = HIDDEN * 2 + TOP_K * 8 + 4
    sent = torch.zeros(rows * world_size, row_bytes, dtype=torch.uint8)
    got = torch.zeros_like(sent)
    split = [rows] * world_size
    for turn in range(rounds + 5):
        if turn == 5:
            dist.barrier()
            started = time.perf_counter()
        dist.all_to_all_single(received, counts)
        dist.all_to_all_single(got, sent, split, split)
        dist.all_to_all_single(sent, got, split, split)
    dist.barrier()
    if rank == 0:
        report.send(rounds / (time.perf_counter() - started))
    dist.destroy_process_group()


def floor_rate(world_size: int, rounds: int) -> float:
    """Three exchanges per second over gloo and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ranks = [
            context.Process(target=_floor_rank, args=(r, world_size, store, rounds, theirs)) for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        rate = float(ours.recv())
        for process in ranks:
            process.join()
    return rate


def restart_seconds(world_size: int, times: int) -> float:
    """Median seconds from asking for a pool until every rank is ready."""
    measured = []
    for _ in range(times):
        pool = Pool(PoolKey(world_size, "reference"))
        measured.append(pool.start_seconds)
        pool.kill()
    return statistics.median(measured)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ep-sizes", default="2,4,8")
    parser.add_argument("--cases", type=int, default=60, help="cases per batch")
    parser.add_argument("--batches", type=int, default=5, help="batches per figure, floor and engine in turn")
    options = parser.parse_args(arguments)
    print(f"{TOKENS} tokens per rank, hidden {HIDDEN}, top-{TOP_K}, {len(os.sched_getaffinity(0))} cores, CPU and gloo")
    print("mori-standin is a software double: no AMD hardware is measured")
    print(f"{'EP':>3} {'backend':<14} {'cases/s':>8} {'floor/s':>8} {'ratio':>6}   (medians; floor of the same run)")
    for world_size in map(int, options.ep_sizes.split(",")):
        for backend, kernel_type, implementations in BACKENDS:
            driver = Driver(backend)
            rates, floors = [], []
            for _ in range(options.batches):
                rates.append(engine_rate(driver, backend, kernel_type, world_size, options.cases))
                floors.append(floor_rate(world_size, options.cases) / implementations)
            driver.close()
            ratio = statistics.median(r / f for r, f in zip(rates, floors, strict=True))
            rate, floor = statistics.median(rates), statistics.median(floors)
            print(f"{world_size:>3} {backend:<14} {rate:>8.1f} {floor:>8.1f} {ratio:>6.2f}", flush=True)
    widest = max(map(int, options.ep_sizes.split(",")))
    print(f"pool restart at EP {widest}: {restart_seconds(widest, 5):.2f} s (median of 5)")
    stop_forkserver()
    return 0


if __name__ == "__main__":
    # Rank processes import functions by module name, which must not be "__main__".
    from conformance.benchmark import main as run

    raise SystemExit(run())
