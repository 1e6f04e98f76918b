"""Single steps of a reduction of row-operator cases: pure functions to smaller ones.

Scope: how a case is changed so that it stays well-formed; whether a changed case still fails, and whether the backend
takes it, is the reducer's business. Nothing here proves that the steps reach every smaller case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import msgspec

from conformance.row_cases import EPSILONS, KINDS, Call, Pattern, RowCase, Weight

#: Row lengths to try, shortest first; the planned one comes after them.
HIDDEN = (32, 64, 128, 256, 384, 512, 1024, 2048, 4096)
_WEIGHTS: tuple[Weight, ...] = get_args(Weight)

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
        sum(KINDS.index(p.kind) for p in patterns),
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
    """A shorter row."""
    for hidden in HIDDEN:
        if hidden < case.cell.hidden:
            yield with_cell(case, hidden=hidden)


def fewer_rows(case: RowCase) -> Iterator[RowCase]:
    """No row, one, few, half, one less; in all calls, then in one. Fewer that exist among them; in one call."""

    def fewer(call: Call) -> Iterator[Call]:
        for rows in dict.fromkeys((0, 1, 2, 3, 4, 8, call.rows // 2, call.rows * 3 // 4, call.rows - 1)):
            if 0 <= rows < call.rows:
                yield _with_rows(call, rows)
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
    for name in ("exponent", "position", "seed"):
        value = getattr(pattern, name)
        amount, sign = abs(value), 1 if value >= 0 else -1
        # A seed only has to be another one; how far a position or an exponent goes says something.
        near = () if name == "seed" else (amount * 3 // 4, amount - 1)
        for lower in dict.fromkeys((0, 1, amount // 2, *near)):
            if 0 <= lower < amount:
                yield msgspec.structs.replace(pattern, **{name: sign * lower})


#: Bold steps first.
STEPS: tuple[Steps, ...] = (
    fewer_ranks,
    fewer_calls,
    fewer_rows,
    shorter_rows,
    fewer_patterns,
    settings,
    plainer_patterns,
)
