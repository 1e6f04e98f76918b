"""Run as a module: ask a pool of one backend for some hazards, print name and verdict. Proves nothing by itself.

A process of its own, so that its ranks search the path that it was started with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conformance.engine.pool import PoolKey, stop_forkserver
from conformance.hazards.catalogue import PROBES
from conformance.hazards.pool import ProbePool
from conformance.hazards.prober import Patience, examine


def main(arguments: Sequence[str]) -> None:
    """``look BACKEND NAME...``"""
    backend, *names = arguments
    pool = ProbePool(PoolKey(4, backend))
    for name in names:
        verdict, _ = examine(pool, PROBES[name], Patience(60.0, 10.0))
        print(name, verdict.state.value, verdict.text)
    pool.kill()
    stop_forkserver()


if __name__ == "__main__":
    main(sys.argv[1:])
