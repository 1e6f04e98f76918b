"""Probes of what ends a process or never returns: whoever asked is left with a dead or a silent rank, and its phase.

Scope: calls that come back say what happened instead, which is then ABSENT. What a death looks like on a device is not
proven by one on the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

from conformance.hazards.protocol import Seen
from conformance.hazards.rank.bench import Bench, seen

#: MoRI's cache of compiled kernels (python/mori/jit/cache.py), and the lock that a compilation holds in it (core.py).
_CACHE_VARIABLE, _LOCK = "MORI_JIT_CACHE_DIR", ".{}.hsaco.lock"
_MODULE = "ep_internode_v1"


def gpu_per_node_aborts(bench: Bench) -> Seen:
    """The default of 8 on fewer ranks."""
    _, message = bench.attempt(bench.build, gpu_per_node=8)
    return seen(False, f"gpu_per_node = 8 on {bench.world} ranks: {message or 'taken'}")


def host_assert_kills(bench: Bench) -> Seen:
    """Rows wider by one element than the operator was built for."""
    op, mine = bench.build(), bench.ids([2 * bench.rank, 2 * bench.rank])
    _, message = bench.attempt(bench.dispatch, op, bench.rows(1, 9), None, None, mine)
    return seen(False, f"rows of 9 where hidden_dim = 8: {message or 'taken'}")


def weights_required(bench: Bench) -> Seen:
    """A dispatch without weights."""
    op, x = bench.build(), bench.rows(1)
    out, *_ = bench.misuse(bench.dispatch, op, x, None, None, bench.ids([2 * bench.rank, 2 * bench.rank]))
    right = bool((out[0] == x[0]).all())
    return seen(False, f"{bench.kind}: dispatched without weights, the row is {'right' if right else 'wrong'}")


def construction_is_collective(bench: Bench) -> Seen:
    """All ranks but the last one build an operator."""
    if bench.rank == bench.world - 1:
        return seen(False, "this rank builds nothing")
    bench.misuse(bench.build, phase="build alone")
    return seen(False, "built without the last rank")


def stale_lock_hangs(bench: Bench) -> Seen:
    """An empty cache with nothing in it but locks, in every place in which this machine's cache holds these kernels."""
    real = Path(os.environ.get(_CACHE_VARIABLE) or Path.home() / ".mori" / "jit")
    places = {path.parent.relative_to(real) for path in real.rglob(f"{_MODULE}*.hsaco")} if real.is_dir() else set()
    cache = bench.directory / "cache"
    if bench.rank == 0:
        for place in (Path(), *sorted(places)):
            (cache / place).mkdir(parents=True, exist_ok=True)
            (cache / place / _LOCK.format(_MODULE)).touch()
    bench.meet()
    before = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = str(cache)
    try:
        bench.misuse(bench.build)
    finally:
        if before is None:
            del os.environ[_CACHE_VARIABLE]
        else:
            os.environ[_CACHE_VARIABLE] = before
    return seen(False, f"built beside {len(places) + 1} stale locks")
