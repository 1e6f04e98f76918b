"""The legality model against rules that look back from each step, and the generator's support against the model.

Scope: every sequence of up to five steps on one operator and up to four on two, for several promises. The rules here
are written without the model: each says, of a finished sequence, what must lie before a step. A pass says nothing about
what a library makes of a legal sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from conformance.sequence_cases import (
    POISONED,
    Check,
    Combine,
    Dispatch,
    Poison,
    Recreate,
    Replay,
    Sequence,
    Step,
)
from conformance.sequence_generation import Choose, next_steps, walk
from conformance.sequence_rules import Model, Promises, illegal

_PROMISES = {
    "views": Promises(operators=1),
    "views of two": Promises(operators=2),
    "handles": Promises(operators=1, handles=True),
    "last handle": Promises(operators=1, handles=True, handles_kept=False),
    "fresh": Promises(operators=1, fresh=True, tails=False),
    "zero-copy": Promises(operators=1, own_rows=False),
}
_LENGTH = {"views of two": 4}


def calls(steps: Sequence, op: int, upto: int) -> list[tuple[int, Step]]:
    """Calls on an operator before a step, with their numbers."""
    return [(n, s) for n, s in enumerate(steps[:upto]) if not isinstance(s, Poison | Check) and s.op == op]  # type: ignore[union-attr]


def begun(steps: Sequence, op: int, upto: int) -> bool:
    """Whether the operator's last dispatch or combine before a step is a dispatch."""
    ends = [s for _, s in calls(steps, op, upto) if not isinstance(s, Recreate)]
    return bool(ends) and not isinstance(ends[-1], Combine)


def answer_to(steps: Sequence, number: int) -> int:
    """The dispatch that a combine answers, or the combine that answers a dispatch; -1 for none."""
    own = steps[number]
    mine = [(n, s) for n, s in calls(steps, own.op, len(steps)) if not isinstance(s, Recreate)]  # type: ignore[union-attr]
    place = [n for n, _ in mine].index(number)
    place += -1 if isinstance(own, Combine) else 1
    return mine[place][0] if 0 <= place < len(mine) else -1


def holds(steps: Sequence, of: int, at: int, promised: Promises) -> bool:
    """Whether what a step returned still has to be what it was."""
    if of >= at or isinstance(steps[of], Recreate | Poison | Check):
        return False
    returned = steps[of]
    later = [s for n, s in calls(steps, returned.op, at) if n > of]  # type: ignore[union-attr]
    if isinstance(returned, Combine):
        untouched = Poison("output", of) not in steps[:at]
        return untouched and (promised.fresh or not any(isinstance(s, Combine | Recreate) for s in later))
    return promised.fresh or not any(isinstance(s, Combine) for s in later)


def fits(steps: Sequence, at: int, promised: Promises) -> bool:
    """Whether a step is one that what lies before it allows."""
    step = steps[at]
    if isinstance(step, Check):
        return holds(steps, step.of, at, promised)
    if isinstance(step, Poison):
        return step.of < at and step not in steps[:at] and poisonable(steps, step, at, promised)
    running = begun(steps, step.op, at)  # type: ignore[union-attr]
    if isinstance(step, Combine):
        return running
    if isinstance(step, Dispatch):
        return not running and step.round == sum(isinstance(s, Dispatch) for s in steps[:at])
    if isinstance(step, Recreate):
        return not running
    assert isinstance(step, Replay)
    before = calls(steps, step.op, at)
    made = max((n for n, s in before if isinstance(s, Recreate)), default=-1)
    rounds = [s.round for n, s in before if n > made and isinstance(s, Dispatch | Replay)]
    kept = rounds if promised.handles_kept else rounds[-1:]
    return promised.handles and not running and step.round in kept


def poisonable(steps: Sequence, step: Poison, at: int, promised: Promises) -> bool:
    """Whether nobody relies on what is poisoned."""
    target = steps[step.of]
    if isinstance(target, Combine):
        own = step.what == "experts" and promised.own_rows
        return own or (step.what == "output" and holds(steps, step.of, at, promised))
    if not isinstance(target, Dispatch | Replay):
        return False
    combined = 0 <= answer_to(steps, step.of) < at
    return (
        step.what == "inputs"
        or (step.what == "ids" and combined and not promised.handles)
        or (step.what == "tail" and not combined and promised.tails)
    )


