"""Judging of one round on one rank: dispatch bit for bit as a multiset, combine against its acceptance interval.

Each check has a name; the first one that fails on a rank is its verdict, with the coordinates of one bad element. The
fast path is a few whole-tensor comparisons; coordinates are worked out only after it failed. Not judged here: crashes
and hangs (the driver's), and row order beyond what the contract promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from accelerated.contract import Contract, RowOrder
from conformance.engine.protocol import Mismatch
from conformance.rank.inputs import Inputs, read_tags
from reference.intervals import Interval


@dataclass
class ExpectedRows:
    """Rows a rank's layout must hold, ascending by (source rank, token); ``keys [R, 2]`` int64 on the host."""

    keys: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None  # None: none are dispatched
    scales: torch.Tensor | None = None
    expert_count: torch.Tensor | None = None  # None: not asked for
    room: int | None = None  # rows of the tensors that hold them, valid or not; None: nothing is promised


@dataclass
class Delivered:
    """Rows of a dispatch, as they lay there, and their count."""

    rows: torch.Tensor
    count: torch.Tensor


@dataclass
class Observed:
    """What the backend delivered in one round, cloned on its stream."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor
    source_map: torch.Tensor | None
    output: torch.Tensor
    combined_weights: torch.Tensor | None
    inputs: Inputs  # the tensors that were handed to the backend
    source_map_promised: bool = False
    scales: torch.Tensor | None = None
    expert_count: torch.Tensor | None = None
    kernel: str = ""  # of combine, as the backend calls it
    repeated: Delivered | None = None  # by the dispatch that this one replays


@dataclass
class ExpectedResult:
    """What combine must return: the acceptance interval ``[n, H]`` and the weights ``[n, k]``.

    Where a codec was asked for, ``otherwise`` gives the interval of a sum for which what ``swapped`` says is true.
    """

    output: Interval
    weights: torch.Tensor
    dtype: torch.dtype
    otherwise: Callable[[], Interval] | None = None
    swapped: str = ""


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """True if two tensors have the same shape and the same bytes (so -0 is not 0 and a NaN is itself)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_raw(left), _raw(right))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor [n, c]``, one row per row."""
    rows = tensor.contiguous()
    # A column of one element may count as contiguous with stride 0, which view() refuses.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


def judge_dispatch(
    index: int, seen: Observed, want: ExpectedRows, contract: Contract, stamp: int | None = None
) -> Mismatch | None:
    """Compare received rows with the expected ones; None if they agree. ``stamp`` is that of the rows, if not index."""
    stamp = index % 256 if stamp is None else stamp
    count, room = int(seen.count.item()), seen.rows.shape[0]
    expected_count = want.keys.shape[0]
    if malformed := _malformed(index, seen, want):
        return malformed
    if count != expected_count or count > room:
        # The count alone says too little: name the rows as well where they can be read.
        detail = _row_set_difference(seen, want, min(max(count, 0), room), index, stamp)
        message = f"received {count} rows in a buffer of {room}, expected {expected_count}"
        message += f"; {detail}" if detail else ""
        return Mismatch("dispatch.count", index, message, got=str(count), wanted=str(expected_count))
    rows = seen.rows[:count]
    tags = read_tags(rows).cpu()
    keys = tags[:, :2]
    width = 1 << 32
    flat = keys[:, 0] * width + keys[:, 1]
    order = torch.argsort(flat, stable=True)
    stale = bool((tags[:, 2] != stamp).any())
    if stale or not torch.equal(keys[order], want.keys):
        return Mismatch("dispatch.rows", index, _row_set_difference(seen, want, count, index, stamp))
    on_device = order.to(rows.device)
    for name, got, wanted in _columns(seen, want):
        if not same_bits(got[:count][on_device], wanted):
            return _unequal(f"dispatch.{name}", index, got[:count][on_device], wanted, want.keys)
    if mismatch := _bad_expert_count(index, seen, want):
        return mismatch
    return (
        _bad_source_map(index, seen, keys)
        or _bad_order(index, keys, flat, contract.row_order)
        or _bad_room(index, seen, want)
        or _bad_places(index, seen, keys)
    )


def _columns(seen: Observed, want: ExpectedRows) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is received of a row: name, tensor seen, tensor wanted."""
    columns = [("payload", seen.rows, want.rows), ("ids", seen.ids, want.ids)]
    if want.weights is not None:
        columns.append(("weights", seen.weights, want.weights))
    if want.scales is not None:
        assert seen.scales is not None  # the guard asks for them
        columns.append(("scales", seen.scales, want.scales))
    return columns


