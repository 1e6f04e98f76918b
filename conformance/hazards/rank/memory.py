"""Probes of what is written outside of its place: by rows past a limit, by slots that are too narrow for what they get.

Scope: what the interface shows of the memory around: an operator's own outputs, and those of an operator built right
after it, which the symmetric heap puts behind it. ABSENT means that nothing visible changed; what lies behind a buffer
is the allocator's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conformance.hazards.protocol import Seen
from conformance.hazards.rank.bench import Bench, seen, told, unlike

#: Elements of a row, so that what runs past the staging memory is not lost in a gap before the next allocation, which
#: begins at a multiple of 256 bytes (src/shmem/memory.cpp): 4 * (64 * 4 + 20) bytes have room, 16 * 128 are written.
WIDE = 64
#: Words of the guard behind a routing handle's map: 16 for each block of a launch of up to 4096.
_GUARD_WORDS, _GUARD = 1 << 16, 0x5A5A5A5A


def intranode_receive_overflow(bench: Bench) -> Seen:
    """Four rows of every rank for one rank's one each."""
    op = bench.build(max_total_recv_tokens=bench.world)  # a row from each rank
    one = bench.ids([0, 1])
    out, out_weights, *_ = bench.dispatch(op, bench.rows(1), bench.weights(1), None, one)
    kept = [tensor for tensor in bench.combine(op, out, out_weights, one) if tensor is not None]
    bench.meet()
    before = [_bits(tensor) for tensor in kept]
    *_, total = bench.dispatch(op, bench.rows(4), bench.weights(4), None, bench.ids(*[[0, 1]] * 4))
    count, room = int(total), op.max_num_tokens_to_recv()
    hit = any(not torch.equal(_bits(tensor), bits) for tensor, bits in zip(kept, before, strict=True))
    text = f"{count} rows were counted where {room} have room, without a word"
    return seen(count > room or hit, text + ("; outputs of the combine before changed" if hit else ""))


def capped_push_overruns_staging(bench: Bench) -> Seen:
    """Four rows received where R is 4: they fit, their staging slots do not."""
    mine = [2 * bench.rank, 2 * bench.rank]  # every rank gets its own four rows, which fit

    def make() -> Any:
        return bench.misuse(bench.build, max_total_recv_tokens=4, hidden_dim=WIDE)

    found = _overrun(bench, make, bench.ids(mine, mine, mine, mine), WIDE)
    return seen(bool(found), f"4 rows received where R = 4: {found or 'nothing else changed'}")


def blockwise_staging_overrun(bench: Bench) -> Seen:
    """Eight elements with 56 scales."""
    ids = bench.ids([0, 2], [4, 6], [0, 4], [2, 6])

    def look(kind: str) -> tuple[bool, str]:
        found = _overrun(bench, lambda: bench.misuse(bench.build, kind, quant_type="fp8_blockwise"), ids)
        return bool(found), f"{kind}, h = 8: {found or 'nothing else changed'}"

    return bench.each_kind(look)


def _overrun(bench: Bench, make: Callable[[], Any], ids: torch.Tensor, hidden: int = 8) -> str:
    """What combine changed beside its own outputs, in this operator or the next one on the heap; "" for nothing."""
    op, behind = make(), bench.build()
    n = len(ids)
    bench.dispatch(behind, bench.rows(4), bench.weights(4), None, bench.ids())
    out, out_weights, _, out_ids, _ = bench.dispatch(op, bench.rows(n, hidden), bench.weights(n), None, ids)
    rows = -out  # what combine writes over a received row differs from it
    watched = {"rows": out, "weights": out_weights, "ids": out_ids}
    watched["registered buffer of the next operator"] = behind.get_registered_combine_input_buffer(torch.bfloat16)
    bench.meet()
    before = {name: _bits(tensor) for name, tensor in watched.items()}
    bench.combine(op, rows, None, ids)
    bench.meet()
    changed = [name for name, tensor in watched.items() if not torch.equal(_bits(tensor), before[name])]
    return f"combine changed {' and '.join(changed)}" if changed else ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def ragged_chunks(bench: Bench) -> Seen:
    """A hundred tokens across nodes: a full chunk and a part of one."""
    times = 0

    def look(kind: str) -> tuple[bool, str]:
        nonlocal times
        sizes: dict[str, Any] = {"gpu_per_node": 2, "rdma_block_num": 8, "max_num_inp_token_per_rank": 100}
        op, ids = bench.misuse(bench.build, kind, **sizes), bench.ids(*[[0, 6]] * 100)
        worst: list[int] = []
        for _ in bench.each_round():
            wrong = bench.wrong_tokens(op, ids, 2.0, misuse=True)
            times += bool(wrong)
            worst = max(worst, wrong, key=len)
            bench.meet()
        return bool(worst), told(f"{kind}, M = 100", worst, 100)

    text = bench.each_kind(look).text
    return Seen(min(times, bench.rounds), text)


def too_many_tokens(bench: Bench) -> Seen:
    """Six tokens where M is 4."""
    op, ids = bench.build(), torch.cat([bench.ids(), bench.ids()[:2]])
    x = bench.rows(6)
    out, *_ = bench.misuse(bench.dispatch, op, x, None, None, ids)
    combined, _ = bench.misuse(bench.combine, op, out, None, ids)
    back = min(len(combined), 6)
    wrong = unlike(combined[:back], (x.float() * torch.cat([bench.factor(), bench.factor()[:2]]))[:back])
    wrong += range(back, 6)  # rows that are not there
    return seen(bool(wrong), told(f"6 tokens taken where M = 4, {back} came back", wrong, 6))


def gfx125x_barrier_overrun(bench: Bench) -> Seen:
    """A combine along a handle whose map has a guard behind it."""
    op, ids = bench.build(), bench.ids()
    x = bench.rows(4)
    out, *_, handle = bench.dispatch(op, x, None, None, ids, return_routing=True)
    # The same handle with its map in a place of ours, with room behind it: nothing of anybody else's is hit.
    words = handle.inter_node_disp_dest_tok_id_map.numel()
    place = torch.full((words + _GUARD_WORDS,), _GUARD, dtype=torch.int32, device=bench.device)
    place[:words] = handle.inter_node_disp_dest_tok_id_map
    tensors = list(handle.tensors())
    tensors[1] = place[:words]
    guarded = type(handle).from_tensors(tuple(tensors), 4)
    bench.combine(op, out, None, ids, routing=guarded)
    hit = (place[words:] != _GUARD).nonzero().flatten()
    text = f"{len(hit)} words behind a map of {words} changed"
    return seen(len(hit) > 0, f"{text}, the first {int(hit[0])} past its end" if len(hit) else text)
