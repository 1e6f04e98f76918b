"""The driver: sends cases to a pool, turns replies into outcomes, keeps the pool healthy.

After a failed case the operator is rebuilt, after a crash, hang, exception or lost lockstep the whole pool is replaced
and must pass a canary exchange before it is used again. Every call runs the case; the harness remembers outcomes. What
the driver never does: import torch, open a device, or look at a tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from conformance.cases import AnyCase, AnyCell
from conformance.engine.pool import Pool, PoolKey, PoolStartError, Progress, Ranks, Reply, signal_name
from conformance.engine.protocol import Answer, Build, Canary, Mismatch, Run
from conformance.engine.world import LaunchedPool, World
from conformance.rank.main import BACKEND_PHASE
from conformance.rank.phases import AT_STEP
from conformance.verdicts import Verdict

BUILD_LIMIT_S = {"cpu": 120.0, "cuda": 600.0}
#: The first collective on a GPU also creates the communicator and loads code.
CANARY_LIMIT_S = {"cpu": 30.0, "cuda": 300.0}


@dataclass(frozen=True)
class Limits:
    """Seconds one case may take: ``max(floor, factor x median of passed cases)``; the first case gets ``first``."""

    floor_s: float = 10.0
    first_s: float = 60.0
    factor: float = 50.0
    hang_budget: int = 40  # crashes and hangs that one cell may cost before reduction stops


@dataclass(frozen=True)
class Outcome:
    """Verdict on one case. ``check`` names what failed; two failures are the same iff (verdict, check) are equal."""

    verdict: Verdict
    check: str = ""
    rank: int = -1
    ratio: float = 0.0
    mismatch: Mismatch | None = None
    text: str = ""
    stacks: dict[int, str] = field(default_factory=dict, hash=False)
    phases: dict[int, str] = field(default_factory=dict, hash=False)
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()  # that the backend says it launched

    @property
    def key(self) -> tuple[Verdict, str]:
        """Identity of a failure."""
        return self.verdict, self.check

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS


class InfraError(RuntimeError):
    """The harness or the machine failed; never the product's fault."""


class WorldEndedError(InfraError):
    """The launched world is over; what was to run on it is not run."""


class StartError(InfraError):
    """The backend does not initialise on this machine; another attempt would end the same way."""


_T = TypeVar("_T")


def _guard(action: Callable[[], _T]) -> _T:
    """Run ``action`` on a pool; a rank that the kernel does not let go is a failure of the machine."""
    try:
        return action()
    except TimeoutError as error:
        raise InfraError(str(error)) from error


