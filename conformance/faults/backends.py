"""Faulty backends: the ordinary adapter over a double whose operator is replaced.

Scope: construction, without torch until a session opens in a rank process. That a faulty backend opens does not prove
that its defect shows; the selftest does.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

from accelerated.mori_ep.backend import MoriBackend
from accelerated.mori_ep.library import MoriLibrary, load_standin

#: Operator of each fault, ``module:class``; the modules import torch and are loaded in a rank process only.
OPERATORS = {
    "dropped_row": "conformance.faults.dispatch:DroppedRow",
    "duplicated_row": "conformance.faults.dispatch:DuplicatedRow",
    "wrong_expert_offset": "conformance.faults.dispatch:WrongExpertOffset",
    "stale_round": "conformance.faults.dispatch:StaleRound",
    "last_metadata_lost": "conformance.faults.dispatch:LastMetadataLost",
    "masked_as_rank_zero": "conformance.faults.dispatch:MaskedAsRankZero",
    "capacity_off_by_one": "conformance.faults.dispatch:CapacityOffByOne",
    "rare_loss": "conformance.faults.dispatch:RareLoss",
    "swapped_rows": "conformance.faults.combine:SwappedRows",
    "weight_twice": "conformance.faults.combine:WeightTwice",
    "node_partial_lost": "conformance.faults.combine:NodePartialLost",
    "scales_of_another_row": "conformance.faults.calls:ScalesOfAnotherRow",
    "codec_twice": "conformance.faults.calls:CodecTwice",
    "codec_unsaturated": "conformance.faults.calls:CodecUnsaturated",
    "codec_left_out": "conformance.faults.calls:CodecLeftOut",
    "codec_unasked": "conformance.faults.calls:CodecUnasked",
    "fast_unasked": "conformance.faults.calls:FastUnasked",
    "cap_ignored": "conformance.faults.calls:CapIgnored",
    "stale_replay": "conformance.faults.calls:StaleReplay",
    "replay_in_other_places": "conformance.faults.calls:ReplayInOtherPlaces",
    "masked_counted": "conformance.faults.calls:MaskedCounted",
    "shared_received": "conformance.faults.sequences:SharedReceived",
    "shared_output": "conformance.faults.sequences:SharedOutput",
    "scribbled_ids": "conformance.faults.sequences:ScribbledIds",
    "output_in_received": "conformance.faults.sequences:OutputInReceived",
    "memory_left": "conformance.faults.sequences:MemoryLeft",
    "replay_of_last_count": "conformance.faults.sequences:ReplayOfLastCount",
    "stale_tail": "conformance.faults.sequences:StaleTail",
    "tail_is_state": "conformance.faults.sequences:TailIsState",
    "output_is_scratch": "conformance.faults.sequences:OutputIsScratch",
    "late_rows": "conformance.faults.sequences:LateRows",
    "late_ids": "conformance.faults.sequences:LateIds",
    "late_weights": "conformance.faults.sequences:LateWeights",
    "hang_on_zero": "conformance.faults.process:HangOnZero",
    "segfault": "conformance.faults.process:Segfault",
    "python_wait": "conformance.faults.process:PythonWait",
    "native_wait": "conformance.faults.process:NativeWait",
    "blocked_in_gloo": "conformance.faults.process:BlockedInGloo",
}


def faulty(fault: str, arch: str) -> MoriBackend:
    """The stand-in backend with one seeded fault, under the name by which the registry finds it again."""
    return MoriBackend(backend_name(fault), standin=True, load=lambda: _library(fault), arch=arch)


def backend_name(fault: str) -> str:
    """What ``--backend`` takes."""
    return f"conformance.faults:{fault}"


def _library(fault: str) -> MoriLibrary:
    genuine = load_standin()
    module, _, name = OPERATORS[fault].partition(":")
    ops = SimpleNamespace(
        EpDispatchCombineConfig=genuine.ops.EpDispatchCombineConfig,
        EpDispatchCombineKernelType=genuine.ops.EpDispatchCombineKernelType,
        EpDispatchCombineOp=getattr(importlib.import_module(module), name),
    )
    return replace(genuine, ops=ops, version=f"stand-in with the fault {fault}")
