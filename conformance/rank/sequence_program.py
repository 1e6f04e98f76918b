"""The program of a sequence: the steps of a case on one or two operators, drained and free-running.

Inputs and expected results of every step are made first. *Drained* then synchronises after each dispatch and combine;
*free-running* makes every call without host sync, collective of ours or ``.item()``, and judges after the last step.
Clones, comparisons and poison are put on the same stream, so they see what a user's next kernel would see. What an
earlier step returned is compared with its clone in the backend's own tensor, the count in the library's counter where
the backend returned a copy of it. To destroy an operator is the exception: its memory must not go while a peer still
works, and building one synchronises every rank anyway, so a free-running sequence is drained there on every rank and
runs on from it. Every case begins with new operators, so that it holds all that they went through.

What a pass does not prove: that another order of calls is safe; and a step that is late on a device is one whose
launch is late, for delays are the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from accelerated.contract import Contract, ContractError, exchange
from accelerated.interface import Backend, Operation, RankContext, Received
from conformance.cases import Case, Rows, SequenceCase, SequenceCell
from conformance.engine.protocol import Mismatch
from conformance.rank.byte_views import differing
from conformance.rank.experts import LocalExperts
from conformance.rank.guard import backend_code
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.inputs import Inputs, numbered_inputs
from conformance.rank.judge import Observed, judge_dispatch, judge_inputs
from conformance.rank.phases import AT_STEP, SetPhase
from conformance.rank.programs import Expectation, Program, Returned, Sent
from conformance.sequence_cases import Check, Combine, Delay, Dispatch, Poison, Recreate, Replay, told

#: What integers are overwritten with: no expert, no count.
INTEGER_POISON = 0x7ABADBAD
_STAMPS = 256
#: Parts of a seed that dispatches have; replays have those beyond.
_DISPATCHED = 128


@dataclass
class _Exchange:
    """One dispatch or replay and its combine, by their steps."""

    step: int
    op: int
    round: int
    replayed: bool
    pristine: Inputs
    handed: Inputs
    expected: Expectation
    seen_inputs: Inputs  # those handed, or clones of what was overwritten since
    combine: int = -1
    sent: Sent | None = None
    returned: Returned | None = None
    observed: Observed | None = None


@dataclass
class _Look:
    """A comparison: what a step returned, as it is now and as it was."""

    exchange: _Exchange
    of: int
    now: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)


class SequenceProgram(Program):
    """Operators of one cell, their contract and experts, ready to run sequences.

    Args:
        context: of the rank.
        operations: in the order in which they were built.
        make: builds an operator again.
        contract: of every one of them.
        judged_by: the reference or the oracle.
        experts: of this rank.
    """

    def __init__(
        self,
        context: RankContext,
        operations: list[Operation],
        make: Callable[[int], Operation],
        contract: Contract,
        judged_by: str,
        experts: LocalExperts,
    ) -> None:
        super().__init__(context, operations[0], contract, judged_by, experts)
        self._operations, self._make = operations, make
        self._begun = 0  # steps of the cases before, the same on every rank
        self._used = False

    def close(self) -> None:
        """Close the operators, in the order in which they are numbered."""
        for operation in self._operations:
            operation.close()

    def run(self, case: Case, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank, with its step, and the largest error/bound."""
        assert isinstance(case, SequenceCase)
        if self._used:
            phase("build", 0)
            self._renew(range(len(self._operations)))
        self._used = True
        phase("inputs", 0)
        exchanges = self._exchanges(case, phase)
        looks: dict[int, _Look] = {}
        running: dict[int, _Exchange] = {}
        handles: dict[tuple[int, int], Sent] = {}
        for number, step in enumerate(case.sequence):

            def at(name: str, index: int, number: int = number) -> None:
                phase(f"{name}{AT_STEP}{number}", index)

            match step:
                case Dispatch() | Replay():
                    one = running[step.op] = exchanges[number]
                    cached = handles[step.op, step.round] if one.replayed else None
                    one.sent = self._send(case, one.round, one.handed, at, cached, self._operations[step.op])
                    if not one.replayed:
                        handles[step.op, step.round] = one.sent
                case Combine():
                    one = running[step.op]
                    one.combine = number
                    assert one.sent is not None
                    operation = self._operations[step.op]
                    one.observed, one.returned = self._return(case, one.round, one.sent, one.handed, at, operation)
                    one.observed.inputs = one.seen_inputs
                case Recreate():
                    at("recreate", 0)
                    self._recreate(step.op, exchanges)
                    handles = {key: handle for key, handle in handles.items() if key[0] != step.op}
                case Delay():
                    if step.rank == self._context.rank:
                        time.sleep(step.ms / 1000)
                case Poison():
                    at("poison", 0)
                    _poison(step, _of(step.of, exchanges), drained=case.cell.mode == "drained")
                case Check():
                    at("check", 0)
                    looks[number] = _look(step.of, _of(step.of, exchanges))
        self._begun += len(case.sequence)
        phase("judge", 0)
        self._synchronise()
        return self._judge_steps(case, exchanges, looks)

    # ------------------------------------------------------------------ what is made first
    def _exchanges(self, case: SequenceCase, phase: SetPhase) -> dict[int, _Exchange]:
        """Inputs and expected results of every dispatch and replay, by the number of its step."""
        routings = self._routings(case)
        made: list[tuple[int, Dispatch | Replay, Inputs]] = []
        for number, step in enumerate(case.sequence):
            if isinstance(step, Dispatch | Replay):
                inputs = self._inputs(case, (step.round, number), self._context.rank, routings[step.round])
                made.append((number, step, inputs))
        handed = [inputs.clone() for _, _, inputs in made]
        phase("expected", 0)
        return {
            number: _Exchange(
                number,
                step.op,
                step.round,
                isinstance(step, Replay),
                inputs,
                given,
                self._expect(case, (step.round, number), routings[step.round], inputs),
                replace(given),
            )
            for (number, step, inputs), given in zip(made, handed, strict=True)
        }

    def _inputs(self, case: Case, step: tuple[int, int], source: int, routing: Rows) -> Inputs:
        """Inputs of the dispatch or replay of a round that has a step's number."""
        assert isinstance(case, SequenceCase)
        index, number = step
        part = _DISPATCHED + number if isinstance(case.sequence[number], Replay) else index
        stamp = self._stamp(number)
        return numbered_inputs(case, index, source, routing, self._context.device, part, stamp)

    def _stamp(self, number: int) -> int:
        """Steps are counted over all cases of an operator, so that a row of an earlier one is recognised."""
        return (self._begun + number) % _STAMPS

    # ------------------------------------------------------------------ steps
    def _recreate(self, op: int, exchanges: dict[int, _Exchange]) -> None:
        """Destroy and build an operator, and let go of what it returned."""
        if not self._contract.fresh_outputs:
            for one in exchanges.values():
                # Views of memory that goes with the operator; the experts' rows are the caller's.
                if one.op == op and one.sent is not None and one.returned is not None:
                    one.sent.received = one.returned.combined = _GONE
        self._renew((op,))

    def _renew(self, ops: Sequence[int]) -> None:
        """Destroy operators, then build them again, when no rank has work under way."""
        self._synchronise()
        dist.all_reduce(torch.zeros(1), group=self._context.group)
        for op in ops:
            self._operations[op].close()
        for op in ops:
            self._operations[op] = self._make(op)

    # ------------------------------------------------------------------ judging
    def _judge_steps(
        self, case: SequenceCase, exchanges: dict[int, _Exchange], looks: dict[int, _Look]
    ) -> tuple[Mismatch | None, float]:
        """Judge every step in its order, as if the case ended there."""
        worst = 0.0
        combines = {one.combine: one for one in exchanges.values()}
        for number, step in enumerate(case.sequence):
            mismatch: Mismatch | None = None
            one = exchanges.get(number) or combines.get(number)
            if number in exchanges:
                assert one is not None
                assert one.observed is not None
                stamp = self._stamp(number - len(case.sequence))  # those of this case are counted already
                mismatch = judge_dispatch(number, one.observed, one.expected[0], self._contract, stamp)
                if mismatch is not None:
                    # What a row carries is the number of a step here.
                    mismatch.message = mismatch.message.replace(", round ", ", step ")
            elif one is not None:
                assert one.observed is not None
                mismatch, ratio = self._judge_result(case, one.round, one.observed, one.expected[1])
                worst = max(worst, ratio)
                mismatch = mismatch or judge_inputs(one.round, one.seen_inputs, one.pristine)
            elif number in looks:
                one = looks[number].exchange
                mismatch = _changed(looks[number], weightless="weightless" in case.cell.modes)
            if mismatch is not None:
                assert one is not None
                mismatch.step, mismatch.round = number, one.round
                mismatch.message = f"{told(step)}: {mismatch.message}"
                if one.replayed and number not in looks:
                    mismatch.check = f"replay.{mismatch.check}"
                return mismatch, worst
        return None, worst