class Driver:
    """One worker's pool and its current cell."""

    def __init__(
        self,
        backend: str,
        *,
        arch: str = "gfx942",
        device: str = "cpu",
        environment: Sequence[tuple[str, str]] = (),
        limits: Limits | None = None,
        progress: Progress | None = None,
        world: World | None = None,
    ) -> None:
        self.backend, self._arch, self._device = backend, arch, device
        self._environment = tuple(environment)
        self.limits = limits or Limits()
        self._world = world
        self._pool: Ranks | None = None
        self._cell: AnyCell | None = None
        self._durations: list[float] = []
        #: Positions of the GPUs that the caller leased; set before a case runs.
        self.devices: tuple[int, ...] = ()
        #: How the last pool ended, if not well.
        self.teardown: Outcome | None = None
        self.restarts = 0
        self._progress = progress

    # ------------------------------------------------------------------ life of pools and operators
    def close(self) -> None:
        """Let the pool finalise in order; what goes wrong then is kept in :attr:`teardown`."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            reply = _guard(pool.close)
            outcome = _outcome_of(reply, "teardown")
            if reply.lost:
                outcome = Outcome(Verdict.INFRA, "lost agent", text="; ".join(reply.lost.values()))
            if not outcome.passed:
                self.teardown = outcome
        self._pool = self._cell = None

    def discard(self) -> None:
        """Kill the pool at once; the next case gets a fresh one.

        Ranks of a launched world are let finalise, as long as nothing had to be killed there.
        """
        if self._world is not None and not self._world.ended:
            self.close()
            return
        pool, self._pool, self._cell = self._pool, None, None
        if pool is not None:
            self.restarts += 1
            _guard(pool.kill)

    @property
    def ended(self) -> str:
        """Why no further case can run, because the launched world is over; empty if one can."""
        return self._world.ended if self._world is not None else ""

    def holds(self, cell: AnyCell) -> bool:
        """Whether this driver has the ranks for a cell."""
        return self._world is None or self._world.holds(cell.world_size, cell.nodes)

    def _new_pool(self, key: PoolKey) -> Ranks:
        if self._world is None:
            return Pool(key, self._progress)
        if self._world.ended:
            raise WorldEndedError(f"the launched world is over: {self._world.ended}; start its agents again")
        if key.world_size != self._world.world_size:
            raise InfraError(f"{key.world_size} ranks were asked of a launched world of {self._world.world_size}")
        return LaunchedPool(self._world, key, self._progress)

    def _ready_pool(self, cell: AnyCell) -> Outcome | None:
        """Have a pool with the cell's operator; the outcome of the attempt if it failed."""
        key = PoolKey(cell.world_size, self.backend, self._arch, self._device, self._environment, self.devices)
        if self._pool is not None and self._pool.key != key:
            self.close()
        if self._pool is None:
            try:
                self._pool = self._new_pool(key)
            except PoolStartError as error:
                self.restarts += 1
                _raise_if_ours(error.reply, "start")
                # A library that does not initialise ends the run: nothing is known about what it computes.
                raise StartError(_outcome_of(error.reply, "start").text) from error
            if self._device != "cpu":
                self._durations = []
            reply = self._pool.command(Canary, CANARY_LIMIT_S[self._device])
            if not reply.alive:
                self.discard()
                raise InfraError("a fresh pool failed its canary exchange: " + _describe(reply))
        if self._cell != cell:
            reply = self._pool.command(Build, BUILD_LIMIT_S[self._device], cell=cell)
            if not reply.alive:
                self.discard()
                _raise_if_ours(reply, "build")
                return _outcome_of(reply, "build")
            self._cell = cell
        return None

    def rebuild(self) -> None:
        """Have the next case run on a new operator."""
        self._cell = None

    # ------------------------------------------------------------------ running
    @property
    def patient_s(self) -> float:
        """Seconds after which a case is too slow to be a slow pass, from the passed cases of this driver."""
        return self.limits.factor * statistics.median(self._durations[-50:]) if self._durations else 0.0

    def run(self, case: AnyCase, *, limit_s: float | None = None, stacks: bool = True) -> Outcome:
        """Run a case once and say what happened; without ``stacks``, silent ranks are not asked where they are.

        Raises:
            InfraError: the harness itself failed (its own exception, lost lockstep, a pool that does not come up).
        """
        failed = self._ready_pool(case.cell)
        if failed is not None:
            return failed
        assert self._pool is not None
        started = time.monotonic()
        self._pool.dump_stacks = stacks
        reply = self._pool.command(Run, limit_s or self._limit(), case=case)
        seconds = time.monotonic() - started
        if not reply.alive:
            self.discard()
            _raise_if_ours(reply, "case")
        outcome = _outcome_of(reply, "case", seconds)
        if not reply.alive:
            return outcome
        if not outcome.passed:
            self.rebuild()  # its counters and buffers may be spoilt
        else:
            self._durations.append(seconds)
        return outcome

    def _limit(self) -> float:
        return max(self.limits.floor_s, self.patient_s) if self._durations else self.limits.first_s


def _raise_if_ours(reply: Reply, stage: str) -> None:
    """Raise if a reply tells of a failure of the harness or the machine rather than of the product.

    Raises:
        InfraError: a lost agent, lost lockstep, an exception in our own code, or a rank that got stuck before the
            backend was opened.
    """
    if reply.lost:
        # Whatever the other ranks say then is its consequence.
        raise InfraError(f"an agent of the launched world is gone during {stage}: {'; '.join(reply.lost.values())}")
    if reply.lost_lockstep:
        raise InfraError(f"lost lockstep during {stage}: {reply.lost_lockstep}")
    # A rank that dies takes the others' collectives down with it: its death explains their exceptions.
    broken = _first(reply, "harness")
    if broken is not None and not reply.dead:
        raise InfraError(f"the harness failed on rank {broken.rank} during {stage} ({broken.kind}):\n{broken.text}")
    if stage == "case" and reply.missing and not reply.dead and _first(reply, "raised") is None:
        late = {rank: reply.phases.get(rank, "") for rank in reply.missing}
        if all(phase.startswith(_OUR_PHASES) for phase in late.values()):
            where = ", ".join(f"rank {rank} in {phase}" for rank, phase in sorted(late.items()))
            raise InfraError(f"inputs and expected results were not ready in time: {where}")
    stuck = {rank: phase for rank, phase in reply.phases.items() if rank in reply.dead or rank in reply.missing}
    backend_ran = _first(reply, "raised") is not None or any(p.startswith(BACKEND_PHASE) for p in stuck.values())
    if stage == "start" and stuck and not backend_ran:
        where = ", ".join(f"rank {rank} in {phase}" for rank, phase in sorted(stuck.items()))
        raise InfraError(f"ranks did not come up, before any backend code ran: {where}")


