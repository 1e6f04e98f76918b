"""The experts of a layer and the whole layer: their problems, contracts and the operations a session builds for them.

Scope: what :mod:`accelerated.operators` is for row operators. A backend offers experts as operators of the family
``experts``; a composed backend (:mod:`accelerated.layer`) runs them between a dispatch and a combine. Data without
torch. What conforming to this interface does not prove: that the contract is kept.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from accelerated.contract import Contract, ContractError, MaskedSlots
from reference.codecs import Codec, Granularity
from reference.expert_numerics import ExpertNumerics, GateLayout
from reference.problem import Problem, ProblemError

if TYPE_CHECKING:
    import torch

    from reference.expert_weights import ExpertWeights

#: Stands between kernel type and experts operator where a layer's path is named: ``IntraNode/fused_moe.bf16``.
SEPARATOR = "/"
#: Ends a layer's path whose rows are dispatched in the element type although the experts take a quantised wire; the
#: experts then quantise what they receive (vLLM's deferred quantisation, and DeepEP's high-throughput kernels).
UNQUANTISED = "@bf16"


class Selection(enum.Enum):
    """What tells an experts kernel which of the global ids it holds, and in which slot."""

    MASK = "0/1 per global id, slots in ascending order of the ids (AITER)"
    MAP = "slot per global id, -1 where another rank holds it (vLLM, Triton)"


@dataclass(frozen=True)
class ExpertProblem:
    """Sizes of the experts of one layer, of which each of ``shards`` ranks holds a part.

    Attributes:
        shards: expert-parallel ranks; 1 if one rank holds every expert.
        hidden: H.
        intermediate: I.
        experts: E, routed experts of all ranks, physical ones where experts are replicated.
        top_k: k, routed experts of a token. Ids and weights have ``top_k + shared`` columns, the shared ones last: a
            token's shared experts on one rank, -1 on the others.
        capacity: rows of the largest buffer, valid or not.
        dtype: element type of rows and results.
        shared: S, fused shared experts: global ids E to E + S - 1, held by every rank.

    Raises:
        ProblemError: a size is out of range.
    """

    shards: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    capacity: int
    dtype: str = "bfloat16"
    shared: int = 0

    def __post_init__(self) -> None:
        for name in ("shards", "hidden", "intermediate", "experts", "top_k", "capacity"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProblemError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.shared < 0:
            raise ProblemError(f"shared is {self.shared}; it must be at least 0")
        if self.top_k > self.experts + self.shared:
            raise ProblemError(f"top_k is {self.top_k}; it cannot exceed the {self.experts + self.shared} experts")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ProblemError(f"dtype is {self.dtype!r}; choose bfloat16, float16 or float32")

    @property
    def nodes(self) -> int:
        """Experts do not know of nodes."""
        return 1


@dataclass(frozen=True)
class ExpertContract:
    """Declared behaviour of one experts operator at one problem.

    Attributes:
        numerics: rounding points of a call with a buffer of so many rows, valid or not; paths differ by size.
        boundaries: row counts m of which m and m + 1 take different paths; the suite runs both sides of those within
            a cell's capacity.
        gate_layout: of the W1 that the library gets; the adapter lays it out.
        selection: what the library is given to find its local experts.
        wire: quantiser of rows that a dispatch carries, with their scales, to these experts (the same as the numerics'
            ``input_codec``), or None: they take rows in the element type only.
        biased: the experts have biases.
        takes_remote: ids of experts that other ranks hold may be in a row; where not, one rank holds every expert.
        takes_duplicates: a row may name an expert twice, and then it counts twice; routers never do.
        drops_masked: id -1 contributes nothing; where it does not, none is ever passed.
        takes_num_rows: a device row count may be given; rows from it on hold anything, and their results are undefined.
        takes_empty: a call with no rows is legal.
        deterministic: the same call twice gives the same bits.
        rows_alone: a row has the same bits whatever other rows are in the call, at the same number of rows.
        bits_at_any_rows: a row has the same bits whatever the number of rows, on one side of every boundary.
        one_term_bits: what a slot adds to its row has the same bits in every call with as many rows, even where
            ``deterministic`` or ``rows_alone`` is not promised: all that differs is the order of additions, so that a
            row of which at most one weight is not zero has the same bits.
        bits_at_any_shards: what a slot adds to its row has the same bits however many ranks share the experts, where
            the numerics are the same.

    Raises:
        ContractError: wire and numerics disagree.
    """

    numerics: Callable[[int], ExpertNumerics]
    boundaries: tuple[int, ...] = ()
    gate_layout: GateLayout = GateLayout.SEPARATED
    selection: Selection = Selection.MAP
    wire: Codec | None = None
    biased: bool = False
    takes_remote: bool = True
    takes_duplicates: bool = True
    drops_masked: bool = True
    takes_num_rows: bool = True
    takes_empty: bool = True
    deterministic: bool = True
    rows_alone: bool = True
    bits_at_any_rows: bool = False
    one_term_bits: bool = False
    bits_at_any_shards: bool = False

    def __post_init__(self) -> None:
        if self.wire is not None and self.wire.granularity not in (Granularity.TOKEN, Granularity.GROUP):
            raise ContractError(
                f"the wire quantises per {self.wire.granularity.value}; a dispatch carries scales of a token or its "
                f"groups"
            )

    @property
    def weight_codec(self) -> Codec | None:
        """How the weights are stored; the same at every number of rows."""
        return self.numerics(1).weight_codec

    @property
    def terms_keep_bits(self) -> bool:
        """Whether what a slot adds to its row is one number in every call with the same rows and ids."""
        return self.deterministic or self.one_term_bits


class ExpertOperation(Protocol):
    """The experts of one rank, alive until :meth:`close`."""

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """Take the weights of this rank's experts; may be called again, when a rebalance moves them.

        Args:
            weights: by local slot.
            owned: ascending global ids of the slots, shared experts' included.
        """

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows ``[n, H]`` as a dispatch carries them to these experts: codes and scales, as the library's own
        quantiser lays them out; the rows themselves and None where the contract has no wire. n may be 0. No host sync.
        """

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum over the local experts of each row; ``[M, H]`` in the problem's element type. No host sync.

        Args:
            rows: ``[M, H]`` in the element type, or codes of the wire as a dispatch delivers them.
            ids: ``[M, k + S]`` int32 global ids; those of other ranks contribute nothing.
            weights: ``[M, k + S]`` float32.
            scales: of the wire's codes.
            num_rows: ``(1,)`` int32 on the device, number of valid rows.
        """

    def close(self) -> None:
        """Release the operator."""


@dataclass(frozen=True)
class LayerProblem:
    """A whole layer: an exchange and the experts between its halves.

    Attributes:
        exchange: sizes of dispatch and combine. Its ``wire`` is left empty: the path says what is carried.
        experts: sizes of the experts.
        placement: which rank holds which expert, one of :data:`reference.placement.STRATEGIES`.
    """

    exchange: Problem
    experts: ExpertProblem
    placement: str = "linear"

    @property
    def world_size(self) -> int:
        """W."""
        return self.exchange.world_size

    @property
    def nodes(self) -> int:
        """N."""
        return self.exchange.nodes

    def carrying(self, wire: str) -> LayerProblem:
        """The same with another wire format, a key of :data:`reference.problem.WIRES`."""
        return replace(self, exchange=replace(self.exchange, wire=wire))


@dataclass(frozen=True)
class LayerContract:
    """Declared behaviour of a composed layer.

    Attributes:
        exchange: of the dispatch and combine.
        experts: of the experts between them.
        wire: format in which rows are dispatched, a key of :data:`reference.problem.WIRES`, quantised by
            ``experts.wire`` before they leave; "" for the element type.
        buffer_rows: rows of the buffer that the experts get, valid or not; None: as many as the rank receives, so that
            the path the experts take may differ from rank to rank and from call to call.
    """

    exchange: Contract
    experts: ExpertContract
    wire: str = ""
    buffer_rows: int | None = None

    def numerics(self, received: int) -> ExpertNumerics:
        """Of the experts on a rank that receives so many rows, at least 1."""
        return self.experts.numerics(received if self.buffer_rows is None else self.buffer_rows)

    @property
    def masked_slots(self) -> MaskedSlots:
        """Fate of id -1: dropped only where both halves drop it; else none is ever passed."""
        if self.exchange.masked_slots is MaskedSlots.DROPPED and not self.experts.drops_masked:
            return MaskedSlots.UNMODELLED
        return self.exchange.masked_slots


class LayerOperation(Protocol):
    """One layer on one rank. Collective."""

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """See :meth:`ExpertOperation.load`."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Output ``[n, H]`` of this rank's tokens; may be a view that the next call overwrites. No host sync.

        Args:
            rows: ``[n, H]`` in the element type.
            ids: ``[n, k]`` int32 global ids, -1 only where exchange and experts both drop it.
            weights: ``[n, k]`` float32.
        """

    def record_load(self) -> None:
        """Count the load of every forward pass from here on."""

    def expert_load(self) -> torch.Tensor:
        """Load of this rank's physical experts in the last forward pass: how many slots of all ranks' tokens came to
        each, int64 by local slot, on the device and not overwritten by the next pass. No host sync.
        """

    def close(self) -> None:
        """Release both operators. Called in the same order on every rank."""
