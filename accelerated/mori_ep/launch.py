"""Arguments of MoRI's operator configuration, its launch geometry, and the symmetric memory it takes.

Scope: plain integers without torch. A configuration from here is within MoRI's documented limits if
:func:`accelerated.mori_ep.contract.support` does not refuse the problem; it does not prove that the geometry is fast,
or that the device has the memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerated import wires
from accelerated.mori_ep.calls import receive_cap
from accelerated.mori_ep.contract import resolve
from accelerated.mori_ep.kernel_types import INTRA_NODE_TYPES, NODE_LEVEL_TYPES
from reference.catalogue import KERNEL_TYPES, VLLM_BACKENDS, LaunchParameters, architecture, vllm_kernel_type
from reference.problem import Problem, block_width, wire_format

#: Environment variable with the size of the symmetric heap; read once, when shmem initialises.
HEAP_VARIABLE = "MORI_SHMEM_HEAP_SIZE"

#: Environment variable with the blocks of a row for the blockwise combine codecs; read when an operator is built.
SCALE_DIM_VARIABLE = "MORI_FP8_COMBINE_SCALE_DIM"

#: torch's name of E2M1 codes, two to a byte.
PACKED_FP4 = "float4_e2m1fn_x2"

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "K": _KIB, "M": _MIB, "G": _GIB}
_SIZE = re.compile(r"(\d+)((?:[KMG](?:i?B|b)?|[kmg](?:i?b)?)?)")
#: Room for signals, allocator granularity, and operators that differ from the sizing problem.
_HEADROOM = 1.25
#: Operators that may be alive at once; the one before lives on where a rank has not dropped it yet.
_LIVE_OPERATORS = 2
_SMALL_BUFFERS = _MIB


@dataclass(frozen=True)
class Launch:
    """A kernel type and the geometry it is launched with."""

    kernel_type: str
    parameters: LaunchParameters


def launch(problem: Problem, kernel_type: str, arch: str) -> Launch:
    """Kernel type and geometry behind a kernel type or a vLLM backend name.

    vLLM's names take vLLM's geometry; kernel types take the geometry of the architecture's catalogue entry. The
    legacy InterNode kernel splits its blocks evenly over ranks (MoRI 624002c8, internode.hpp:138), so its block count
    is rounded up to a multiple of ``world_size``.

    Raises:
        CatalogueError: unknown name or architecture, or a kernel type that does not run there.
    """
    target = architecture(arch)
    resolved = resolve(kernel_type, problem, target)
    if kernel_type in VLLM_BACKENDS:
        parameters = vllm_kernel_type(kernel_type, problem.nodes, target)[1]
    else:
        parameters = target.launch_parameters(resolved, problem.nodes)
    blocks = parameters.block_num
    if resolved == "InterNode":
        blocks = -(-blocks // problem.world_size) * problem.world_size
    rdma_blocks = parameters.rdma_block_num
    if problem.nodes > 1 and resolved in NODE_LEVEL_TYPES and not 0 < rdma_blocks < blocks:
        # Nothing fails in the library: 0 loses the cross-node rows silently, all blocks lose the rows of the own node.
        raise ValueError(
            f"rdma_block_num is {rdma_blocks} of {blocks} blocks for {resolved} on {arch} with {problem.nodes} nodes; "
            "it must lie strictly between 0 and block_num (fixtures/architectures)"
        )
    return Launch(resolved, LaunchParameters(blocks, parameters.warp_num_per_block, rdma_blocks))


def config_arguments(problem: Problem, kernel_type: str, arch: str, rank: int) -> dict[str, object]:
    """Every field of ``EpDispatchCombineConfig`` (MoRI 624002c8, python/mori/ops/dispatch_combine.py).

    ``data_type`` and ``kernel_type`` are names here: the adapter turns them into the torch dtype and the library's
    member, so that this module needs neither.

    Raises:
        CatalogueError: as :func:`launch`.
        ValueError: ``rank`` is not a rank of the problem, or the geometry loses rows.
    """
    if not 0 <= rank < problem.world_size:
        raise ValueError(f"rank is {rank}; it must be at least 0 and below world_size = {problem.world_size}")
    chosen = launch(problem, kernel_type, arch)
    scale_dim, scale_type_size = wires.scale_shape(problem)
    return {
        "data_type": dispatch_dtype(problem, arch),
        "rank": rank,
        "world_size": problem.world_size,
        "hidden_dim": problem.hidden,  # logical elements, of packed FP4, too: combine has as many (vLLM 0.33.0)
        "scale_dim": scale_dim,
        "scale_type_size": scale_type_size,
        # Combine carries the element type whatever dispatch carries.
        "max_token_type_size": problem.element_bytes,
        "max_num_inp_token_per_rank": problem.capacity,
        "num_experts_per_rank": problem.experts_per_rank,
        "num_experts_per_token": problem.top_k,
        "warp_num_per_block": chosen.parameters.warp_num_per_block,
        "block_num": chosen.parameters.block_num,
        "max_total_recv_tokens": receive_cap(problem),
        "use_external_inp_buf": "zero-copy" not in problem.modes,
        "kernel_type": chosen.kernel_type,
        # The library's default of 8 aborts below 8 ranks.
        "gpu_per_node": problem.ranks_per_node,
        "rdma_block_num": chosen.parameters.rdma_block_num,
        "num_qp_per_pe": 1,
        "quant_type": problem.codec or "none",
    }


def dispatch_dtype(problem: Problem, arch: str) -> str:
    """Name of the torch dtype in which rows are dispatched: the element type, or the architecture's for a wire.

    Raises:
        CatalogueError: unknown architecture.
    """
    if not problem.wire:
        return problem.dtype
    return architecture(arch).fp8.dtype if wire_format(problem.wire).payload == "fp8" else PACKED_FP4


@contextmanager
def scale_dim(problem: Problem) -> Iterator[None]:
    """Blocks of the problem's combine codec, in the environment, where the library reads them as it builds."""
    before = os.environ.get(SCALE_DIM_VARIABLE)
    if problem.scale_dim:
        os.environ[SCALE_DIM_VARIABLE] = str(problem.scale_dim)
    try:
        yield
    finally:
        if problem.scale_dim:
            if before is None:
                del os.environ[SCALE_DIM_VARIABLE]
            else:
                os.environ[SCALE_DIM_VARIABLE] = before


