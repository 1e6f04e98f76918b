"""The stand-alone script of a failure: torchrun and a backend, nothing from the suite's engine.

The script spells out the routing, builds the same tensors as the suite, calls the backend's operator directly and makes
the suite's comparisons: received rows with their multiplicity, bytes, source map and promised order, combined weights,
inputs left alone, and the sum against a dense one in float64. What it does not reproduce: the exact acceptance interval
of the sum. It lets every addition and every store round to the element type, which is coarser than the suite's
interval, so a wrong last bit passes here; and a hang hangs it. Failures of anything but plain exchanges have another
script (:mod:`conformance.suite.reproduce_programs`).
"""

from __future__ import annotations

import pprint

from accelerated.contract import ReceiveLayout, exchange
from accelerated.registry import backend
from conformance.cases import Case, GraphCase, LayerCase, SequenceCase, expand
from conformance.rank.routing import wire_rows
from conformance.suite.reproduce_programs import program_script

_TEMPLATE = '''#!/usr/bin/env python
"""Case {case_id}: {label}

Run: torchrun --standalone --nproc-per-node {world_size} reproduce.py [cpu|cuda]
The device is {device} unless given, the architecture {arch} unless EP_ARCH names another.
Every rank prints what it received, what differs under the suite's name of the check, and the worst element of its sum;
exit status 1 if anything differs. Every addition and store may round to the element type, which is coarser than the
suite's interval.
"""
import os
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.registry import backend
from reference.problem import Problem

PROBLEM = Problem({problem})
BACKEND, KERNEL_TYPE = {backend!r}, {kernel_type!r}
DEVICE = sys.argv[1] if len(sys.argv) > 1 else {device!r}
ARCH = os.environ.get("EP_ARCH", {arch!r})
# Drained: the host waits after every call. Otherwise nothing waits before the last round is over.
DRAINED = {drained}
# What the backend's contract promises.
EVERY_ROW = {every_row}  # every rank receives all rows of all ranks
ROW_ORDER = {row_order!r}
SOURCE_MAP, COMBINES_WEIGHTS = {source_map}, {combines_weights}
ROUNDS = {rounds}
# Global expert behind each dispatched id (they differ under round-robin placement).
EXPERT_OF = {expert_of}
SHOWN = 20  # differences per rank and round


def inputs(spec, index, rank, dtype):
    generator = torch.Generator().manual_seed((spec["seed"] * 512 + index) * 1024 + rank)
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


def experts(names, rows, ids, weights, rank):
    """Weighted sum of a_e x + b_e over the experts of one rank, float32."""
    name = names[ids.clamp(0, PROBLEM.experts - 1).long()]
    mine = torch.div(ids, PROBLEM.experts_per_rank, rounding_mode="floor") == rank
    weight = torch.where(mine & (ids >= 0), weights, 0.0)
    scale = (weight * (2 + name % 13)).sum(1, keepdim=True)
    offset = (weight * (name % 61 - 30)).sum(1, keepdim=True)
    return rows.float() * scale + offset


def destinations(row):
    """Distinct ranks that own an expert of a token."""
    return {{e // PROBLEM.experts_per_rank for e in row if e >= 0}}


def run_round(operation, spec, handed, names, rank):
    """One dispatch and combine; copies of all that came back."""
    if spec["delays_ms"]:
        time.sleep(spec["delays_ms"][rank] / 1000)
    got, source_map = operation.prepare(*handed), None
    if DRAINED:
        synchronise(handed[0].device)
        source_map = got.source_map() if got.source_map is not None else None
    valid = (torch.arange(got.rows.shape[0], device=got.rows.device) < got.count).unsqueeze(1)
    answers = experts(names, got.rows, got.ids, got.weights, rank)
    outputs = torch.where(valid, answers, torch.nan).to(got.rows.dtype)
    kept = got.rows.clone(), got.ids.clone(), got.weights.clone(), got.count.clone()
    back = operation.finalize(outputs, got)
    if DRAINED:
        synchronise(handed[0].device)
    return *kept, source_map, back.output.clone(), None if back.weights is None else back.weights.clone()


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(text):
    """One write a line: the ranks share the terminal."""
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()


def unequal(got, wanted):
    """Where two tensors differ in their bytes (-0 is not 0, a NaN is itself); "" if nowhere."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{{list(got.shape)}} {{got.dtype}}, wanted {{list(wanted.shape)}} {{wanted.dtype}}"
    flat = [t.clone(memory_format=torch.contiguous_format).flatten() for t in (got, wanted)]
    bytes_ = [t.view(torch.uint8).reshape(t.numel(), t.element_size()) for t in flat]
    differ = (bytes_[0] != bytes_[1]).any(1).nonzero().flatten().tolist()
    if not differ:
        return ""
    got, wanted = (t[differ[0]].item() for t in flat)
    return f"element {{differ[0]}}: got {{got}}, wanted {{wanted}} ({{len(differ)}} of {{flat[0].numel()}} differ)"


def tag(row):
    """(source rank, token, round) of a received row, (-1, -1, -1) where it carries no tag."""
    digits = row[:4].float().tolist()
    if not all(d == d and 0 <= d < 256 and d == int(d) for d in digits):
        return -1, -1, -1
    source, low, high, stamp = map(int, digits)
    return source, low + 256 * high, stamp


def dispatch_differences(spec, index, rank, rows, ids, weights, count, source_map, dtype):
    """Yield (check, text); prints what was received."""
    received = [tag(row) for row in rows[: max(count, 0)]]
    wanted = sorted(
        (source, token, index % 256)
        for source, tokens in enumerate(spec["rows"])
        for token, row in enumerate(tokens)
        if EVERY_ROW or rank in destinations(row)
    )
    say(f"rank {{rank}} round {{index}}: received {{len(received)}} rows, wanted {{len(wanted)}}; "
        f"(source rank, token, round) {{sorted(received)[:8]}}, wanted {{wanted[:8]}}")
    if count != len(wanted) or count > rows.shape[0]:
        yield "dispatch.count", f"{{count}} rows in a buffer of {{rows.shape[0]}}, wanted {{len(wanted)}}"
    if sorted(received) != wanted:
        missing, extra = (Counter(wanted) - Counter(received)), (Counter(received) - Counter(wanted))
        yield "dispatch.rows", f"missing {{sorted(missing.elements())}}, too many {{sorted(extra.elements())}}"
    own = {{source: inputs(spec, index, source, dtype) for source in {{key[0] for key in wanted}}}}
    known = set(wanted)
    for i, (source, token, stamp) in enumerate(received):
        if (source, token, stamp) not in known:
            continue
        for name, got, sent in zip(("payload", "ids", "weights"), (rows[i], ids[i], weights[i]), own[source]):
            if text := unequal(got, sent[token]):
                yield f"dispatch.{{name}}", f"row {{i}}, of rank {{source}} token {{token}}, {{text}}"
    keys = [[source, token] for source, token, _ in received]
    if source_map is not None and source_map.tolist() != keys:
        yield "dispatch.source_map", f"says {{source_map.tolist()}}, the rows' tags say {{keys}}"
    if source_map is None and DRAINED and SOURCE_MAP:
        yield "dispatch.source_map", "promised, none came back"
    order = {{"any": [], "grouped by ascending source rank": [key[0] for key in keys]}}.get(ROW_ORDER, keys)
    if order != sorted(order):
        yield "dispatch.order", f"rows {{keys}} are not in the promised order: {{ROW_ORDER}}"


def combine_differences(spec, index, rank, own, names, output, combined, dtype):
    """Yield (check, text); prints the worst element."""
    x, ids, weights = own
    # Random bits hold NaN and infinities, and what is summed of them means nothing; their weights do.
    if output.shape != x.shape or output.dtype != dtype:
        yield "combine.output", f"{{list(output.shape)}} {{output.dtype}}, wanted {{list(x.shape)}} {{dtype}}"
    elif spec["values"] != "bits" and x.numel():
        partials = [experts(names, x, ids, weights, r).to(dtype).double() for r in range(PROBLEM.world_size)]
        expected = sum(partials)
        # Half a unit for each addition and for each store, if every one of them rounds to the element type.
        roundings = min(PROBLEM.top_k, PROBLEM.world_size) + 2
        allowed = roundings / 2 * torch.finfo(dtype).eps * sum(partial.abs() for partial in partials)
        error = (output.double() - expected).abs()
        excess = torch.nan_to_num(error - allowed, nan=torch.inf)
        token, element = divmod(int(excess.argmax()), x.shape[1])
        text = (f"worst at token {{token}} element {{element}}: got {{float(output[token, element])}}, "
                f"wanted {{float(expected[token, element])}} within {{float(allowed[token, element])}}")
        say(f"rank {{rank}} round {{index}}: {{text}}")
        if not bool((error <= allowed).all()):
            yield "combine.output", text
    if not COMBINES_WEIGHTS:
        return
    if combined is None:
        yield "combine.weights", "promised, none came back"
        return
    times = torch.tensor([len(destinations(row)) for row in spec["rows"][rank]], dtype=torch.float32)
    if text := unequal(combined + 0.0, weights * times.unsqueeze(1)):  # -0 is 0 here
        yield "combine.weights", text


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != PROBLEM.world_size:
        sys.exit(f"started with {{world}} ranks; give --nproc-per-node {{PROBLEM.world_size}}")
    cuda = DEVICE == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device(DEVICE)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    dtype = getattr(torch, PROBLEM.dtype)
    session = backend(BACKEND, arch=ARCH).open(RankContext(rank, world, device, dist.group.WORLD, ARCH))
    operation = session.build(PROBLEM, KERNEL_TYPE)
    prepared = [inputs(spec, i, rank, dtype) for i, spec in enumerate(ROUNDS)]
    handed = [[tensor.clone().to(device) for tensor in one] for one in prepared]
    names = torch.tensor(EXPERT_OF)
    names_there = names.to(device)
    seen = [run_round(operation, spec, one, names_there, rank) for spec, one in zip(ROUNDS, handed)]
    synchronise(device)
    bad = False
    for index, (spec, own, mine, back) in enumerate(zip(ROUNDS, prepared, handed, seen)):
        rows, ids, weights, count, source_map, output, combined = (t if t is None else t.cpu() for t in back)
        got = rows, ids, weights, int(count), source_map
        found = list(dispatch_differences(spec, index, rank, *got, dtype))
        found += combine_differences(spec, index, rank, own, names, output, combined, dtype)
        changed = [(name, unequal(a.cpu(), b)) for name, a, b in zip(("rows", "ids", "weights"), mine, own)]
        found += [("inputs.modified", f"{{name}} {{text}}") for name, text in changed if text]
        bad = bad or bool(found)
        for check, text in found[:SHOWN]:
            say(f"rank {{rank}} round {{index}}: DIFFERS {{check}}: {{text}}")
        if len(found) > SHOWN:
            say(f"rank {{rank}} round {{index}}: and {{len(found) - SHOWN}} more")
    say(f"rank {{rank}}: {{'DIFFERS' if bad else 'agrees'}}")
    # No rank may free its buffers, or have torchrun end the others, while another one is still at work.
    dist.all_reduce(torch.zeros(1))
    operation.close()
    session.close()
    dist.destroy_process_group()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
'''


