"""The stand-alone script of a row operator's failure: torchrun, a backend and the judge, and neither pools nor pytest.

The script carries the rows themselves, as bytes beside it, calls the backend's operator directly, and compares what
comes back with the reference's acceptance. What it does not reproduce: a check that is not one of layout and values;
then it says so and ends with status 2.
"""

from __future__ import annotations

import io
import pprint

import numpy as np

from accelerated.operators import NormContract, QuantContract
from accelerated.registry import backend
from accelerated.routers import RouteContract
from conformance.row_cases import RowCase
from conformance.row_values import bias_of, rows_of, shape_of, weight_of

#: Checks that the script does not make.
_NOT_MADE = ("inputs.", "outputs.", "compiled.", "norm.ranks", "quantise.row_count", "route.rows")

_TEMPLATE = '''#!/usr/bin/env python
"""Case {case_id}: {label}

Run: torchrun --standalone --nproc-per-node {world_size} reproduce.py [cpu|cuda]
The device is {device} unless given, the architecture {arch} unless EP_ARCH names another. The rows are in inputs.npz.
Every rank prints what it got and the worst element; exit status 1 if anything is outside what the reference accepts,
2 if nothing is and the check that failed ({check}) is one that this script does not make.
"""
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.operators import Family, RowProblem
from accelerated.registry import backend
from conformance.rank.judge_rows import Answered, judge_call

PROBLEM = RowProblem({problem})
BACKEND, OPERATOR = {backend!r}, {operator!r}
DEVICE = sys.argv[1] if len(sys.argv) > 1 else {device!r}
ARCH = os.environ.get("EP_ARCH", {arch!r})
# Drained: the host waits after every call. Otherwise nothing waits before the last call is over.
DRAINED = {drained}
# The check that failed is about side effects, other ranks or another call.
NOT_MADE_HERE = {not_made_here}
CALLS = {calls}


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != PROBLEM.world_size:
        sys.exit(f"started with {{world}} ranks; give --nproc-per-node {{PROBLEM.world_size}}")
    cuda = DEVICE == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device(DEVICE)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    made = backend(BACKEND, arch=ARCH)
    contract = made.contract(PROBLEM, OPERATOR)
    session = made.open(RankContext(rank, world, device, dist.group.WORLD, ARCH))
    operation = session.build(PROBLEM, OPERATOR)
    stored = np.load(Path(__file__).parent / "inputs.npz")
    dtype = getattr(torch, PROBLEM.dtype)

    def tensor(name, rows=None):
        held = torch.from_numpy(stored[name]).to(dtype).to(device)
        # Rows repeat after so many as are stored.
        return held if rows is None else held[torch.arange(rows, device=device) % max(len(held), 1)]

    def bias(index, contract):
        if not contract.takes_bias:
            return None
        return torch.from_numpy(stored[f"weight{{index}}"]).to(getattr(torch, contract.bias_dtype)).to(device)

    results = []
    for index, call in enumerate(CALLS):
        if call["delays_ms"]:
            time.sleep(call["delays_ms"][rank] / 1000)
        rows = tensor(f"rows{{index}}_{{rank}}", call["rows"])
        if PROBLEM.family is Family.QUANTISE:
            static, counted = contract.codec.static, call["num_rows"] >= 0
            if counted:
                # These rows do not exist: nothing may depend on them.
                rows[call["num_rows"] :: 2], rows[call["num_rows"] + 1 :: 2] = float("nan"), 1e30
            scale = torch.tensor([call["scale"]], dtype=torch.float32, device=device) if static else None
            count = torch.tensor([call["num_rows"]], dtype=torch.int32, device=device) if counted else None
            results.append(operation.quantise(rows, scale=scale, num_rows=count))
        elif PROBLEM.family is Family.ROUTE:
            results.append(operation.route(rows, bias(index, contract)))
        else:
            residual = tensor(f"residual{{index}}_{{rank}}", call["rows"]) if contract.residual else None
            weight = tensor(f"weight{{index}}")
            results.append(operation.normalise(rows, residual, weight, call["epsilon"]))
        if cuda and DRAINED:
            torch.cuda.synchronize(device)
    if cuda:
        torch.cuda.synchronize(device)
    bad = False
    for index, (call, result) in enumerate(zip(CALLS, results)):
        answered = Answered(
            terms=torch.stack([tensor(f"rows{{index}}_{{r}}", call["rows"]) for r in range(world)]),
            residual=tensor(f"residual{{index}}_{{rank}}", call["rows"]) if call["residual"] else None,
            weight=bias(index, contract) if PROBLEM.family is Family.ROUTE else tensor(f"weight{{index}}"),
            epsilon=call["epsilon"],
            scale=call["scale"],
            num_rows=call["num_rows"],
            result=result,
        )
        mismatch, ratio = judge_call(index, answered, contract)
        print(f"rank {{rank}} call {{index}}: largest error over bound {{ratio:.3f}}", flush=True)
        if mismatch is not None:
            bad = True
            print(f"rank {{rank}} call {{index}}: DIFFERS {{mismatch.text()}}", flush=True)
    print(f"rank {{rank}}: {{'DIFFERS' if bad else 'agrees'}}", flush=True)
    if not bad and NOT_MADE_HERE:
        print(f"{check} is not looked at here; replay the case through the suite", flush=True)
    dist.all_reduce(torch.zeros(1))
    operation.close()
    session.close()
    dist.destroy_process_group()
    sys.exit(1 if bad else 2 if NOT_MADE_HERE else 0)


if __name__ == "__main__":
    main()
'''