#: In the place of what must not be touched any more.
_GONE: Any = None


def _of(step: int, exchanges: dict[int, _Exchange]) -> _Exchange:
    """The exchange whose dispatch, replay or combine has a number."""
    return next(one for one in exchanges.values() if step in (one.step, one.combine))


# ---------------------------------------------------------------------------------------------------------- poison


def _poison(step: Poison, one: _Exchange, *, drained: bool) -> None:
    """Overwrite what nobody has promised to anybody, on the stream."""
    handed, seen = one.handed, one.seen_inputs
    if step.what == "inputs":
        for name in ("rows", "weights", "scales"):
            tensor = getattr(handed, name)
            if tensor is not None:
                setattr(seen, name, tensor.clone())
                tensor.fill_(_poison_of(tensor))
    elif step.what == "ids":
        seen.ids = handed.ids.clone()
        handed.ids.fill_(INTEGER_POISON)
    elif step.what == "tail":
        assert one.sent is not None
        for tensor in _valid_columns(one.sent.received):
            _poison_tail(tensor, one.sent.count, drained=drained)
    else:
        assert one.returned is not None
        tensor = one.returned.expert_rows if step.what == "experts" else one.returned.combined.output
        tensor.fill_(_poison_of(tensor))


def _poison_tail(tensor: torch.Tensor, count: torch.Tensor, *, drained: bool) -> None:
    if drained:
        rows = min(max(int(count.item()), 0), tensor.shape[0])
        tensor[rows:] = _poison_of(tensor)
        return
    beyond = torch.arange(tensor.shape[0], device=tensor.device) >= count
    tensor.masked_fill_(beyond.unsqueeze(1), _poison_of(tensor))


