"""What the two halves of an operator share: the calls under way, the last layout, the memory and the switches.

Scope: data and one lookup, no behaviour. It proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.codecs import Codec
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.handles import EpDispatchRoutingHandle, Handles
from accelerated.standin.mori_ep.jit_config import is_gfx125x, wave_size
from accelerated.standin.mori_ep.routing import Routing, Rules
from accelerated.standin.mori_ep.transport import Transport
from accelerated.standin.mori_ep.wire import AnswerWire, DispatchWire, Plan


@dataclass
class Round:
    """What combine needs of the dispatch before it."""

    n: int
    owners: torch.Tensor  # [n, k]
    lookup: torch.Tensor  # [k * n], slot-major
    slots: torch.Tensor  # [Q]
    plan: Plan


@dataclass
class DispatchCall:
    """Arguments of one dispatch, kept alive until they are read."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    scales: torch.Tensor | None
    indices: torch.Tensor
    blocks: int
    rdma_blocks: int
    warps: int
    handle: EpDispatchRoutingHandle | None = None
    replay: bool = False


@dataclass
class CombineCall:
    """Arguments of one combine, kept alive until they are read; ``n`` is frozen when it is made."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    indices: torch.Tensor
    external: bool
    n: int
    blocks: int = 0
    codec: Codec | None = None
    fused: bool = False
    width: int | None = None  # block of a row that the receiver takes, where it is not the sender's
    unwritten: bool = False  # the kernels write no output for this element type
    handle: EpDispatchRoutingHandle | None = None


class State:
    """Attributes of one operator on one rank, set by :meth:`_start`."""

    _serial = 0

    def _start(
        self,
        config: EpDispatchCombineConfig,
        rules: Rules,
        group: dist.ProcessGroup | None,
        device: torch.device,
        hazards: frozenset[str],
    ) -> None:
        self._rules = rules
        self._hazards = hazards
        self._device = device
        self._transport = Transport(group, config.world_size)
        self._routing = Routing(config, rules, device, hazards)
        self._handles = Handles(config, self._transport, device)
        self._buffers = Buffers(config, device)
        self._tokens = config.max_num_inp_token_per_rank
        self._k = config.num_experts_per_token
        self._scale_bytes = config.scale_dim * config.scale_type_size
        narrow = is_gfx125x() and rules.name == "IntraNode" and "gfx125x-scale-vectors" in hazards
        # The body of gfx125x moves scales by vectors and leaves the rest of a row.
        self._moved_scale_bytes = self._scale_bytes // 16 * 16 if narrow else self._scale_bytes
        staged = 8 * 32768 // config.world_size * 128
        self._scales_overrun = narrow and self._buffers.capacity * self._scale_bytes > staged
        self._rank = config.rank
        self._node_levels = rules.node_levels and self._routing.nodes > 1
        self._narrow_waves = wave_size() == 32
        self._wires: dict[int, DispatchWire] = {}
        self._answer_wires: dict[int, AnswerWire] = {}
        self._round: Round | None = None
        self._active: Round | None = None
        self._call: CombineCall | None = None
        self._counter = self._buffers.total
        self._excess: torch.Tensor | None = None  # rows of tokens past M
        self._answers_before: torch.Tensor | None = None
        self._handle_dispatches = self._combines = 0  # since the last combine, since the last dispatch
        self._epoch = 0  # combines ever
        self._warps = 0
        # The order of received rows is arbitrary upstream: a fresh one for every call, the same in every run.
        State._serial += 1
        self._random = torch.Generator(device).manual_seed(State._serial * 4096 + config.rank)
        stale = (self._routing.nodes, self._tokens)
        self._sent_map = torch.zeros(stale, dtype=torch.int64, device=device)  # V1: slot of (node, token), kept stale

    def _on(self, hazard: str) -> bool:
        return hazard in self._hazards
