"""What a hazard probe is: where the hazard is recorded, what it runs on, and what an observation means.

Scope: data. A probe says PRESENT where it saw the hazard, ABSENT where it looked and did not, UNTESTED where it could
not look. ABSENT is no proof: it speaks for the sizes of the probe, and of a race for its rate alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

#: Modules of the functions that observe, by what they are about.
PLACE = "conformance.hazards.rank"
#: Rounds of a probe of something that the library shows only sometimes, and how many a rank is asked for at a time.
ROUNDS, BATCH = 100, 10


@dataclass(frozen=True)
class Probe:
    """One hazard and how it is looked for.

    Attributes:
        name: of the hazard; of the stand-in's switch, too, where it has one.
        reference: items and sections of the written MoRI contract; ``10#`` are rows of its table of executed code.
        text: the hazard in one sentence.
        seen: what was observed where the verdict is PRESENT.
        module: holds the function of the name with underscores, run on every rank.
        kernel_types: what the probe builds.
        world_size, nodes: ranks, and emulated nodes among them.
        archs: gfx architectures that can have it; any if empty.
        environment: of the pool, as the library reads it.
        rounds: of a race; 1 otherwise.
        death, hang: phase of the probe in which the end of a rank, or its silence, is the hazard; "" where neither is.
        refusal: pattern of last words by which the library itself refuses: such a death is ABSENT.
        apart: a pool for each kernel type, since the first observation may end the pool.
        compiles: where the hazard is absent the library compiles kernels, which takes minutes on a device.
        harm: what the probe may do to the machine that it runs on; "" for nothing.
        never: why it is not run by this suite.
    """

    name: str
    reference: str
    text: str
    seen: str
    module: str = ""
    kernel_types: tuple[str, ...] = ("IntraNode",)
    world_size: int = 4
    nodes: int = 1
    archs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    rounds: int = 1
    death: str = ""
    hang: str = ""
    refusal: str = ""
    apart: bool = False
    compiles: bool = False
    harm: str = ""
    never: str = ""

    @property
    def function(self) -> str:
        """Name of the observing function in :attr:`module`."""
        return self.name.replace("-", "_")

    @property
    def place(self) -> str:
        """Kernel types, ranks and nodes in words."""
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{', '.join(self.kernel_types)} EP {self.world_size}{nodes}"

    @property
    def runs(self) -> tuple[Probe, ...]:
        """The probe, split where each kernel type has a pool of its own."""
        if not self.apart:
            return (self,)
        return tuple(replace(self, kernel_types=(kind,)) for kind in self.kernel_types)


def undetected(rounds: int) -> float:
    """The rate of a fault that ``rounds`` independent rounds miss with a chance of one in twenty."""
    return 1.0 - math.exp(math.log(0.05) / rounds)
