"""Cells, contracts and cases of experts and layers for the selftests; nothing here proves anything."""

from __future__ import annotations

from typing import Any

from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder
from accelerated.experts import ExpertContract, LayerContract
from conformance.cases import Explicit, LayerCase, LayerCell, LayerRound
from reference.codecs import STANDARD
from reference.expert_numerics import ExpertNumerics

PLAIN = ExpertNumerics()
TOKEN = STANDARD["token_fnuz"]


def experts_cell(**changes: Any) -> LayerCell:
    """Experts alone: 8 of them on two shards, four slots."""
    sizes: dict[str, Any] = {
        "check": "experts",
        "backend": "reference",
        "kernel_type": "experts.bf16",
        "world_size": 1,
        "nodes": 1,
        "hidden": 64,
        "experts": 8,
        "top_k": 4,
        "capacity": 40,
        "dtype": "bfloat16",
        "mode": "drained",
        "intermediate": 32,
        "shards": 2,
    }
    return LayerCell(**(sizes | changes))


def layer_cell(**changes: Any) -> LayerCell:
    """A layer on four ranks."""
    whole = {"check": "layer", "kernel_type": "one-level/experts.bf16", "backend": "reference+reference"}
    return experts_cell(**(whole | {"world_size": 4, "shards": 1, "top_k": 2, "capacity": 9} | changes))


def experts_contract(**changes: Any) -> ExpertContract:
    """Everything promised and taken, with a switch of path at 16 rows."""
    fields: dict[str, Any] = {"numerics": lambda rows: PLAIN, "boundaries": (16,), "wire": TOKEN}
    return ExpertContract(**(fields | changes))


def layer_contract(masked: MaskedSlots = MaskedSlots.DROPPED, **changes: Any) -> LayerContract:
    """Dense rows and the experts above."""
    sent = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, masked)
    return LayerContract(sent, experts_contract(**changes), buffer_rows=36)


def one(cell: LayerCell, *tokens: tuple[int, ...], **changes: Any) -> LayerCase:
    """A round with these tokens on rank 0."""
    rows = (tokens, *((),) * (cell.world_size - 1))
    return LayerCase(cell, (LayerRound(Explicit(rows), **changes),))