def _bad_expert_count(index: int, seen: Observed, want: ExpectedRows) -> Mismatch | None:
    """Compare the received slots of every local expert, duplicates included and masked slots not, with the routing."""
    if want.expert_count is None:
        return None
    assert seen.expert_count is not None  # the guard asks for it
    if torch.equal(seen.expert_count, want.expert_count):
        return None
    expert = int((seen.expert_count != want.expert_count).nonzero()[0])
    return Mismatch(
        "dispatch.expert_count",
        index,
        f"local expert {expert} is counted in {int(seen.expert_count[expert])} received slots; the routing sends "
        f"{int(want.expert_count[expert])}",
        got=str(seen.expert_count.tolist()[:64]),
        wanted=str(want.expert_count.tolist()[:64]),
        bound="0 (a count)",
    )


def _bad_room(index: int, seen: Observed, want: ExpectedRows) -> Mismatch | None:
    """Compare the rows of the received tensors, valid or not, with those that the contract and a cap leave room for."""
    room = seen.rows.shape[0]
    if want.room is None or room == want.room:
        return None
    message = f"received tensors have {room} rows, and the contract promises as many as can be received: {want.room}"
    return Mismatch("dispatch.room", index, message, got=str(room), wanted=str(want.room), bound="0 (a count)")


def _malformed(index: int, seen: Observed, want: ExpectedRows) -> Mismatch | None:
    """Received tensors whose element type, width or number of rows is not the contract's."""
    room = seen.rows.shape[0]
    for name, got, wanted in _columns(seen, want):
        check = f"dispatch.{name}"
        shape = [room, *wanted.shape[1:]]
        if list(got.shape) != shape or got.dtype != wanted.dtype:
            message = f"received {list(got.shape)} {got.dtype} in a buffer of {room} rows"
            return Mismatch(check, index, message, got=message, wanted=f"{shape} {wanted.dtype}")
    return None


def _row_set_difference(seen: Observed, want: ExpectedRows, count: int, index: int, stamp: int) -> str:
    """Which rows are missing, doubled, foreign or stale; at most three of each. Earlier runs have rounds beyond 200."""
    tags = read_tags(seen.rows[:count])
    tags[:, 2] = torch.where(tags[:, 2] < 0, -1, (tags[:, 2] - stamp + index) % 256)
    got = Counter(map(tuple, tags.tolist()))
    wanted = {(rank, token, index % 256) for rank, token in want.keys.tolist()}
    parts = []
    missing = sorted(wanted - set(got))
    doubled = sorted(tag for tag, times in got.items() if times > 1 and tag in wanted)
    foreign = sorted(tag for tag in got if tag not in wanted)
    stale = [tag for tag in foreign if tag[0] >= 0 and tag[2] != index % 256]
    unreadable = got.get((-1, -1, -1), 0)
    if missing:
        parts.append("missing " + _name_rows(missing))
    if doubled:
        parts.append("more than once " + _name_rows(doubled))
    if stale:
        parts.append("from another round " + _name_rows(stale))
    if others := [tag for tag in foreign if tag[0] >= 0 and tag not in stale]:
        parts.append("not expected here " + _name_rows(others))
    if unreadable:
        parts.append(f"{unreadable} rows without a readable tag")
    return "; ".join(parts)


def _name_rows(tags: Sequence[tuple[int, ...]]) -> str:
    names = ", ".join(f"(rank {r}, token {t}, round {n})" for r, t, n in tags[:3])
    return names + (f" and {len(tags) - 3} more" if len(tags) > 3 else "")


