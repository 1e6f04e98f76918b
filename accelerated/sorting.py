"""The sort of (token, slot) pairs by local expert as an operator: its contract, its result and its operation.

Scope: what :mod:`accelerated.operators` is for row operators, for the one that precedes fused experts. Its problem is
an :class:`accelerated.experts.ExpertProblem`, of which it looks at the numbers of experts, slots and rows and at H.
Data without torch. What conforming to this interface does not prove: that the contract is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reference.problem import ProblemError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SortContract:
    """Declared behaviour of one sort at one problem. The permutation itself is :mod:`reference.sorting`.

    Attributes:
        block: pairs of one block; each expert's are padded to whole ones.
        masked: the sort gets a mask: ids of other ranks, -1 and ids out of range are left out. Where not, one rank has
            every expert and no such id is ever passed.
        takes_num_rows: a device row count may be given; rows from it on hold anything.
        clears: the sort zeroes the rows of the output buffer that the experts add to, those that count.

    Raises:
        ProblemError: blocks of nothing.
    """

    block: int = 32
    masked: bool = True
    takes_num_rows: bool = True
    clears: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ProblemError(f"block is {self.block}; it must be at least 1")


@dataclass
class SortResult:
    """What a sort returns, in the library's own buffers; their ends are unwritten.

    Attributes:
        entries: int32 ``[P]``: token in the low 24 bits, slot in the high 8; P is at least the padded total.
        weights: float32 ``[P]``.
        experts: int32 ``[at least P / block]``, local expert of each block.
        totals: int32 ``[2]``: entries in use, padding included, and rows that count.
        output: ``[M, H]`` in the element type, of which the rows that count are zero; None where nothing is cleared.
    """

    entries: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    totals: torch.Tensor
    output: torch.Tensor | None = None


class SortOperation(Protocol):
    """One sort of one rank, alive until :meth:`close`."""

    def place(self, owned: Sequence[int]) -> None:
        """Take the ascending global ids of this rank's experts, shared experts' included; may be called again."""

    def sort(self, ids: torch.Tensor, weights: torch.Tensor, *, num_rows: torch.Tensor | None = None) -> SortResult:
        """Sort the pairs of ``ids [M, k]`` int32 and ``weights [M, k]`` float32 by local expert. No host sync.

        No row names an expert twice. M is at least 1.

        Args:
            num_rows: ``(1,)`` int32 on the device, number of valid rows.
        """

    def close(self) -> None:
        """Release the operator."""
