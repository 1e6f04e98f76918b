"""What a backend declares about itself: the checks and the error bounds of the suite follow from these values.

Scope: plain data without torch. A combination that no check models fails closed (:class:`ContractError`).
What a contract does not prove: that the backend keeps it; that is what the suite is for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reference.combine_numerics import CombineCodec

#: What replays of a captured dispatch and combine may change: the contents of rows and weights; the ids, with which the
#: received counts change. Token counts, addresses and sizes never. "cold": an operator's first call may be captured.
CAPTURES = ("contents", "routing", "cold")


class ContractError(ValueError):
    """A contract asks for something that no check or bound models."""


class ReceiveLayout(enum.Enum):
    """Where the rows that a rank receives lie."""

    DENSE_ROWS = "dense rows"  # one row per (token, destination rank), packed from row 0
    EVERY_ROW = "every row everywhere"  # all rows of all ranks, ordered by source rank and token
    EXPERT_MAJOR = "expert major"  # [local expert, slot], with a count per expert


class RowOrder(enum.Enum):
    """Order of received rows that the backend promises."""

    ANY = "any"
    GROUPED_BY_SOURCE_RANK = "grouped by ascending source rank"
    SOURCE = "ascending (source rank, token)"


class MaskedSlots(enum.Enum):
    """What the backend does with an expert id of -1."""

    DROPPED = "dropped"  # contributes nothing anywhere
    RANK_ZERO = "counted as an expert of rank 0"  # truncating division; a known hazard, never generated
    UNMODELLED = "depends on the path taken"  # never generated


class Accumulation(enum.Enum):
    """How the contributions of the destination ranks are summed."""

    FLOAT32 = "float32, one rounding per level"
    ELEMENT = "element type, a rounding after every addition"


class Standing(enum.Enum):
    """How upstream stands to a cell."""

    CLAIMED = "claimed"  # upstream tests or ships it: a failure gates
    UNCLAIMED = "unclaimed"  # a failure is a FINDING
    REFUSED = "refused"  # the backend cannot run it, with its reason


@dataclass(frozen=True)
class Support:
    """Standing of one (problem, kernel type), with the reason when it is not claimed."""

    standing: Standing
    reason: str = ""


@dataclass(frozen=True)
class CombineKernels:
    """Which of its kernels combine launches, by the length of its rows.

    Attributes:
        generic: name of the kernel for any length.
        fast: (row length, name) of every length that has a kernel of its own.
    """

    generic: str
    fast: tuple[tuple[int, str], ...] = ()

    def of(self, hidden: int) -> str:
        """Name of the kernel for rows of ``hidden`` elements."""
        return dict(self.fast).get(hidden, self.generic)


@dataclass(frozen=True)
class Contract:
    """Declared behaviour of one (backend, kernel type, problem).

    Attributes:
        receive_layout: where received rows lie.
        row_order: order of received rows that is promised.
        masked_slots: fate of expert id -1.
        accumulation: arithmetic of the combine sum over destination ranks.
        fold: which of a destination's slots places it in the sum, ``"first"`` or ``"last"`` (informative: the bound
            holds for any order).
        node_levels: True if partial sums are rounded per node and summed again over nodes in ascending node id.
        combines_weights: True if finalize also returns the unweighted sum of the weight rows.
        source_map: True if the backend reports (source rank, token) of every received row.
        exact_rows: True if received tensors end with their last valid row; else they have as many as can be received,
            valid or not: W·capacity, with a cap the problem's ``most_rows``.
        codec: what combine does to the rows that it carries; None if nothing.
        ignored_codec: what a problem asks combine to do, and it leaves out without a word; None otherwise.
        narrow_rows: True if a call may have rows shorter than the problem's hidden size.
        idle_ranks: True if a rank may take part in a call without a token of its own.
        kernels: of combine, where the backend may tell which it launched (``Combined.kernel``); None where there is no
            choice, or nothing is known of it.
        fresh_outputs: True if returned tensors are the caller's: no later call of any operator changes them, and they
            outlive their operator. Else received rows are stable until their operator's combine is launched, and
            combined ones until its next combine.
        captures: what graphs of captured calls promise, of :data:`CAPTURES`; empty where capture is refused.
        capture_refusal: why it is refused.
        handles_kept: True if a routing handle can still be replayed after later dispatches of its operator.
    """

    receive_layout: ReceiveLayout
    row_order: RowOrder
    masked_slots: MaskedSlots
    accumulation: Accumulation = Accumulation.FLOAT32
    fold: str = "first"
    node_levels: bool = False
    combines_weights: bool = True
    source_map: bool = True
    exact_rows: bool = False
    codec: CombineCodec | None = None
    ignored_codec: CombineCodec | None = None
    narrow_rows: bool = False
    idle_ranks: bool = True
    kernels: CombineKernels | None = None
    fresh_outputs: bool = False
    handles_kept: bool = False
    captures: frozenset[str] = frozenset()
    capture_refusal: str = "the backend declares nothing of captured calls"

    def __post_init__(self) -> None:
        if self.fold not in ("first", "last"):
            raise ContractError(f"fold is {self.fold!r}; choose 'first' or 'last'")
        if self.receive_layout is ReceiveLayout.EXPERT_MAJOR:
            raise ContractError("receive layout 'expert major' has no check yet; declare dense rows or every row")
        if self.node_levels and self.accumulation is not Accumulation.FLOAT32:
            raise ContractError("per-node rounding levels are modelled for float32 accumulation only")
        if self.codec and self.ignored_codec:
            raise ContractError("a codec is carried out or ignored; declare one of codec and ignored_codec")
        if self.codec and self.accumulation is not Accumulation.FLOAT32:
            raise ContractError("combine codecs are modelled for float32 accumulation only")
        if self.captures - set(CAPTURES) or (self.captures and "contents" not in self.captures):
            raise ContractError(f"captures is {sorted(self.captures)}; give 'contents' and some of {CAPTURES}, or none")


def exchange(contract: object) -> Contract:
    """The contract of a dispatch/combine.

    Raises:
        ContractError: it is another operator's.
    """
    if not isinstance(contract, Contract):
        raise ContractError(f"{type(contract).__name__} is no contract of a dispatch/combine; ask for a Problem's")
    return contract
