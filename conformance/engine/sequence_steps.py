"""Steps of a reduction that only sequences have; the others are in :mod:`conformance.engine.steps`.

Scope: pure functions from a sequence's case to smaller ones that are well-formed: what refers to a step that is left
out goes with it, and rounds that nothing dispatches any more go, too. Whether what is left is legal, the model of
:mod:`conformance.sequence_rules` says; no other candidate is run. Nothing here proves that the steps reach every
smaller case.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import msgspec

from conformance.cases import SequenceCase
from conformance.sequence_cases import (
    Check,
    Combine,
    Delay,
    Dispatch,
    Poison,
    Recreate,
    Replay,
    Step,
    moved,
)

#: Kinds of steps in the order in which they are best told: a look as early as it shows what it is for.
_PLAINEST: tuple[type[Step], ...] = (Dispatch, Check, Poison, Combine, Replay, Recreate, Delay)


def size(case: SequenceCase) -> tuple[Any, ...]:
    """What a reduction lowers beside what every exchange has: steps, operators, delays, then the plainest order."""
    steps, cell = case.sequence, case.cell
    return (
        len(steps),
        cell.second > 0,
        cell.second not in (0, cell.capacity),
        sum(step.ms for step in steps if isinstance(step, Delay)),
        [_cost(step) for step in steps],
    )


def played(case: SequenceCase) -> list[int]:
    """Rounds in the order in which they are dispatched and replayed, as often as they are."""
    return [step.round for step in case.sequence if isinstance(step, Dispatch | Replay)]


def _cost(step: Step) -> tuple[int, ...]:
    """Plain kinds, low operators and near references first."""
    own = getattr(step, "op", 0), getattr(step, "round", 0), getattr(step, "of", 0), getattr(step, "rank", 0)
    return _PLAINEST.index(type(step)), *own


def without(case: SequenceCase, gone: Container[int]) -> SequenceCase:
    """Leave steps out by number, and whatever refers to them."""
    places: dict[int, int] = {}
    rounds: dict[int, int] = {}
    kept: list[Step] = []
    for number, step in enumerate(case.sequence):
        if number in gone:
            continue
        if isinstance(step, Poison | Check) and step.of not in places:
            continue
        if isinstance(step, Replay) and step.round not in rounds:
            continue
        if isinstance(step, Dispatch):
            rounds[step.round] = len(rounds)
        places[number] = len(kept)
        step_ = moved(step, places)
        kept.append(
            msgspec.structs.replace(step_, round=rounds[step_.round]) if isinstance(step_, Dispatch | Replay) else step_
        )
    left = tuple(case.rounds[index] for index in rounds)
    return msgspec.structs.replace(case, rounds=left, sequence=tuple(kept))


def exchanges(case: SequenceCase) -> list[tuple[int, int]]:
    """Steps of every dispatch or replay and its combine, in the order of the first."""
    running: dict[int, int] = {}
    found = []
    for number, step in enumerate(case.sequence):
        if isinstance(step, Dispatch | Replay):
            running[step.op] = number
        elif isinstance(step, Combine) and step.op in running:
            found.append((running.pop(step.op), number))
    return sorted(found)


def _replays(case: SequenceCase, gone: set[int]) -> set[int]:
    """Combines of replays whose round goes with the given steps."""
    rounds = {step.round for number in gone if isinstance(step := case.sequence[number], Dispatch)}
    lost = {number for number, step in enumerate(case.sequence) if isinstance(step, Replay) and step.round in rounds}
    return {combine for first, combine in exchanges(case) if first in lost} | lost


def fewer_steps(case: SequenceCase) -> Iterator[SequenceCase]:
    """One exchange alone, exchanges left out by halves, one by one, then every other step, all and one by one."""
    pairs = [set(pair) for pair in exchanges(case)]
    everything = set().union(*pairs) if pairs else set()
    if len(pairs) > 2:
        half = len(pairs) // 2
        for part in (pairs[:half], pairs[half:]):
            yield _left_out(case, set().union(*part))
    for pair in pairs:
        if len(pairs) > 1:
            yield _left_out(case, pair)
    others = [number for number in range(len(case.sequence)) if number not in everything]
    if len(others) > 1:
        yield without(case, set(others))
        for kind in (Delay, Poison, Recreate, Check):
            yield without(case, {number for number in others if isinstance(case.sequence[number], kind)})
    for number in reversed(others):
        yield without(case, {number})
    # Two exchanges may only be needed together, as may an exchange and what stands between.
    for first in range(len(pairs)):
        for second in range(first + 1, len(pairs)):
            if len(pairs) > 2:
                yield _left_out(case, pairs[first] | pairs[second])


def _left_out(case: SequenceCase, gone: set[int]) -> SequenceCase:
    return without(case, gone | _replays(case, gone))


def plainer(case: SequenceCase) -> Iterator[SequenceCase]:
    """One operator in the place of two, then each step made plain or moved towards a plainer order."""
    cell = case.cell
    if cell.second:
        yield _on_one(case)
        if all(getattr(step, "op", 0) == 0 for step in case.sequence):
            yield msgspec.structs.replace(case, cell=msgspec.structs.replace(cell, second=0, model=""))
        if cell.second != cell.capacity:
            yield msgspec.structs.replace(case, cell=msgspec.structs.replace(cell, second=cell.capacity, model=""))
        else:
            yield from _exchanged(case)
    for number, step in enumerate(case.sequence):
        if isinstance(step, Delay) and step.ms > 1:
            yield _with(case, number, Delay(step.rank, 1))
        if isinstance(step, Delay) and step.rank:
            yield _with(case, number, Delay(0, step.ms))
        if isinstance(step, Replay):
            # A dispatch of the same round is no replay's equal, so it gets a round of its own, which is a copy.
            yield _as_dispatch(case, number)
    for number in range(1, len(case.sequence)):
        yield from _earlier(case, number)


def _on_one(case: SequenceCase) -> SequenceCase:
    """Every call on operator 0."""
    steps = [msgspec.structs.replace(step, op=0) if hasattr(step, "op") else step for step in case.sequence]
    cell = msgspec.structs.replace(case.cell, second=0, model="")
    return msgspec.structs.replace(case, cell=cell, sequence=tuple(steps))


def _exchanged(case: SequenceCase) -> Iterator[SequenceCase]:
    """The operators in each other's place, and then also the order of two dispatches."""
    steps = [msgspec.structs.replace(step, op=1 - step.op) if hasattr(step, "op") else step for step in case.sequence]
    exchanged = msgspec.structs.replace(case, sequence=tuple(steps))
    yield exchanged
    for number in range(1, len(steps)):
        if isinstance(steps[number - 1], Dispatch) and isinstance(steps[number], Dispatch):
            yield _dispatched_before(exchanged, number)


