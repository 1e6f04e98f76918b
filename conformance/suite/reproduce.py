"""The stand-alone script of a failure: torchrun and a backend, nothing from the suite's engine.

The script spells out the routing, builds the same tensors as the suite, calls the backend's operator directly and
compares with a dense sum in float64. What it does not reproduce: the exact acceptance interval; it allows two units in
the last place and names what it saw.
"""

from __future__ import annotations

import pprint

from conformance.cases import Case, expand
from conformance.rank.routing import wire_rows

_TEMPLATE = '''#!/usr/bin/env python
"""Case {case_id}: {label}

Run: torchrun --standalone --nproc-per-node {world_size} reproduce.py [cpu|cuda]
Every rank prints what it received and the worst element it got back; exit status 1 if anything differs.
"""
import os
import sys
import time

import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.registry import backend
from reference.problem import Problem

PROBLEM = Problem({problem})
BACKEND, KERNEL_TYPE, ARCH = {backend!r}, {kernel_type!r}, os.environ.get("EP_ARCH", "gfx942")
ROUNDS = {rounds}
# Global expert behind each dispatched id (they differ under round-robin placement).
EXPERT_OF = {expert_of}


def inputs(spec, index, rank, dtype):
    generator = torch.Generator().manual_seed((spec["seed"] * 64 + index) * 1024 + rank)
    tokens, hidden = len(spec["rows"][rank]), PROBLEM.hidden
    if spec["values"] == "bits":
        shape = (tokens, hidden * dtype.itemsize)
        rows = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
    elif spec["values"] == "integers":
        rows = torch.randint(-8, 9, (tokens, hidden), generator=generator).float()
    else:
        rows = torch.randn((tokens, hidden), generator=generator)
        if spec["values"] == "wide":
            rows = rows * torch.exp2(torch.randint(-20, 21, (tokens, hidden), generator=generator).float())
    token = torch.arange(tokens)
    rows = rows.to(dtype)
    rows[:, :4] = torch.stack([token * 0 + rank, token % 256, token // 256, token * 0 + index % 256], 1).to(dtype)
    ids = torch.tensor(spec["rows"][rank], dtype=torch.int32).reshape(tokens, PROBLEM.top_k)
    weights = torch.randint(1, 17, (tokens, PROBLEM.top_k), generator=generator).float() / 16
    return rows, ids, weights


def experts(rows, ids, weights, rank):
    """Weighted sum of a_e x + b_e over the experts of one rank, float32."""
    per_rank = PROBLEM.experts_per_rank
    name = torch.tensor(EXPERT_OF, device=ids.device)[ids.clamp(0, PROBLEM.experts - 1).long()]
    mine = torch.div(ids, per_rank, rounding_mode="floor") == rank
    weight = torch.where(mine & (ids >= 0), weights, 0.0)
    scale = (weight * (2 + name % 13)).sum(1, keepdim=True)
    offset = (weight * (name % 61 - 30)).sum(1, keepdim=True)
    return rows.float() * scale + offset


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kind = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    dtype = getattr(torch, PROBLEM.dtype)
    session = backend(BACKEND, arch=ARCH).open(RankContext(rank, world, device, dist.group.WORLD, ARCH))
    operation = session.build(PROBLEM, KERNEL_TYPE)
    prepared = [inputs(spec, i, rank, dtype) for i, spec in enumerate(ROUNDS)]
    seen = []
    for spec, (rows, ids, weights) in zip(ROUNDS, prepared):
        if spec["delays_ms"]:
            time.sleep(spec["delays_ms"][rank] / 1000)
        got = operation.prepare(rows.to(device), ids.to(device), weights.to(device))
        {drained_source_map}
        valid = (torch.arange(got.rows.shape[0], device=device) < got.count).unsqueeze(1)
        outputs = torch.where(valid, experts(got.rows, got.ids, got.weights, rank), torch.nan).to(dtype)
        kept = got.rows.clone(), got.count.clone()
        seen.append((*kept, operation.finalize(outputs, got).output.clone()))
    bad = False
    for index, (rows, count, output) in enumerate(seen):
        tags = rows[: int(count), :4].float().tolist()
        received = sorted((int(r), int(lo + 256 * hi), int(n)) for r, lo, hi, n in tags if r == r)
        wanted = sorted(
            (source, token, index % 256)
            for source, tokens in enumerate(ROUNDS[index]["rows"])
            for token, row in enumerate(tokens)
            if any(e >= 0 and e // PROBLEM.experts_per_rank == rank for e in row)
        )
        x, ids, weights = prepared[index]
        expected = sum(experts(x, ids, weights, r).to(dtype).double() for r in range(world))
        error = (output.cpu().double() - expected).abs()
        allowed = 2 * torch.finfo(dtype).eps * expected.abs() + 1e-30
        # An every-row layout delivers other ranks' rows too; they are not compared here.
        # Sums of random bits mean nothing: NaN and infinities are among them.
        sums_differ = ROUNDS[index]["values"] != "bits" and not bool((error <= allowed).all())
        differs = (set(wanted) - set(received)) or sums_differ
        bad = bad or bool(differs)
        worst = int(torch.nan_to_num(error - allowed, nan=torch.inf).argmax()) if error.numel() else -1
        print(f"rank {{rank}} round {{index}}: received (source rank, token, round) {{received}}, wanted {{wanted}}")
        if worst >= 0:
            token, element = divmod(worst, error.shape[1])
            print(f"rank {{rank}} round {{index}}: worst at token {{token}} element {{element}}: "
                  f"got {{float(output[token, element])}}, wanted {{float(expected[token, element])}}")
    operation.close()
    session.close()
    dist.destroy_process_group()
    print(f"rank {{rank}}: {{'DIFFERS' if bad else 'agrees'}}", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
'''


def script(case: Case) -> str:
    """Text of the stand-alone script of ``case``."""
    cell = case.cell
    rounds = [
        {
            "rows": wire_rows(cell, expand(cell, r.routing)),
            "values": r.values,
            "seed": r.seed,
            "delays_ms": r.delays_ms,
        }
        for r in case.rounds
    ]
    size = cell.world_size
    physical = [g for r in range(size) for g in range(r, cell.experts, size)]
    linear = list(range(cell.experts))
    sizes = ("world_size", "hidden", "experts", "top_k", "capacity", "dtype", "nodes")
    return _TEMPLATE.format(
        case_id=case.id,
        label=cell.label,
        world_size=size,
        problem=", ".join(f"{name}={getattr(cell, name)!r}" for name in sizes),
        backend=cell.backend,
        kernel_type=cell.kernel_type,
        rounds=pprint.pformat(rounds, width=110, sort_dicts=False),
        expert_of=physical if cell.placement == "round_robin" else f"list(range({len(linear)}))",
        drained_source_map="got.source_map()  # synchronises, as the drained program does"
        if cell.mode == "drained"
        else "pass  # free-running: nothing synchronises here",
    )
