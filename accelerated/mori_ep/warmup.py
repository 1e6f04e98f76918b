"""Compile MoRI's kernels of one kernel type: ``python -m accelerated.mori_ep.warmup IntraNode``.

A process of its own that nothing kills: MoRI's compile lock has no owner and no timeout (python/mori/jit/core.py), so a
compile that is killed blocks every later run. What it does not prove: that the compiled kernels load or work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from accelerated.mori_ep.library import load_mori


def main(arguments: Sequence[str]) -> int:
    """Compile the kernels of the kernel types named, and those of shmem."""
    library = load_mori()
    operators = importlib.import_module("mori.ops.dispatch_combine")
    for name in arguments:
        print(f"compiling {name}", flush=True)
        operators.warmup_jit_kernels(getattr(library.ops.EpDispatchCombineKernelType, name))
    print("compiling shmem", flush=True)
    importlib.import_module("mori.jit.core").compile_genco("shmem_kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