def _outcome_of(reply: Reply, stage: str, seconds: float = 0.0) -> Outcome:
    """The first failure in a reply; blocked ranks are its consequences."""
    if reply.dead:
        rank = next(iter(reply.dead))  # the first that was noticed
        name = signal_name(reply.dead[rank])
        text = f"rank {rank} died of {name} during {stage}, in {reply.phases.get(rank, 'unknown')}"
        if reply.stderr.get(rank):
            text += f"\nits last words:\n{reply.stderr[rank]}"
        return Outcome(Verdict.CRASH, name, rank, text=text, stacks=reply.stacks, phases=reply.phases, seconds=seconds)
    raised = _first(reply, "raised") or _first(reply, "harness")
    if raised is not None:
        text = f"rank {raised.rank} raised {raised.kind} during {stage}:\n{raised.text}"
        check = f"raised.{raised.kind}"
        return Outcome(
            Verdict.FAIL, check, raised.rank, text=text, stacks=reply.stacks, phases=reply.phases, seconds=seconds
        )
    if reply.missing:
        waiting = ", ".join(f"rank {r} in {reply.phases.get(r, 'unknown')}" for r in reply.missing)
        text = f"no answer during {stage} from {waiting}"
        rank = min(reply.missing, key=lambda r: _progress(reply.phases.get(r, "")))
        return Outcome(Verdict.HANG, "hang", rank, text=text, stacks=reply.stacks, phases=reply.phases, seconds=seconds)
    failed = [a for a in reply.answers.values() if a.mismatch is not None]
    if failed:
        first = min(failed, key=_severity)
        assert first.mismatch is not None
        text = f"on rank {first.rank}, {first.mismatch.text()}"
        others = sorted(a.rank for a in failed if a is not first)
        if others:
            text += f"\nalso failing: ranks {', '.join(map(str, others))}"
        return Outcome(
            Verdict.FAIL,
            first.mismatch.check,
            first.rank,
            first.ratio,
            first.mismatch,
            text,
            seconds=seconds,
            kernels=_kernels(reply),
        )
    ratio = max((a.ratio for a in reply.answers.values()), default=0.0)
    return Outcome(Verdict.PASS, ratio=ratio, seconds=seconds, kernels=_kernels(reply))


def _kernels(reply: Reply) -> tuple[str, ...]:
    """Every kernel that a rank named, once."""
    return tuple(sorted({name for answer in reply.answers.values() for name in answer.kernels}))


#: Checks of one dispatch and combine, or of its replay.
_OF_A_ROUND = (
    "dispatch.count",
    "dispatch.rows",
    "dispatch.payload",
    "dispatch.ids",
    "dispatch.weights",
    "dispatch.scales",
    "dispatch.expert_count",
    "dispatch.source_map",
    "dispatch.order",
    "dispatch.room",
    "dispatch.places",
    "combine.codec",
    "combine.output",
    "combine.weights",
    "combine.kernel",
)
#: Every check, in the order of the data flow: the first one that fails explains the later ones.
CHECKS = (
    *_OF_A_ROUND,
    *(f"replay.{check}" for check in _OF_A_ROUND),
    "replay.inputs.modified",
    "quantise.layout",
    "quantise.scales",
    "quantise.codes",
    "quantise.dequantised",
    "quantise.row_count",
    "norm.residual",
    "norm.output",
    "norm.scales",
    "norm.codes",
    "norm.ranks",
    "route.layout",
    "route.rows",
    "route.ids",
    "route.choice",
    "route.weights",
    "compiled.layout",
    "sort.layout",
    "sort.totals",
    "sort.entries",
    "sort.weights",
    "sort.experts",
    "sort.cleared",
    "experts.layout",
    "experts.output",
    "experts.relation",
    "experts.bits",
    "experts.parts",
    "experts.shards",
    "layer.layout",
    "layer.output",
    "layer.equal",
    "eplb.load",
    "eplb.logical_load",
    "eplb.replicas",
    *(f"graph.{check}" for check in (*_OF_A_ROUND, "inputs.modified")),
    "kept.received",
    "kept.output",
    "outputs.overwritten",
    "outputs.guard",
    "inputs.modified",
)


#: Phases in which no backend code of the case has run yet.
_OUR_PHASES = ("inputs", "expected")
#: Phases of a round in their order; a rank that is behind holds the others up.
_PHASES = ("prepare", "load", "forward", "source map", "experts", "call", "finalize", "judge")


def _progress(phase: str) -> tuple[int, int]:
    """How far a rank got, from the text of its phase."""
    name, _, index = phase.partition(" of round ")
    name, _, step = name.partition(AT_STEP)
    index = step or index
    return int(index) if index.isdigit() else 0, _PHASES.index(name) if name in _PHASES else -1


def _severity(answer: Answer) -> tuple[int, int, int, int]:
    assert answer.mismatch is not None
    return answer.mismatch.step, answer.mismatch.round, CHECKS.index(answer.mismatch.check), answer.rank


def _first(reply: Reply, status: str) -> Answer | None:
    return min((a for a in reply.answers.values() if a.status == status), key=lambda a: a.rank, default=None)


def _describe(reply: Reply) -> str:
    return _outcome_of(reply, "canary").text or "wrong answer"
