"""Double of ``mori.ops``: the operator with the real signatures, exceptions and order of checks.

Scope: kernel types, masking, state and arithmetic of MoRI 624002c8 for dispatch, combine and its codecs, and routing
handles. The standard-MoE conversion is not modelled and says so. A pass against this double proves nothing about AMD
hardware.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.standin.mori_ep import graphs
from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.codecs import Codec, kernel_name
from accelerated.standin.mori_ep.config import (
    EpDispatchCombineConfig,
    EpDispatchCombineKernelType,
    EpDispatchCombineQuantType,
)
from accelerated.standin.mori_ep.engine import CombineCall, DispatchCall
from accelerated.standin.mori_ep.environment import DTYPE_SUFFIX
from accelerated.standin.mori_ep.expert_count import count_local_experts, launch_local_expert_count
from accelerated.standin.mori_ep.fatal import die
from accelerated.standin.mori_ep.handles import EpDispatchRoutingHandle
from accelerated.standin.mori_ep.queries import Queries
from accelerated.standin.mori_ep.standard_moe import StandardMoeNotBuilt

__all__ = [
    "EpDispatchCombineConfig",
    "EpDispatchCombineKernelType",
    "EpDispatchCombineOp",
    "EpDispatchCombineQuantType",
    "EpDispatchRoutingHandle",
    "launch_local_expert_count",
]

_Outputs = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor, torch.Tensor]


class EpDispatchCombineOp(StandardMoeNotBuilt, Queries):
    """One dispatch/combine operator. Construction is collective over the default group.

    Attributes:
        config: the configuration, by reference.
        local_expert_count: ``[EPR]`` int32, filled on request by dispatch.

    Raises:
        ValueError: unknown kernel type or quantisation, fp4_blockwise off gfx950, gfx125x staging too small, unknown
            launch configuration mode, unknown hazard.
        RuntimeError: the cco communicator without torch.distributed, or a graph is being captured.

    Dies (SIGABRT) for a wrong ``gpu_per_node``, more ranks than the kernels hold, or shmem that is not initialised.
    Defects and traps are switched by :mod:`.hazards`. Source of semantics: python/mori/ops/dispatch_combine.py.
    Overridable steps: see :mod:`.engine`.
    """

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        self._construct(config)

    # ---- dispatch -------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
        *,
        routing: EpDispatchRoutingHandle | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Send ``input [n, h]`` once to every rank that owns an expert of the token. Collective, no host sync.

        Args:
            input: float32, bfloat16, float8 or packed float4.
            weights: ``[n, k]`` float32 or None (IntraNode, IntraNodeLL, InterNode only).
            scales: ``[n, scale_dim]`` or None, forwarded verbatim.
            indices: ``[n, k]`` int32; other types are misread, as upstream.
            routing: a handle whose layout is used again for this payload.
            return_routing: return a handle of the new layout as a sixth item.

        Returns:
            ``(out [R, h], out_weights [R, k] float32, out_scales [R, scale_dim] or None, out_indices [R, k] int32,
            total_recv [1] int32)``: views of persistent buffers with stale tails; AsyncLL fills them in dispatch_recv.
            With a handle, total_recv is the handle's own.

        Raises:
            ValueError: both handle arguments, or a handle for another number of tokens; NotImplementedError: handles on
                other kernel types than IntraNode and InterNodeV1; KeyError: element type without kernels.
        """
        if routing is not None and return_routing:
            raise ValueError("routing= (replay) and return_routing=True (new layout) exclude each other")
        replay = routing is not None
        if replay or return_routing:
            self._refuse_routing()
        handle = self._handles.allocate() if return_routing else routing
        n, hidden = int(input.size(0)), int(input.size(1))
        if routing is not None:
            self._check_replay(n, int(indices.size(0)), routing)
        if self.config.scale_dim <= 0:
            scales = None
        geometry = self._launch_geometry(block_num, rdma_block_num, warp_per_block, dispatch=True)
        self._cached_dispatch_launch = geometry
        self._dispatch_dtype = input.dtype
        _ = DTYPE_SUFFIX[input.dtype]
        self._check_hidden(hidden)
        self._check_pointers(input, indices, weights, scales)
        if n > self.config.max_num_inp_token_per_rank and not self._on("too-many-tokens"):
            raise ValueError(f"{n} tokens exceed max_num_inp_token_per_rank={self.config.max_num_inp_token_per_rank}")
        self._cur_n = n
        call = DispatchCall(input, weights, scales, indices, *geometry, handle, replay)
        if self._rules.asynchronous:
            if weights is None and self._weights_required:
                die(f"{self._rules.name} reads the weights unconditionally: memory fault at address 0")
            self._pending_dispatch = call
        else:
            graphs.submit(self, _dispatch, call)
            if call_local_expert_count:
                graphs.submit(self, _count, handle)
        if handle is not None and return_routing:
            handle.cur_rank_num_token = n
        outputs = self._outputs(hidden, input.dtype, None if scales is None else scales.dtype, handle)
        return (*outputs, handle) if handle is not None and return_routing else outputs

    def _outputs(
        self,
        hidden: int,
        dtype: torch.dtype,
        scale_dtype: torch.dtype | None,
        handle: EpDispatchRoutingHandle | None,
    ) -> _Outputs:
        buffers, rows = self._buffers, self._buffers.capacity
        total = buffers.total.view(1) if handle is None else handle.total_recv_token_num
        scales = None
        if scale_dtype is not None:
            scales = Buffers.view(buffers.scales, rows, self.config.scale_dim, scale_dtype)
        out = Buffers.view(buffers.out, rows, hidden, dtype)
        shown = rows
        if not (self._on("capacity-sized-outputs") or self._rules.asynchronous or graphs.is_capturing()):
            shown = min(int(total), rows)
        return (
            out[:shown],
            buffers.weights[:shown],
            None if scales is None else scales[:shown],
            buffers.ids[:shown],
            total,
        )

    def dispatch_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
    ) -> Any:
        """Same as :meth:`dispatch`; ``call_local_expert_count`` is ignored, as upstream."""
        self._pending_count = call_local_expert_count and not self._on("send-drops-expert-count")
        count = self._pending_count and not self._rules.asynchronous
        return self.dispatch(input, weights, scales, indices, block_num, -1, warp_per_block, count)

    def dispatch_recv(
        self, block_num: int = -1, warp_per_block: int = -1, call_local_expert_count: bool = False
    ) -> None:
        """Complete an AsyncLL dispatch. Collective.

        Raises:
            AssertionError: no dispatch before; ValueError: another kernel type.
        """
        if not hasattr(self, "_dispatch_dtype"):
            raise AssertionError("dispatch_recv needs a dispatch or dispatch_send before it")
        _ = DTYPE_SUFFIX[self._dispatch_dtype]
        if not self._rules.asynchronous:
            raise ValueError(f"dispatch_recv supports AsyncLL only, not kernel_type={self.config.kernel_type.value}")
        call, self._pending_dispatch = self._pending_dispatch, None
        if call is None:
            die("dispatch_recv without a new dispatch_send: the real kernel would wait for ever")
        graphs.submit(self, _dispatch, call)
        if call_local_expert_count or self._pending_count:
            graphs.submit(self, _count, None)
        self._pending_count = False

    # ---- combine --------------------------------------------------------------------------------------------------

    def combine(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        use_external_inp_buf: int = -1,
        call_reset: bool = False,
        *,
        routing: EpDispatchRoutingHandle | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum the expert rows of every token over its destination ranks, unweighted. Collective, no host sync.

        Args:
            input: ``[>= total_recv, h]``, row i answers received row i. Zero-copy ignores its content.
            weights: ``[>= total_recv, k]`` float32 in received order, or None; an empty tensor counts as None.
            indices: this rank's own dispatch ids ``[n, k]`` int32.
            routing: the handle of the dispatch that is answered.

        Returns:
            ``(out [M, h], out_weights [M, k] float32 or None)``: views of persistent buffers, rows from n on are stale.

        Raises:
            NotImplementedError: handles on other kernel types; ValueError: a handle without tokens, wrong number of
                index rows, a blockwise codec where it has no kernels; KeyError: element type.
        """
        if routing is not None:
            self._refuse_routing()
        hidden = int(input.size(1))
        given = weights is not None and weights.size(0) != 0
        flag = use_external_inp_buf if use_external_inp_buf >= 0 else int(self.config.use_external_inp_buf)
        n = self._cur_n if routing is None else self._handle_tokens(routing)
        self._check_combine_indices(indices, n)
        push = bool(flag) and self._codec_setting is None
        geometry = self._launch_geometry(block_num, rdma_block_num, warp_per_block, dispatch=False, push=push)
        self._cached_combine_launch = geometry
        self._combine_dtype = input.dtype
        _ = DTYPE_SUFFIX[input.dtype]
        self._check_hidden(hidden)
        self._check_pointers(input, indices, weights, None)
        self._check_zero_copy(bool(flag))
        self._check_weight_rows(weights, routing)
        self._cur_n = n
        call = CombineCall(input, weights, indices, bool(flag), n, geometry[0], handle=routing)
        self._choose_codec(call, hidden, given)
        if self._rules.asynchronous:
            self._pending_combine = call
        else:
            graphs.submit(self, _combine, call)
        out = Buffers.view(self._buffers.combined, self._tokens, hidden, input.dtype)
        if call_reset:
            self.reset()
        return out, self._buffers.combined_weights.view_as(self._buffers.combined_weights) if given else None

    def _choose_codec(self, call: CombineCall, hidden: int, weighted: bool) -> None:
        """Set what travels: the codec where the library has kernels for it, silently none, or nothing that is written.

        Raises:
            ValueError: a blockwise codec on another kernel type, for other than bfloat16, or in zero-copy mode; with
                the traps ``codec-ignored`` and ``v1-codec-garbage`` off, fp8_direct_cast where it would be ignored.
        """
        codec, kind, dtype = self._codec_setting, self._rules.name, call.rows.dtype
        if codec is None:
            return
        bfloat16 = dtype == torch.bfloat16
        if codec.blockwise:
            self._check_blockwise(codec, dtype, call.external)
            call.codec = codec
            if kind != "AsyncLL":
                config = self.config
                self._last_combine_kernel_name, call.fused = kernel_name(
                    codec, hidden, config.num_experts_per_token, config.world_size, weighted
                )
            else:  # its kernel is one, and tells the vector path by the floor of the block size
                block = hidden // codec.scale_dim
                call.fused = block == 128 and hidden % 8 == 0 and self.config.num_experts_per_token in (8, 9)
                call.width = block if call.fused and self._on("async-blockwise-width") else None
        elif self._rules.node_levels:
            if bfloat16:
                call.codec = codec
            elif self._on("v1-codec-garbage"):
                call.unwritten = True
            else:
                raise ValueError(f"{codec.name} on {kind} writes bfloat16 only, not {dtype}")
        elif bfloat16 and (kind == "AsyncLL" or (self._rules.pushes and call.external)):
            call.codec = codec
        elif not self._on("codec-ignored"):
            raise ValueError(f"{codec.name} would be ignored: {kind}, {dtype}, external buffer {call.external}")

    def _check_blockwise(self, codec: Codec, dtype: torch.dtype, external: bool) -> None:
        kinds = ("IntraNode", "IntraNodeLL") + (("AsyncLL",) if codec.name == "fp8_blockwise" else ())
        if self._rules.name not in kinds:
            raise ValueError(f"{codec.name} has combine kernels for {', '.join(kinds)}, not for {self._rules.name}")
        if dtype != torch.bfloat16:
            raise ValueError(f"{codec.name} combines torch.bfloat16, not {dtype}")
        if not external:
            raise ValueError(f"{codec.name} has no zero-copy combine; pass use_external_inp_buf=1")

    def combine_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same as :meth:`combine`."""
        return self.combine(input, weights, indices, block_num=block_num, warp_per_block=warp_per_block)

    def combine_recv(self, block_num: int = -1, warp_per_block: int = -1) -> None:
        """Complete an AsyncLL combine. Collective.

        Raises:
            AssertionError: no combine before; ValueError: another kernel type.
        """
        if not hasattr(self, "_combine_dtype"):
            raise AssertionError("combine_recv needs a combine or combine_send before it")
        _ = DTYPE_SUFFIX[self._combine_dtype]
        if not self._rules.asynchronous:
            raise ValueError(f"combine_recv supports AsyncLL only, not kernel_type={self.config.kernel_type.value}")
        call, self._pending_combine = self._pending_combine, None
        if call is None:
            die("combine_recv without a new combine_send: the real kernel would wait for ever")
        graphs.submit(self, _combine, call)


def _dispatch(op: EpDispatchCombineOp, call: DispatchCall) -> None:
    op._run_dispatch(call)


def _combine(op: EpDispatchCombineOp, call: CombineCall) -> None:
    op._run_combine(call)


def _count(op: EpDispatchCombineOp, handle: EpDispatchRoutingHandle | None) -> None:
    buffers, config = op._buffers, op.config
    total = buffers.total if handle is None else handle.total_recv_token_num
    ids = buffers.ids[: buffers.capacity]
    count_local_experts(ids, total, config.rank, config.num_experts_per_rank, op.local_expert_count)
