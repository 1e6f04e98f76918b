"""Single steps of a reduction of row-operator cases: pure functions to smaller ones.

Scope: how a case is changed so that it stays well-formed; whether a changed case still fails, and whether the backend
takes it, is the reducer's business. Nothing here proves that the steps reach every smaller case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import msgspec

from conformance.row_cases import BIASES, EPSILONS, KINDS, Call, Pattern, RowCase, Weight

#: Row lengths to try, shortest first; the planned one comes after them.
HIDDEN = (32, 64, 128, 256, 384, 512, 1024, 2048, 4096)
_WEIGHTS: tuple[Weight, ...] = get_args(Weight)
#: Kinds whose magnitudes lie far from 1; what takes their place may have to as well.
_SCALED = ("row_scaled", "block_scaled", "powers", "wide", "huge", "subnormal")
#: Kinds that are drawn, and the seeds with which others of them are tried.
_DRAWN = ("integers", "normal", "zero_group", "nan", "infinity", *_SCALED)
_SEEDS = (1, 2, 3, 4)
#: Exponents that rows of powers have, by their number.
_SCALES = range(-30, 31)

Steps = Callable[[RowCase], Iterator[RowCase]]


def size(case: RowCase) -> tuple[Any, ...]:
    """What a reduction lowers, most important first: ranks, calls, rows, row length, settings, contents."""
    cell, calls = case.cell, case.calls
    patterns = [p for call in calls for p in (*call.patterns, *call.residual)]
    return (
        cell.world_size,
        len(calls),
        sum(call.rows for call in calls),
        cell.hidden,
        cell.mode != "drained",
        sum(bool(call.delays_ms) for call in calls),
        sum(call.num_rows >= 0 for call in calls),
        sum(call.num_rows for call in calls),
        sum(call.into for call in calls),
        len(patterns),
        _kinds(case),
        sum(_WEIGHTS.index(call.weight) for call in calls),
        sum(call.epsilon != EPSILONS[0] for call in calls),
        sum(call.scale != 1.0 for call in calls),
        sum(abs(p.exponent) for p in patterns),
        sum(p.position for p in patterns),
        sum(p.seed for p in patterns),
    )


def with_cell(case: RowCase, **changes: Any) -> RowCase:
    """Another cell."""
    return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, **changes))


def map_calls(case: RowCase, change: Callable[[Call], Call]) -> RowCase:
    """Replace every call."""
    return msgspec.structs.replace(case, calls=tuple(change(call) for call in case.calls))


def _one_by_one(case: RowCase, changes: Callable[[Call], Iterator[Call]]) -> Iterator[RowCase]:
    """Change one call at a time."""
    for index, call in enumerate(case.calls):
        for changed in changes(call):
            yield msgspec.structs.replace(case, calls=(*case.calls[:index], changed, *case.calls[index + 1 :]))


def fewer_ranks(case: RowCase) -> Iterator[RowCase]:
    """Two ranks at once, then half of them."""
    world_size = case.cell.world_size
    for width in dict.fromkeys((2, world_size // 2)):
        if 2 <= width < world_size:
            narrow = map_calls(case, lambda call, w=width: msgspec.structs.replace(call, delays_ms=call.delays_ms[:w]))  # type: ignore[misc]
            yield with_cell(narrow, world_size=width)


def fewer_calls(case: RowCase) -> Iterator[RowCase]:
    """Each call alone, halves, then all but one."""
    calls = case.calls
    if len(calls) < 2:
        return
    for call in calls:
        yield msgspec.structs.replace(case, calls=(call,))
    half = len(calls) // 2
    for kept in (calls[:half], calls[half:], *(calls[:i] + calls[i + 1 :] for i in range(len(calls)))):
        yield msgspec.structs.replace(case, calls=kept)


def shorter_rows(case: RowCase) -> Iterator[RowCase]:
    """A shorter row; of rows that hold every code in turn, each part of one."""
    for hidden in HIDDEN:
        if hidden < case.cell.hidden:
            yield with_cell(case, hidden=hidden)
            for part in range(case.cell.hidden // hidden):
                shorter = with_cell(case, hidden=hidden)
                parted = map_calls(shorter, lambda call, p=part, h=hidden: _part(call, case.cell.hidden, h, p))  # type: ignore[misc]
                if parted != shorter:
                    yield parted


def _part(call: Call, before: int, hidden: int, part: int) -> Call:
    """The same codes in rows of ``hidden``, beginning with the ``part``-th."""
    return _moved(call, lambda position: position * before // hidden + part)


def _moved(call: Call, change: Callable[[int], int]) -> Call:
    """Other positions for the patterns that count every code from theirs on."""
    patterns = (
        msgspec.structs.replace(p, position=change(p.position)) if p.kind == "every_code" else p for p in call.patterns
    )
    return msgspec.structs.replace(call, patterns=tuple(patterns))


def fewer_rows(case: RowCase) -> Iterator[RowCase]:
    """No row, one, few, half, one less; in all calls, then in one. Fewer that exist among them; in one call."""

    def fewer(call: Call) -> Iterator[Call]:
        for rows in dict.fromkeys((0, 1, 2, 3, 4, 8, call.rows // 2, call.rows * 3 // 4, call.rows - 1)):
            if 0 <= rows < call.rows:
                yield _with_rows(call, rows)
                if any(p.kind == "every_code" for p in call.patterns):
                    # The last ones: what these rows hold follows from their number.
                    yield _moved(_with_rows(call, rows), lambda position, n=call.rows - rows: position + n)  # type: ignore[misc]
        for count in dict.fromkeys((0, 1, call.num_rows // 2, call.num_rows - 1)):
            if 0 <= count < call.num_rows:
                yield msgspec.structs.replace(call, num_rows=count)

    for rows in (1, 2, 4):
        yield map_calls(case, lambda call, n=rows: _with_rows(call, min(call.rows, n)))  # type: ignore[misc]
    yield from _one_by_one(case, fewer)


def _with_rows(call: Call, rows: int) -> Call:
    return msgspec.structs.replace(call, rows=rows, num_rows=min(call.num_rows, rows))


def settings(case: RowCase) -> Iterator[RowCase]:
    """One setting of all calls, then of one call, made plain."""
    yield with_cell(case, mode="drained")
    choices: tuple[dict[str, Any], ...] = (
        {"delays_ms": ()},
        {"num_rows": -1},
        {"into": False},
        {"weight": "ones"},
        {"weight": "twos"},
        *({"weight": bias} for bias in BIASES),
        {"epsilon": EPSILONS[0]},
        {"scale": 1.0},
    )
    for change in choices:
        yield map_calls(case, lambda call, c=change: msgspec.structs.replace(call, **c))  # type: ignore[misc]
    yield from _one_by_one(case, lambda call: (msgspec.structs.replace(call, **change) for change in choices))


def fewer_patterns(case: RowCase) -> Iterator[RowCase]:
    """One pattern alone, or all but one."""

    def fewer(call: Call) -> Iterator[Call]:
        for name in ("patterns", "residual"):
            held: tuple[Pattern, ...] = getattr(call, name)
            if len(held) > 1:
                for kept in (*((p,) for p in held), *(held[:i] + held[i + 1 :] for i in range(len(held)))):
                    yield msgspec.structs.replace(call, **{name: kept})

    yield from _one_by_one(case, fewer)


def plainer_patterns(case: RowCase) -> Iterator[RowCase]:
    """A plainer kind, then a smaller exponent, position or seed, of one pattern."""

    def plainer(call: Call) -> Iterator[Call]:
        for name in ("patterns", "residual"):
            held: tuple[Pattern, ...] = getattr(call, name)
            for index, pattern in enumerate(held):
                for simpler in _plainer(pattern):
                    yield msgspec.structs.replace(call, **{name: (*held[:index], simpler, *held[index + 1 :])})

    yield from _one_by_one(case, plainer)


def _plainer(pattern: Pattern) -> Iterator[Pattern]:
    for kind in KINDS[: KINDS.index(pattern.kind)]:
        yield Pattern(kind)
        yield msgspec.structs.replace(pattern, kind=kind)
        if pattern.kind in _SCALED:
            yield Pattern(kind, exponent=-12)
            yield Pattern(kind, exponent=12)
    for name in ("exponent", "position", "seed"):
        value = getattr(pattern, name)
        amount, sign = abs(value), 1 if value >= 0 else -1
        # A seed only has to be another one; how far a position or an exponent goes says something.
        near = () if name == "seed" else (amount * 3 // 4, amount - 1)
        for lower in dict.fromkeys((0, 1, amount // 2, *near)):
            if 0 <= lower < amount:
                yield msgspec.structs.replace(pattern, **{name: sign * lower})


def other_seeds(case: RowCase) -> Iterator[RowCase]:
    """Fewer or shorter rows or plainer kinds, where other numbers of the same kinds show what these do not."""
    if not _drawn(case):
        return
    for seed in _SEEDS:
        other = map_calls(case, lambda call, s=seed: _reseeded(call, s))  # type: ignore[misc]
        yield from (c for make in (fewer_rows, shorter_rows, _plainer_kinds) for c in make(other) if _drawn(c))


def other_scales(case: RowCase) -> Iterator[RowCase]:
    """One row, or a shorter one, of powers, with the scale of any other: it follows from the row's number.

    The seed tells whether it is a power of two or beside one.
    """
    if not any(p.kind == "powers" for call in case.calls for p in call.patterns):
        return
    single = map_calls(case, lambda call: _with_rows(call, min(call.rows, 1)))
    for smaller in (single, *shorter_rows(single)):
        for seed, exponent in product((0, 1), _SCALES):
            yield map_calls(smaller, lambda call, s=seed, e=exponent: _rescaled(call, s, e))  # type: ignore[misc]


def _rescaled(call: Call, seed: int, exponent: int) -> Call:
    powers = Pattern("powers", exponent=exponent, seed=seed)
    patterns = (powers if p.kind == "powers" else p for p in call.patterns)
    return msgspec.structs.replace(call, patterns=tuple(patterns))


def _drawn(case: RowCase) -> bool:
    return any(p.kind in _DRAWN for call in case.calls for p in (*call.patterns, *call.residual))


def _reseeded(call: Call, seed: int) -> Call:
    patterns, residual = (
        tuple(msgspec.structs.replace(p, seed=seed) for p in held) for held in (call.patterns, call.residual)
    )
    return msgspec.structs.replace(call, patterns=patterns, residual=residual)


def _plainer_kinds(case: RowCase) -> Iterator[RowCase]:
    """A plainer kind in one place; what else is plainer would be undone by the seed."""
    before = _kinds(case)
    yield from (candidate for candidate in plainer_patterns(case) if _kinds(candidate) < before)


def _kinds(case: RowCase) -> int:
    return sum(KINDS.index(p.kind) for call in case.calls for p in (*call.patterns, *call.residual))


#: Bold steps first.
STEPS: tuple[Steps, ...] = (
    fewer_ranks,
    fewer_calls,
    fewer_rows,
    shorter_rows,
    fewer_patterns,
    settings,
    plainer_patterns,
    other_seeds,
    other_scales,
)
