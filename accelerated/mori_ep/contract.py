"""What MoRI declares about each kernel type: which problems run, and how the results come out.

Scope: plain data without torch, restated from MoRI 624002c8 (file and line with each rule) and from running its device
code under emulation. What a declaration does not prove: that the hardware keeps it, or that upstream's own tests cover
the cell (they run 8 ranks only).

How cells stand: **claimed** is what upstream tests, documents or ships a kernel instance and a launch value for. That
includes the legacy InterNode, whose combine values upstream never compares: it is compiled, documented as the baseline
multi-node kernel and tested for dispatch (tests/python/ops/test_dispatch_combine_internode.py), so its users rely on
it. It includes float32, which every kernel type is compiled for (dispatch_combine.py, dtype suffixes). **unclaimed** is
what neither upstream nor vLLM 0.33.0 exercises. **refused** is what aborts, faults or is known to lose rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from accelerated import wires
from accelerated.contract import (
    CAPTURES,
    Contract,
    ContractError,
    MaskedSlots,
    ReceiveLayout,
    RowOrder,
    Standing,
    Support,
)
from accelerated.mori_ep import calls
from accelerated.mori_ep.kernel_types import INTRA_NODE_TYPES, NODE_LEVEL_TYPES
from reference.catalogue import (
    KERNEL_TYPES,
    VLLM_BACKENDS,
    Architecture,
    CatalogueError,
    architecture,
    vllm_kernel_type,
)
from reference.problem import Problem, wire_format

#: MoRI asserts that a rank's index on its host is below this (src/application/context/context.cpp).
RANKS_PER_HOST = 8
#: Length of the per-rank arrays of the intra-node kernels (intranode.hpp:40, intranode_ll.hpp:44).
INTRA_NODE_RANKS = 8
#: Ranks the legacy InterNode kernel counts to a node, whatever ``gpu_per_node`` says (internode.hpp:67).
LEGACY_NODE_RANKS = 8
#: Tokens per chunk of the multi-node V1 kernels (internode_v1.cpp:203).
CHUNK_TOKENS = 64
#: Slots the destination scan of IntraNodeLL covers (intranode_ll.hpp:177).
LL_SLOTS = 8

#: Scale rows of upstream's tests are whole words (32, 56, 128 and 224 bytes).
SCALE_WORD = 4

# gfx125x only: intranode_1250x.hpp:325-340 (staging slots over all peers, slots of a token, scale bytes staged per
# slot), intranode_1250x.hpp:485 and 575 (scales move in vectors; the rest of a row does not), dispatch_combine.py:318
# (LDS budget) and dispatch_combine.py:703,751 (warps of a block; more where combine pushes uncoded rows from a caller's
# tensor); 128 is the alignment of the tiles.
_TDM_POOL_SLOTS = 8 * 32768
_TDM_TOP_K = 16
_TDM_SCALE_BYTES = 128
_TDM_SCALE_VECTOR = 16
_TDM_LDS_BYTES = 327680
_TDM_WARPS, _TDM_PUSH_WARPS = 8, 16
_TDM_ALIGNMENT = 128


@lru_cache(maxsize=4096)
def support(
    problem: Problem, kernel_type: str, arch: str, *, ranks_per_host_limit: int | None = RANKS_PER_HOST, hosts: int = 1
) -> Support:
    """Standing of ``problem`` on one kernel type.

    Args:
        problem: sizes.
        kernel_type: one of the six, or a vLLM backend name (``mori_high_throughput``, ``mori_low_latency``).
        arch: gfx architecture of the catalogue.
        ranks_per_host_limit: most ranks that may run on one host; None for a stand-in.
        hosts: machines that the ranks are spread over, as evenly as a launched world's.

    Returns:
        REFUSED with the first rule that the problem breaks, UNCLAIMED with what nobody exercises, or CLAIMED.
    """
    try:
        target = architecture(arch)
        kernel_type = resolve(kernel_type, problem, target)
    except CatalogueError as error:
        return Support(Standing.REFUSED, str(error))
    reason = next(_refusals(problem, kernel_type, target, ranks_per_host_limit, hosts), None)
    if reason is not None:
        return Support(Standing.REFUSED, reason)
    reason = next(_unclaimed(problem, kernel_type, target), None)
    if reason is not None:
        return Support(Standing.UNCLAIMED, reason)
    return Support(Standing.CLAIMED)


@lru_cache(maxsize=4096)
def contract(problem: Problem, kernel_type: str, arch: str) -> Contract:
    """Declared behaviour of one kernel type for a problem that :func:`support` does not refuse.

    Source of semantics (MoRI 624002c8): row order low_latency_async.cpp:324; fold intranode.hpp:133 and
    intranode_ll.hpp:178; node levels internode_v1.cpp:802 and 1365; combined weights dispatch_combine.py, combine_send.

    Raises:
        ContractError: unknown kernel type or architecture.
    """
    try:
        target = architecture(arch)
        kernel_type = resolve(kernel_type, problem, target)
    except CatalogueError as error:
        raise ContractError(str(error)) from error
    return Contract(
        receive_layout=ReceiveLayout.DENSE_ROWS,
        row_order=RowOrder.GROUPED_BY_SOURCE_RANK if kernel_type == "AsyncLL" else RowOrder.ANY,
        masked_slots=_masked_slots(problem, kernel_type),
        fold="last" if kernel_type == "IntraNodeLL" else "first",
        node_levels=kernel_type in NODE_LEVEL_TYPES and problem.nodes > 1,
        combines_weights=kernel_type != "AsyncLL" and "weightless" not in problem.modes,
        codec=None if calls.ignored(problem, kernel_type) else calls.codec(problem, kernel_type, target),
        ignored_codec=calls.codec(problem, kernel_type, target) if calls.ignored(problem, kernel_type) else None,
        # With a cap, the library decodes the legacy map with another stride than its kernel has written it with
        # (dispatch_combine.py, get_dispatch_src_token_pos).
        source_map=not (kernel_type == "InterNode" and "capped" in problem.modes),
        narrow_rows=True,
        # A rank without tokens has a routing handle that nothing can be replayed from (dispatch_combine.py, routing).
        idle_ranks="handle" not in problem.modes,
        kernels=calls.kernels(problem, kernel_type),
        # A handle is made of tensors of its own, which a caller may stash (dispatch_combine.py, _alloc_routing_handle).
        handles_kept=True,
        captures=frozenset(CAPTURES),
    )


def resolve(kernel_type: str, problem: Problem, arch: Architecture) -> str:
    """Kernel type behind a name: itself, or vLLM's choice for one of its MoRI backends on this topology.

    Raises:
        CatalogueError: no such name, or vLLM has no branch for the architecture.
    """
    if kernel_type in KERNEL_TYPES:
        return kernel_type
    if kernel_type in VLLM_BACKENDS:
        return vllm_kernel_type(kernel_type, problem.nodes, arch)[0]
    choices = ", ".join((*KERNEL_TYPES, *VLLM_BACKENDS))
    raise CatalogueError(f"unknown MoRI kernel type {kernel_type!r}; choose one of {choices}")


def _masked_slots(problem: Problem, kernel_type: str) -> MaskedSlots:
    single_expert = problem.experts_per_rank == 1
    if kernel_type == "InterNode":
        # -1 // EPR truncates to 0 unless EPR is 1, when the range check catches it (internode.hpp:95,111).
        return MaskedSlots.DROPPED if single_expert else MaskedSlots.RANK_ZERO
    if kernel_type == "AsyncLL":
        # With EPR 1 the receiver aborts if another slot of the token is valid (low_latency_async.cpp:379).
        return MaskedSlots.UNMODELLED if single_expert else MaskedSlots.RANK_ZERO
    if kernel_type == "InterNodeV1LL" and problem.nodes > 1:
        # The cross-node path adds a row on rank 0 that only sometimes contributes; EPR 1 aborts (internode_v1.cpp:536).
        return MaskedSlots.UNMODELLED
    return MaskedSlots.DROPPED


def _refusals(
    problem: Problem, kernel_type: str, arch: Architecture, ranks_per_host_limit: int | None, hosts: int
) -> Iterator[str]:
    """Reasons why the library cannot run the problem, most general first."""
    ranks, per_node = problem.world_size, problem.ranks_per_node
    if kernel_type not in arch.kernel_types:
        yield (
            f"{kernel_type} is not available on {arch.name}: MoRI's {arch.symmetric_backend} backend carries "
            f"{', '.join(arch.kernel_types)} only, the others put through shmem device state that it never "
            "initialises (dispatch_combine.py, _maybe_get_cco_comm)"
        )
    if ranks_per_host_limit is not None and ranks > ranks_per_host_limit * hosts:
        spread = f" on {hosts} hosts" if hosts > 1 else ""
        yield f"world_size is {ranks}{spread}; MoRI runs at most {ranks_per_host_limit} ranks on a host (context.cpp)"
    if per_node & (per_node - 1):
        yield (
            f"{per_node} ranks per node; MoRI aborts unless gpu_per_node is a power of two "
            "(dispatch_combine.cpp:117); choose another world_size or nodes"
        )
    if problem.top_k >= arch.wave_size:
        yield f"top_k is {problem.top_k}; {arch.name} asserts that it is below its wave size {arch.wave_size}"
    if kernel_type in INTRA_NODE_TYPES:
        yield from _intra_node_refusals(problem, kernel_type)
    elif kernel_type in NODE_LEVEL_TYPES and problem.nodes > 1:
        yield from _node_level_refusals(problem, kernel_type, arch)
    elif kernel_type == "InterNode" and problem.nodes > 1 and per_node != LEGACY_NODE_RANKS:
        yield (
            f"{per_node} ranks per node; the legacy InterNode kernel counts {LEGACY_NODE_RANKS} ranks to a node "
            "whatever gpu_per_node says (internode.hpp:67); use InterNodeV1 to emulate nodes on one host"
        )
    elif kernel_type == "AsyncLL" and ranks > arch.wave_size:
        yield f"world_size is {ranks}; AsyncLL gives each rank a lane and {arch.name} has {arch.wave_size}"
    if kernel_type == "IntraNode" and arch.symmetric_backend == "cco":
        yield from _tdm_refusals(problem)
    yield from calls.refusals(problem, kernel_type, arch)


def _intra_node_refusals(problem: Problem, kernel_type: str) -> Iterator[str]:
    if problem.nodes > 1:
        yield f"nodes is {problem.nodes}; {kernel_type} runs on one node; use InterNodeV1, InterNodeV1LL or AsyncLL"
    if problem.world_size > INTRA_NODE_RANKS:
        yield (
            f"world_size is {problem.world_size}; {kernel_type} holds per-rank state for {INTRA_NODE_RANKS} ranks "
            "(intranode.hpp:40, intranode_ll.hpp:44); use an InterNode type"
        )
    if kernel_type == "IntraNodeLL" and problem.top_k > LL_SLOTS:
        yield (
            f"top_k is {problem.top_k}; IntraNodeLL looks for destinations in the first {LL_SLOTS} slots only and "
            "loses the rest (intranode_ll.hpp:177); use IntraNode"
        )


def _node_level_refusals(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    if problem.nodes > problem.top_k:
        yield (
            f"nodes is {problem.nodes} and top_k {problem.top_k}; {kernel_type} indexes arrays of top_k by node "
            "(internode_v1.cpp:1352), so nodes must not exceed top_k"
        )
    if problem.capacity > CHUNK_TOKENS and problem.capacity % CHUNK_TOKENS:
        yield (
            f"capacity is {problem.capacity}; with more than one node {kernel_type} overruns a node's rows unless it "
            f"is at most {CHUNK_TOKENS} or a multiple of {CHUNK_TOKENS} (internode_v1.cpp:203)"
        )
    if kernel_type == "InterNodeV1" and arch.wave_size == 32:
        yield (
            "InterNodeV1 loses rows with more than one node on wave 32 (a 64-bit mask shifted by a 32-lane count, "
            "internode_v1.cpp:206); use InterNodeV1LL"
        )


def _tdm_refusals(problem: Problem) -> Iterator[str]:
    """Limits of the gfx125x bodies of IntraNode."""
    if problem.top_k > _TDM_TOP_K:
        yield f"top_k is {problem.top_k}; the gfx125x dispatch stages {_TDM_TOP_K} slots (intranode_1250x.hpp:330)"
    slots, needed = _TDM_POOL_SLOTS // problem.world_size, problem.world_size * problem.capacity
    if needed > slots:
        yield (
            f"capacity is {problem.capacity}; the gfx125x dispatch stages {slots} rows per peer at "
            f"{problem.world_size} ranks and needs {needed} (dispatch_combine.py); lower the capacity"
        )
    groups, size = wires.scale_shape(problem)
    if groups * size % _TDM_SCALE_VECTOR:
        yield (
            f"the scales of a row are {groups * size} bytes; the gfx125x dispatch moves them by {_TDM_SCALE_VECTOR} "
            "and leaves the rest behind (intranode_1250x.hpp:485)"
        )
    if needed * groups * size > slots * _TDM_SCALE_BYTES:
        yield (
            f"capacity is {problem.capacity} with {groups * size} bytes of scales; the gfx125x dispatch stages "
            f"{slots * _TDM_SCALE_BYTES} bytes per peer and needs {needed * groups * size} (intranode_1250x.hpp:340)"
        )
    for phase, lds in _tdm_lds(problem):
        if lds > _TDM_LDS_BYTES:
            yield (
                f"hidden is {problem.hidden} in {problem.dtype}; the gfx125x {phase} needs {lds} bytes of LDS and has "
                f"{_TDM_LDS_BYTES} (dispatch_combine.py:802,841)"
            )


def _tdm_lds(problem: Problem) -> Iterator[tuple[str, int]]:
    """LDS of a block in each phase: a row for each warp, beside the counters of dispatch and the pointers of combine.

    The library checks combine alone, and there only what pushes rows: a combine from the registered buffer falls back
    to a gather without tiles, and a blockwise codec takes the portable body.
    """
    row = problem.hidden * problem.element_bytes
    counters = 4 * (_TDM_WARPS * (problem.world_size + problem.experts_per_rank) + problem.experts_per_rank)
    yield "dispatch", max(counters, _TDM_WARPS * row)
    if "zero-copy" in problem.modes or problem.scale_dim:
        return
    warps = _TDM_WARPS if problem.codec else _TDM_PUSH_WARPS
    pointers = warps * problem.top_k * 2 * 8
    yield "combine", -(-pointers // _TDM_ALIGNMENT) * _TDM_ALIGNMENT + warps * row


def _unclaimed(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    """What neither upstream nor vLLM exercises, although nothing in the code forbids it."""
    if problem.world_size == 1:
        yield "upstream tests 8 ranks and vLLM 2 and more; nobody runs expert parallelism on 1 rank"
    if kernel_type in NODE_LEVEL_TYPES and problem.nodes > 1 and problem.ranks_per_node == 1:
        yield f"upstream runs {kernel_type} with 4 and 8 ranks per node; nobody runs it with one"
    yield from _unclaimed_wire(problem, kernel_type, arch)
    yield from calls.unclaimed(problem, kernel_type, arch)
    if kernel_type == "IntraNodeLL" and arch.symmetric_backend == "cco":
        yield f"upstream has neither a test nor a launch value for IntraNodeLL on {arch.name}, only for IntraNode"


def _unclaimed_wire(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    """Quantised dispatches that compile, which nobody runs."""
    if not problem.wire:
        return
    if problem.dtype != "bfloat16":
        yield f"upstream and vLLM combine in bfloat16 what was dispatched quantised; nobody combines in {problem.dtype}"
    if kernel_type == "InterNode":
        yield "upstream compares quantised dispatches of every kernel type but the legacy InterNode"
    if wire_format(problem.wire).payload == "fp4" and arch.fp8.dtype == "float8_e4m3fnuz":
        yield f"upstream runs packed FP4 on gfx950 and later; on {arch.name} its tests skip it"
    groups, size = wires.scale_shape(problem)
    if groups * size % SCALE_WORD:
        yield (
            f"the scales of a row are {groups * size} bytes; upstream sends whole words of {SCALE_WORD} only, and the "
            "fields behind them in a staged row would lie unaligned"
        )
