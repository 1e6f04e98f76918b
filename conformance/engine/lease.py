"""Leases on cores and GPUs by kernel file locks: all or nothing, released by the kernel when the holder dies.

On CPU a lease is one slot out of as many as there are usable cores, so ``-n 8`` on two cores runs two pools at a time
and the other workers wait. On GPUs a lease is one lock file per device, named by its UUID, so two jobs on one host
exclude each other too. A queue lock keeps a wide lease from starving. What a lease does not do: pin processes.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

_POLL_S = 0.02


def lock_directory() -> Path:
    """Directory of the lock files, shared by all runs of this user on this host."""
    path = Path(tempfile.gettempdir()) / f"ep-conformance-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def core_slots() -> list[str]:
    """One slot per core this process may use."""
    return [f"core-{index}" for index in range(len(os.sched_getaffinity(0)))]


@contextmanager
def lease(names: Sequence[str], count: int, directory: Path | None = None) -> Iterator[list[str]]:
    """Hold ``count`` of the named locks, waiting until that many are free at once.

    Raises:
        ValueError: more locks are asked for than there are names.
    """
    if count > len(names):
        raise ValueError(f"{count} devices are needed, {len(names)} are visible; lower --ep-sizes or add devices")
    where = directory or lock_directory()
    with ExitStack() as held, (where / "queue").open("w") as queue:
        # Whoever is first in the queue gathers; nobody else can take part of what it waits for.
        fcntl.flock(queue, fcntl.LOCK_EX)
        taken: list[str] = []
        while len(taken) < count:
            for name in names:
                if name not in taken and len(taken) < count and _try_lock(where / name, held) is not None:
                    taken.append(name)
            if len(taken) < count:
                time.sleep(_POLL_S)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield taken


def _try_lock(path: Path, held: ExitStack) -> IO[str] | None:
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    held.enter_context(handle)
    return handle
