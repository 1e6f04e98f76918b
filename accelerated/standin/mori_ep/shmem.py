"""Double of ``mori.shmem``: initialisation state, rank queries and a barrier.

Scope: which process group the operators talk over, and the order in which init and finalize may be called. No
symmetric heap exists here: nothing proves that a heap size would have sufficed on a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch.distributed as dist

from accelerated.standin.mori_ep.fatal import die

_logger = logging.getLogger(__name__)

MORI_SHMEM_INIT_WITH_MPI_COMM = 0
MORI_SHMEM_INIT_WITH_UNIQUEID = 1


@dataclass
class _State:
    group: dist.ProcessGroup | None = None


_state = _State()


def current_group() -> dist.ProcessGroup | None:
    """Return the group of the initialised shmem, or None. Not part of the real API."""
    return _state.group


def shmem_torch_process_group_init(group_name: str) -> int:
    """Initialise from the registered process group ``group_name`` and return 0.

    A second call while initialised is a logged no-op.

    Raises:
        RuntimeError: torch.distributed is not initialised, or no group of that name is registered.

    Source of semantics: python/mori/shmem/api.py.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; call init_process_group before initialising shmem")
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
    if _state.group is not None:
        _logger.info("shmem is already initialised; ignoring the second initialisation")
        return 0
    _state.group = group
    return 0


def shmem_finalize() -> int:
    """Drop the state and return 0. Operators that are still alive leak silently, as in the real library.

    Source of semantics: src/shmem/init.cpp (finalising what is not initialised aborts).
    """
    _require()
    _state.group = None
    return 0


def shmem_mype() -> int:
    """Return this process's rank in the shmem group."""
    return dist.get_rank(_require())


def shmem_npes() -> int:
    """Return the number of ranks of the shmem group."""
    return dist.get_world_size(_require())


def shmem_barrier_all() -> None:
    """Wait for every rank of the shmem group."""
    dist.barrier(_require())


def _require() -> dist.ProcessGroup:
    if _state.group is None:
        die("shmem is not initialised")
    return _state.group
