"""What each seeded fault is, where it applies, which property and check catch it, and its true minimum.

Scope: plain data without torch. The minima are written down from the definition of each fault, not read off a run; a
reduction that ends elsewhere is a defect of the reducer. They do not say how likely a fault is to be met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.cases import Rows
from conformance.faults.backends import backend_name
from conformance.row_cases import Mode
from conformance.verdicts import Verdict

_NODE_LEVELS = ("InterNodeV1", "InterNodeV1LL")


@dataclass(frozen=True)
class Minimum:
    """The smallest case that shows a fault.

    Attributes:
        world_size: EP size.
        experts: of all ranks.
        top_k: slots of a token.
        rounds: routing ``[round][rank][token][slot]``.
        nodes: nodes.
        capacity: tokens per rank, or None if the fault does not depend on it and the original's stays.
        mode: free-running only where a drained run does not show the fault.
        wire: format of dispatch that the fault needs.
        codec: format of combine that the fault needs.
        modes: ways of calling that the fault needs.
    """

    world_size: int
    experts: int
    top_k: int
    rounds: tuple[Rows, ...]
    nodes: int = 1
    capacity: int | None = None
    mode: Mode = "drained"
    wire: str = ""
    codec: str = ""
    modes: tuple[str, ...] = ()


def _everywhere(kernel_type: str, nodes: int) -> bool:
    del kernel_type, nodes
    return True


@dataclass(frozen=True)
class Fault:
    """A seeded fault.

    Attributes:
        name: name of its factory in :mod:`conformance.faults`.
        description: what goes wrong.
        check: what the failing check is called.
        minimum: the true minimum.
        verdict: verdict on the failing case.
        subject: the property that catches it.
        applies: whether a kernel type on so many nodes has the code that is wrong.
    """

    name: str
    description: str
    check: str
    minimum: Minimum
    verdict: Verdict = Verdict.FAIL
    subject: str = "round_trip"
    applies: Callable[[str, int], bool] = _everywhere

    @property
    def backend(self) -> str:
        """What ``--backend`` takes."""
        return backend_name(self.name)


def _drops_masked_slots(kernel_type: str, nodes: int) -> bool:
    # Legacy InterNode does with one expert per rank; V1LL does not over several nodes.
    return kernel_type != "AsyncLL" and not (kernel_type == "InterNodeV1LL" and nodes > 1)


def _sums_per_node(kernel_type: str, nodes: int) -> bool:
    return kernel_type in _NODE_LEVELS and nodes > 1


#: One token on rank 0 for the expert of rank 1.
_CROSSING = ((((1,),), ()),)
#: One token on the only rank, for its only expert.
_LOCAL = ((((0,),),),)

_FAULTS = (
    Fault("dropped_row", "a row that crosses ranks is lost", "dispatch.count", Minimum(2, 2, 1, _CROSSING)),
    Fault(
        "duplicated_row",
        "a row for two experts of a rank is delivered there twice",
        "dispatch.count",
        Minimum(1, 2, 2, ((((0, 1),),),)),
    ),
    Fault(
        "swapped_rows",
        "the answers to two tokens from the same other rank are exchanged",
        "combine.output",
        Minimum(2, 2, 1, ((((1,), (1,)), ()),)),
    ),
    Fault(
        "wrong_expert_offset",
        "the last expert of a rank is looked for on the next one",
        "dispatch.count",
        Minimum(2, 2, 1, ((((0,),), ()),)),
    ),
    Fault(
        "stale_round",
        "without a synchronisation, a row from another rank is the round before's",
        "dispatch.rows",
        Minimum(2, 2, 1, (*_CROSSING, *_CROSSING), mode="free-running"),
        subject="rounds",
    ),
    Fault("weight_twice", "combine applies the weights again", "combine.output", Minimum(1, 1, 1, _LOCAL)),
    Fault(
        "node_partial_lost",
        "of a token's partial sums of two nodes, one is lost",
        "combine.output",
        Minimum(2, 2, 2, ((((0, 1),), ()),), nodes=2),
        applies=_sums_per_node,
    ),
    Fault(
        "last_metadata_lost",
        "the last of several received rows has neither ids nor weights",
        "dispatch.ids",
        Minimum(1, 1, 1, ((((0,), (0,)),),)),
    ),
    Fault(
        "masked_as_rank_zero",
        "a masked slot counts as an expert of rank 0",
        "dispatch.count",
        Minimum(1, 1, 1, ((((-1,),),),)),
        applies=_drops_masked_slots,
    ),
    Fault(
        "capacity_off_by_one",
        "a rank that sends as many tokens as fit loses one",
        "dispatch.count",
        Minimum(1, 1, 1, _LOCAL, capacity=1),
    ),
    Fault("rare_loss", "in 3 % of the calls a row is lost", "dispatch.count", Minimum(1, 1, 1, _LOCAL)),
    Fault(
        "hang_on_zero",
        "a rank without tokens never enters the exchange",
        "hang",
        Minimum(2, 2, 1, (((), ()),)),
        verdict=Verdict.HANG,
    ),
)

#: The twelve faults of the product, by name.
FAULTS = {fault.name: fault for fault in _FAULTS}

_PROCESS_FAULTS = (
    Fault("segfault", "a rank dies of a signal", "SIGSEGV", Minimum(2, 2, 1, _CROSSING), Verdict.CRASH),
    Fault("python_wait", "a rank waits in Python", "hang", Minimum(2, 2, 1, _CROSSING), Verdict.HANG),
    Fault("native_wait", "a rank waits with signals blocked", "hang", Minimum(2, 2, 1, _CROSSING), Verdict.HANG),
    Fault("blocked_in_gloo", "a rank waits in the process group", "hang", Minimum(2, 2, 1, _CROSSING), Verdict.HANG),
)

#: Ways of losing a rank, for the selftests of the engine, by name.
PROCESS_FAULTS = {fault.name: fault for fault in _PROCESS_FAULTS}
