"""Which defects and misuse traps of MoRI 624002c8 the double reproduces, each with a switch of its own.

Scope: names, where the written MoRI contract records them, and one environment variable, read when an operator is
built. ``STANDIN_MORI_HAZARDS`` lists names separated by commas: only these are then on. ``default`` stands for all that
act in every run, ``-name`` takes one out again, ``none`` is none. Without the variable everything acts that the
library does on its own; races and hangs that the library shows only sometimes (``always=False``) act when named only.

With a name off the double does what a caller would expect instead: it moves the rows, drops the id, raises a Python
exception. A probe that says ABSENT with a name off and PRESENT with it on proves that the probe can tell; it proves
nothing about the library. Nothing here imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "STANDIN_MORI_HAZARDS"


@dataclass(frozen=True)
class Hazard:
    """One switch: the contract section (or table row) that records it, what is observed, and whether it always acts."""

    reference: str
    text: str
    always: bool = True


HAZARDS: dict[str, Hazard] = {
    # Suspected or confirmed defects.
    "intranode-replay-moves-nothing": Hazard(
        "7.1#1, 10#12", "IntraNode replay leaves the payload of the last dispatch"
    ),
    "low-latency-scans-eight-slots": Hazard("7.1#2, 10#14", "IntraNodeLL takes destinations from slots 0 to 7 only"),
    "intranode-receive-overflow": Hazard("7.1#3, 10#15", "IntraNode writes rows past R over the last combine output"),
    "capped-push-overruns-staging": Hazard("7.1#3, 10#16", "a capped R and PUSH combine write past the staging memory"),
    "internode-cap-aliases": Hazard("4.5", "legacy InterNode loses a source's rows past its share of a capped R"),
    "weights-disagree": Hazard("7.1#4, 10#17", "a rank without weights reads its peers' slots with another stride"),
    "negative-id-is-rank-zero": Hazard("7.1#5, 10#18-21", "-1 is an expert of rank 0 on AsyncLL, InterNode, V1LL"),
    "ids-past-experts": Hazard("7.1#5, 10#22", "an id past the experts pollutes V1's combine or ends the process"),
    "more-nodes-than-slots": Hazard("7.1#6, 10#23", "V1 and V1LL with N > k mix the node sums of neighbouring tokens"),
    "push-fence": Hazard("7.1#7", "IntraNode PUSH combine reads a row of the combine before", always=False),
    "quant-members-refused": Hazard("7.1#10", "members of the quant_type enumeration are refused"),
    "low-latency-needs-three-warps": Hazard("2, 10#29", "IntraNodeLL with less than 3 warps a block moves no payload"),
    "async-weights-unwritten": Hazard("3, 10#8", "AsyncLL never writes the weights that combine returns"),
    "fp4-odd-block": Hazard(
        "5.4, 10#28", "fp4_blockwise codes the last element of an odd block by the next one's scale"
    ),
    "fp4-empty-block": Hazard("5.4", "fp4_blockwise, odd h, empty last block: its zero is coded over the last element"),
    "async-blockwise-width": Hazard(
        "5.4", "fp8_blockwise on AsyncLL takes scales by blocks of floor(h / S), coded by ceil(h / S)"
    ),
    "rdma-block-split": Hazard("10.1.5", "rdma_block_num 0 loses rows across nodes, all blocks those within a node"),
    "ragged-chunks": Hazard("10.2a", "V1 and V1LL, N > 1, M > 64, M % 64: chunks run past the node's region"),
    "internode-combine-hangs": Hazard("10.2b", "legacy InterNode combine never ends", always=False),
    "blockwise-staging-overrun": Hazard("10.2c", "fp8_blockwise on IntraNodeLL and AsyncLL overruns staging, small h"),
    "wave32-mask-shift": Hazard("10.2d", "InterNodeV1, N > 1, wave 32 loses rows behind a gap in a chunk"),
    "handle-dispatches-race": Hazard("4.6, 10#34", "two handle dispatches in a row claim a slot twice", always=False),
    "combine-twice-hangs": Hazard("4.6, 10#35", "a second IntraNode combine without dispatch never ends", always=False),
    "gfx125x-scale-vectors": Hazard("8", "gfx125x IntraNode moves whole 16-byte vectors of scales only"),
    "gfx125x-barrier-overrun": Hazard(
        "8", "gfx125x combine writes a word of every 64 bytes a block behind a short map"
    ),
    # Traps of the interface.
    "gpu-per-node-aborts": Hazard(
        "7.2, 2", "gpu_per_node that does not divide W ends the process (the default at W < 8)"
    ),
    "host-assert-kills": Hazard("7.2, 5.7", "rows wider than hidden_dim end the process"),
    "codec-ignored": Hazard(
        "7.2, 5.4", "fp8_direct_cast is dropped in silence: zero-copy, other than bfloat16, InterNode"
    ),
    "v1-codec-garbage": Hazard(
        "3", "fp8_direct_cast on V1 and V1LL leaves the output unwritten for other than bfloat16"
    ),
    "dispatch-ignores-geometry": Hazard("7.2, 2", "IntraNode dispatch ignores the configured block_num and warps"),
    "zero-copy-ignores-input": Hazard("7.2, 5.1", "zero-copy combine reads the registered buffer, not its input"),
    "zero-copy-flag-ignored": Hazard("3", "other kernel types read the caller's tensor in zero-copy mode"),
    "push-from-registered": Hazard("5.3, 10#33", "PUSH combine from the registered buffer reads what peers put there"),
    "source-layout-weights": Hazard(
        "7.2, 5.1", "weights in source order are read as if in received order, past the end"
    ),
    "capacity-sized-outputs": Hazard("7.2, 4.2", "dispatch outputs have R rows whatever was received"),
    "combine-clears-total": Hazard(
        "7.2, 10#11", "combine zeroes the counter that dispatch returned (AsyncLL excepted)"
    ),
    "dispatch-accumulates": Hazard("4.6, 10#11", "a second dispatch adds to the counter of the first"),
    "reset-does-nothing": Hazard("7.2, 4.6", "reset() leaves the counters as they are"),
    "handle-without-tokens": Hazard("7.2, 4.7", "a routing handle of a rank without tokens is refused"),
    "int64-ids-misread": Hazard("7.2, 4.1", "int64 ids are read as int32"),
    "strided-rows-misread": Hazard("4.1", "a strided tensor is read as if it were contiguous"),
    "too-many-tokens": Hazard("4.5, 10#32", "n > M corrupts other tokens in silence"),
    "weights-required": Hazard("3, 10#31", "dispatch without weights is a memory fault on V1, V1LL, AsyncLL"),
    "construction-is-collective": Hazard("7.2, 1.3", "an operator that one rank does not build stops the others"),
    "stale-lock-hangs": Hazard("7.2, 1.2", "a lock file left in MORI_JIT_CACHE_DIR stops construction for ever"),
    "send-drops-expert-count": Hazard("7.2, 4.9", "dispatch_send ignores call_local_expert_count"),
}

NONE: frozenset[str] = frozenset()
DEFAULT: frozenset[str] = frozenset(name for name, hazard in HAZARDS.items() if hazard.always)


def parse(value: str | None) -> frozenset[str]:
    """Return the names that ``value`` switches on; None is the default.

    Raises:
        ValueError: a name that no hazard has, or ``none`` beside others.
    """
    if value is None or not value.strip():
        return DEFAULT
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words == ["none"]:
        return NONE
    unknown = [word for word in words if word != "default" and word.removeprefix("-") not in HAZARDS]
    if unknown:
        raise ValueError(f"{VARIABLE}: unknown {', '.join(unknown)}; give 'none', 'default' or of {', '.join(HAZARDS)}")
    found = set(DEFAULT) if "default" in words else set()
    found.update(word for word in words if word in HAZARDS)
    return frozenset(found - {word[1:] for word in words if word.startswith("-")})


def active() -> frozenset[str]:
    """Return the names that are on in this process, from the environment.

    Raises:
        ValueError: as :func:`parse`.
    """
    return parse(os.environ.get(VARIABLE))
