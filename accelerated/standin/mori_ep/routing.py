"""Where a token goes: what each kernel type makes of an expert id, and which slot stands for a destination.

Scope: pure functions of the index row, with the differences between the kernel types as data. It proves nothing about
the atomics and maps by which the real kernels arrive at the same destinations.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.fatal import die, die_if
from accelerated.standin.mori_ep.hazards import DEFAULT


class Negative(enum.Enum):
    """What a negative expert id means."""

    DROPPED = "dropped"
    RANK_ZERO = "rank 0"  # C++ division truncates: -1 / EPR is 0 for EPR > 1
    RANK_ZERO_ABROAD = "rank 0, seen from another node"


@dataclass(frozen=True)
class Rules:
    """Behaviour of one kernel type (contract sections 3-5, corrected by section 10.1)."""

    name: str
    negative: Negative = Negative.DROPPED
    scanned_slots: int | None = None  # destinations are taken from this many leading slots only
    last_slot_stands: bool = False  # fold order: the last instead of the first slot of a destination
    weights_required: bool = False
    asynchronous: bool = False
    node_levels: bool = False
    registered_input: bool = False  # honours use_external_inp_buf
    pushes: bool = False  # combine pushes rows into slots whose stride depends on the writer's weights
    max_ranks: int | None = None

    @property
    def module(self) -> str:
        """The compilation unit of its kernels."""
        units = {"IntraNodeLL": "intranode", "InterNodeV1": "internode_v1", "InterNodeV1LL": "internode_v1ll"}
        return "ep_" + units.get(self.name, "async_ll" if self.asynchronous else self.name.lower())


RULES: dict[int, Rules] = {
    0: Rules("IntraNode", registered_input=True, pushes=True, max_ranks=8),
    1: Rules("InterNode", Negative.RANK_ZERO),
    2: Rules("InterNodeV1", weights_required=True, node_levels=True),
    3: Rules("InterNodeV1LL", Negative.RANK_ZERO_ABROAD, weights_required=True, node_levels=True),
    4: Rules("AsyncLL", Negative.RANK_ZERO, weights_required=True, asynchronous=True),
    5: Rules("IntraNodeLL", scanned_slots=8, last_slot_stands=True, registered_input=True, pushes=True, max_ranks=8),
}


class Routing:
    """Destination decisions of one rank.

    Attributes:
        nowhere: the owner code W of a slot that leads to no rank.
    """

    def __init__(
        self,
        config: EpDispatchCombineConfig,
        rules: Rules,
        device: torch.device,
        hazards: frozenset[str] = DEFAULT,
    ) -> None:
        self.config = config
        self.rules = rules
        self._hazards = hazards
        self._negative = rules.negative if "negative-id-is-rank-zero" in hazards else Negative.DROPPED
        self.nowhere = config.world_size
        self.experts = config.world_size * config.num_experts_per_rank
        self.node = config.rank // config.gpu_per_node
        self.nodes = config.world_size // config.gpu_per_node
        owner = torch.arange(self.experts, dtype=torch.int64) // config.num_experts_per_rank
        edge = torch.tensor([self.nowhere])
        # Entry 0 is for every negative id, the last for every id past the experts.
        self._table = torch.cat([torch.tensor([self._negative_owner()]), owner, edge]).to(device)
        k = config.num_experts_per_token
        triangle = torch.ones(k, k, dtype=torch.bool, device=device)
        self._other_slot = triangle.triu(1) if rules.last_slot_stands else triangle.tril(-1)

    def _negative_owner(self) -> int:
        if self.config.num_experts_per_rank == 1 or self._negative is Negative.DROPPED:
            return self.nowhere
        if self._negative is Negative.RANK_ZERO_ABROAD and self.node == 0:
            return self.nowhere
        return 0

    def owners(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids ``[n, k]`` int32 to owning ranks ``[n, k]`` int64, :attr:`nowhere` for slots that are dropped."""
        owners = self._table[ids.clamp(-1, self.experts).add_(1)]
        scanned = self.rules.scanned_slots if "low-latency-scans-eight-slots" in self._hazards else None
        if scanned is not None and scanned < owners.size(1):
            owners[:, scanned:] = self.nowhere
        return owners

    def destinations(self, owners: torch.Tensor) -> torch.Tensor:
        """Return ``[n, W + 1]`` bool: token goes to rank. The last column (nowhere) is False."""
        mask = torch.zeros(owners.size(0), self.nowhere + 1, dtype=torch.bool, device=owners.device)
        mask.scatter_(1, owners, True)
        mask[:, self.nowhere] = False
        return mask

    def keep_nodes(self, mask: torch.Tensor, rdma_blocks: int, blocks: int, narrow_waves: bool) -> torch.Tensor:
        """Drop what a wrong split of the grid, or a mask of 64 lanes on waves of 32, loses across nodes. In place."""
        if not self.rules.node_levels or self.nodes == 1:
            return mask
        per_node = self.config.gpu_per_node
        home = slice(self.node * per_node, (self.node + 1) * per_node)
        local = mask[:, home].clone()
        if "wave32-mask-shift" in self._hazards and narrow_waves and self.rules.name == "InterNodeV1":
            for node in range(self.nodes):
                block = mask[:, node * per_node : (node + 1) * per_node]
                block &= _without_gap(block.any(1), 32).unsqueeze(1)
            mask[:, home] = local
        if "rdma-block-split" in self._hazards:
            if rdma_blocks <= 0:
                mask.zero_()
                mask[:, home] = local
            elif rdma_blocks >= blocks:
                mask[:, home] = False
        return mask

    def stands_elsewhere(self, owners: torch.Tensor) -> torch.Tensor:
        """Return ``[n, k]`` bool: another slot of the token represents this slot's rank in the sum."""
        same = owners.unsqueeze(2) == owners.unsqueeze(1)
        return (same & self._other_slot).any(2)

    def listed_nodes(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ``[n, N]`` bool: nodes that the ids ``[n, k]`` name, as the last stage of InterNodeV1 reads them."""
        nodes = torch.arange(self.nodes, device=ids.device)
        node = ids // (self.config.num_experts_per_rank * self.config.gpu_per_node)
        return ((node.unsqueeze(2) == nodes) & (ids >= 0).unsqueeze(2)).any(1)

    def out_of_range(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ``[n, k]`` bool: ids past the last expert."""
        return ids >= self.experts

    def refuse_sent(self, ids: torch.Tensor) -> None:
        """Die for ids that a proxy on another node would assert on (V1 and V1LL over several nodes)."""
        if not self.rules.node_levels or self.nodes == 1:
            return
        bad = self.out_of_range(ids)
        if "ids-past-experts" not in self._hazards:
            bad = torch.zeros_like(bad)
        if self.rules.negative is Negative.DROPPED:
            away = self.listed_nodes(ids.clamp(max=self.experts - 1).masked_fill(bad, -1))
            away[:, self.node] = False
            bad = bad & away.any(1, keepdim=True)
        elif self.config.num_experts_per_rank == 1 and self._negative is not Negative.DROPPED:
            bad = bad | (ids < 0)
        die_if(bad, "device assertion: an expert id sent to another node names no rank")

    def refuse_received(self, ids: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Die for ids ``[Q, k]`` in rows marked ``valid [Q]`` that the receiver of AsyncLL asserts on."""
        if not self.rules.asynchronous:
            return
        bad = self.out_of_range(ids)
        if "ids-past-experts" not in self._hazards:
            bad = torch.zeros_like(bad)
        if self.config.num_experts_per_rank == 1 and self._negative is not Negative.DROPPED:
            bad = bad | (ids < 0)
        if valid is not None:
            bad = bad & valid.unsqueeze(1)
        die_if(bad, "device assertion: a received expert id names no rank")


def _without_gap(sent: torch.Tensor, lanes: int) -> torch.Tensor:
    """Which of ``sent [n]`` come before the first gap of their chunk of ``lanes``."""
    filled = torch.nn.functional.pad(sent, (0, -len(sent) % lanes)).view(-1, lanes)
    return filled.long().cumprod(1).bool().view(-1)[: len(sent)]


def check_geometry(config: EpDispatchCombineConfig, rules: Rules, hazards: frozenset[str] = DEFAULT) -> None:
    """Die where the host code or the kernels would (src/ops/dispatch_combine/dispatch_combine.cpp, intranode.hpp).

    Raises:
        ValueError: a wrong ``gpu_per_node``, where that does not end the process.
    """
    per_node, world = config.gpu_per_node, config.world_size
    if per_node < 1 or per_node & (per_node - 1) or world % per_node:
        message = f"gpu_per_node={per_node} must be a power of two that divides world_size={world}"
        if "gpu-per-node-aborts" not in hazards:
            raise ValueError(message)
        die(message)
    if rules.max_ranks is not None and world > rules.max_ranks:
        die(f"{rules.name} holds {rules.max_ranks} ranks, but world_size={world}")
