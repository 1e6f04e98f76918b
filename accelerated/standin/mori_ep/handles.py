"""Routing handles: the layout of one dispatch as plain tensors, filled by a dispatch and read back by later calls.

Scope: the five tensors and their encodings (contract section 4.7), so that a handle rebuilt from its tensors alone
means the same. Rows on other nodes are recorded where the library records them, at the rank of equal place within the
other node. Slots of a chunk are claimed in order; the library claims chunks as they come. It proves nothing about
autograd or about the lifetime of device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accelerated.standin.mori_ep.config import EpDispatchCombineConfig, recv_capacity
from accelerated.standin.mori_ep.transport import Transport
from accelerated.standin.mori_ep.wire import Plan


@dataclass
class EpDispatchRoutingHandle:
    """Layout of one dispatch; int32 tensors (python/mori/ops/dispatch_combine.py).

    Attributes:
        disp_dest_tok_id_map: ``[W * M * EPR]``; entry ``t * k + j`` is ``rank * W * M + slot``, or ``W * W * M`` where
            slot j of token t sends nothing or leaves the node.
        inter_node_disp_dest_tok_id_map: ``[N * M * k]``, the same for tokens of this place in other nodes.
        inter_node_disp_send_map: ``[N * M]``; entry ``t * N + node`` is where token t stands at that node.
        total_recv_token_num: ``[1]``.
        disp_tok_id_to_src_tok_id_local: ``[W * M * EPR]``, ``rank * W * M + token`` of every received row.
        cur_rank_num_token: tokens that this rank dispatched.
    """

    disp_dest_tok_id_map: torch.Tensor
    inter_node_disp_dest_tok_id_map: torch.Tensor
    inter_node_disp_send_map: torch.Tensor
    total_recv_token_num: torch.Tensor
    disp_tok_id_to_src_tok_id_local: torch.Tensor
    cur_rank_num_token: int = 0

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The five tensors, in the order that :meth:`from_tensors` takes."""
        return (
            self.disp_dest_tok_id_map,
            self.inter_node_disp_dest_tok_id_map,
            self.inter_node_disp_send_map,
            self.total_recv_token_num,
            self.disp_tok_id_to_src_tok_id_local,
        )

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor], cur_rank_num_token: int = 0) -> EpDispatchRoutingHandle:
        """Rebuild a handle; the number of tokens does not travel in the tensors."""
        destinations, abroad, sent, total, sources = tensors
        return cls(destinations, abroad, sent, total, sources, cur_rank_num_token)


@dataclass
class Layout:
    """What a handle says about one rank: see :class:`.engine.Round`."""

    owners: torch.Tensor  # [n, k]
    mask: torch.Tensor  # [n, W + 1]
    slots: torch.Tensor  # [Q]
    plan: Plan


