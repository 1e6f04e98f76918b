"""Counting, on the device, how many tokens come to each local expert of a layer.

Scope: the load that expert-parallel load balancing weighs, counted behind the dispatch: every slot of a valid received
row whose id is a local physical expert counts once. A dispatch delivers a token's row once to a rank, with all its ids
(:class:`accelerated.contract.ReceiveLayout`), so that the counts of all ranks together are those of all ranks' tokens;
masked slots and experts of other ranks count nowhere, an expert that a row names twice counts twice. No host sync.
What a count does not prove: that the experts computed what was counted.

vLLM 0.33.0 counts where tokens come from, for the experts of all ranks, and adds the ranks up; both give the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accelerated.interface import Received


class LoadCounter:
    """The load of one rank's experts.

    Args:
        experts: E, physical ones of all ranks.
        device: of the rank.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._experts, self._device = experts, device
        self._slot_of = torch.full((experts,), -1, dtype=torch.int64, device=device)
        self._local = 0
        self._last: torch.Tensor | None = None
        self.recording = False

    def place(self, owned: Sequence[int]) -> None:
        """Take the ids of this rank's experts, by local slot; ids beyond the routed experts are never counted."""
        routed = [expert for expert in owned if expert < self._experts]
        slot_of = torch.full((self._experts,), -1, dtype=torch.int64)
        slot_of[torch.tensor(routed, dtype=torch.int64)] = torch.arange(len(routed))
        self._slot_of, self._local = slot_of.to(self._device), len(routed)

    def count(self, received: Received) -> None:
        """Count what a dispatch delivered, if the load is recorded.

        Rows from the count on may hold anything.
        """
        if not self.recording:
            return
        ids = received.ids.long()
        row = torch.arange(ids.shape[0], device=ids.device)
        known = (row < received.count).unsqueeze(1) & (ids >= 0) & (ids < self._experts)
        slot = torch.where(known, self._slot_of[ids.clamp(0, self._experts - 1)], -1)
        # What is not local falls into one more place, so that nothing has to be selected.
        place = torch.where(slot >= 0, slot, self._local).flatten()
        total = torch.zeros(self._local + 1, dtype=torch.int64, device=ids.device)
        self._last = total.index_add_(0, place, torch.ones_like(place))[: self._local]

    def last(self) -> torch.Tensor:
        """Int64 ``[local experts]`` of the last dispatch.

        Raises:
            RuntimeError: nothing was counted.
        """
        if self._last is None:
            raise RuntimeError("no load was counted; call record_load before the forward pass")
        return self._last
