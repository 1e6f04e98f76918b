"""Seeded faults of captured calls: what each is, on which backends, what catches it, and its true minimum.

Scope: plain data without torch. The defects wrap a genuine backend's operations and graphs, so they run on the double's
recorder as well as on CUDA and HIP graphs; a fault of ``allgather`` or ``reference`` is for a GPU. The minima are
written down from the definition of each fault, as in :mod:`conformance.faults.catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass

from conformance.cases import Rows
from conformance.faults.backends import backend_name

#: Backends that the defects are in; the first one's faults are named after the defect alone.
BASES = ("mori-standin", "allgather", "reference")


@dataclass(frozen=True)
class GraphMinimum:
    """The smallest case that shows a fault: one round to a graph, captured after a warm-up, drained.

    Attributes:
        world_size: EP size; there are as many experts, and a token has one slot.
        rounds: routing ``[round][rank][token][slot]``.
        graphs: the graph that replays each round.
    """

    world_size: int
    rounds: tuple[Rows, ...]
    graphs: tuple[int, ...]


@dataclass(frozen=True)
class GraphFault:
    """A seeded fault.

    Attributes:
        name: name of its factory in :mod:`conformance.faults`.
        defect: what wraps the backend, in :mod:`conformance.faults.graphs`.
        base: the genuine backend.
        description: what goes wrong.
        check: what the failing check is called.
        minimum: the true minimum.
    """

    name: str
    defect: str
    base: str
    description: str
    check: str
    minimum: GraphMinimum

    @property
    def backend(self) -> str:
        """What ``--backend`` takes."""
        return backend_name(self.name)


_LOCAL: Rows = (((0,),),)
_EMPTY = GraphMinimum(1, (((),),), (0,))
_ONE = GraphMinimum(1, (_LOCAL,), (0,))
_TWO = GraphMinimum(1, (_LOCAL, _LOCAL), (0, 1))

_DEFECTS = (
    ("stale_capture", "a replay dispatches the rows of the warm-up", "graph.dispatch.rows", _ONE),
    ("cold_replay", "the first replay of a graph does nothing", "graph.dispatch.count", _EMPTY),
    ("second_size", "the graph of another size reads the first one's inputs", "graph.dispatch.rows", _TWO),
    ("shared_result", "a later graph hands out the first one's result", "graph.combine.output", _TWO),
)
#: Where every rank receives every row, and where the routing is frozen, the count of received rows is so, too.
_FROZEN_COUNT = GraphFault(
    "frozen_count",
    "frozen_count",
    BASES[0],
    "the number of received rows is that of the warm-up",
    "graph.dispatch.count",
    GraphMinimum(2, ((((1,),), ()),), (0,)),
)

#: Faults of captured calls, by name.
GRAPH_FAULTS = {
    fault.name: fault
    for fault in (
        *(
            GraphFault(name if base == BASES[0] else f"{name}_{base}", name, base, description, check, minimum)
            for name, description, check, minimum in _DEFECTS
            for base in BASES
        ),
        _FROZEN_COUNT,
    )
}
