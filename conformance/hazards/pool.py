"""A pool of ranks that look for hazards: the engine's, with a body of its own, and questions in the place of cases.

Scope: start, ask, end. Whatever becomes of a rank is in the engine's reply; what it means is judged elsewhere.
"""

from __future__ import annotations

from conformance.engine.pool import PRELOAD, Pool, PoolKey, Progress, Reply
from conformance.hazards.probe import PLACE, Probe
from conformance.hazards.protocol import Ask, pack
from conformance.hazards.rank.main import main

_PRELOAD = (*PRELOAD, *(f"{PLACE}.{name}" for name in ("bench", "defects", "ends", "memory", "races", "traps")))


class ProbePool(Pool):
    """``world_size`` ranks on this host that answer questions about hazards."""

    def __init__(self, key: PoolKey, progress: Progress | None = None) -> None:
        super().__init__(key, progress, main, _PRELOAD)

    def ask(self, probe: Probe, rounds: int, limit_s: float, environment: tuple[tuple[str, str], ...] = ()) -> Reply:
        """Have every rank look ``rounds`` times, with ``environment`` set meanwhile, and wait as the engine does."""
        self._sequence += 1
        # A silence that is expected needs no stacks, which take seconds for each rank.
        self.dump_stacks = not probe.hang
        ask = Ask(self._sequence, limit_s, probe.module, probe.function, probe.kernel_types, rounds, environment)
        self._send(pack(ask))
        return self._collect(self._sequence, limit_s)
