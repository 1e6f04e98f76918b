"""Where the ranks of a pool meet: a file of the pool's own, or the store that torchrun gave a launched world.

A pass does not prove anything about the network: gloo, NCCL and RCCL choose their own interfaces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from conformance.rank.main import RankSetup


def store_of(setup: RankSetup) -> Any:
    """Key-value store for ``init_process_group``.

    A launched rank takes MASTER_ADDR and MASTER_PORT from the environment, as torch's own ``env://`` does, and keeps
    its generation of ranks apart from those before it by a prefix.
    """
    made: Any = dist  # torch's stubs lack the stores
    if not setup.rendezvous:
        return made.FileStore(str(Path(setup.directory) / "store"), setup.world_size)
    found, _, _ = next(made.rendezvous("env://", setup.rank, setup.world_size))
    return made.PrefixStore(setup.rendezvous, found)
