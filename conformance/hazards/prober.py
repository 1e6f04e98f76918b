"""Looks for hazards one after the other, each in a pool of its own that may die of it, and records each.

Scope: machine, pools and records. A pool that was used for one probe is used for nothing else; after a probe that ends
ranks the next pool must pass its canary before it is asked. What a hazard does after its pool was killed is not known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from accelerated.mori_ep import transports
from accelerated.registry import backend
from conformance.engine.driver import CANARY_LIMIT_S
from conformance.engine.lease import core_slots, lease
from conformance.engine.pool import START_LIMIT_S, PoolKey, PoolStartError, Reply
from conformance.engine.protocol import Canary
from conformance.hazards.judge import HazardState, Verdict, counted, judge, together
from conformance.hazards.pool import ProbePool
from conformance.hazards.probe import BATCH, Probe, undetected
from conformance.suite.options import Options
from conformance.suite.records import HazardBeginRecord, HazardRecord, RecordWriter

Told = Callable[[HazardRecord], None]
#: Switches of the stand-in, as far as a command that repeats a probe needs them.
STANDIN_VARIABLE = "STANDIN_MORI_HAZARDS"


@dataclass(frozen=True)
class Patience:
    """Seconds that one question may take, and those after which a silence that may be a hazard is one."""

    question_s: float
    silence_s: float


#: Kernels are compiled before; a question is a few calls, or :data:`BATCH` rounds of them.
PATIENCE = {"cpu": Patience(30.0, 10.0), "cuda": Patience(300.0, 60.0)}


class Prober:
    """Probes one backend's hazards."""

    def __init__(
        self,
        options: Options,
        name: str,
        devices: Sequence[str],
        writer: RecordWriter,
        told: Told,
        patience: Patience | None = None,
    ) -> None:
        self._options, self._name, self._devices = options, name, tuple(devices)
        self._standin = backend(name, options.arch).standin
        self._writer, self._told = writer, told
        self._patience = patience or PATIENCE[options.device]
        self._log = writer.path.parent / "progress.log"
        self._broken = ""  # why nothing more is tried

    def untested(self, probe: Probe, reason: str) -> None:
        """Note what is not tried."""
        self._end(probe, self._options.arch, Verdict(HazardState.UNTESTED, reason), tried=False)

    def probe(self, probe: Probe) -> None:
        """Look for one hazard and note what was found."""
        arch, reason = self.fits(probe)
        if reason or self._broken:
            self.untested(probe, reason or f"not tried: {self._broken}")
            return
        self._writer.write(
            HazardBeginRecord(
                probe.name,
                self._name,
                probe.reference,
                probe.kernel_types,
                probe.world_size,
                probe.nodes,
                arch,
                probe.environment,
            )
        )
        started = time.monotonic()
        verdicts: dict[str, Verdict] = {}
        try:
            with ExitStack() as held:
                devices = self._lease(held, probe)
                for part in probe.runs:
                    verdicts[", ".join(part.kernel_types)] = self._look(part, arch, devices)
            verdict = together(verdicts)
        except Exception as error:  # noqa: BLE001
            # What is ours must neither pass for the library's nor leave a begin without an end.
            verdict = Verdict(HazardState.UNTESTED, f"{type(error).__name__}: {error}", broken=True)
        if verdict.broken:
            self._broken = f"the machine or the harness failed during {probe.name}: {verdict.text}"
        self._end(probe, arch, verdict, seconds=time.monotonic() - started)

    def fits(self, probe: Probe) -> tuple[str, str]:
        """The architecture that a probe runs on here, and why it does not run; "" if it does."""
        arch = self._options.arch
        if probe.never:
            return arch, probe.never
        if probe.archs and arch not in probe.archs:
            wanted = " or ".join(probe.archs)
            if not self._standin or self._options.arch_given:
                return arch, f"only {wanted} can have it; this is {arch}"
            arch = probe.archs[0]  # the double acts as any
        if self._options.device == "cuda" and len(self._devices) < probe.world_size:
            return arch, f"it takes {probe.world_size} GPUs; {len(self._devices)} are visible"
        return arch, ""

    def _lease(self, held: ExitStack, probe: Probe) -> tuple[int, ...]:
        """Every GPU of the machine: what is written out of bounds may be anybody's. On CPU one core, as for a cell."""
        if not self._devices:
            held.enter_context(lease(core_slots(), 1))
            return ()
        held.enter_context(lease(self._devices, len(self._devices)))
        return tuple(range(probe.world_size))

    def _look(self, probe: Probe, arch: str, devices: tuple[int, ...]) -> Verdict:
        options = self._options
        environment = (*transports.TRANSPORTS[options.transport], *probe.environment)
        key = PoolKey(probe.world_size, self._name, arch, options.device, environment, devices)
        try:
            pool = ProbePool(key, self._progress)
        except PoolStartError as error:
            text = f"its ranks did not start: {_why(error.reply)}"
            # With variables of its own it says nothing about the next probe's.
            own = bool(probe.environment)
            return Verdict(HazardState.UNTESTED, text, broken=not own, unexpected=own)
        alive = False
        try:
            reply = pool.command(Canary, CANARY_LIMIT_S[options.device])
            if not reply.alive:
                text = f"a fresh pool failed its canary exchange: {_why(reply)}"
                return Verdict(HazardState.UNTESTED, text, broken=True)
            verdict, alive = examine(pool, probe, self._patience)
            return verdict
        finally:
            if alive:
                pool.close()  # a device is left as a run leaves it
            else:
                pool.kill()

    def _end(self, probe: Probe, arch: str, verdict: Verdict, *, seconds: float = 0.0, tried: bool = True) -> None:
        record = HazardRecord(
            probe.name,
            self._name,
            probe.reference,
            verdict.state.value,
            verdict.text,
            standin=self._standin,
            arch=arch,
            kernel_types=probe.kernel_types,
            world_size=probe.world_size,
            nodes=probe.nodes,
            times=verdict.times,
            rounds=verdict.rounds,
            rate=undetected(verdict.rounds) if verdict.rounds and verdict.state is HazardState.ABSENT else 0.0,
            seconds=seconds,
            tried=tried,
            broken=verdict.broken,
            unexpected=verdict.unexpected,
            stacks=verdict.stacks,
            command=self._command(probe),
        )
        self._writer.write(record)
        self._told(record)

    def _command(self, probe: Probe) -> str:
        """What repeats exactly this probe."""
        options, value = self._options, os.environ.get(STANDIN_VARIABLE)
        switches = f"{STANDIN_VARIABLE}={value} " if self._standin and value is not None else ""
        asked = f"{switches}pytest conformance --hazards {probe.name} --backend {self._name} --device {options.device}"
        asked += f" --arch {options.arch}" if options.arch_given else ""
        return asked + (f" --transport {options.transport}" if options.transport != transports.DEFAULT else "")

    def _progress(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def examine(
    pool: ProbePool, probe: Probe, patience: Patience, environment: tuple[tuple[str, str], ...] = ()
) -> tuple[Verdict, bool]:
    """Ask a pool for all rounds of a probe; the verdict, and whether the pool can be asked again."""
    limit = patience.silence_s if probe.hang else patience.question_s
    if probe.compiles and pool.key.device != "cpu":
        limit += START_LIMIT_S[pool.key.device]
    times = done = 0
    found: Verdict | None = None
    while done < probe.rounds:
        rounds = min(BATCH, probe.rounds - done)
        reply = pool.ask(probe, rounds, limit, environment)
        verdict = judge(probe, reply)
        done, times = done + rounds, times + verdict.times
        if found is None or verdict.state is not HazardState.ABSENT:
            found = replace(verdict, times=0)
        if not reply.alive:
            break
    assert found is not None
    final = counted(found, times, done) if reply.alive else found
    return replace(final, times=times), reply.alive


def _why(reply: Reply) -> str:
    """The first reason in a reply that is no answer."""
    for rank, answer in sorted(reply.answers.items()):
        if answer.text and answer.status in ("raised", "harness"):
            return f"rank {rank}: {answer.text.strip().splitlines()[-1]}"
    if reply.dead:
        rank = min(reply.dead)
        return f"rank {rank} died in {reply.phases.get(rank, 'unknown')}: {reply.stderr.get(rank, '').strip()}"
    return ", ".join(f"rank {rank} in {reply.phases.get(rank, 'unknown')}" for rank in reply.missing)
