"""Every hazard of the double that leaves the process alive, on and off, on four ranks.

Scope: the observations of :mod:`.mori_probes`; one scenario per hazard, in which only it, then nothing, then everything
that always acts but it is switched on. Passing proves that the switches work, nothing about MoRI.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import hazards
from conformance.selftest.standin import mori_probes

#: Ends the process, or takes the others with it, where it is on: tested apart.
FATAL = {"intranode-receive-overflow", "gpu-per-node-aborts", "host-assert-kills", "weights-required"}
NAMES = [name for name in hazards.HAZARDS if name not in FATAL]


def _scenario(name: str) -> Callable[[int, int], None]:
    probe = getattr(mori_probes, name.replace("-", "_"))

    def scenario(rank: int, world: int) -> None:
        for value in (name, "none"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(hazards.VARIABLE, value)
                seen = torch.tensor([int(probe(rank, world, patch))])
            dist.all_reduce(seen, dist.ReduceOp.MAX)
            assert bool(seen) == (value == name), f"{hazards.VARIABLE}={value}: {'PRESENT' if seen else 'ABSENT'}"

    return scenario


for _name in NAMES:
    globals()[_name.replace("-", "_")] = _scenario(_name)
