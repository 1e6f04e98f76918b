"""A pool of ranks that look for hazards: the engine's, with a body of its own, and questions in the place of cases.

Scope: start, ask, end. Whatever becomes of a rank is in the engine's reply; what it means is judged elsewhere.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

from conformance.engine.pool import PRELOAD, START_LIMIT_S, Pool, PoolKey, Progress, RankProcess, Ranks, Reply
from conformance.hazards.probe import PLACE, Probe
from conformance.hazards.protocol import Ask, pack
from conformance.hazards.rank.main import main
from conformance.rank.main import RankSetup

_PRELOAD = (*PRELOAD, *(f"{PLACE}.{name}" for name in ("bench", "defects", "ends", "memory", "races", "traps")))


class _ProbeProcess(RankProcess):
    """A rank process whose body is that of the probes."""

    def __init__(self, setup: RankSetup) -> None:
        on_cpu = setup.device == "cpu"
        context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            context.set_forkserver_preload(list(_PRELOAD))
        self.connection, theirs = context.Pipe()
        watched, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(  # type: ignore[attr-defined]
            target=main, args=(setup, theirs, watched), name=f"ep-probe-{setup.rank}", daemon=True
        )
        self.process.start()
        theirs.close()
        watched.close()


class ProbePool(Pool):
    """``world_size`` ranks on this host that answer questions about hazards."""

    def __init__(self, key: PoolKey, progress: Progress | None = None) -> None:
        Ranks.__init__(self, key, progress)
        self._directory = Path(tempfile.mkdtemp(prefix="ep-probe-"))
        self._ranks = []
        for rank in range(key.world_size):
            where = f"cuda:{key.devices[rank] if key.devices else rank}" if key.device == "cuda" else key.device
            setup = RankSetup(rank, key.world_size, where, key.backend, key.arch, str(self._directory), key.environment)
            self._ranks.append(_ProbeProcess(setup))
        self._started(self._collect(0, START_LIMIT_S[key.device]))

    def ask(self, probe: Probe, rounds: int, limit_s: float, environment: tuple[tuple[str, str], ...] = ()) -> Reply:
        """Have every rank look ``rounds`` times, with ``environment`` set meanwhile, and wait as the engine does."""
        self._sequence += 1
        # A silence that is expected needs no stacks, which take seconds for each rank.
        self.dump_stacks = not probe.hang
        ask = Ask(self._sequence, limit_s, probe.module, probe.function, probe.kernel_types, rounds, environment)
        self._send(pack(ask))
        return self._collect(self._sequence, limit_s)
