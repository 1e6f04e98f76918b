"""Sequences: one that every cell begins with, and drawn ones: walks along the legality model, and rounds for them.

The first one has a look at an earlier result, poison and, where there are handles, a replay; a small budget may draw
none of these. In a drawn one every step is among those that may come next, so every sequence is legal by construction.
Each walk has a number of exchanges to begin and of other steps to spend; what is open at the end is combined. What is
never drawn: a sequence of which some rank makes other calls than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from hypothesis import strategies as st

from accelerated.contract import Contract
from conformance.cases import Explicit, Round, Rows, SequenceCase, SequenceCell
from conformance.generation import applies, rounds
from conformance.recipes import ARCHETYPES
from conformance.sequence_cases import Check, Combine, Delay, Dispatch, Poison, Poisoned, Recreate, Replay, Step
from conformance.sequence_rules import Model, Promises, promises

#: Chooses one of the steps that may come next; None ends the sequence.
Choose = Callable[[Model, Sequence[Step | None]], Step | None]

#: Dispatches and replays of a case, and other steps beside their combines.
EXCHANGES = {"drained": (3, 5), "free-running": (3, 6)}
EXTRAS = (4, 8)
DELAYS_MS = (1, 3)
#: How often a kind of step is offered.
_WEIGHTS: dict[type[Step], int] = {Dispatch: 3, Combine: 3, Replay: 8, Recreate: 1, Delay: 1, Poison: 6, Check: 3}
#: How much more often what can tell something new: a look at a result behind which there were other calls, a replay of
#: an older round, an operator recreated after it was used.
_TELLING = 6
#: Poison that is legal on fewer occasions than that in a dispatch's inputs.
_RARE: dict[Poisoned, int] = {"tail": 5, "output": 6, "experts": 4, "ids": 4}
#: Tokens of each rank in the rounds of the first sequence, and in that of the second operator.
_MANY, _FEW, _OTHER = 3, 1, 2


def first_sequence(cell: SequenceCell, contract: Contract) -> SequenceCase:
    """Looks and poison around calls of two operators, then a smaller round and a larger one, with handles a replay."""
    model = Model(promises(contract, cell.modes, cell.operators))
    sizes: list[int] = []

    def take(step: Step) -> int:
        model.take(step)
        return len(model.steps) - 1

    def dispatch(op: int, tokens: int) -> int:
        sizes.append(min(tokens, cell.room_of(op)))
        return take(Dispatch(op, model.rounds))

    def poison(what: Poisoned, of: int) -> None:
        if not model.why_not(Poison(what, of)):
            take(Poison(what, of))

    received = dispatch(0, _MANY)
    poison("inputs", received)
    other = dispatch(1, _OTHER) if cell.operators > 1 else received
    take(Check(received))
    poison("tail", received)
    combined = take(Combine(0))
    if cell.operators > 1:
        take(Check(other))
        take(Combine(1))
    poison("ids", received)
    poison("experts", combined)
    dispatch(0, _FEW)
    take(Check(combined))
    poison("output", combined)
    take(Combine(0))
    again = take(Replay(0, model.replayable(0)[0])) if model.promises.handles else dispatch(0, _MANY)
    poison("inputs", again)
    take(Combine(0))
    built = [Round(Explicit(_moving(cell, tokens, turn)), "normal", turn) for turn, tokens in enumerate(sizes)]
    return SequenceCase(cell, tuple(built), tuple(model.steps))


def _moving(cell: SequenceCell, tokens: int, turn: int) -> Rows:
    """So many tokens on each rank, whose experts move on with every token and turn."""
    per_rank = cell.experts // cell.world_size

    def row(rank: int, token: int) -> tuple[int, ...]:
        start = (rank + token + 1) * per_rank + turn
        return tuple((start + slot) % cell.experts for slot in range(cell.top_k))

    return tuple(tuple(row(rank, token) for token in range(tokens)) for rank in range(cell.world_size))


def next_steps(model: Model, world_size: int, exchanges: int, extras: int) -> list[Step]:
    """Steps that may come next, with so many dispatches or replays and so many other steps left.

    A combine costs neither.
    """
    found: list[Step] = []
    for step in model.calls():
        left = exchanges if isinstance(step, Dispatch | Replay) else extras if isinstance(step, Recreate) else 1
        found += [step] if left > 0 else []
    if extras > 0:
        found += model.looks()
        found += [Delay(rank, ms) for rank in range(world_size) for ms in DELAYS_MS]
    return found


def walk(
    choose: Choose, promised: Promises, world_size: int, exchanges: int, extras: int, *, last_looks: bool
) -> list[Step]:
    """Steps as they are chosen, until everything is combined and nothing more is chosen.

    With last looks, what a step returned is compared once more where that promise ends, if there were calls since.
    """
    model = Model(promised)
    while True:
        options: list[Step | None] = [*next_steps(model, world_size, exchanges, extras)]
        if exchanges == 0 and model.complete:
            options.append(None)
        step = choose(model, options)
        if last_looks:
            for look in _last_looks(model, step):
                model.take(look)
        if step is None:
            return model.steps
        model.take(step)
        exchanges -= isinstance(step, Dispatch | Replay)
        extras -= not isinstance(step, Dispatch | Replay | Combine)


def _last_looks(model: Model, step: Step | None) -> list[Check]:
    """Checks that are legal before a step and not after it; at the end all that are."""
    looks = [look for look in model.looks() if isinstance(look, Check) and telling(look, model.steps)]
    if not isinstance(step, Combine | Recreate):
        return looks if step is None else []
    after = model.copy()
    after.take(step)
    return [look for look in looks if after.why_not(look)]


def telling(step: Step, taken: Sequence[Step]) -> bool:
    """Whether a step after those taken is one that a fault between calls would show in."""
    if isinstance(step, Check):
        since = max((number for number, other in enumerate(taken) if other == step), default=step.of)
        return any(isinstance(other, Dispatch | Replay | Combine | Recreate) for other in taken[since + 1 :])
    mine = [other for other in taken if isinstance(other, Dispatch | Replay) and other.op == getattr(step, "op", -1)]
    if isinstance(step, Replay):
        return mine[-1].round != step.round
    return isinstance(step, Recreate) and bool(mine) and taken[-1] != step


def _worth(step: Step, taken: Sequence[Step]) -> int:
    """How often a step is offered among those of its kind."""
    if isinstance(step, Poison):
        return _RARE.get(step.what, 1)
    if isinstance(step, Recreate):
        return 2 if telling(step, taken) else 1  # a new operator costs more than all other steps
    return _TELLING if telling(step, taken) else 1


@st.composite
def sequences(draw: st.DrawFn, cell: SequenceCell, promised: Promises) -> tuple[Step, ...]:
    """Steps for a cell: the kind is drawn first, so that many delays do not crowd out the one combine."""

    def choose(model: Model, options: Sequence[Step | None]) -> Step | None:
        worth = {step: _worth(step, model.steps) for step in options if step is not None}
        kinds: list[type[Step] | None] = [None] * (len(options) - len(worth))
        for kind, weight in _WEIGHTS.items():
            best = max((worth[step] for step in worth if isinstance(step, kind)), default=0)
            kinds += [kind] * (weight + best if best > 1 else weight * best)
        chosen = random.choice(kinds)
        if chosen is None:
            return None
        return random.choice([step for step in worth if isinstance(step, chosen) for _ in range(worth[step])])

    # A small batch of Hypothesis's own choices repeats the simplest ones; what a seed leads to does not.
    random = Random(draw(st.integers(0, 2**32 - 1)))
    exchanges, extras = random.randint(*EXCHANGES[cell.mode]), random.randint(*EXTRAS)
    looks = random.random() < 0.5
    return tuple(walk(choose, promised, cell.world_size, exchanges, extras, last_looks=looks))


@st.composite
def sequence_rounds(
    draw: st.DrawFn, cell: SequenceCell, contract: Contract, steps: Sequence[Step], names: Sequence[str]
) -> tuple[Round, ...]:
    """Rounds for the dispatches of a sequence: any counts, or full and nearly empty ones in turn on each operator."""
    waves = draw(st.booleans())
    dispatched = [0, 0]
    found = []
    for step in steps:
        if not isinstance(step, Dispatch):
            continue
        capacity = cell.room_of(step.op)
        counts = None
        if waves:
            few = draw(st.sampled_from((0, 1, 2))) if dispatched[step.op] % 2 else capacity
            counts = (min(few, capacity),) * cell.world_size
        dispatched[step.op] += 1
        found.append(draw(rounds(cell, names, delays=False, contract=contract, capacity=capacity, counts=counts)))
    return tuple(found)


@st.composite
def sequence_cases(draw: st.DrawFn, cell: SequenceCell, contract: Contract, only: str = "") -> SequenceCase:
    """A case of the cell; ``only`` names an archetype that every round is to have."""
    names = [only] if only else [a for a in ARCHETYPES if applies(a, cell, contract)]
    steps = draw(sequences(cell, promises(contract, cell.modes, cell.operators)))
    return SequenceCase(cell, draw(sequence_rounds(cell, contract, steps, names)), steps)
