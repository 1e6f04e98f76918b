"""Construction of the double's operator: which checks come in which order, and what they raise or end.

Scope: python/mori/ops/dispatch_combine.py and src/ops/dispatch_combine/dispatch_combine.cpp of MoRI 624002c8. It proves
nothing about compilation, symmetric memory or the communicator.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import graphs, hazards, shmem
from accelerated.standin.mori_ep.codecs import Codec, fp8_type
from accelerated.standin.mori_ep.config import (
    EpDispatchCombineConfig,
    EpDispatchCombineKernelType,
    normalize_quant_type,
    recv_capacity,
)
from accelerated.standin.mori_ep.engine import DispatchCall, Engine
from accelerated.standin.mori_ep.environment import (
    AUTO_GEOMETRY,
    LOCK_FILE,
    combine_scale_dim,
    communicator,
    device_of,
)
from accelerated.standin.mori_ep.fatal import die, hang
from accelerated.standin.mori_ep.jit_config import detect_gpu_arch, is_gfx125x, wave_size
from accelerated.standin.mori_ep.routing import RULES, Rules, check_geometry
from accelerated.standin.mori_ep.state import CombineCall


class Construction(Engine):
    """The constructor's steps and the launch geometry."""

    config: EpDispatchCombineConfig

    def _construct(self, config: EpDispatchCombineConfig) -> None:
        graphs.refuse("the construction of an operator")
        self.config = config
        self._hazards = switched = hazards.active()
        self._warp_size = wave_size()
        if getattr(config.kernel_type, "value", None) not in RULES:
            raise ValueError(f"unknown kernel_type: {config.kernel_type}")
        rules = RULES[config.kernel_type.value]
        self._wait_for_compiler(rules)
        together = dist.is_initialized() and self._on("construction-is-collective")
        if together:
            dist.barrier()
        quantisation = normalize_quant_type(config.quant_type, members="quant-members-refused" not in switched)
        group = self._communicator_group(rules)
        self._handle = object()
        self._codec_setting = self._read_codec(quantisation.name)
        self._check_staging()
        device = device_of(group)
        self._start(config, rules, group, device, switched)
        self.local_expert_count = torch.zeros(config.num_experts_per_rank, dtype=torch.int32, device=device)
        self._read_launch_mode()
        self._pending_dispatch: DispatchCall | None = None
        self._pending_combine: CombineCall | None = None
        self._pending_count = False
        self._cur_n = 0
        if together:
            dist.barrier()

    def _wait_for_compiler(self, rules: Rules) -> None:
        """Wait for the lock of a compilation of these kernels, if a cache folder is named and holds one."""
        folder = os.environ.get("MORI_JIT_CACHE_DIR", "")
        lock = Path(folder, LOCK_FILE.format(rules.module))
        if folder and lock.exists():
            if self._on("stale-lock-hangs"):
                hang(f"{lock} exists; if no compilation runs, delete it")
            lock.unlink(missing_ok=True)

    def _communicator_group(self, rules: Rules) -> dist.ProcessGroup | None:
        if communicator() == "cco":
            if not dist.is_initialized():
                raise RuntimeError("the cco communicator requires an initialised torch.distributed group")
            group = dist.group.WORLD
            check_geometry(self.config, rules, self._hazards)
        else:
            check_geometry(self.config, rules, self._hazards)
            group = shmem.current_group()
            if group is None:
                die("shmem is not initialised; call shmem_torch_process_group_init before building an operator")
        size = dist.get_world_size(group)
        if size != self.config.world_size:
            die(f"config.world_size={self.config.world_size}, but the communicator has {size} ranks")
        return group

    def _read_codec(self, member: str) -> Codec | None:
        """The codec of the configuration; the number of blocks comes from the environment, here and never again."""
        name = {"Fp8DirectCast": "fp8_direct_cast", "Fp8BlockwiseQuant": "fp8_blockwise"}.get(member, "fp4_blockwise")
        blockwise = member in ("Fp8BlockwiseQuant", "Fp4BlockwiseQuant")
        self._fp8_blockwise_combine_scale_dim = combine_scale_dim() if blockwise else 0
        self._fp8_blockwise_combine_scale_type_size = 4 if blockwise else 0
        if member == "None_":
            return None
        arch = detect_gpu_arch()
        if name == "fp4_blockwise" and "gfx950" not in arch:
            raise ValueError(f"quant_type='fp4_blockwise' requires gfx950; the architecture is {arch!r}")
        packing = (self._on("fp4-odd-block"), self._on("fp4-empty-block"))
        return Codec(name, fp8_type(arch), self._fp8_blockwise_combine_scale_dim, *packing)

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

    def _launch_geometry(
        self, blocks: int, rdma_blocks: int, warps: int, dispatch: bool, push: bool = False
    ) -> tuple[int, int, int]:
        blocks, rdma_blocks, warps = self.get_launch_config(dispatch, blocks, rdma_blocks, warps)
        default_blocks, default_warps = self.config.block_num, self.config.warp_num_per_block
        fixed = self._rules.name == "IntraNode" and self._on("dispatch-ignores-geometry")
        if fixed and is_gfx125x():
            default_blocks, default_warps = 64, 16 if push else 8
        elif fixed and dispatch:
            default_blocks, default_warps = 256, 16
        return (
            blocks if blocks > 0 else default_blocks,
            rdma_blocks if rdma_blocks > 0 else self.config.rdma_block_num,
            warps if warps > 0 else default_warps,
        )

    def get_launch_config(
        self, is_dispatch: bool = True, block_num: int = -1, rdma_block_num: int = -1, warp_per_block: int = -1
    ) -> tuple[int, int, int]:
        """Return (blocks, RDMA blocks, warps per block): AUTO mode's values, else the arguments unchanged."""
        return (
            self.auto_block_num or block_num,
            self.auto_rdma_block_num or rdma_block_num,
            self.auto_warp_per_block or warp_per_block,
        )