def _unequal(check: str, index: int, got: torch.Tensor, wanted: torch.Tensor, keys: torch.Tensor) -> Mismatch:
    """First element whose bits differ, with its coordinates."""
    width = got.element_size()
    differs = (_raw(got) != _raw(wanted)).reshape(*got.shape, width).any(2)
    row, element = differs.nonzero()[0].tolist()
    rank, token = keys[row].tolist()
    return Mismatch(
        check,
        index,
        f"{int(differs.sum())} of {differs.numel()} elements differ",
        source_rank=rank,
        token=token,
        element=element,
        got=str(got[row, element].item()),
        wanted=str(wanted[row, element].item()),
        bound="0 (bit for bit)",
    )


def _bad_source_map(index: int, seen: Observed, tags: torch.Tensor) -> Mismatch | None:
    """Compare the backend's own source map with the (source rank, token) tags of the rows."""
    check = "dispatch.source_map"
    if seen.source_map is None:
        if not seen.source_map_promised:
            return None
        return Mismatch(check, index, "the contract promises a source map, none came back")
    reported = seen.source_map.cpu()
    if tags.shape != reported.shape:
        message = f"the backend's source map has {reported.shape[0]} entries for {tags.shape[0]} rows"
        return Mismatch(check, index, message, got=str(list(reported.shape)), wanted=str(list(tags.shape)))
    wrong = (tags != reported).any(1).nonzero()
    if not wrong.numel():
        return None
    row = int(wrong[0])
    message = f"row {row} carries the tag {tuple(tags[row].tolist())} but the backend's source map says otherwise"
    return Mismatch(check, index, message, got=str(reported[row].tolist()), wanted=str(tags[row].tolist()))


def _bad_order(index: int, keys: torch.Tensor, flat: torch.Tensor, promised: RowOrder) -> Mismatch | None:
    if promised is RowOrder.ANY or keys.shape[0] < 2:
        return None
    sequence = keys[:, 0] if promised is RowOrder.GROUPED_BY_SOURCE_RANK else flat
    falls = (sequence[1:] < sequence[:-1]).nonzero()
    if not falls.numel():
        return None
    row = int(falls[0]) + 1
    return Mismatch("dispatch.order", index, f"row {row} breaks the promised order: {promised.value}")


def _bad_places(index: int, seen: Observed, keys: torch.Tensor) -> Mismatch | None:
    """Compare where a replay delivered its rows with where the dispatch that it repeats did.

    A source map that follows does not help who kept places: a handle is for leaving the layout alone.
    """
    if seen.repeated is None:
        return None
    check = "dispatch.places"
    kept = read_tags(seen.repeated.rows[: max(int(seen.repeated.count.item()), 0)])[:, :2].cpu()
    if kept.shape != keys.shape:
        message = f"{len(keys)} rows are a replay of {len(kept)}"
        return Mismatch(check, index, message, got=str(len(keys)), wanted=str(len(kept)))
    moved = (keys != kept).any(1).nonzero()
    if not moved.numel():
        return None
    row = int(moved[0])
    (rank, token), before = keys[row].tolist(), tuple(kept[row].tolist())
    return Mismatch(
        check,
        index,
        f"{moved.numel()} of {len(keys)} rows are in other places than in the dispatch that is replayed, the first is "
        f"row {row}, (source rank, token) {before} then",
        source_rank=rank,
        token=token,
        got=str((rank, token)),
        wanted=str(before),
        bound="the same row in every place",
    )