def script(case: Case, device: str = "cpu", arch: str = "gfx942") -> str:
    """Text of the stand-alone script of ``case``, which runs on ``device`` under the contract of ``arch``."""
    cell = case.cell
    plain = not isinstance(case, GraphCase | SequenceCase | LayerCase) and not cell.special
    if not plain or any(r.hidden or r.values == "edges" for r in case.rounds):
        return program_script(case, device, arch)
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
    sizes = ("world_size", "hidden", "experts", "top_k", "capacity", "dtype", "nodes")
    contract = exchange(backend(cell.backend, arch).contract(cell.problem(), cell.kernel_type))
    return _TEMPLATE.format(
        case_id=case.id,
        label=cell.label,
        world_size=size,
        device=device,
        arch=arch,
        problem=", ".join(f"{name}={getattr(cell, name)!r}" for name in sizes),
        backend=cell.backend,
        kernel_type=cell.kernel_type,
        drained=cell.mode == "drained",
        every_row=contract.receive_layout is ReceiveLayout.EVERY_ROW,
        row_order=contract.row_order.value,
        source_map=contract.source_map,
        combines_weights=contract.combines_weights,
        rounds=pprint.pformat(rounds, width=110, sort_dicts=False),
        expert_of=physical if cell.placement == "round_robin" else f"list(range({cell.experts}))",
    )
