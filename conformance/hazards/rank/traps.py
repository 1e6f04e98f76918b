"""Probes of misuse that the library takes without a word: what it does instead of refusing.

Scope: one observation for each trap of :mod:`conformance.hazards.traps` that leaves the process alive. A trap that is
ABSENT is refused by an exception, or has no effect on these sizes.
"""

from __future__ import annotations

import time

import torch

from conformance.hazards.protocol import Seen
from conformance.hazards.rank.bench import IDS, Bench, seen, seen_of, told, unlike

#: How long the ranks with tokens wait for the one without to be refused, in seconds.
_PATIENCE_S = 1.0


def codec_ignored(bench: Bench) -> Seen:
    """Odd numbers from 19 on are none of E4M3's: a sum of them that is exact was not cast."""
    ids, found = bench.ids(), []
    manners = (("IntraNode", torch.float32, True), ("IntraNode", torch.bfloat16, False))
    for kind, dtype, external in (*manners, ("InterNode", torch.bfloat16, True)):
        if kind not in bench.kinds:
            continue
        what = f"{kind} {str(dtype).removeprefix('torch.')}{'' if external else ' zero-copy'}"
        op, message = bench.attempt(bench.build, kind, quant_type="fp8_direct_cast", use_external_inp_buf=external)
        if message:
            found.append((False, f"{what}: refused: {message}"))
            continue
        x = (2 * bench.rows(4) + 17).to(dtype)
        out, *_ = bench.dispatch(op, x, bench.weights(4), None, ids)
        if not external:
            buffer = op.get_registered_combine_input_buffer(dtype)
            buffer[: len(out)] = out
            out = buffer
        taken, message = bench.attempt(bench.combine, op, out, None, ids)
        exact = not message and not unlike(taken[0][:4], x.float() * bench.factor())
        found.append(
            (exact, f"{what}: {'refused' if message else 'sums without a cast' if exact else 'sums of codes'}")
        )
    return seen_of(found)


def v1_codec_garbage(bench: Bench) -> Seen:
    """A cast to FP8 asked of float32 rows."""
    ids = bench.ids()

    def look(kind: str) -> tuple[bool, str]:
        op = bench.build(kind, quant_type="fp8_direct_cast")
        x = bench.rows(4).float()
        out, out_weights, *_ = bench.misuse(bench.dispatch, op, x, bench.weights(4), None, ids)
        combined, _ = bench.misuse(bench.combine, op, out, out_weights, ids)
        wrong = unlike(combined[:4], x * bench.factor())
        return bool(wrong), told(f"{kind} float32", wrong, 4)

    return bench.each_kind(look)


def dispatch_ignores_geometry(bench: Bench) -> Seen:
    """The launch geometry shows nowhere but in what the operator remembers of it."""
    op = bench.build(block_num=40, warp_num_per_block=4)
    wrong = bench.wrong_tokens(op, bench.ids(), bench.factor())
    used = tuple(op._cached_dispatch_launch)
    return seen(used != (40, 0, 4), f"configured (40, 0, 4), launched {used}; {len(wrong)} tokens wrong")


def zero_copy_ignores_input(bench: Bench) -> Seen:
    """The rows as the input, zeros in the registered buffer."""
    ids = bench.ids()

    def look(kind: str) -> tuple[bool, str]:
        op = bench.build(kind, use_external_inp_buf=False)
        x = bench.rows(4)
        out, *_ = bench.dispatch(op, x, None, None, ids)
        op.get_registered_combine_input_buffer(torch.bfloat16).zero_()
        bench.meet()
        combined, _ = bench.misuse(bench.combine, op, out.clone(), None, ids)
        wrong = unlike(combined[:4], x.float() * bench.factor())
        return bool(wrong), f"{kind}: sums of the {'buffer' if wrong else 'input'}"

    return bench.each_kind(look)


def zero_copy_flag_ignored(bench: Bench) -> Seen:
    """The rows as the input, zeros in the registered buffer, on kernel types that have none."""
    ids = bench.ids()

    def look(kind: str) -> tuple[bool, str]:
        op = bench.misuse(bench.build, kind, use_external_inp_buf=False)
        x = bench.rows(4)
        out, out_weights, *_ = bench.dispatch(op, x, bench.weights(4), None, ids)
        bench.misuse(op.get_registered_combine_input_buffer, torch.bfloat16).zero_()
        bench.meet()
        combined, _ = bench.misuse(bench.combine, op, out, out_weights, ids)
        read = not unlike(combined[:4], x.float() * bench.factor())
        return read, f"{kind}: {'sums of the input' if read else 'other sums'}"

    return bench.each_kind(look)


def push_from_registered(bench: Bench) -> Seen:
    """The rows in the registered buffer, given as an external input."""
    op, ids, times = bench.build(), bench.ids(), 0
    for _ in bench.each_round():
        out, *_ = bench.dispatch(op, bench.rows(4), None, None, ids)
        buffer = op.get_registered_combine_input_buffer(torch.bfloat16)
        buffer[: len(out)] = out
        bench.meet()
        combined, _ = bench.misuse(bench.combine, op, buffer, None, ids)
        times += bool(unlike(combined[:4], bench.rows(4).float() * bench.factor()))
        bench.meet()
    return Seen(times, "wrong sums" if times else "every sum was right")