def judge_combine(
    index: int, seen: Observed, want: ExpectedResult, contract: Contract
) -> tuple[Mismatch | None, float]:
    """Compare the combined rows with their interval; the largest error/bound comes with it."""
    expected = want.output
    if seen.output.shape != expected.value.shape or seen.output.dtype != want.dtype:
        message = f"combine returned {list(seen.output.shape)} {seen.output.dtype}"
        wanted = f"{list(expected.value.shape)} {want.dtype}"
        return Mismatch("combine.output", index, message, got=message, wanted=wanted), float("inf")
    worst = 0.0
    if expected.value.numel():
        ratio = expected.error_over_bound(seen.output)
        worst = float(ratio.max())
        if not worst <= 1.0:
            return _bad_codec(index, seen, want, ratio) or _bad_output(index, seen, expected, ratio), worst
    return judge_weights(index, seen, want, contract), worst


def judge_weights(index: int, seen: Observed, want: ExpectedResult, contract: Contract) -> Mismatch | None:
    """Compare the combined weights, which are exact in float32, where the contract promises them."""
    if not contract.combines_weights:
        return None
    if seen.combined_weights is None:
        return Mismatch("combine.weights", index, "the contract promises combined weights, none came back")
    if seen.combined_weights.dtype != want.weights.dtype or not torch.equal(seen.combined_weights, want.weights):
        return _unequal_weights(index, seen.combined_weights, want.weights)
    return None


def judge_kernel(index: int, seen: Observed, contract: Contract) -> Mismatch | None:
    """Compare the kernel that the backend says it launched with the one that its contract names for such rows."""
    if contract.kernels is None or not seen.kernel:
        return None
    hidden = seen.output.shape[1]
    wanted = contract.kernels.of(hidden)
    if seen.kernel == wanted:
        return None
    message = f"combine launched {seen.kernel} for rows of {hidden} elements; the contract says {wanted}"
    return Mismatch("combine.kernel", index, message, got=seen.kernel, wanted=wanted)


def _bad_codec(index: int, seen: Observed, want: ExpectedResult, ratio: torch.Tensor) -> Mismatch | None:
    """The failure of an output that is right for the opposite of what the contract says of the codec."""
    if want.otherwise is None:
        return None
    if not bool((want.otherwise().error_over_bound(seen.output) <= 1).all()):
        return None
    bad = _bad_output(index, seen, want.output, ratio)
    bad.check, bad.message = "combine.codec", f"{want.swapped}: {bad.message}, and all are what that gives"
    return bad


def _bad_output(index: int, seen: Observed, expected: Interval, ratio: torch.Tensor) -> Mismatch:
    position = int(ratio.argmax())
    token, element = divmod(position, ratio.shape[1])
    low, high = float(expected.lower[token, element]), float(expected.upper[token, element])
    bad_tokens = (ratio > 1).any(1).nonzero().flatten()
    return Mismatch(
        "combine.output",
        index,
        f"{int((ratio > 1).sum())} elements of {bad_tokens.numel()} tokens are outside their interval "
        f"(first token {int(bad_tokens[0])})",
        token=token,
        element=element,
        got=str(float(seen.output[token, element])),
        wanted=str(float(expected.value[token, element])),
        bound=f"[{low}, {high}]",
        routed=str(seen.inputs.ids[token].tolist()),
    )


def _unequal_weights(index: int, got: torch.Tensor, wanted: torch.Tensor) -> Mismatch:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        message = f"combine returned weights {list(got.shape)} {got.dtype}"
        return Mismatch("combine.weights", index, message, got=message, wanted=f"{list(wanted.shape)} {wanted.dtype}")
    token, slot = (got != wanted).nonzero()[0].tolist()
    return Mismatch(
        "combine.weights",
        index,
        f"{int((got != wanted).sum())} of {got.numel()} combined weights differ",
        token=token,
        slot=slot,
        got=str(float(got[token, slot])),
        wanted=str(float(wanted[token, slot])),
        bound="0 (exact in float32)",
    )


def judge_inputs(index: int, handed: Inputs, pristine: Inputs) -> Mismatch | None:
    """Prove that the backend left its inputs alone."""
    for name in ("rows", "ids", "weights", "scales"):
        own, before = getattr(handed, name), getattr(pristine, name)
        if before is not None and not same_bits(own, before):
            return Mismatch("inputs.modified", index, f"the backend changed its input {name}")
    return None