def heap_bytes(problem: Problem, kernel_type: str) -> int:
    """Symmetric bytes that one operator takes on each rank (MoRI 624002c8, dispatch_combine.cpp:302-557).

    Args:
        problem: sizes; W·M rows is the receive capacity R, which a cap can only lower.
        kernel_type: one of the six.
    """
    tokens, nodes = problem.capacity, problem.nodes
    received = problem.world_size * tokens
    payload = problem.hidden * problem.element_bytes
    groups, scale_size = wires.scale_shape(problem)
    scales, blocks = groups * scale_size, 4 * problem.scale_dim
    head = 8 * problem.top_k + 4
    transfer = payload + head + scales
    # Scales have a buffer on either side; the one for sending holds a combine codec's, too.
    outputs = (received + tokens) * payload + received * (max(scales, blocks) + scales)
    if kernel_type == "IntraNode" and blocks:
        # Only this type sizes a staged row for the codec.
        region = block_width(problem.hidden, 2) if problem.codec == "fp4_blockwise" else payload
        staging = received * (region + head + blocks)
    elif kernel_type in INTRA_NODE_TYPES:
        staging = received * transfer
    elif kernel_type in NODE_LEVEL_TYPES:
        staging = (3 * nodes * tokens + tokens + received) * transfer
    else:
        staging = 3 * received * transfer
    metadata = 20 * received * problem.top_k + 4 * received * problem.experts_per_rank + 8 * nodes * tokens
    return staging + outputs + metadata + _SMALL_BUFFERS


def session_heap_bytes(world_size: int) -> int:
    """Heap for a session on ``world_size`` ranks, fixed before the first operator is known.

    Sized for two live operators of the largest shape in use (DeepSeek-V3's H = 7168 and k = 8, 4096 tokens per rank,
    32 experts per rank, float32) on the hungriest kernel type, with a quarter of headroom.
    """
    largest = Problem(world_size, hidden=7168, experts=32 * world_size, top_k=8, capacity=4096, dtype="float32")
    return int(_HEADROOM * _LIVE_OPERATORS * max(heap_bytes(largest, name) for name in KERNEL_TYPES))


def heap_setting(needed: int, current: str | None) -> str:
    """Value for :data:`HEAP_VARIABLE`: ``needed`` bytes in whole MiB, or the user's ``current`` value if that is more.

    Raises:
        ValueError: ``current`` is no size.
    """
    if current and parse_size(current) >= needed:
        return current
    return f"{-(-needed // _MIB)}M"


def parse_size(text: str) -> int:
    """Bytes of a size that MoRI reads as meant: an integer with K, KB or KiB (or M, G), all powers of 1024.

    MoRI falls back to bytes for any other spelling, blanks at the end and ``GIB`` included, and cuts fractions off
    (MoRI 624002c8, src/shmem/init.cpp:96); those are errors here.

    Raises:
        ValueError: anything else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{HEAP_VARIABLE} is {text!r}; write an integer with K, M or G, e.g. 8G")
    return int(found[1]) * _UNITS[found[2][:1].upper()]


def cco_arena_bytes(problem: Problem) -> int:
    """Bytes of the arena that one operator takes from the cco communicator (dispatch_combine.cpp:212)."""
    return 6 * problem.world_size * problem.capacity * problem.hidden * problem.element_bytes + 256 * _MIB


def cco_communicator_bytes(problem: Problem) -> int:
    """Bytes of the process-wide cco communicator, fixed by the first operator (dispatch_combine.py:115)."""
    return 6 * problem.world_size * problem.capacity * problem.hidden * problem.element_bytes + _GIB
