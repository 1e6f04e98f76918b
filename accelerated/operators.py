"""Row operators: quantisers, norms and AllReduce + RMSNorm, beside dispatch/combine.

Scope: their problems, contracts and the operations a session builds for them. A backend offers them by an attribute
``operators`` (family -> names), answers ``support``, ``contract`` and ``build`` for their problems as it does for a
:class:`reference.problem.Problem`, the operator's name standing in the place of the kernel type. Data without torch.
What conforming to this interface does not prove: that the contract is kept.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from accelerated.contract import ContractError
from reference.codecs import Codec, Granularity
from reference.norm_numerics import NormNumerics
from reference.problem import ProblemError

if TYPE_CHECKING:
    import torch


class Family(enum.Enum):
    """What kind of operator: which program runs it and which checks judge it."""

    QUANTISE = "quantise"
    NORM = "norm"  # RMSNorm of local rows, with or without residual and quantised output
    ALLREDUCE_NORM = "allreduce_norm"  # the same on the sum over ranks
    ROUTE = "route"  # expert ids and weights from router logits; see accelerated.routers
    EXPERTS = "experts"  # the experts of one rank; see accelerated.experts
    SORT = "sort"  # (token, slot) pairs ordered by local expert; see accelerated.experts


#: Element types of rows, with their size in bytes.
ROW_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def operators_of(backend: object) -> Mapping[str, Sequence[str]]:
    """Row operators that a backend offers: names by value of :class:`Family`; none where it has no such attribute."""
    found: Mapping[str, Sequence[str]] = getattr(backend, "operators", {})
    return found


@dataclass(frozen=True)
class RowProblem:
    """Sizes of a row operator.

    Attributes:
        family: which operators it is a problem of.
        world_size: W; 1 but for ALLREDUCE_NORM.
        hidden: N, elements of a row.
        capacity: most rows M of one call.
        dtype: element type of the rows, a key of :data:`ROW_BYTES`.

    Raises:
        ProblemError: a size is out of range.
    """

    family: Family
    world_size: int
    hidden: int
    capacity: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("world_size", "hidden", "capacity"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProblemError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.dtype not in ROW_BYTES:
            raise ProblemError(f"dtype is {self.dtype!r}; choose one of {', '.join(sorted(ROW_BYTES))}")
        if self.world_size > 1 and self.family is not Family.ALLREDUCE_NORM:
            raise ProblemError(f"world_size is {self.world_size}; {self.family.value} runs on one rank")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * ROW_BYTES[self.dtype]


@dataclass(frozen=True)
class QuantContract:
    """Declared behaviour of one quantiser at one problem.

    Attributes:
        codec: its numerics.
        takes_num_rows: a device row count may be given; rows from it on are then undefined and may be unwritten.
        takes_out: results go where the caller says.
        takes_empty: a call with no rows is legal. Where it is not, the library raises or launches an empty grid.
        rows_alone: where scales are of a row or less, a row has the same codes whatever the number of rows.
    """

    codec: Codec
    takes_num_rows: bool = False
    takes_out: bool = False
    takes_empty: bool = True
    rows_alone: bool = True


@dataclass(frozen=True)
class NormContract:
    """Declared behaviour of one norm operator at one problem.

    Attributes:
        numerics: rounding points of a call with so many rows; paths differ by size.
        residual: a residual is added and the sum comes back.
        codec: quantiser of the output, or None; of a call with one row where ``codecs`` is given.
        codecs: quantiser of a call with so many rows, where it differs by path (a fused one and its fallback).
        element_output: the output in the element type comes back (also beside a quantised one).
        in_place: ``output`` and ``residual`` come back in the buffers of the inputs.
        ranks_identical: every rank gets the same bits.
        boundaries: row counts m of which m and m + 1 take different paths; the suite runs both sides.
        takes_empty: a call with no rows is legal.

    Raises:
        ContractError: nothing is promised, or a fused quantiser whose scale covers several rows.
    """

    numerics: Callable[[int], NormNumerics]
    residual: bool = True
    codec: Codec | None = None
    element_output: bool = True
    in_place: bool = False
    ranks_identical: bool = True
    boundaries: tuple[int, ...] = ()
    takes_empty: bool = True
    codecs: Callable[[int], Codec] | None = None

    def __post_init__(self) -> None:
        if not (self.residual or self.element_output or self.codec):
            raise ContractError("the norm promises no result; declare residual, element_output or codec")
        if self.codec is not None and (
            self.codec.static or self.codec.granularity not in (Granularity.TOKEN, Granularity.GROUP)
        ):
            raise ContractError(
                f"a fused quantiser per {self.codec.granularity.value}, static={self.codec.static}, has no check yet; "
                f"declare a dynamic one per token or per group"
            )

    def codec_at(self, rows: int) -> Codec | None:
        """Quantiser of the output of a call with ``rows`` rows, or None."""
        return self.codecs(rows) if self.codecs is not None else self.codec


@dataclass
class QuantResult:
    """What a quantiser returns, in the library's own layout.

    Attributes:
        codes: uint8 view of the payload, ``[M, N]``, or ``[M, N / 2]`` for packed E2M1.
        scales: float32, or uint8 for E8M0; shape and strides as the contract's layout says: ``(1,)`` per tensor,
            ``(M, 1)`` per token, ``(M, G)`` per group, ``(M / 128, G)`` per block.
    """

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass
class NormResult:
    """What a norm operator returns; None where the contract promises nothing.

    Attributes:
        output: ``[M, N]`` in the rows' type.
        residual: ``[M, N]`` in the rows' type: the sum that goes on.
        quantised: quantised output.
    """

    output: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    quantised: QuantResult | None = None


class QuantOperation(Protocol):
    """One quantiser, alive until :meth:`close`."""

    def quantise(
        self,
        rows: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        out: QuantResult | None = None,
    ) -> QuantResult:
        """Quantise ``rows [M, N]``. No host sync.

        Args:
            rows: contiguous, M from 0 to the problem's capacity.
            scale: ``(1,)`` float32 of a static codec.
            num_rows: ``(1,)`` int32 on the device; only where the contract takes it.
            out: buffers to write, shaped and strided like the result; only where the contract takes them.
        """

    def close(self) -> None:
        """Release the operator."""


class NormOperation(Protocol):
    """One norm operator, alive until :meth:`close`. Collective if W > 1."""

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        """Normalise ``rows [M, N]`` summed over ranks, plus ``residual [M, N]``; ``weight [N]``. No host sync."""

    def close(self) -> None:
        """Release the operator. Called in the same order on every rank."""
