"""AITER's sort of tokens by expert behind the operator interface.

Scope: ``aiter.fused_moe.moe_sorting`` (AITER e4048607, aiter/fused_moe.py:341) with a mask as its fused experts pass
it. What a pass through it does not prove: anything about the kernels that read the sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accelerated.aiter_ops import expert_layout
from accelerated.aiter_ops.library import AiterLibrary
from accelerated.experts import ExpertProblem
from accelerated.sorting import SortContract, SortResult


class AiterSort:
    """The sort of one rank.

    Args:
        library: AITER or its double.
        problem: sizes.
        contract: declared for it.

    Raises:
        LibraryError: the library's experts are broken; the message names the part.
    """

    def __init__(self, library: AiterLibrary, problem: ExpertProblem, contract: SortContract) -> None:
        self._entry = library.part("fused_moe").moe_sorting
        self._problem, self._contract = problem, contract
        self._experts = problem.experts + problem.shared
        self._owned: list[int] | None = None
        self._mask: torch.Tensor | None = None
        self._closed = False

    def place(self, owned: Sequence[int]) -> None:
        """See :class:`accelerated.sorting.SortOperation`.

        Raises:
            ValueError: ids that a mask cannot express.
        """
        expert_layout.expert_mask(owned, self._experts, torch.device("cpu"))
        if not self._contract.masked and len(owned) != self._experts:
            raise ValueError(f"{len(owned)} of {self._experts} experts on the only rank; it has them all")
        self._owned, self._mask = list(owned), None

    def sort(self, ids: torch.Tensor, weights: torch.Tensor, *, num_rows: torch.Tensor | None = None) -> SortResult:
        """See :class:`accelerated.sorting.SortOperation`.

        Raises:
            RuntimeError: the operation is closed or knows no experts, or what the library raises.
            ValueError: ids or a count that are not int32, of which the library says nothing.
        """
        if self._closed or self._owned is None:
            raise RuntimeError("the sort is closed, or was not told which experts are local; call place first")
        if ids.dtype != torch.int32 or (num_rows is not None and num_rows.dtype != torch.int32):
            raise ValueError(f"ids are {ids.dtype}; give int32 for ids and num_rows (AITER has no other sort)")
        ids = ids.contiguous()
        if self._contract.masked:
            if self._mask is None or self._mask.device != ids.device:
                self._mask = expert_layout.expert_mask(self._owned, self._experts, ids.device)
            ids = expert_layout.only_known(ids, self._experts)
        entries, of_pairs, experts, totals, output = self._entry(
            ids,
            weights.contiguous(),
            self._experts if self._mask is None else self._mask.numel(),
            self._problem.hidden,
            getattr(torch, self._problem.dtype),
            self._contract.block,
            self._mask,
            num_rows,
        )
        return SortResult(entries, of_pairs, experts, totals, output)

    def close(self) -> None:
        """Release the operator; the library keeps nothing between calls."""
        self._closed = True
