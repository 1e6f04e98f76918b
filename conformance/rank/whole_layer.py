"""Which program runs a cell of a whole layer, and which operations it closes.

Scope: one place for the ranks and for the stand-alone script: a layer alone, behind its router, with loads that are
counted, or beside the same experts behind another exchange. What a program proves is its own to say.
"""

from __future__ import annotations

from typing import Any

from accelerated.interface import Backend, RankContext
from conformance.cases import LayerCell
from conformance.rank.cross_layer import CrossLayerProgram, Neighbours, cross_program
from conformance.rank.guarded_layers import GuardedLayer, Together
from conformance.rank.layer_program import LayerProgram
from conformance.rank.load_program import LoadProgram
from conformance.rank.routed_layer import built_router, program_of

WholeLayerProgram = LayerProgram | CrossLayerProgram | LoadProgram


def whole_layer(
    context: RankContext, neighbours: Neighbours, made: Backend, session: Any, layer: GuardedLayer, cell: LayerCell
) -> tuple[GuardedLayer | Together, WholeLayerProgram]:
    """What to close, and the program of a cell. Collective.

    Args:
        context: of the rank.
        neighbours: of the session.
        made: the cell's backend, a composed one.
        session: an open session of it.
        layer: built by it for the cell.
        cell: of a whole layer.

    Raises:
        BackendError: a router or another layer that the cell asks for is not built.
    """
    if cell.against:
        return cross_program(context, neighbours, made, layer, cell)
    contract = made.contract(cell.problem(), cell.kernel_type)
    if cell.redundant and not cell.router:
        return layer, LoadProgram(context, layer, contract, made.judged_by, cell)
    router = built_router(session, made, cell)
    program = program_of(context, layer, contract, made.judged_by, cell, router)
    return (layer if router is None else Together([router.operation, layer])), program