def alphabet(length: int, operators: int) -> list[Step]:
    """Every step that a sequence of so many may hold, without delays."""
    ops, numbers, rounds = range(operators), range(length - 1), range((length + 1) // 2)
    found: list[Step] = [Dispatch(op, r) for op in ops for r in rounds]
    found += [kind(op) for kind in (Combine, Recreate) for op in ops]
    found += [Replay(op, r) for op in ops for r in rounds]
    return found + [Check(n) for n in numbers] + [Poison(what, n) for what in POISONED for n in numbers]


def legal_by_rules(length: int, promised: Promises, *, whole: bool = True) -> set[Sequence]:
    """Every legal sequence of up to so many steps, by the rules above: what is legal has legal beginnings.

    With ``whole`` those that end with everything combined, else the beginnings, too.
    """
    letters = alphabet(length, promised.operators)
    beginnings: list[Sequence] = [()]
    found: set[Sequence] = set()
    for _ in range(length):
        longer = [(*one, step) for one, step in product(beginnings, letters)]
        beginnings = [one for one in longer if fits(one, len(one) - 1, promised)]
        found |= set(beginnings)
    ops = range(promised.operators)
    return {one for one in found if not whole or not any(begun(one, op, len(one)) for op in ops)}


@pytest.mark.parametrize("name", _PROMISES)
def test_model_agrees_with_rules_that_look_back(name: str) -> None:
    promised, length = _PROMISES[name], _LENGTH.get(name, 5)
    letters = alphabet(length, promised.operators)
    wanted = legal_by_rules(length, promised, whole=False)
    models = [Model(promised)]
    found: set[Sequence] = set()
    complete: set[Sequence] = set()
    for _ in range(length):
        models = [after for model in models for step in letters if (after := taken(model, step)) is not None]
        found |= {tuple(model.steps) for model in models}
        complete |= {tuple(model.steps) for model in models if model.complete}
    assert found == wanted
    assert complete == legal_by_rules(length, promised)
    assert len(complete) > 100
    assert all(illegal(one, promised) == "" for one in list(complete)[:500])


def taken(model: Model, step: Step) -> Model | None:
    """The model after a step; None if it may not come next."""
    if model.why_not(step):
        return None
    after = model.copy()
    after.take(step)
    return after


def walks(promised: Promises, exchanges: int, extras: int) -> Iterator[Sequence]:
    """Every sequence that the generator can draw with so many exchanges and other steps, without delays."""
    pending: list[list[int]] = [[]]
    while pending:
        path = pending.pop()
        widths: list[int] = []
        yield tuple(walk(_following(path, widths), promised, 0, exchanges, extras, last_looks=False))
        for depth in range(len(path), len(widths)):
            chosen = [*path, *[0] * (depth - len(path))]
            pending += [[*chosen, other] for other in range(1, widths[depth])]


def _following(path: list[int], widths: list[int]) -> Choose:
    """Choices along a path, then the first of each; how many there were is noted."""

    def choose(model: Model, options: list[Step | None]) -> Step | None:
        del model
        widths.append(len(options))
        place = len(widths) - 1
        return options[path[place] if place < len(path) else 0]

    return choose  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "exchanges", "extras"), [("views", 1, 2), ("handles", 2, 1), ("views of two", 2, 1)])
def test_generator_draws_what_is_legal_and_nothing_else(name: str, exchanges: int, extras: int) -> None:
    promised = _PROMISES[name]
    drawn = list(walks(promised, exchanges, extras))
    length = 2 * exchanges + extras
    possible = legal_by_rules(length, promised)

    def counted(steps: Sequence) -> tuple[int, bool]:
        begun_ = sum(isinstance(s, Dispatch | Replay) for s in steps)
        return begun_, len(steps) - 2 * begun_ <= extras

    assert set(drawn) == {one for one in possible if counted(one) == (exchanges, True)}
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ((Combine(0),), "has dispatched nothing"),
        ((Dispatch(0, 0), Dispatch(0, 1)), "combine it first"),
        ((Dispatch(0, 1),), "give round 0"),
        ((Dispatch(0, 0),), "never combined; combine on operator 0"),
        ((Dispatch(2, 0),), "give 0 to 1"),
        ((Dispatch(0, 0), Combine(0), Replay(0, 0)), "no handle of it; rounds to replay: none"),
        ((Dispatch(0, 0), Recreate(0)), "combine it first"),
        ((Dispatch(0, 0), Combine(0), Check(0)), "launched a combine"),
        ((Dispatch(0, 0), Combine(0), Recreate(0), Check(1)), "was destroyed"),
        ((Dispatch(0, 0), Combine(0), Poison("output", 1), Check(1)), "it was poisoned"),
        ((Dispatch(0, 0), Poison("ids", 0)), "poison them after it"),
        ((Dispatch(0, 0), Combine(0), Poison("tail", 0)), "peers may dispatch into its tail"),
        ((Check(0),), "it returned nothing"),
    ],
)
def test_refusals_name_the_step_and_the_reason(steps: Sequence, told: str) -> None:
    reason = illegal(steps, Promises())
    assert told in reason
    assert f"{len(steps) - 1}" in reason


def test_delays_cost_an_extra_and_are_offered_for_every_rank() -> None:
    offered = next_steps(Model(Promises()), world_size=3, exchanges=1, extras=1)
    assert {step.rank for step in offered if hasattr(step, "rank")} == {0, 1, 2}
    assert not [s for s in next_steps(Model(Promises()), 3, 1, 0) if hasattr(s, "rank")]
