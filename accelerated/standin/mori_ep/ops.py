"""Double of ``mori.ops``: the operator with the real signatures, exceptions and order of checks.

Scope: kernel types, masking, state and arithmetic of MoRI 624002c8 for dispatch and unquantised combine. Quantised
combine codecs, routing handles and the standard-MoE conversion are not modelled and say so. A pass against this double
proves nothing about AMD hardware.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import shmem
from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.config import (
    EpDispatchCombineConfig,
    EpDispatchCombineKernelType,
    EpDispatchCombineQuantType,
    normalize_quant_type,
    recv_capacity,
    recv_capacity_per_rank,
)
from accelerated.standin.mori_ep.engine import CombineCall, DispatchCall, Engine
from accelerated.standin.mori_ep.environment import AUTO_GEOMETRY, DTYPE_SUFFIX, communicator, device_of
from accelerated.standin.mori_ep.expert_count import count_local_experts, launch_local_expert_count
from accelerated.standin.mori_ep.fatal import die
from accelerated.standin.mori_ep.jit_config import detect_gpu_arch, is_gfx125x
from accelerated.standin.mori_ep.positions import legacy_positions
from accelerated.standin.mori_ep.routing import RULES, Rules, check_geometry
from accelerated.standin.mori_ep.standard_moe import StandardMoeNotBuilt

__all__ = [
    "EpDispatchCombineConfig",
    "EpDispatchCombineKernelType",
    "EpDispatchCombineOp",
    "EpDispatchCombineQuantType",
    "launch_local_expert_count",
]

_Outputs = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor, torch.Tensor]


class EpDispatchCombineOp(StandardMoeNotBuilt, Engine):
    """One dispatch/combine operator. Construction is collective over the default group.

    Attributes:
        config: the configuration, by reference.
        local_expert_count: ``[EPR]`` int32, filled on request by dispatch.

    Raises:
        ValueError: unknown kernel type or quantisation, fp4_blockwise off gfx950, gfx125x staging too small, unknown
            launch configuration mode.
        NotImplementedError: a quantisation that this double does not model yet.
        RuntimeError: the cco communicator without torch.distributed.

    Dies (SIGABRT) for a wrong ``gpu_per_node``, more ranks than the kernels hold, or shmem that is not initialised.
    Source of semantics: python/mori/ops/dispatch_combine.py. Overridable steps: see :mod:`.engine`.
    """

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        self.config = config
        self._warp_size = 32 if is_gfx125x() else 64
        if getattr(config.kernel_type, "value", None) not in RULES:
            raise ValueError(f"unknown kernel_type: {config.kernel_type}")
        rules = RULES[config.kernel_type.value]
        if dist.is_initialized():
            dist.barrier()
        normalize_quant_type(config.quant_type)
        group = self._communicator_group(rules)
        self._handle = object()
        self._fp8_blockwise_combine_scale_dim = 0
        self._check_quantisation()
        self._check_staging()
        device = device_of(group)
        self._start(config, rules, group, device)
        self.local_expert_count = torch.zeros(config.num_experts_per_rank, dtype=torch.int32, device=device)
        self._read_launch_mode()
        self._pending_dispatch: DispatchCall | None = None
        self._pending_combine: CombineCall | None = None
        self._cur_n = 0
        if dist.is_initialized():
            dist.barrier()

    # ---- construction ---------------------------------------------------------------------------------------------

    def _communicator_group(self, rules: Rules) -> dist.ProcessGroup | None:
        if communicator() == "cco":
            if not dist.is_initialized():
                raise RuntimeError("the cco communicator requires an initialised torch.distributed group")
            group = dist.group.WORLD
            check_geometry(self.config, rules)
        else:
            check_geometry(self.config, rules)
            group = shmem.current_group()
            if group is None:
                die("shmem is not initialised; call shmem_torch_process_group_init before building an operator")
        size = dist.get_world_size(group)
        if size != self.config.world_size:
            die(f"config.world_size={self.config.world_size}, but the communicator has {size} ranks")
        return group

    def _check_quantisation(self) -> None:
        name = str(self.config.quant_type).strip().lower()
        if name == "fp4_blockwise" and "gfx950" not in detect_gpu_arch():
            raise ValueError(f"quant_type='fp4_blockwise' requires gfx950; the architecture is {detect_gpu_arch()!r}")
        if name != "none":
            raise NotImplementedError(f"the stand-in does not model quant_type={name!r} yet; use 'none'")

    def _check_staging(self) -> None:
        config = self.config
        if config.kernel_type == EpDispatchCombineKernelType.IntraNode and is_gfx125x():
            slots = 8 * 32768 // max(config.world_size, 1)
            if recv_capacity(config) > slots:
                raise ValueError(
                    f"gfx125x stages {slots} rows per peer, but this configuration needs {recv_capacity(config)}; "
                    "lower max_num_inp_token_per_rank"
                )

    def _read_launch_mode(self) -> None:
        self.launch_config_mode = os.environ.get("MORI_EP_LAUNCH_CONFIG_MODE", "MANUAL")
        if self.launch_config_mode not in ("MANUAL", "AUTO"):
            raise ValueError(f"MORI_EP_LAUNCH_CONFIG_MODE must be MANUAL or AUTO, got {self.launch_config_mode!r}")
        auto: tuple[int | None, int | None, int | None] = (None, None, None)
        if self.launch_config_mode == "AUTO":  # the double has no tuning tables: always the fixed fallback
            auto = AUTO_GEOMETRY.get(self._rules.name, (128, 0, 16))
        self.auto_block_num, self.auto_rdma_block_num, self.auto_warp_per_block = auto

    def _launch_geometry(self, blocks: int, rdma_blocks: int, warps: int, dispatch: bool) -> tuple[int, int, int]:
        blocks, rdma_blocks, warps = self.get_launch_config(dispatch, blocks, rdma_blocks, warps)
        default_blocks, default_warps = self.config.block_num, self.config.warp_num_per_block
        if self._rules.name == "IntraNode" and (dispatch or is_gfx125x()):
            default_blocks, default_warps = (64, 8) if is_gfx125x() else (256, 16)
        return (
            blocks if blocks > 0 else default_blocks,
            rdma_blocks if rdma_blocks > 0 else self.config.rdma_block_num,
            warps if warps > 0 else default_warps,
        )

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
        routing: Any = None,
        return_routing: bool = False,
    ) -> _Outputs:
        """Send ``input [n, h]`` once to every rank that owns an expert of the token. Collective, no host sync.

        Args:
            input: float32, bfloat16, float8 or packed float4.
            weights: ``[n, k]`` float32 or None (IntraNode, IntraNodeLL, InterNode only).
            scales: ``[n, scale_dim]`` or None, forwarded verbatim.
            indices: ``[n, k]`` int32; other types are misread, as upstream.

        Returns:
            ``(out [R, h], out_weights [R, k] float32, out_scales [R, scale_dim] or None, out_indices [R, k] int32,
            total_recv [1] int32)``: views of persistent buffers with stale tails; AsyncLL fills them in dispatch_recv.

        Raises:
            ValueError, NotImplementedError: routing handles; KeyError: element type without kernels.
        """
        if routing is not None and return_routing:
            raise ValueError("routing= (replay) and return_routing=True (new layout) exclude each other")
        if routing is not None or return_routing:
            self._refuse_routing()
        n, hidden = int(input.size(0)), int(input.size(1))
        if self.config.scale_dim <= 0:
            scales = None
        geometry = self._launch_geometry(block_num, rdma_block_num, warp_per_block, dispatch=True)
        self._cached_dispatch_launch = geometry
        self._dispatch_dtype = input.dtype
        _ = DTYPE_SUFFIX[input.dtype]
        self._check_hidden(hidden)
        self._cur_n = n
        call = DispatchCall(input, weights, scales, indices, *geometry)
        if self._rules.asynchronous:
            if weights is None:
                die(f"{self._rules.name} reads the weights unconditionally: memory fault at address 0")
            self._pending_dispatch = call
        else:
            self._run_dispatch(call)
            if call_local_expert_count:
                self._count_experts()
        return self._outputs(hidden, input.dtype, None if scales is None else scales.dtype)

    def _outputs(self, hidden: int, dtype: torch.dtype, scale_dtype: torch.dtype | None) -> _Outputs:
        buffers, rows = self._buffers, self._buffers.capacity
        scales = None
        if scale_dtype is not None:
            scales = Buffers.view(buffers.scales, rows, self.config.scale_dim, scale_dtype)
        out = Buffers.view(buffers.out, rows, hidden, dtype)
        return out, buffers.weights[:rows], scales, buffers.ids[:rows], buffers.total.view(1)

    def dispatch_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
    ) -> _Outputs:
        """Same as :meth:`dispatch`; ``call_local_expert_count`` is ignored, as upstream."""
        return self.dispatch(input, weights, scales, indices, block_num=block_num, warp_per_block=warp_per_block)

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
        self._run_dispatch(call)
        if call_local_expert_count:
            self._count_experts()

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
        routing: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum the expert rows of every token over its destination ranks, unweighted. Collective, no host sync.

        Args:
            input: ``[>= total_recv, h]``, row i answers received row i. Zero-copy ignores its content.
            weights: ``[>= total_recv, k]`` float32 in received order, or None; an empty tensor counts as None.
            indices: this rank's own dispatch ids ``[n, k]`` int32.

        Returns:
            ``(out [M, h], out_weights [M, k] float32 or None)``: views of persistent buffers, rows from n on are stale.

        Raises:
            NotImplementedError: routing handles; ValueError: wrong number of index rows; KeyError: element type.
        """
        if routing is not None:
            self._refuse_routing()
        hidden = int(input.size(1))
        given = weights is not None and weights.size(0) != 0
        flag = use_external_inp_buf if use_external_inp_buf >= 0 else int(self.config.use_external_inp_buf)
        self._check_combine_indices(indices)
        self._cached_combine_launch = self._launch_geometry(block_num, rdma_block_num, warp_per_block, dispatch=False)
        self._combine_dtype = input.dtype
        _ = DTYPE_SUFFIX[input.dtype]
        self._check_hidden(hidden)
        call = CombineCall(input, weights, indices, bool(flag))
        if self._rules.asynchronous:
            self._pending_combine = call
        else:
            self._run_combine(call)
        out = Buffers.view(self._buffers.combined, self._tokens, hidden, input.dtype)
        if call_reset:
            self.reset()
        return out, self._buffers.combined_weights.view_as(self._buffers.combined_weights) if given else None

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
        self._run_combine(call)

    # ---- queries --------------------------------------------------------------------------------------------------

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int = -1) -> torch.Tensor:
        """Return the registered buffer as ``[R, hidden_dim]`` of ``dtype``."""
        hidden = hidden_dim if hidden_dim > 0 else self.config.hidden_dim
        return Buffers.view(self._buffers.registered, self._buffers.capacity, hidden, dtype)

    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        """Return ``[total_recv]`` int32, ``source_rank * W * M + token`` of each received row; empty after combine.

        Synchronises with the host. Legacy InterNode answers on the CPU with stride M instead of W * M, collectively.
        """
        total = int(self._buffers.total.item())
        positions = self._buffers.source[: min(total, self._buffers.source.numel() - 1)]
        if self._rules.name == "InterNode":
            return legacy_positions(positions, self.config, self._cur_n)
        return positions

    def decode_send_flat_idx(self, flat_idx: Any) -> tuple[int, int]:
        """Split ``source_rank * W * M + token``."""
        stride = self.max_num_tokens_to_send()
        return int(flat_idx) // stride, int(flat_idx) % stride

    def max_num_tokens_to_recv(self) -> int:
        """R, rows of every dispatch output."""
        return recv_capacity(self.config)

    def max_num_tokens_to_recv_per_rank(self) -> int:
        """Rows that one source may send here."""
        return recv_capacity_per_rank(self.config)

    def max_num_tokens_to_send(self) -> int:
        """W * M."""
        return self.config.world_size * self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_send_per_rank(self) -> int:
        """M."""
        return self.config.max_num_inp_token_per_rank

    def get_launch_config(
        self, is_dispatch: bool = True, block_num: int = -1, rdma_block_num: int = -1, warp_per_block: int = -1
    ) -> tuple[int, int, int]:
        """Return (blocks, RDMA blocks, warps per block): AUTO mode's values, else the arguments unchanged."""
        return (
            self.auto_block_num or block_num,
            self.auto_rdma_block_num or rdma_block_num,
            self.auto_warp_per_block or warp_per_block,
        )

    def reset(self) -> None:
        """Do nothing, as upstream."""

    # ---- refusals -------------------------------------------------------------------------------------------------

    def _refuse_routing(self) -> None:
        if self._rules.name not in ("IntraNode", "InterNodeV1"):
            raise NotImplementedError(
                f"kernel_type={self._rules.name} has no routing handles; only IntraNode and InterNodeV1 have"
            )
        raise NotImplementedError("the stand-in does not model routing handles yet")

    def _check_combine_indices(self, indices: torch.Tensor) -> None:
        rows = int(indices.size(0))
        if rows != self._cur_n:
            raise ValueError(
                f"combine indices have {rows} rows, but this rank dispatched {self._cur_n} tokens; "
                "pass the ids given to dispatch, not the ones it returned"
            )

    def _check_hidden(self, hidden: int) -> None:
        if not 0 < hidden <= self.config.hidden_dim:
            die(f"host assertion: hidden size {hidden} is not in 1..{self.config.hidden_dim} (config.hidden_dim)")

    def _count_experts(self) -> None:
        buffers, config = self._buffers, self.config
        ids = buffers.ids[: buffers.capacity]
        count_local_experts(ids, buffers.total, config.rank, config.num_experts_per_rank, self.local_expert_count)
