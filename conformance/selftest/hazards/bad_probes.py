"""Probes that end in ways that no hazard is known for, and one that tells its delays. They prove nothing themselves."""

from __future__ import annotations

import os
import time
from unittest import mock

from conformance.hazards.protocol import Seen
from conformance.hazards.rank import races
from conformance.hazards.rank.bench import Bench


def dies(bench: Bench) -> Seen:
    """Rank 1 dies while it looks; the others wait for it."""
    bench.note("look")
    if bench.rank == 1:
        os.write(2, b"nobody expected this\n")
        os.abort()
    bench.meet()
    return Seen(0, "never reached")


def waits(bench: Bench) -> Seen:
    """Rank 1 never answers."""
    bench.note("look")
    time.sleep(3600.0 * (bench.rank == 1))
    return Seen(0, "did not wait")


def raises(bench: Bench) -> Seen:
    """An exception of the library's."""
    raise RuntimeError(f"no kernel for rank {bench.rank}")


def sleeps(bench: Bench) -> Seen:
    """The delays that a race draws, in the place of waiting."""
    drawn: list[float] = []
    with mock.patch("time.sleep", drawn.append):
        races.push_fence(bench)
    return Seen(0, str(drawn))
