"""Compile MoRI's kernels of one kernel type: ``python -m accelerated.mori_ep.warmup IntraNode``.

A process of its own that nothing kills: MoRI's compile lock has no owner and no timeout (python/mori/jit/core.py:78),
so a compile that is killed blocks every later run. What it does not prove: that the compiled kernels load or work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from accelerated.mori_ep.library import load_mori

#: Kernels apart from those of a kernel type: shmem's own, and the one that counts received slots per local expert,
#: which the library would otherwise compile in a rank process, at the first dispatch that asks for it.
SHARED_KERNELS = ("shmem_kernels", "ep_local_expert_count")


def main(arguments: Sequence[str]) -> int:
    """Compile the kernels of the kernel types named, and the shared ones; 1 if those of one do not compile."""
    library = load_mori()
    operators = importlib.import_module("mori.ops.dispatch_combine")
    for name in arguments:
        print(f"compiling {name}", flush=True)
        # A compile that fails is a warning to MoRI and no result (python/mori/ops/_jit_loader.py:58).
        if operators.warmup_jit_kernels(getattr(library.ops.EpDispatchCombineKernelType, name)) is None:
            print(f"the kernels of {name} do not compile; see the warning above", file=sys.stderr)
            return 1
    for name in SHARED_KERNELS:
        print(f"compiling {name}", flush=True)
        importlib.import_module("mori.jit.core").compile_genco(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