def _dispatched_before(case: SequenceCase, number: int) -> SequenceCase:
    """A dispatch and the one before it change places, and so do their rounds."""
    first, second = case.sequence[number - 1], case.sequence[number]
    assert isinstance(first, Dispatch)
    assert isinstance(second, Dispatch)
    rounds = {first.round: second.round, second.round: first.round}
    places = {index: index for index in range(len(case.sequence))} | {number - 1: number, number: number - 1}
    steps = [
        msgspec.structs.replace(step, round=rounds.get(step.round, step.round)) if isinstance(step, Replay) else step
        for step in case.sequence
    ]
    steps[number - 1] = Dispatch(second.op, first.round)
    steps[number] = Dispatch(first.op, second.round)
    payloads = list(case.rounds)
    payloads[first.round], payloads[second.round] = payloads[second.round], payloads[first.round]
    changed = tuple(moved(step, places) for step in steps)
    return msgspec.structs.replace(case, rounds=tuple(payloads), sequence=changed)


def _with(case: SequenceCase, number: int, step: Step) -> SequenceCase:
    steps = (*case.sequence[:number], step, *case.sequence[number + 1 :])
    return msgspec.structs.replace(case, sequence=steps)


def _as_dispatch(case: SequenceCase, number: int) -> SequenceCase:
    """A replay made a dispatch of a copy of its round; later rounds are renumbered."""
    replay = case.sequence[number]
    assert isinstance(replay, Replay)
    before = sum(isinstance(step, Dispatch) for step in case.sequence[:number])
    steps: list[Step] = []
    for place, step in enumerate(case.sequence):
        if place == number:
            steps.append(Dispatch(replay.op, before))
        elif isinstance(step, Dispatch | Replay) and step.round >= before:
            steps.append(msgspec.structs.replace(step, round=step.round + 1))
        else:
            steps.append(step)
    rounds = (*case.rounds[:before], case.rounds[replay.round], *case.rounds[before:])
    return msgspec.structs.replace(case, rounds=rounds, sequence=tuple(steps))


def _earlier(case: SequenceCase, number: int) -> Iterator[SequenceCase]:
    """A step changes places with the one before it."""
    first, second = case.sequence[number - 1], case.sequence[number]
    if isinstance(first, Dispatch) and isinstance(second, Dispatch):
        yield _dispatched_before(case, number)
        return
    if isinstance(second, Poison | Check) and second.of == number - 1:
        return
    places = {index: index for index in range(len(case.sequence))} | {number - 1: number, number: number - 1}
    steps = list(case.sequence)
    steps[number - 1], steps[number] = second, first
    yield msgspec.structs.replace(case, sequence=tuple(moved(step, places) for step in steps))


def folded(case: SequenceCase, keep: range) -> SequenceCase:
    """The same on the ranks that stay, in their order; delays of others are left out."""
    narrower = without(
        case, {n for n, step in enumerate(case.sequence) if isinstance(step, Delay) and step.rank not in keep}
    )
    steps = [Delay(keep.index(step.rank), step.ms) if isinstance(step, Delay) else step for step in narrower.sequence]
    return msgspec.structs.replace(narrower, sequence=tuple(steps))