class Handles:
    """Reads and writes the handles of one operator on one rank."""

    def __init__(self, config: EpDispatchCombineConfig, transport: Transport, device: torch.device) -> None:
        self._config, self._transport, self._device = config, transport, device
        self._world, self._tokens = config.world_size, config.max_num_inp_token_per_rank
        self._k, self._per_node = config.num_experts_per_token, config.gpu_per_node
        self._stride = self._world * self._tokens
        self._null = self._world * self._stride
        self._nodes = max(1, self._world // self._per_node)
        self._node, self._place = divmod(config.rank, self._per_node)

    def allocate(self) -> EpDispatchRoutingHandle:
        """Zeroed tensors."""
        experts = self._config.num_experts_per_rank

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        return EpDispatchRoutingHandle(
            zeros(self._stride * experts),
            zeros(self._nodes * self._tokens * self._k),
            zeros(self._nodes * self._tokens),
            zeros(1),
            zeros(self._stride * experts),
        )

    def token_count(self, handle: EpDispatchRoutingHandle, empty_refused: bool) -> int:
        """Tokens that the handle was made with.

        Raises:
            ValueError: none, or fewer; with ``empty_refused`` off, fewer only.
        """
        count = int(handle.cur_rank_num_token)
        if count < 0 or (empty_refused and count == 0):
            raise ValueError(
                f"the routing handle is for {count} tokens; it must come from dispatch(return_routing=True) or be "
                "rebuilt by from_tensors with the number of tokens, and a rank without tokens can have none"
            )
        return count

    # ---- filling --------------------------------------------------------------------------------------------------

    def fill(self, handle: EpDispatchRoutingHandle, destination: torch.Tensor) -> None:
        """Record where every slot went. Collective over several nodes.

        Args:
            handle: tensors to write.
            destination: ``[n, k]`` int64, ``rank * W * M + slot``, or ``W * W * M`` for none.
        """
        n = len(destination)
        handle.cur_rank_num_token = n
        node = destination.div(self._stride * self._per_node, rounding_mode="floor")
        here = torch.where(node == self._node, destination, self._null)
        count = min(n * self._k, handle.disp_dest_tok_id_map.numel())
        handle.disp_dest_tok_id_map[:count].copy_(here.flatten()[:count])
        if self._nodes == 1:
            return
        sent = torch.full((self._world, self._tokens, self._k), self._null, dtype=torch.int64, device=self._device)
        send_map = handle.inter_node_disp_send_map.view(self._tokens, self._nodes)
        for other in range(self._nodes):
            if other == self._node:
                continue
            goes = (node == other).any(1)
            position = chunk_positions(goes)
            send_map[:n, other] = torch.where(goes, position, 0)
            there = torch.where(node == other, destination, self._null)
            sent[other * self._per_node + self._place, position[goes]] = there[goes]
        received = torch.empty_like(sent)
        self._transport.slots(received, sent)
        kept = received.view(self._nodes, self._per_node, self._tokens, self._k)[:, self._place]
        handle.inter_node_disp_dest_tok_id_map.copy_(kept.flatten())

    # ---- reading --------------------------------------------------------------------------------------------------

    def destinations(self, handle: EpDispatchRoutingHandle, listed: torch.Tensor) -> torch.Tensor:
        """``[n, k]`` int64 as given to :meth:`fill`, for tokens whose ids name the nodes ``listed [n, N]``.

        Collective over several nodes.
        """
        n = len(listed)
        found = handle.disp_dest_tok_id_map[: n * self._k].view(n, self._k).long()
        if self._nodes == 1:
            return found
        kept = handle.inter_node_disp_dest_tok_id_map.view(self._nodes, 1, self._tokens, self._k).long()
        sent = torch.full(
            (self._nodes, self._per_node, self._tokens, self._k), self._null, dtype=torch.int64, device=self._device
        )
        sent[:, self._place] = kept[:, 0]
        received = torch.empty_like(sent)
        self._transport.slots(received.view(self._world, -1), sent.view(self._world, -1))
        send_map = handle.inter_node_disp_send_map.view(self._tokens, self._nodes)[:n].long()
        for other in range(self._nodes):
            if other != self._node:
                there = received[other, self._place][send_map[:, other]]
                node = there.div(self._stride * self._per_node, rounding_mode="floor")
                # The map of a token that was not sent there is zero, which is another token's place.
                found = torch.where((node == other) & listed[:, other : other + 1], there, found)
        return found

    def layout(self, handle: EpDispatchRoutingHandle, destination: torch.Tensor, slotted: bool) -> Layout:
        """Rebuild the exchange of the dispatch that filled ``handle``; reads the row count on the host."""
        owners = destination.div(self._stride, rounding_mode="floor").clamp(max=self._world)
        n = len(owners)
        mask = torch.zeros(n, self._world + 1, dtype=torch.bool, device=self._device)
        mask.scatter_(1, owners, True)
        mask[:, self._world] = False
        total = int(handle.total_recv_token_num)
        source = handle.disp_tok_id_to_src_tok_id_local[:total].long()
        order = source.argsort()
        rank = source[order].div(self._stride, rounding_mode="floor")
        if not slotted:
            leaving: list[int] = mask[:, : self._world].sum(0).tolist()
            arriving: list[int] = rank.bincount(minlength=self._world).tolist()
            flat = mask[:, : self._world].t().reshape(-1)
            nothing = sum(leaving)
            place = torch.where(flat, flat.cumsum(0) - 1, nothing).view(self._world, -1).t()
            target = torch.cat([place, place.new_full((n, 1), nothing)], 1)
            return Layout(owners, mask, order, Plan(target, nothing, leaving, arriving))
        rows = self._tokens + 1
        nothing = self._world * rows
        base = torch.arange(self._world + 1, device=self._device) * rows
        target = torch.where(mask, mask.cumsum(0) + base, nothing)
        number = torch.arange(total, device=self._device)
        first = torch.zeros(self._world + 1, dtype=torch.int64, device=self._device)
        first[1:] = rank.bincount(minlength=self._world).cumsum(0)
        slots = torch.full((nothing,), recv_capacity(self._config), dtype=torch.int64, device=self._device)
        slots[rank * rows + 1 + number - first[rank]] = order
        return Layout(owners, mask, slots, Plan(target, nothing))


def chunk_positions(goes: torch.Tensor, chunk: int = 64, reverse: bool = False) -> torch.Tensor:
    """Place at another node of every token that ``goes [n]`` there; the chunks that send claim places in turn."""
    n = len(goes)
    filled = torch.nn.functional.pad(goes, (0, -n % chunk)).view(-1, chunk).long()
    sends = filled.amax(1) if n else filled.new_zeros(0)
    claimed = (sends.flip(0).cumsum(0).flip(0) if reverse else sends.cumsum(0)) - 1
    within = filled.cumsum(1) - 1
    return (claimed.unsqueeze(1) * chunk + within).clamp(min=0).view(-1)[:n]
