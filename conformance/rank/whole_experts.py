"""The operator of one rank that holds every expert, beside those of a cell's shards.

Scope: construction, for the ranks and for the stand-alone script. What it gives proves nothing by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from accelerated.contract import Standing
from accelerated.experts import ExpertContract
from accelerated.interface import Backend
from conformance.cases import LayerCell
from conformance.rank.guard import backend_code
from conformance.rank.guarded_layers import GuardedExperts

Whole = Callable[[], tuple[GuardedExperts, ExpertContract]]


def whole_experts(made: Backend, session: Any, cell: LayerCell, held: list[Any]) -> Whole | None:
    """What builds the operator, once, and adds it to ``held``, which are closed together; None if it is refused.

    Args:
        made: the cell's backend.
        session: an open session of it.
        cell: of experts alone.
        held: the cell's operators.
    """
    alone = msgspec.structs.replace(cell, shards=1).problem()
    if made.support(alone, cell.kernel_type).standing is Standing.REFUSED:
        return None

    @functools.cache
    def build() -> tuple[GuardedExperts, ExpertContract]:
        contract = made.contract(alone, cell.kernel_type)
        assert isinstance(contract, ExpertContract)
        with backend_code():
            built = GuardedExperts(session.build(alone, cell.kernel_type))
        held.append(built)
        return built, contract

    return build
