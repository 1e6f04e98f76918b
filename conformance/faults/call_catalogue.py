"""Seeded faults of wires, codecs and ways of calling: where each applies, what catches it, and its true minimum.

Scope: plain data without torch, as in :mod:`conformance.faults.catalogue`; the minima are written down from the
definition of each fault.
"""

from __future__ import annotations

from accelerated.mori_ep.kernel_types import INTRA_NODE_TYPES, NODE_LEVEL_TYPES
from conformance.cases import Cell
from conformance.faults.catalogue import Fault, Minimum

_LOCAL = ((((0,),),),)
_NOTHING = (((),),)


#: Kernel types on which each fault is a fault: elsewhere the library has not what is wrong, or it is what it does.
_PLACES: dict[str, tuple[str, ...]] = {
    "scales_of_another_row": (*INTRA_NODE_TYPES, *NODE_LEVEL_TYPES, "AsyncLL", "InterNode"),
    # InterNodeV1 and V1LL do round a node's sum to the codec.
    "codec_twice": (*INTRA_NODE_TYPES, "AsyncLL"),
    "codec_unsaturated": (*INTRA_NODE_TYPES, "AsyncLL"),
    "codec_left_out": (*INTRA_NODE_TYPES, *NODE_LEVEL_TYPES, "AsyncLL"),
    "codec_unasked": ("InterNode",),
    "fast_unasked": INTRA_NODE_TYPES,
    # The others take a cap beside zero-copy only.
    "cap_ignored": (*NODE_LEVEL_TYPES, "AsyncLL", "InterNode"),
    "stale_replay": ("InterNodeV1",),
    "replay_in_other_places": ("InterNodeV1",),
    "masked_counted": (*INTRA_NODE_TYPES, "InterNodeV1"),
}


def _fault(name: str, description: str, check: str, minimum: Minimum) -> Fault:
    return Fault(name, description, check, minimum, applies=lambda kernel_type, _: kernel_type in _PLACES[name])


_CALL_FAULTS = (
    _fault(
        "scales_of_another_row",
        "the last of several received rows has the scales of the first",
        "dispatch.scales",
        Minimum(1, 1, 1, ((((0,), (0,)),),), wire="fp8_token"),
    ),
    _fault(
        "codec_twice",
        "the sum of two ranks' rows is coded again",
        "combine.output",
        Minimum(2, 2, 2, ((((0, 1),), ()),), codec="fp8_direct_cast"),
    ),
    _fault(
        "codec_unsaturated",
        "a value beyond the largest code becomes NaN",
        "combine.output",
        Minimum(1, 1, 1, _LOCAL, codec="fp8_direct_cast"),
    ),
    _fault(
        "codec_left_out",
        "a codec that is asked for does not run",
        "combine.codec",
        Minimum(1, 1, 1, _LOCAL, codec="fp8_direct_cast"),
    ),
    _fault(
        "codec_unasked",
        "a codec runs where the library ignores it",
        "combine.codec",
        Minimum(1, 1, 1, _LOCAL, codec="fp8_direct_cast"),
    ),
    _fault(
        "fast_unasked",
        "combine takes a fast kernel where it is none of those that the contract names",
        "combine.kernel",
        Minimum(1, 1, 1, _NOTHING, codec="fp8_blockwise"),
    ),
    _fault(
        "cap_ignored",
        "received rows have as much room as without a cap",
        "dispatch.room",
        Minimum(1, 1, 1, _NOTHING, capacity=2, modes=("capped",)),
    ),
    _fault(
        "stale_replay",
        "a replay delivers the payload of the dispatch before it",
        "replay.dispatch.rows",
        Minimum(1, 1, 1, _LOCAL, modes=("handle",)),
    ),
    _fault(
        "replay_in_other_places",
        "a replay delivers rows in the reverse order, with a source map and a combine to match",
        "replay.dispatch.places",
        Minimum(1, 1, 1, ((((0,), (0,)),),), modes=("handle",)),
    ),
    _fault(
        "masked_counted",
        "a masked first slot counts for the first local expert",
        "dispatch.expert_count",
        Minimum(1, 2, 2, ((((-1, 1),),),), modes=("expert count",)),
    ),
)

#: Faults of wires, codecs and ways of calling, by name.
CALL_FAULTS = {fault.name: fault for fault in _CALL_FAULTS}


def has_what_is_wrong(fault: Fault, cell: Cell) -> bool:
    """Whether a cell asks for what the fault breaks."""
    minimum = fault.minimum
    if minimum.wire:
        return cell.wire not in ("", "fp8_tensor")
    if minimum.codec:
        return cell.codec == minimum.codec and cell.modes != ("zero-copy",)
    return set(minimum.modes) <= set(cell.modes)
