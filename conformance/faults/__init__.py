"""Seeded faults: backends with one known defect each, driven by the ordinary adapter through the stand-in.

Scope: each is a library defect (a subclass of the double's operator, or a replaced function of the double), declares
the contract of ``mori-standin`` or ``aiter-standin`` and breaks it, and is named on the command line like any backend,
e.g. ``--backend conformance.faults:dropped_row``. What catching them all does not prove: that the suite catches a
defect of another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from accelerated.aiter_ops.backend import AiterBackend
from accelerated.mori_ep.backend import MoriBackend
from conformance.faults.backends import faulty
from conformance.faults.call_catalogue import CALL_FAULTS
from conformance.faults.catalogue import FAULTS, PROCESS_FAULTS, Fault, Minimum
from conformance.faults.graph_backends import FaultyGraphBackend, faulty_graphs
from conformance.faults.graph_catalogue import GRAPH_FAULTS, GraphFault, GraphMinimum
from conformance.faults.layer_backends import FaultyBackend, faulty_layer
from conformance.faults.layer_catalogue import LAYER_FAULTS, LayerFault
from conformance.faults.row_catalogue import ROW_FAULTS
from conformance.faults.row_fault import RowFault, RowMinimum
from conformance.faults.row_replacements import faulty_rows
from conformance.faults.sequence_catalogue import SEQUENCE_FAULTS, SequenceFault, SequenceMinimum

dropped_row = partial(faulty, "dropped_row")
duplicated_row = partial(faulty, "duplicated_row")
swapped_rows = partial(faulty, "swapped_rows")
wrong_expert_offset = partial(faulty, "wrong_expert_offset")
stale_round = partial(faulty, "stale_round")
weight_twice = partial(faulty, "weight_twice")
node_partial_lost = partial(faulty, "node_partial_lost")
last_metadata_lost = partial(faulty, "last_metadata_lost")
masked_as_rank_zero = partial(faulty, "masked_as_rank_zero")
capacity_off_by_one = partial(faulty, "capacity_off_by_one")
rare_loss = partial(faulty, "rare_loss")
hang_on_zero = partial(faulty, "hang_on_zero")
segfault = partial(faulty, "segfault")
python_wait = partial(faulty, "python_wait")
native_wait = partial(faulty, "native_wait")
blocked_in_gloo = partial(faulty, "blocked_in_gloo")

__all__ = [
    "CALL_FAULTS",
    "FAULTS",
    "GRAPH_FAULTS",
    "LAYER_FAULTS",
    "PROCESS_FAULTS",
    "ROW_FAULTS",
    "SEQUENCE_FAULTS",
    "Fault",
    "GraphFault",
    "GraphMinimum",
    "LayerFault",
    "Minimum",
    "RowFault",
    "RowMinimum",
    "SequenceFault",
    "SequenceMinimum",
]


def __getattr__(name: str) -> Callable[[str], AiterBackend | FaultyBackend | FaultyGraphBackend | MoriBackend]:
    """The factory of a fault of calls (their way, order, capture), of the row operators, of experts or of layers."""
    if name in CALL_FAULTS or name in SEQUENCE_FAULTS:
        return partial(faulty, name)
    if name in GRAPH_FAULTS:
        return partial(faulty_graphs, name)
    if name in ROW_FAULTS:
        return partial(faulty_rows, name)
    if name in LAYER_FAULTS:
        return partial(faulty_layer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
