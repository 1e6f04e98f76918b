"""What MoRI declares about combine codecs and ways of calling: which kernel type takes which, and what it ignores.

Scope: plain data without torch, restated from MoRI 624002c8 (python/mori/ops/dispatch_combine.py unless another file is
named) and from running its device code under emulation. Refused is what the library raises for, what faults or corrupts
memory, and what it ignores although the call would mean something else: a quantised combine that silently does not
quantise is not refused, but declared to be none. What a declaration does not prove: that the hardware keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerated import wires
from accelerated.contract import CombineKernels
from accelerated.mori_ep.kernel_types import INTRA_NODE_TYPES, NODE_LEVEL_TYPES
from reference.catalogue import Architecture
from reference.combine_numerics import CombineCodec, combine_codec
from reference.problem import Problem, block_width

#: Kernel types that take each blockwise codec (combine).
BLOCKWISE_TYPES = {
    "fp8_blockwise": (*INTRA_NODE_TYPES, "AsyncLL"),
    "fp4_blockwise": INTRA_NODE_TYPES,
}
#: Kernel types that cache and replay a routing (_supports_routing_handle).
HANDLE_TYPES = ("IntraNode", "InterNodeV1")
#: Kernel types whose dispatch reads the weights, given or not (internode_v1.cpp:84, low_latency_async.cpp:221).
WEIGHTED_TYPES = (*NODE_LEVEL_TYPES, "AsyncLL")
#: The only block width of AsyncLL's fast dequantisation, and the numbers of slots it has kernels for
#: (low_latency_async.cpp:620).
_ASYNC_FAST_WIDTH, _ASYNC_FAST_SLOTS = 128, (8, 9)
#: What the fast kernels of the intra-node types are for (combine): numbers of slots, block widths, a divisor of the
#: row, and more ranks than this, without weights.
_FAST_SLOTS, _FAST_WIDTHS, _FAST_ROW, _FEW_RANKS = (8, 9), (128, 256), 512, 4
#: AsyncLL adds up eight elements at once (low_latency_async.cpp:620).
_VECTOR = 8


def codec(problem: Problem, kernel_type: str, arch: Architecture) -> CombineCodec | None:
    """What a problem that is not refused asks combine to do to its rows; :func:`ignored` says where it does not."""
    return combine_codec(
        problem.codec,
        fp8=arch.fp8.dtype,
        scale_dim=problem.scale_dim,
        rounds_partials=kernel_type in NODE_LEVEL_TYPES,
    )


def ignored(problem: Problem, kernel_type: str) -> str:
    """Why a direct cast that is asked for does not happen, without a word; "" where it does."""
    if problem.codec != "fp8_direct_cast":
        return ""
    if kernel_type == "InterNode":
        return "the legacy InterNode ignores quant_type and combines in the element type"
    if kernel_type in INTRA_NODE_TYPES and "zero-copy" in problem.modes:
        return f"{kernel_type} ignores quant_type where combine reads the registered buffer (combine)"
    return ""


def fast_rows(problem: Problem, kernel_type: str) -> tuple[int, ...]:
    """Row lengths up to H at which a blockwise combine adds up in vectors rather than element by element."""
    if kernel_type not in BLOCKWISE_TYPES.get(problem.codec, ()):
        return ()
    hidden, blocks = problem.hidden, problem.scale_dim
    if kernel_type == "AsyncLL":
        # The one kernel type that rounds the width down, and that looks neither at the weights nor at W.
        fits = problem.top_k in _ASYNC_FAST_SLOTS
        return tuple(h for h in range(_VECTOR, hidden + 1, _VECTOR) if fits and h // blocks == _ASYNC_FAST_WIDTH)
    if problem.top_k not in _FAST_SLOTS or problem.world_size <= _FEW_RANKS or "weightless" not in problem.modes:
        return ()
    return tuple(h for h in range(_FAST_ROW, hidden + 1, _FAST_ROW) if block_width(h, blocks) in _FAST_WIDTHS)


def kernels(problem: Problem, kernel_type: str) -> CombineKernels | None:
    """Kernels among which combine chooses by the length of its rows, where the library says which it took (combine)."""
    if kernel_type not in INTRA_NODE_TYPES or problem.codec not in BLOCKWISE_TYPES:
        return None
    generic = f"EpCombineIntraNodeKernel_bf16_nop2p_{problem.codec}"
    nine = "_top9" if problem.top_k == 9 else ""
    return CombineKernels(
        generic,
        tuple(
            (row, f"{generic}_noweight_block{block_width(row, problem.scale_dim)}_vec8{nine}")
            for row in fast_rows(problem, kernel_type)
        ),
    )


def receive_cap(problem: Problem) -> int:
    """``max_total_recv_tokens``: 0 for none, the least that means room for half of the tokens, or twice W·M.

    The library divides the cap by W, rounds up and clamps it to M (dispatch_combine.hpp:160): W (c - 1) + 1 gives
    R = W·c rows, which W ranks with at most c = ceil(M / 2) tokens each cannot exceed. More than W·M is W·M.
    """
    if "capped above" in problem.modes:
        return 2 * problem.world_size * problem.capacity
    if "capped" in problem.modes:
        return problem.world_size * (problem.most_tokens - 1) + 1
    return 0


def refusals(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    """Reasons why a codec or a way of calling does not run on a kernel type."""
    if problem.codec:
        yield from _codec_refusals(problem, kernel_type, arch)
    modes = problem.modes
    if "zero-copy" in modes and kernel_type not in INTRA_NODE_TYPES:
        yield (
            f"zero-copy: {kernel_type} ignores use_external_inp_buf and reads the caller's tensor; use IntraNode or "
            "IntraNodeLL"
        )
    if "weightless" in modes and kernel_type in WEIGHTED_TYPES:
        yield (
            f"weightless: {kernel_type} reads the dispatched weights unconditionally and faults without them "
            "(internode_v1.cpp:84, low_latency_async.cpp:221); give weights"
        )
    if "handle" in modes and kernel_type not in HANDLE_TYPES:
        yield (
            f"handle: routing handles raise NotImplementedError on {kernel_type}; only IntraNode and InterNodeV1 cache "
            "and replay a routing"
        )
    if "handle" in modes and kernel_type == "IntraNode":
        yield (
            "handle: a replay on IntraNode moves nothing, because every phase of its dispatch is left out "
            "(intranode.hpp:121,159); use InterNodeV1"
        )
    if "capped" in modes and "capped above" in modes:
        yield "capped: an operator has one max_total_recv_tokens; choose capped or capped above"
    if "capped" in modes and kernel_type in INTRA_NODE_TYPES and "zero-copy" not in modes:
        yield (
            f"capped: {kernel_type} stages the rows of combine at (rank, token) of all W·M, in memory for the R of the "
            "cap, and writes past its end (dispatch_combine.cpp:302); use zero-copy, which stages none"
        )


def _codec_refusals(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    name = problem.codec
    if name == "fp4_blockwise" and arch.name != "gfx950":
        yield f"fp4_blockwise: the operator raises ValueError on {arch.name}; it needs gfx950's FP4 conversions"
    if name not in BLOCKWISE_TYPES:
        return
    takes = BLOCKWISE_TYPES[name]
    if kernel_type not in takes:
        yield f"{name}: combine raises ValueError on {kernel_type}; it runs on {', '.join(takes)}"
        return
    if "zero-copy" in problem.modes:
        yield f"{name}: combine raises ValueError where it would read the registered buffer; give the rows themselves"
    if kernel_type != "IntraNode":
        yield from _staging_refusals(problem, kernel_type)
    if kernel_type == "AsyncLL":
        yield from _async_refusals(problem)


def _staging_refusals(problem: Problem, kernel_type: str) -> Iterator[str]:
    """A staged row is sized for dispatch; only IntraNode counts the scales of combine (dispatch_combine.cpp:302)."""
    hidden, scales = problem.hidden, 4 * problem.scale_dim
    groups, size = wires.scale_shape(problem)
    room = hidden * problem.element_bytes + 8 * problem.top_k + 4 + groups * size
    weights = 4 * problem.top_k if kernel_type == "IntraNodeLL" and "weightless" not in problem.modes else 0
    slot = (block_width(hidden, 2) if problem.codec == "fp4_blockwise" else hidden) + scales + weights
    if slot > room:
        yield (
            f"{problem.codec}: a staged row on {kernel_type} takes {slot} bytes and has {room}, because the scales of "
            "combine are counted for IntraNode only (dispatch_combine.cpp:302); use fewer blocks or a larger hidden"
        )


def _async_refusals(problem: Problem) -> Iterator[str]:
    hidden, blocks = problem.hidden, problem.scale_dim
    fast = hidden // blocks == _ASYNC_FAST_WIDTH and problem.top_k in _ASYNC_FAST_SLOTS
    if fast and hidden % blocks:
        yield (
            f"fp8_blockwise: hidden {hidden} in {blocks} blocks; AsyncLL quantises blocks of "
            f"{block_width(hidden, blocks)} elements and takes {_ASYNC_FAST_WIDTH} to be their width when it adds up "
            "(low_latency_async.cpp:617 rounds down); choose a scale dimension that divides hidden"
        )


def unclaimed(problem: Problem, kernel_type: str, arch: Architecture) -> Iterator[str]:
    """Codecs and ways of calling that run, which neither upstream nor vLLM 0.33.0 exercises."""
    if reason := ignored(problem, kernel_type):
        yield f"fp8_direct_cast: {reason}; nobody asks for it there"
    if "weightless" in problem.modes and kernel_type == "InterNode":
        yield "weightless: upstream never leaves out the weights on the legacy InterNode"
    if "handle" in problem.modes and problem.wire:
        yield "handle: upstream replays rows in the element type only"
    if "capped" in problem.modes:
        yield "capped: upstream tests caps from W·M on, which change nothing"
