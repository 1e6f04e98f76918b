"""Double of MoRI's expert-parallel dispatch/combine API at the level of ``mori.ops`` and ``mori.shmem``.

Scope: the observable contract of MoRI 624002c8 without quantised combine codecs, routing handles and the standard-MoE
conversion. It moves bytes with torch.distributed (gloo or NCCL) on any torch device and imports nothing of the
project's reference. A pass against it proves nothing about AMD hardware, memory ordering, timing or MoRI's kernels.
"""

from accelerated.standin.mori_ep import jit_config, ops, shmem

__all__ = ["jit_config", "ops", "shmem"]
