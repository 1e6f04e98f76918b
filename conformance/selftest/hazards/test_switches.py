"""Every hazard switched on in the double is PRESENT to its probe, switched off it is ABSENT: alone, one by one.

Scope: the probes of the command, the pools of the command, the judgement of the command; pools are shared where a
probe leaves them alive. A pass proves that each probe can tell, and nothing about MoRI.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from accelerated.standin.mori_ep.hazards import HAZARDS, VARIABLE
from conformance.engine.pool import PoolKey, stop_forkserver
from conformance.hazards.catalogue import PROBES
from conformance.hazards.judge import HazardState, Verdict, together
from conformance.hazards.pool import ProbePool
from conformance.hazards.probe import Probe
from conformance.hazards.prober import Patience, examine

#: A silence is known for one after two seconds here: the double waits at once or not at all.
PATIENCE = Patience(question_s=60.0, silence_s=2.0)
ROUNDS = 5
#: What the session reads when it opens; other variables are read when an operator is built.
_OF_THE_SESSION = ("MORI_EP_COMM",)


class Pools:
    """One pool at a time, kept while the next probe can use it."""

    def __init__(self) -> None:
        self._pool: ProbePool | None = None

    def look(self, probe: Probe, switches: str) -> Verdict:
        """The verdict with these switches of the double."""
        return together({", ".join(part.kernel_types): self._one(part, switches) for part in probe.runs})

    def _one(self, probe: Probe, switches: str) -> Verdict:
        arch = probe.archs[0] if probe.archs else "gfx942"
        session = tuple(pair for pair in probe.environment if pair[0] in _OF_THE_SESSION)
        key = PoolKey(probe.world_size, "mori-standin", arch, environment=session)
        if self._pool is None or self._pool.key != key:
            self.end()
            self._pool = ProbePool(key)
        fewer = replace(probe, rounds=min(ROUNDS, probe.rounds))
        verdict, alive = examine(self._pool, fewer, PATIENCE, (*probe.environment, (VARIABLE, switches)))
        if not alive:
            self.end()
        return verdict

    def end(self) -> None:
        """Kill the pool."""
        if self._pool is not None:
            self._pool.kill()
            self._pool = None


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.end()
    stop_forkserver()


#: What a probe must also have noticed.
WORDS = {"intranode-receive-overflow": "outputs of the combine before changed"}
#: Probes of one architecture and session beside each other, so that they share pools.
NAMES = sorted(HAZARDS, key=lambda name: (PROBES[name].archs, PROBES[name].environment, name))


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_it_is_absent(pools: Pools, name: str) -> None:
    found = pools.look(PROBES[name], "none")
    assert found.state is HazardState.ABSENT, found


@pytest.mark.parametrize("name", NAMES)
def test_switched_on_it_is_present(pools: Pools, name: str) -> None:
    found = pools.look(PROBES[name], name)
    assert found.state is HazardState.PRESENT, found
    assert found.times >= 1
    assert WORDS.get(name, "") in found.text
