"""The program of a layer that is compared with the same experts behind another exchange.

Both layers live in one process over one group and get the same inputs, one after the other. Each output is judged by
its own acceptance; where the contracts promise it (:mod:`conformance.layer_pairs`) both are compared as well, and only
the sign of a zero may differ. What a pass does not prove: that either output is right beyond its acceptance, that the
exchanges agree where several terms are added up, or anything about what both share: the experts and their quantiser.
"""

from __future__ import annotations

from typing import Any

import msgspec

from accelerated.experts import LayerContract, LayerOperation
from accelerated.interface import Backend, RankContext
from accelerated.layer_beside import SessionBeside
from accelerated.registry import backend
from conformance.cases import LayerCase, LayerCell, expand
from conformance.engine.protocol import Mismatch
from conformance.layer_pairs import misfit, one_term
from conformance.rank.guard import backend_code
from conformance.rank.guarded_layers import GuardedLayer, Together
from conformance.rank.judge_experts import judge_equal
from conformance.rank.layer_program import LayerProgram
from conformance.rank.phases import SetPhase
from conformance.rank.recorded_layer import RecordedLayer


class Neighbours:
    """Sessions of other composed backends beside a rank's own, opened when a cell first asks for one.

    Args:
        made: the rank's backend.
        session: its session.
        arch: architecture whose contract applies.
    """

    def __init__(self, made: Backend, session: Any, arch: str) -> None:
        self._made: Any = made
        self._session, self._arch = session, arch
        self._held: dict[str, tuple[Any, SessionBeside]] = {}

    def find(self, name: str) -> tuple[Any, SessionBeside]:
        """A backend by name, and its session. Collective.

        Raises:
            BackendError: its dispatch does not initialise, or its experts are others.
        """
        if name not in self._held:
            other: Any = backend(name, self._arch)
            with backend_code():
                self._held[name] = (other, SessionBeside(other, self._made, self._session))
        return self._held[name]

    def close(self) -> None:
        """Close what was opened here, before the rank's own session."""
        for _, session in self._held.values():
            session.close()
        self._held.clear()


class CrossLayerProgram:
    """Two programs of one cell, and the comparison of their outputs.

    Args:
        context: of the rank.
        operations: the cell's own layer and the other one, guarded.
        contracts: of both.
        judged_by: of both backends.
        cell: with ``against``.
        promised: the contracts promise the same bits where :func:`conformance.layer_pairs.one_term` holds.
    """

    def __init__(
        self,
        context: RankContext,
        operations: tuple[LayerOperation, LayerOperation],
        contracts: tuple[LayerContract, LayerContract],
        judged_by: tuple[str, str],
        cell: LayerCell,
        *,
        promised: bool,
    ) -> None:
        self._rank, self._cell, self._promised = context.rank, cell, promised
        self._layers = tuple(RecordedLayer(operation) for operation in operations)
        cells = (cell, cell.other)
        self._programs = tuple(
            LayerProgram(context, layer, contract, judge, one)
            for layer, contract, judge, one in zip(self._layers, contracts, judged_by, cells, strict=True)
        )

    def run(self, case: LayerCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run both and judge them; the first failed check of this rank and the largest error/bound."""
        for layer in self._layers:
            layer.clear()
        # Both whatever the first one's verdict: a rank that passed it waits in the second one's collectives.
        mine, ratio = self._programs[0].run(case, phase)
        rounds = len(case.rounds)

        def later(name: str, index: int) -> None:
            # Behind the first layer's rounds, and the backend's code has run by then.
            phase(name if name not in ("inputs", "expected") else f"other {name}", rounds + index)

        other, other_ratio = self._programs[1].run(case, later)
        if other is not None:
            name = f"{self._cell.against}, {self._cell.other.kernel_type}"
            other = msgspec.structs.replace(other, message=f"{name}: {other.message}")
        return mine or other or self._compare(case), max(ratio, other_ratio)

    def _whose(self) -> str:
        return f"those of {self._cell.against}, whose experts are the same"

    def _compare(self, case: LayerCase) -> Mismatch | None:
        """The first round whose outputs have to be the same and are not."""
        mine, other = (layer.outputs for layer in self._layers)
        for index, (a_round, ours, theirs) in enumerate(zip(case.rounds, mine, other, strict=True)):
            if self._promised and one_term(case.cell, a_round):
                rows = expand(case.cell, a_round.routing, self._rank)[self._rank]
                mismatch = judge_equal("layer.equal", index, ours, theirs, rows, self._rank, self._whose())
                if mismatch is not None:
                    return mismatch
        return None


def cross_program(
    context: RankContext, neighbours: Neighbours, made: Backend, layer: GuardedLayer, cell: LayerCell
) -> tuple[Together, CrossLayerProgram]:
    """Build the other layer of a cell; both operations, to be closed together, and the program. Collective.

    Raises:
        BackendError: the other backend does not build it.
    """
    session: Any
    other, session = neighbours.find(cell.against)
    opposite = cell.other
    contracts = (
        made.contract(cell.problem(), cell.kernel_type),
        other.contract(opposite.problem(), opposite.kernel_type),
    )
    with backend_code():
        second = GuardedLayer(session.build(opposite.problem(), opposite.kernel_type))
    program = CrossLayerProgram(
        context,
        (layer, second),
        contracts,
        (made.judged_by, other.judged_by),
        cell,
        promised=not misfit(cell, made, other),
    )
    return Together([layer, second]), program
