"""Operators that go wrong where rows are quantised, or calls are made in another way than the plain one.

Scope: subclasses of the double's operator with one defect each, overriding its documented hooks. They prove nothing
about kernels of a real library.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.codecs import Codec
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.ops import EpDispatchCombineOp
from accelerated.standin.mori_ep.state import CombineCall, DispatchCall
from accelerated.standin.mori_ep.wire import Arrival, DispatchWire


class ScalesOfAnotherRow(EpDispatchCombineOp):
    """The last of two or more received rows comes with the scales of the first."""

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        total = int(arrival.total)
        if total > 1 and self._scale_bytes:
            scales = Buffers.view(self._buffers.scales, self._buffers.capacity + 1, self._scale_bytes, torch.uint8)
            scales[total - 1] = scales[0]


class CodecTwice(EpDispatchCombineOp):
    """The sum is coded once more before it is stored."""

    def _sum(self, block: torch.Tensor, hidden: int, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        total = super()._sum(block, hidden, indices, dtype)
        if self._codec is None:
            return total
        values, scales = self._codec.decode(self._codec.encode(total.to(dtype)), hidden)
        return values if scales is None else values * scales


class _Unsaturated(Codec):
    """Values beyond the largest code overflow."""

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float().to(self.flavour).view(torch.uint8)


class CodecUnsaturated(EpDispatchCombineOp):
    """A direct cast does not saturate: what is beyond the largest code becomes NaN."""

    def _choose_codec(self, call: CombineCall, hidden: int, weighted: bool) -> None:
        super()._choose_codec(call, hidden, weighted)
        codec = call.codec
        if codec is not None and not codec.blockwise:
            call.codec = _Unsaturated(**{field.name: getattr(codec, field.name) for field in fields(codec)})


class CodecLeftOut(EpDispatchCombineOp):
    """Combine carries rows as they are, whatever codec it was configured with."""

    def _choose_codec(self, call: CombineCall, hidden: int, weighted: bool) -> None:
        super()._choose_codec(call, hidden, weighted)
        call.codec = None


class CodecUnasked(EpDispatchCombineOp):
    """A direct cast happens where the library ignores it."""

    def _choose_codec(self, call: CombineCall, hidden: int, weighted: bool) -> None:
        super()._choose_codec(call, hidden, weighted)
        call.codec = self._codec_setting


class FastUnasked(EpDispatchCombineOp):
    """A blockwise combine takes a fast kernel, whatever the weights, the slots and the ranks are."""

    def _choose_codec(self, call: CombineCall, hidden: int, weighted: bool) -> None:
        super()._choose_codec(call, hidden, weighted)
        codec = call.codec
        if codec is not None and codec.blockwise:
            generic = f"EpCombineIntraNodeKernel_bf16_nop2p_{codec.name}"
            self._last_combine_kernel_name, call.fused = f"{generic}_noweight_block128_vec8", True


class CapIgnored(EpDispatchCombineOp):
    """The receive capacity is W·M rows, whatever cap it was configured with."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        super().__init__(replace(config, max_total_recv_tokens=0))


class StaleReplay(EpDispatchCombineOp):
    """A replay delivers the payload that was dispatched when the handle was made; ids, weights and scales are new."""

    def _replay(self, call: DispatchCall, wire: DispatchWire, ids: torch.Tensor) -> None:
        buffers, hidden = self._buffers, call.rows.size(1)
        out = Buffers.view(buffers.out, buffers.capacity + 1, hidden, call.rows.dtype)
        before = out.clone()
        super()._replay(call, wire, ids)
        out.copy_(before)


class ReplayInOtherPlaces(EpDispatchCombineOp):
    """A replay delivers its rows in the reverse order, and its source map and its combine follow."""

    def _replay(self, call: DispatchCall, wire: DispatchWire, ids: torch.Tensor) -> None:
        assert call.handle is not None
        source = call.handle.disp_tok_id_to_src_tok_id_local[: int(call.handle.total_recv_token_num)]
        source.copy_(source.flip(0))
        super()._replay(call, wire, ids)


class MaskedCounted(EpDispatchCombineOp):
    """A masked first slot of a received row is counted as one of the first local expert."""

    def dispatch(self, *arguments: Any, **named: Any) -> Any:
        """As the genuine one."""
        outputs = super().dispatch(*arguments, **named)
        if named.get("call_local_expert_count"):
            ids, total = self._buffers.ids, int(outputs[4])
            self.local_expert_count[0] += int((ids[:total, 0] < 0).sum())
        return outputs