def source_layout_weights(bench: Bench) -> Seen:
    """The weights that were dispatched in the place of those received."""
    op, ids, given = bench.build(), bench.ids([0, 2], [4, 6], [0, 4]), bench.weights(3)
    out, *_ = bench.dispatch(op, bench.rows(3), given, None, ids)
    # Every rank has to know: one that refused would keep the others waiting.
    _, combined = bench.misuse(bench.combine, op, out, given, ids)
    wrong = unlike(combined[:3], 2 * given)
    return seen(bool(wrong), f"{len(wrong)} of 3 returned weight rows are not the sums")


def capacity_sized_outputs(bench: Bench) -> Seen:
    """Rows of the outputs against rows received."""
    out, _, _, _, total = bench.dispatch(bench.build(), bench.rows(1), None, None, bench.ids([0, 2]))
    return seen(len(out) != int(total), f"{len(out)} rows returned, {int(total)} received")


def combine_clears_total(bench: Bench) -> Seen:
    """The counter of received rows before and after combine."""
    op, ids = bench.build(), bench.ids()
    out, *_, total = bench.dispatch(op, bench.rows(4), None, None, ids)
    before = int(total)
    bench.combine(op, out, None, ids)
    return seen(before > 0 and int(total) == 0, f"the counter is {before} before combine and {int(total)} after it")


def dispatch_accumulates(bench: Bench) -> Seen:
    """The counter after a second dispatch."""
    op, ids, counts = bench.build(), bench.ids(), []
    for _ in range(2):
        counts.append(int(bench.misuse(bench.dispatch, op, bench.rows(4), None, None, ids)[4]))
        bench.meet()
    return seen(counts[0] != counts[1], f"the counter is {counts[0]}, then {counts[1]} after the same dispatch")


def reset_does_nothing(bench: Bench) -> Seen:
    """The counter after reset()."""
    op = bench.build()
    *_, total = bench.dispatch(op, bench.rows(4), None, None, bench.ids())
    before = int(total)
    op.reset()
    bench.wait()
    return seen(
        before > 0 and int(total) == before, f"the counter is {before} before reset() and {int(total)} after it"
    )


def handle_without_tokens(bench: Bench) -> Seen:
    """The ranks with tokens join in combine only if the one without was not refused in time."""
    lone, n = bench.rank == 1, 4 * (bench.rank != 1)
    op, ids, sign = bench.build(), bench.ids()[:n], bench.directory / "refused"
    sign.unlink(missing_ok=True)
    bench.meet()
    out, *_, handle = bench.dispatch(op, bench.rows(n), None, None, ids, return_routing=True)
    bench.meet()
    if not lone:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and not sign.exists():
            time.sleep(0.01)
        if sign.exists():
            return seen(False, "the rank without tokens was refused; this one did not wait for it")
    try:
        combined, _ = bench.combine(op, out, None, ids, routing=handle)
    except ValueError as error:
        sign.touch()
        return seen(True, f"without tokens: {error}")
    wrong = unlike(combined[:n], bench.rows(n).float() * bench.factor()[:n])
    return seen(False, told("a combine with one rank's handle empty", wrong, n))


def int64_ids_misread(bench: Bench) -> Seen:
    """Ids as torch makes them by default."""
    return _misread(bench, bench.rows(4), bench.ids().long(), "int64 ids")


def strided_rows_misread(bench: Bench) -> Seen:
    """A slice of rows with a stride of two."""
    return _misread(bench, bench.rows(4, 16)[:, ::2], bench.ids(), "every second element of longer rows")


def _misread(bench: Bench, x: torch.Tensor, ids: torch.Tensor, what: str) -> Seen:
    """A dispatch of :data:`IDS` in another form: whether every rank received what it must."""
    out, _, _, out_ids, total = bench.misuse(bench.dispatch, bench.build(), x, None, None, ids)
    count = int(total)
    got = sorted(zip(out[:count].tolist(), out_ids[:count].tolist(), strict=True))
    sent = [(token, slots) for token, slots in enumerate(IDS) if bench.rank in {slot // 2 for slot in slots}]
    wanted = [([16.0 * rank + token + 1] * 8, list(slots)) for rank in range(bench.world) for token, slots in sent]
    lost = sum(row not in got for row in wanted)
    text = f"{count} rows received of {len(wanted)}, {lost} of these not as they were sent"
    return seen(got != wanted, f"{what}: taken; {text}")


def send_drops_expert_count(bench: Bench) -> Seen:
    """The count asked of dispatch_send."""
    wanted = [[4, 4], [4, 8], [4, 4], [0, 4]][bench.rank]

    def look(kind: str) -> tuple[bool, str]:
        op, given = bench.build(kind), (bench.rows(4), bench.weights(4), None, bench.ids())
        bench.note("dispatch")
        bench.misuse(op.dispatch_send, *given, call_local_expert_count=True)
        if bench.asynchronous(op):
            op.dispatch_recv()
        bench.wait()
        counts = op.local_expert_count.tolist()
        bench.meet()
        return counts != wanted, f"{kind}: counted {counts}, received {wanted}"

    return bench.each_kind(look)