def row_files(case: RowCase, device: str = "cpu", arch: str = "gfx942", check: str = "") -> dict[str, bytes]:
    """``reproduce.py`` of a case that failed ``check``, and its ``inputs.npz``.

    Args:
        case: the case.
        device: where the script runs unless told otherwise.
        arch: whose contract applies.
        check: what failed.
    """
    cell = case.cell
    contract = backend(cell.backend, arch).contract(cell.problem(), cell.operator)
    assert isinstance(contract, QuantContract | NormContract | RouteContract)
    bias_dtype = contract.bias_dtype if isinstance(contract, RouteContract) else ""
    shape = shape_of(cell, contract)
    stored = {}
    for index, call in enumerate(case.calls):
        stored[f"weight{index}"] = bias_of(call, cell, bias_dtype) if bias_dtype else weight_of(call, cell)
        for rank in range(cell.world_size):
            stored[f"rows{index}_{rank}"] = rows_of(call, cell, shape, rank)
            if isinstance(contract, NormContract) and contract.residual:
                # The residual is the same on every rank.
                stored[f"residual{index}_{rank}"] = rows_of(call, cell, shape, 0, residual=True)
    held = io.BytesIO()
    np.savez_compressed(held, **stored)  # type: ignore[arg-type]
    calls = [
        {
            "rows": c.rows,
            "residual": bool(c.residual),
            "num_rows": c.num_rows,
            "scale": c.scale,
            "epsilon": c.epsilon,
            "delays_ms": c.delays_ms,
        }
        for c in case.calls
    ]
    sizes = ("world_size", "hidden", "capacity", "dtype")
    problem = f"Family.{cell.family.name}, " + ", ".join(f"{name}={getattr(cell, name)!r}" for name in sizes)
    text = _TEMPLATE.format(
        case_id=case.id,
        label=cell.label,
        world_size=cell.world_size,
        device=device,
        arch=arch,
        problem=problem,
        backend=cell.backend,
        operator=cell.operator,
        drained=cell.mode == "drained",
        check=check or "none",
        not_made_here=check.startswith(_NOT_MADE) or any(call.into for call in case.calls),
        calls=pprint.pformat(calls, width=110, sort_dicts=False),
    )
    return {"reproduce.py": text.encode(), "inputs.npz": held.getvalue()}
