"""Which sequences are legal: the one model that generation, case files and reduction share.

Every rank makes the same calls in the same order. On one operator dispatch and combine alternate; two operators know
nothing of each other. What a dispatch returned is stable until its operator's combine is launched, what a combine
returned until that operator's next combine, and neither outlives its operator, unless the contract says that returned
tensors are the caller's. Whatever nobody has promised may be overwritten by the caller.

Source of the rules: MoRI 624002c8 (python/mori/ops/dispatch_combine.py; src/ops/dispatch_combine/intranode.hpp), and
device code run under emulation, where alternation without host barriers held for every kernel type and two combines in
a row hung. What the model does not know: time, and what a backend computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from accelerated.contract import Contract, Standing, exchange
from accelerated.interface import Backend
from conformance.cases import CaseError, SequenceCase
from conformance.sequence_cases import (
    MAX_DELAY_MS,
    MAX_STEPS,
    POISONED,
    Check,
    Combine,
    Delay,
    Dispatch,
    Poison,
    Poisoned,
    Recreate,
    Replay,
    Sequence,
    Step,
    told,
)


@dataclass(frozen=True)
class Promises:
    """What the model has to know of a cell and its contract.

    Attributes:
        operators: one or two.
        handles: dispatches leave something that can be replayed.
        handles_kept: it outlives later dispatches on its operator.
        fresh: returned tensors are the caller's.
        tails: received tensors have rows beyond the valid ones.
        own_rows: the tensor of the experts' rows is the caller's.
    """

    operators: int = 2
    handles: bool = False
    handles_kept: bool = True
    fresh: bool = False
    tails: bool = True
    own_rows: bool = True


def promises(contract: Contract, modes: tuple[str, ...], operators: int) -> Promises:
    """Those of a contract, for calls made in these modes."""
    return Promises(
        operators=operators,
        handles="handle" in modes,
        handles_kept=contract.handles_kept,
        fresh=contract.fresh_outputs,
        tails=not contract.exact_rows,
        own_rows="zero-copy" not in modes,
    )


@dataclass
class Exchange:
    """One dispatch or replay, by the number of its step."""

    op: int
    round: int
    step: int
    combined: int = -1  # step of its combine


@dataclass
class Model:
    """What is promised after the steps taken so far."""

    promises: Promises
    steps: list[Step] = field(default_factory=list)
    rounds: int = 0  # dispatched so far
    exchanges: list[Exchange] = field(default_factory=list)
    poisoned: set[tuple[Poisoned, int]] = field(default_factory=set)
    # The first step at which each operator's memory is what it is now.
    made: list[int] = field(default_factory=lambda: [0, 0])

    def copy(self) -> Model:
        """A model that goes on by itself."""
        exchanges = [replace(exchange) for exchange in self.exchanges]
        return Model(self.promises, [*self.steps], self.rounds, exchanges, {*self.poisoned}, [*self.made])

    # ------------------------------------------------------------------ the state
    def open(self, op: int) -> Exchange | None:
        """The exchange of an operator that is not combined yet."""
        return next((e for e in self.exchanges if e.op == op and e.combined < 0), None)

    @property
    def complete(self) -> bool:
        """Whether everything that was dispatched is combined."""
        return all(e.combined >= 0 for e in self.exchanges)

    def dispatched(self, step: int) -> Exchange | None:
        """The exchange whose dispatch or replay has this number."""
        return next((e for e in self.exchanges if e.step == step), None)

    def combined(self, step: int) -> Exchange | None:
        """The exchange whose combine has this number."""
        return next((e for e in self.exchanges if e.combined == step >= 0), None)

    def replayable(self, op: int) -> list[int]:
        """Rounds of which an operator has a handle that still holds."""
        if not self.promises.handles or self.open(op) is not None:
            return []
        mine = [e.round for e in self.exchanges if e.op == op and e.step >= self.made[op]]
        return sorted(set(mine if self.promises.handles_kept else mine[-1:]))

    def promised(self, step: int) -> str:
        """Why what a step returned may have changed; "" if it has to be what it was."""
        exchange = self.dispatched(step)
        if exchange is not None:
            if self.promises.fresh or exchange.combined < 0:
                return ""
            return f"operator {exchange.op} launched a combine, after which its peers may dispatch into these rows"
        exchange = self.combined(step)
        if exchange is None:
            return "it returned nothing: give a dispatch, a replay or a combine before this one"
        if ("output", step) in self.poisoned:
            return "it was poisoned"
        if self.promises.fresh:
            return ""
        if step < self.made[exchange.op]:
            return f"operator {exchange.op} was destroyed, and its memory with it"
        later = [e for e in self.exchanges if e.op == exchange.op and e.combined > step]
        return f"operator {exchange.op} combined again, at step {later[0].combined}" if later else ""

    # ------------------------------------------------------------------ what may come next
    def why_not(self, step: Step) -> str:
        """Why a step must not come next; "" if it may."""
        match step:
            case Delay():
                return "" if step.rank >= 0 and step.ms > 0 else "give a rank and 1 ms or more"
            case Poison():
                return self._why_not_poison(step)
            case Check():
                return self.promised(step.of)
        if not 0 <= step.op < self.promises.operators:
            return f"the cell has {self.promises.operators} operator(s); give 0 to {self.promises.operators - 1}"
        running = self.open(step.op)
        if isinstance(step, Combine):
            return "" if running is not None else f"operator {step.op} has dispatched nothing that it could combine"
        if running is not None:
            return f"operator {step.op} has not combined what it dispatched at step {running.step}; combine it first"
        if isinstance(step, Dispatch) and step.round != self.rounds:
            return f"rounds are dispatched in their order, each once; give round {self.rounds}"
        if isinstance(step, Replay) and step.round not in self.replayable(step.op):
            return f"operator {step.op} has no handle of it; rounds to replay: {self.replayable(step.op) or 'none'}"
        return ""

    def _why_not_poison(self, step: Poison) -> str:
        if (step.what, step.of) in self.poisoned:
            return "that was poisoned before; leave one out"
        if step.what in ("experts", "output"):
            if self.combined(step.of) is None:
                return f"step {step.of} is no combine before this one"
            if step.what == "experts":
                return "" if self.promises.own_rows else "in the mode zero-copy the experts' rows are the backend's"
            return self.promised(step.of)
        exchange = self.dispatched(step.of)
        if exchange is None:
            return f"step {step.of} is no dispatch or replay before this one"
        if step.what == "tail" and exchange.combined >= 0:
            return "it is combined, after which peers may dispatch into its tail"
        if step.what == "tail" and not self.promises.tails:
            return "the contract gives received rows no tail"
        if step.what == "ids" and self.promises.handles:
            return "a handle needs the ids for as long as it may be replayed"
        if step.what == "ids" and exchange.combined < 0:
            return "combine is given the ids again; poison them after it"
        return ""

    def take(self, step: Step) -> None:
        """Go on by a step that may come next.

        Raises:
            ValueError: it may not.
        """
        if reason := self.why_not(step):
            raise ValueError(f"step {len(self.steps)}: {told(step)}: {reason}")
        number = len(self.steps)
        self.steps.append(step)
        match step:
            case Dispatch() | Replay():
                self.exchanges.append(Exchange(step.op, step.round, number))
                self.rounds += isinstance(step, Dispatch)
            case Combine():
                running = self.open(step.op)
                assert running is not None
                running.combined = number
            case Recreate():
                self.made[step.op] = number
            case Poison():
                self.poisoned.add((step.what, step.of))

    def calls(self) -> Iterator[Step]:
        """Every dispatch, replay, combine and recreate that may come next."""
        for op in range(self.promises.operators):
            candidates: list[Step] = [Dispatch(op, self.rounds), Combine(op), Recreate(op)]
            candidates += [Replay(op, index) for index in self.replayable(op)]
            yield from (step for step in candidates if not self.why_not(step))

    def looks(self) -> Iterator[Check | Poison]:
        """Every check and every poisoning that may come next."""
        for number in range(len(self.steps)):
            candidates: list[Check | Poison] = [Check(number), *(Poison(what, number) for what in POISONED)]
            yield from (step for step in candidates if not self.why_not(step))


def illegal(sequence: Sequence, promised: Promises) -> str:
    """The first thing that is wrong with a sequence; "" if it is legal."""
    model = Model(promised)
    try:
        for step in sequence:
            model.take(step)
    except ValueError as error:
        return str(error)
    running = next((e for e in model.exchanges if e.combined < 0), None)
    if running is not None:
        return f"what step {running.step} dispatches is never combined; combine on operator {running.op} before the end"
    return ""


def validate_sequence(case: SequenceCase) -> None:
    """Check what a sequence's case has beyond that of an exchange, whatever its backend promises.

    Raises:
        CaseError: names the step, the value, the limit and the fix.
    """
    cell, steps = case.cell, case.sequence
    if not 0 <= cell.second <= 1 << 16:
        raise CaseError(f"second is {cell.second}; give the capacity of operator 1, up to {1 << 16}, or 0 for none")
    if not 0 < len(steps) <= MAX_STEPS:
        raise CaseError(f"the sequence has {len(steps)} steps; give 1 to {MAX_STEPS}")
    dispatched = sum(isinstance(step, Dispatch) for step in steps)
    if dispatched != len(case.rounds):
        raise CaseError(f"{dispatched} rounds are dispatched and there are {len(case.rounds)}; dispatch each once")
    for number, step in enumerate(steps):
        if isinstance(step, Delay) and (step.rank >= cell.world_size or not 0 < step.ms <= MAX_DELAY_MS):
            raise CaseError(
                f"step {number} delays rank {step.rank} by {step.ms} ms; give a rank from 0 to {cell.world_size - 1} "
                f"and 1 to {MAX_DELAY_MS} ms"
            )
    if late := [index for index, a_round in enumerate(case.rounds) if a_round.delays_ms]:
        raise CaseError(f"round {late[0]} has delays; a sequence has steps that delay a rank in their place")
    most = Promises(cell.operators, handles="handle" in cell.modes, fresh=True, own_rows="zero-copy" not in cell.modes)
    if reason := illegal(steps, most):
        raise CaseError(reason)


def misfit(case: SequenceCase, made: Backend) -> str:
    """Why a valid case asks a backend for what it does not take or promise; "" if it does not."""
    cell = case.cell
    for op in range(cell.operators):
        support = made.support(cell.problem_of(op), cell.kernel_type)
        if support.standing is Standing.REFUSED:
            return f"operator {op}: {support.reason}"
    contract = exchange(made.contract(cell.problem(), cell.kernel_type))
    idle = [index for index, counts in enumerate(case.token_counts()) if 0 in counts]
    if idle and not contract.idle_ranks:
        return f"round {idle[0]} leaves a rank without tokens, which the contract does not allow"
    return illegal(case.sequence, promises(contract, cell.modes, cell.operators))
