"""The stand-alone script of a failure with a wire, a codec or a mode: torchrun, a backend and the judge, no pools.

The script reads ``case.json`` beside it, builds inputs as the suite's ranks do, calls the backend's operator and judges
by the same acceptance. What it does not reproduce: the isolation of a crash or a hang; it dies or hangs itself.
"""

from __future__ import annotations

from conformance.cases import Case

_TEMPLATE = '''#!/usr/bin/env python
"""Case {case_id}: {label}

Run: torchrun --standalone --nproc-per-node {world_size} reproduce.py [cpu|cuda]
The device is {device} unless given, the architecture {arch} unless EP_ARCH names another. The case is in case.json.
Every rank prints the first check that fails, or its worst error over bound; exit status 1 if any fails.
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.registry import backend
from conformance.case_files import decode
from conformance.rank.experts import LocalExperts
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.programs import Program

DEVICE = sys.argv[1] if len(sys.argv) > 1 else {device!r}
ARCH = os.environ.get("EP_ARCH", {arch!r})


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    path = Path(__file__).parent / "case.json"
    case = decode(path.read_bytes(), str(path))
    cell = case.cell
    if world != cell.world_size:
        sys.exit(f"started with {{world}} ranks; give --nproc-per-node {{cell.world_size}}")
    cuda = DEVICE == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device(DEVICE)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    made = backend(cell.backend, arch=ARCH)
    context = RankContext(rank, world, device, dist.group.WORLD, ARCH)
    contract = made.contract(cell.problem(), cell.kernel_type)
    session = made.open(context)
    built = session.build(cell.problem(), cell.kernel_type)
    operation = GuardedExchange(built, cell.problem())
    program = Program(context, operation, contract, made.judged_by, LocalExperts(cell, rank, device))
    mismatch, ratio = program.run(case, lambda name, index: None)
    print(f"rank {{rank}}: largest error over bound {{ratio:.3f}}", flush=True)
    if mismatch is not None:
        print(f"rank {{rank}}: DIFFERS {{mismatch.text()}}", flush=True)
    # No rank may free its buffers, or have torchrun end the others, while another one is still at work.
    dist.all_reduce(torch.zeros(1))
    operation.close()
    session.close()
    dist.destroy_process_group()
    sys.exit(mismatch is not None)


if __name__ == "__main__":
    main()
'''


def call_script(case: Case, device: str = "cpu", arch: str = "gfx942") -> str:
    """``reproduce.py`` of a case that is stored beside it; see :func:`conformance.suite.reproduce.script`."""
    cell = case.cell
    return _TEMPLATE.format(case_id=case.id, label=cell.label, world_size=cell.world_size, device=device, arch=arch)
