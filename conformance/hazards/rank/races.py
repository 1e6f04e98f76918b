"""Probes of what happens only sometimes: rounds with delays drawn anew for every rank, and how many showed it.

Scope: orders of a few calls. The rounds that saw nothing bound a rate and prove no absence.
"""

from __future__ import annotations

import time

import torch

from conformance.hazards.protocol import Seen
from conformance.hazards.rank.bench import Bench, unlike

#: Longest delay of a rank before a call, in seconds.
_DELAY_S = 0.002
#: Combines in a row, as many as were seen to hang.
_COMBINES = 6


def push_fence(bench: Bench) -> Seen:
    """Rows change from round to round, so that one of the round before shows."""
    op, ids, late, times = bench.build(block_num=80), bench.ids(), bench.delays(), 0
    for index in bench.each_round():
        scale = 1.0 + index % 2
        x = bench.rows(4) * scale
        out, *_ = bench.dispatch(op, x, None, None, ids)
        rows = out.clone()
        time.sleep(late.uniform(0.0, _DELAY_S))
        combined, _ = bench.combine(op, rows, None, ids)
        times += bool(unlike(combined[:4], x.float() * bench.factor()))
    return Seen(times, "rows of the combine before in sums" if times else "every sum was right")


def internode_combine_hangs(bench: Bench) -> Seen:
    """Rounds of dispatch and combine on the legacy kernel."""
    op, ids, late = bench.build(), bench.ids(), bench.delays()
    for _ in bench.each_round():
        out, *_ = bench.dispatch(op, bench.rows(4), bench.weights(4), None, ids)
        time.sleep(late.uniform(0.0, _DELAY_S))
        bench.combine(op, out.clone(), None, ids)
    return Seen(0, "every combine ended")


def combine_twice_hangs(bench: Bench) -> Seen:
    """Rounds of a dispatch and combines back to back: a wait between them is a barrier, and then none hangs."""
    op, ids, late = bench.build(), bench.ids(), bench.delays()
    for _ in bench.each_round():
        out, *_ = bench.dispatch(op, bench.rows(4), None, None, ids)
        rows = out.clone()
        bench.wait()
        time.sleep(late.uniform(0.0, _DELAY_S))
        bench.note("combine")
        op.combine(rows, None, ids)
        # A rank still in its first combine may wait for what a peer's second one passed: that silence counts, too.
        bench.note("second combine")
        for _again in range(_COMBINES - 1):
            bench.misuse(op.combine, rows, None, ids)
        bench.wait()
        bench.meet()
    return Seen(0, "every second combine ended")


def handle_dispatches_race(bench: Bench) -> Seen:
    """Rounds of two handle dispatches; the slots that all ranks claim are counted."""
    op, ids, late, times = bench.build(), bench.ids(), bench.delays(), 0
    slots = bench.world * op.max_num_tokens_to_send()
    for _ in bench.each_round():
        for _again in range(2):
            time.sleep(late.uniform(0.0, _DELAY_S))
            given = (bench.rows(4), None, None, ids)
            out, *_, handle = bench.misuse(op.dispatch, *given, return_routing=True)
        bench.wait()
        flat = handle.disp_dest_tok_id_map[: ids.numel()].cpu().long()
        flat = flat[flat < slots]
        claims = bench.total(torch.zeros(slots, dtype=torch.int64).index_add_(0, flat, torch.ones_like(flat)))
        times += bool((claims > 1).any())
        bench.combine(op, out, None, ids, routing=handle)
        bench.meet()
    return Seen(times, "slots claimed twice" if times else "every slot was claimed once")
