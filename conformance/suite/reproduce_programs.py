"""The stand-alone scripts that run a program of the suite's ranks: torchrun, a backend and the judge, no pools.

One script for exchanges with a wire, a codec or a mode, for captured calls, sequences, experts and layers: it reads
``case.json`` beside it, builds inputs as the suite's ranks do, runs the backend and judges by the same acceptance. What
it does not reproduce: the isolation of a crash or a hang; it dies or hangs itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from conformance.cases import Case, GraphCase, LayerCase, SequenceCase
from conformance.sequence_cases import told

_TEMPLATE = '''#!/usr/bin/env python
"""Case {case_id}: {label}

Run: torchrun --standalone --nproc-per-node {world_size} reproduce.py [cpu|cuda]
The device is {device} unless given, the architecture {arch} unless EP_ARCH names another. The case is in case.json.
{steps}Every rank prints the first check that fails, or its worst error over bound; exit status 1 if any fails.
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.registry import backend
from conformance.case_files import decode
{imports}

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
    dist.all_reduce(torch.zeros(1, device=device))  # a communicator is not made while a graph is captured
    made = backend(cell.backend, arch=ARCH)
    context = RankContext(rank, world, device, dist.group.WORLD, ARCH)
    session = made.open(context)
{build}
    mismatch, ratio = program.run(case, lambda name, index: None)
    print(f"rank {{rank}}: largest error over bound {{ratio:.3f}}", flush=True)
    if mismatch is not None:
        print(f"rank {{rank}}: DIFFERS {{mismatch.text()}}", flush=True)
    # No rank may free its buffers, or have torchrun end the others, while another one is still at work.
    dist.all_reduce(torch.zeros(1))
    for one in closing:
        one.close()
    session.close()
    dist.destroy_process_group()
    sys.exit(mismatch is not None)


if __name__ == "__main__":
    main()
'''


@dataclass(frozen=True)
class _Kind:
    """Lines of one kind of program: its imports, and what makes ``program`` and the list ``closing``, in that order."""

    imports: str
    build: str


_CALLS = _Kind(
    """\
from conformance.rank.experts import LocalExperts
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.programs import Program""",
    """\
    contract = made.contract(cell.problem(), cell.kernel_type)
    operation = GuardedExchange(session.build(cell.problem(), cell.kernel_type), cell.problem())
    program = Program(context, operation, contract, made.judged_by, LocalExperts(cell, rank, device))
    closing = [operation]""",
)
_GRAPHS = _Kind(
    "from conformance.rank.graph_program import graph_program",
    """\
    program = graph_program(context, made, session, cell, session.build(cell.problem(), cell.kernel_type))
    closing = [program]""",
)
_SEQUENCES = _Kind(
    "from conformance.rank.sequence_program import sequence_program",
    """\
    program = sequence_program(context, made, session, cell)
    closing = [program]""",
)
_LAYERS = _Kind(
    """\
from conformance.rank.cross_layer import Neighbours
from conformance.rank.expert_program import ExpertProgram
from conformance.rank.guarded_layers import GuardedLayer
from conformance.rank.sort_program import SortProgram
from conformance.rank.whole_experts import whole_experts
from conformance.rank.whole_layer import whole_layer""",
    """\
    contract = made.contract(cell.problem(), cell.kernel_type)
    neighbours = Neighbours(made, session, ARCH)
    operations = [session.build(cell.problem(), cell.kernel_type) for _ in range(1 if cell.whole else cell.shards)]
    if cell.whole:
        operation, program = whole_layer(context, neighbours, made, session, GuardedLayer(operations[0]), cell)
        operations = [operation]
    elif cell.check == "sort":
        program = SortProgram(context, operations, contract, cell)
    else:
        whole = whole_experts(made, session, cell, operations)
        program = ExpertProgram(context, operations, contract, made.judged_by, cell, whole)
    closing = [*operations, neighbours]""",
)


def program_script(case: Case, device: str = "cpu", arch: str = "gfx942") -> str:
    """``reproduce.py`` of a case.

    Args:
        case: the case, stored beside the script.
        device: where it runs unless told otherwise.
        arch: whose contract applies.
    """
    steps = ""
    kind = {GraphCase: _GRAPHS, SequenceCase: _SEQUENCES, LayerCase: _LAYERS}.get(type(case), _CALLS)
    if isinstance(case, SequenceCase):
        steps = "".join(f"    step {number}: {told(step)}\n" for number, step in enumerate(case.sequence))
    return _TEMPLATE.format(
        case_id=case.id,
        label=case.cell.label,
        world_size=case.cell.world_size,
        device=device,
        arch=arch,
        steps=steps,
        imports=kind.imports,
        build=kind.build,
    )