def _poison_of(tensor: torch.Tensor) -> float | int:
    if tensor.is_floating_point():
        return float("nan")
    return 255 if tensor.dtype == torch.uint8 else INTEGER_POISON


# ---------------------------------------------------------------------------------------------------------- checks


def _valid_columns(received: Received | Sent) -> Iterator[torch.Tensor]:
    """What is received of each row."""
    yield from (received.rows, received.ids, received.weights)
    if received.scales is not None:
        yield received.scales


def _look(of: int, one: _Exchange) -> _Look:
    """Clone what a step returned as it is now, beside what was cloned then."""
    look = _Look(one, of)
    assert one.sent is not None
    pairs: list[tuple[str, torch.Tensor | None, torch.Tensor | None]]
    if of == one.step:
        received = one.sent.received
        counter = received.count if received.counter is None else received.counter
        pairs = [("count", counter, one.sent.count)]
        pairs += list(zip(("rows", "ids", "weights"), _valid_columns(received), _valid_columns(one.sent), strict=False))
        pairs += [("scales", received.scales, one.sent.scales)] if one.sent.scales is not None else []
        pairs += [("expert count", received.expert_count, one.sent.expert_count)]
    else:
        assert one.returned is not None
        assert one.observed is not None
        combined = one.returned.combined
        pairs = [("output", combined.output, one.observed.output)]
        pairs += [("weights", combined.weights, one.observed.combined_weights)]
    for name, now, before in pairs:
        if now is not None and before is not None:
            look.now.append((name, now.clone()))
            look.before.append(before)
    return look


def _changed(look: _Look, *, weightless: bool) -> Mismatch | None:
    """The first tensor that is not what it was; of received rows, the valid ones."""
    received = look.of == look.exchange.step
    count = -1
    for (name, all_now), all_before in zip(look.now, look.before, strict=True):
        if received and name == "count":
            count = int(all_before.item())
        if received and name == "weights" and weightless:
            continue
        whole = name in ("count", "expert count") or not received
        now, before = (all_now, all_before) if whole else (all_now[: max(count, 0)], all_before[: max(count, 0)])
        differs = differing(now, before)
        if not bool(differs.any()):
            continue
        check = "kept.received" if received else "kept.output"
        position = differs.nonzero()[0].tolist()
        return Mismatch(
            check,
            look.exchange.round,
            f"{int(differs.sum())} of {differs.numel()} elements of the {name} that step {look.of} returned changed "
            f"since, the first at row {position[0]}",
            element=position[1] if len(position) > 1 else -1,
            got=str(now[tuple(position)].item()),
            wanted=str(before[tuple(position)].item()),
            bound="0 (bit for bit)",
        )
    return None


# --------------------------------------------------------------------------------------------------------- operators


def sequence_program(
    context: RankContext, made: Backend, session: Any, cell: SequenceCell, first: Operation | None = None
) -> SequenceProgram:
    """The program of a cell with its operators.

    Args:
        context: of the rank.
        made: the backend.
        session: of the backend.
        cell: what to build.
        first: operator 0, if it is built already.

    Raises:
        ContractError: the operators differ in more than their capacity.
    """
    contracts = [exchange(made.contract(cell.problem_of(op), cell.kernel_type)) for op in range(cell.operators)]
    if contracts[0] != contracts[-1]:
        raise ContractError(f"operators of capacity {cell.capacity} and {cell.second} have different contracts")

    def guarded(operation: Any) -> Operation:
        return GuardedExchange(operation, cell.problem())

    def make(op: int) -> Operation:
        with backend_code():
            return guarded(session.build(cell.problem_of(op), cell.kernel_type))

    operations = [make(0) if first is None else guarded(first), *(make(op) for op in range(1, cell.operators))]
    experts = LocalExperts(cell, context.rank, context.device)
    return SequenceProgram(context, operations, make, contracts[0], made.judged_by, experts)
