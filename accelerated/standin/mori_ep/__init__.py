"""Double of MoRI's expert-parallel dispatch/combine API at the level of ``mori.ops`` and ``mori.shmem``.

Scope: the observable contract of MoRI 624002c8 without the standard-MoE conversion and the second-generation operator:
``ops`` and ``shmem`` as upstream, ``graphs`` (capture and replay without a GPU) and ``hazards`` (switches of the
defects that it reproduces). It moves bytes with torch.distributed (gloo or NCCL) on any torch device and imports
nothing of the project's reference. Modules load on first use, so that naming a hazard does not import torch. A pass
against it proves nothing about AMD hardware, memory ordering, timing or MoRI's kernels.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["graphs", "hazards", "jit_config", "ops", "shmem"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
