"""MoRI's operator behind the backend interface: initialisation order, argument rules, and the round's life cycle.

Scope: dispatch of rows in the element type or in a wire format, combine with and without a codec, eager or captured,
and the ways of calling of :data:`reference.problem.MODES`. The adapter does not know whether it drives the library or
its double. What a pass through it does not prove: that user code follows the same rules; every
rule kept here (MoRI 624002c8, python/mori/ops/dispatch_combine.py) is one that the library itself does not check.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from accelerated import wires
from accelerated.graphs import RecordedGraphs
from accelerated.interface import Combined, RankContext, Received
from accelerated.mori_ep import launch
from accelerated.mori_ep.kernel_types import INTRA_NODE_TYPES
from accelerated.mori_ep.library import MoriLibrary
from reference.problem import Problem

#: Name under which the default process group is registered; MoRI resolves it when shmem initialises.
GROUP_NAME = "default"
#: Environment variable that forces the symmetric backend; without it gfx125x takes cco and the rest shmem.
COMMUNICATOR_VARIABLE = "MORI_EP_COMM"


class MoriSession:
    """MoRI initialised in one rank process, once in its life.

    Order (python/mori/shmem/api.py, tests/python/utils.py): heap size, device, process group (initialised by the rank
    process), its registration, shmem. On gfx125x MoRI runs over cco, where shmem must neither be initialised (it can
    hang) nor finalised; that is decided before any call into shmem.

    Raises:
        RuntimeError: the device is not of the architecture whose contract was declared, or shmem does not initialise.
        ValueError: the user's heap size is no size.
    """

    def __init__(self, library: MoriLibrary, context: RankContext) -> None:
        self._library = library
        self._context = context
        #: What captures the double's calls; the library's are captured as any on a device.
        self.graphs = None if library.recorder is None else RecordedGraphs(library.recorder)
        self._arch = arch = context.arch.partition(":")[0]
        seen = str(library.detect_gpu_arch())
        if seen != arch:
            raise RuntimeError(
                f"MoRI sees {seen} but the suite was told {arch}; give the architecture of the device, "
                "or unset MORI_GPU_ARCHS"
            )
        forced = os.environ.get(COMMUNICATOR_VARIABLE, "").strip().lower()
        self._uses_shmem = (forced or ("cco" if arch.startswith("gfx125") else "shmem")) != "cco"
        self._available: int | None = None
        self._live: list[tuple[MoriOperation, int]] = []
        self._closed = False
        if self._uses_shmem:
            self._available = _set_heap(context.world_size)
        if context.device.type == "cuda":
            torch.cuda.set_device(context.device)
        if self._uses_shmem:
            _register_group(context.group)
            status = library.shmem.shmem_torch_process_group_init(GROUP_NAME)
            if status:
                raise RuntimeError(f"shmem_torch_process_group_init returned {status}; see MoRI's log on stderr")

    def build(self, problem: Problem, kernel_type: str) -> MoriOperation:
        """Construct an operator. Collective: MoRI meets twice on the default group.

        Args:
            problem: sizes; its ``world_size`` must be that of the process group.
            kernel_type: one of the six, or a vLLM backend name.

        Raises:
            RuntimeError: the session is closed, the symmetric memory left does not hold the operator (the library would
                end the process), or the kernel type needs shmem and the session runs over cco.
            ValueError: the problem is for another number of ranks.
        """
        if self._closed:
            raise RuntimeError("the session is closed; MoRI cannot be initialised twice in one process")
        if problem.world_size != self._context.world_size:
            raise ValueError(f"the problem is for {problem.world_size} ranks, the group has {self._context.world_size}")
        arguments = launch.config_arguments(problem, kernel_type, self._arch, self._context.rank)
        name = str(arguments["kernel_type"])
        if not self._uses_shmem and name not in INTRA_NODE_TYPES:
            raise RuntimeError(f"{name} puts through shmem, which cco leaves uninitialised; use IntraNode")
        size = self._reserve(problem, name)
        ops = self._library.ops
        wire_dtype: torch.dtype = getattr(torch, str(arguments["data_type"]))
        arguments["data_type"] = wire_dtype
        arguments["kernel_type"] = getattr(ops.EpDispatchCombineKernelType, name)
        with launch.scale_dim(problem):
            made = ops.EpDispatchCombineOp(ops.EpDispatchCombineConfig(**arguments))
        operation = MoriOperation(self, made, problem, name, wire_dtype if problem.wire else None)
        self._live.append((operation, size))
        return operation

    def close(self) -> None:
        """Finalise shmem. Operators come first: one that outlives shmem leaks silently (dispatch_combine.cpp:177).

        Raises:
            RuntimeError: an operation is still open.
        """
        if self._live:
            raise RuntimeError(f"{len(self._live)} operation(s) still open; close them before the session")
        if self._closed:
            return
        self._closed = True
        if self._uses_shmem:
            self._library.shmem.shmem_finalize()
            _unregister_group()

    def forget(self, operation: MoriOperation) -> None:
        """Give back the memory of a closed operation."""
        self._live = [entry for entry in self._live if entry[0] is not operation]

    def _reserve(self, problem: Problem, kernel_type: str) -> int:
        if self._uses_shmem:
            size = launch.heap_bytes(problem, kernel_type)
            remedy = f"set {launch.HEAP_VARIABLE} higher"
        else:
            size = launch.cco_arena_bytes(problem)
            remedy = "build the largest operator first"
            # The first operator sizes the communicator that all later ones share.
            self._available = self._available or launch.cco_communicator_bytes(problem)
        used = sum(bytes_ for _, bytes_ in self._live)
        assert self._available is not None
        if used + size > self._available:
            raise RuntimeError(
                f"{kernel_type} needs {size} bytes of symmetric memory next to {used} in use, of {self._available}; "
                f"{remedy}, or close operations"
            )
        return size


class _Round:
    """One dispatch and its combine. Holds every tensor that a kernel in flight may still read."""

    __slots__ = ("buffer", "ids", "operation", "routing", "rows", "scales", "tokens", "weights", "weights_received")

    def __init__(
        self,
        operation: MoriOperation,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
        self.operation = operation
        self.rows = rows
        self.scales = scales
        self.ids = ids
        self.weights = weights
        self.weights_received: torch.Tensor | None = None
        self.routing: Any = None
        self.buffer: torch.Tensor | None = None
        self.tokens = rows.shape[0]

    def source_map(self) -> torch.Tensor:
        """``[count, 2]`` int64 (source rank, token); synchronises the host.

        Legacy InterNode builds it with collectives on the default group: there every rank has to call it.

        Raises:
            RuntimeError: finalize was called already; the library would return an empty or a newer map.
        """
        return self.operation.source_map(self)

    def replay(self, rows: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None) -> Received:
        """See :attr:`accelerated.interface.Received.replay`."""
        return self.operation.replay(self, rows, weights, scales)


class MoriOperation:
    """One ``EpDispatchCombineOp``. Rounds strictly alternate: prepare, finalize, prepare, ..."""

    def __init__(
        self, session: MoriSession, op: Any, problem: Problem, kernel_type: str, wire_dtype: torch.dtype | None = None
    ) -> None:
        self._session = session
        self._op = op
        self._problem, self._wire_dtype = problem, wire_dtype
        self._capacity = problem.most_tokens
        self._hidden, self._element_bytes = problem.hidden, problem.element_bytes
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._top_k = problem.top_k
        # AsyncLL's calls only queue the send; everything they return is valid after the matching receive.
        self._split = kernel_type == "AsyncLL"
        # The library's own name of what combine launched; it knows one for blockwise codecs within a node only.
        self._names_kernel = problem.codec.endswith("blockwise") and kernel_type in INTRA_NODE_TYPES
        # The legacy kernel encodes (rank, token) with another stride (dispatch_combine.py, get_dispatch_src_token_pos),
        # and with a cap the library takes it for another than it is.
        self._mapped = not (kernel_type == "InterNode" and "capped" in problem.modes)
        self._stride = problem.capacity if kernel_type == "InterNode" else problem.world_size * problem.capacity
        self._modes = problem.modes
        self._round: _Round | None = None

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        """Dispatch ``rows [n, h]``, ``ids [n, k]`` int32 and ``weights [n, k]`` float32; never syncs the host.

        h may be less than the H that the operator was built for. With a wire format rows are its codes, in the FP8 type
        of the architecture, as packed FP4 or as ``torch.uint8``, and ``scales [n, G]`` go with them, as many for short
        rows as for whole ones; both come back in the types given.

        Returns:
            Views ``[R, ...]`` of the operator's buffers, R the problem's ``most_rows``, overwritten by the next round,
            and a private copy of the row count beside the library's counter, which combine clears (AsyncLL excepted).

        Raises:
            RuntimeError: the round before is not finalised (MoRI would add up its counters), or it is closed.
            ValueError: more tokens, or wider rows or elements, than configured (MoRI would write past its buffers),
                shapes that do not match, or rows or scales that are not of the wire.
        """
        if self._op is None:
            raise RuntimeError("prepare called on a closed operation")
        tokens = rows.shape[0]
        slots = (tokens, self._top_k)
        if tokens > self._capacity or ids.shape != slots or weights.shape != slots:
            raise ValueError(
                f"rows {tuple(rows.shape)}, ids {tuple(ids.shape)} and weights {tuple(weights.shape)} do not fit "
                f"capacity {self._capacity} and top_k {self._top_k}"
            )
        return self._dispatch(rows, ids.to(torch.int32).contiguous(), weights, scales, None)

    def _dispatch(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        routing: Any,
    ) -> Received:
        """A dispatch, along ``routing`` if one is given, else a new one."""
        op = self._op
        if self._round is not None:
            raise RuntimeError("prepare called twice: finalize the round before; MoRI's dispatch and combine alternate")
        self._check_width(rows)
        wires.check(self._problem, rows, scales, narrow=True)
        given = rows.dtype
        # MoRI takes raw pointers: it would misread int64 ids, other float types and strided rows without a word.
        rows = rows.contiguous() if self._wire_dtype is None else self._codes(rows, self._wire_dtype)
        scales = None if scales is None else scales.contiguous()
        weightless = weights is None or "weightless" in self._modes
        weights = None if weightless or weights is None else weights.to(torch.float32).contiguous()
        counted = "expert count" in self._modes
        asked: dict[str, Any] = {"call_local_expert_count": True} if counted and not self._split else {}
        if routing is not None:
            asked["routing"] = routing
        elif "handle" in self._modes:
            asked["return_routing"] = True
        received, weights_received, scales_received, ids_received, total, *cached = op.dispatch(
            rows, weights, scales, ids, **asked
        )
        current = self._round = _Round(self, rows, ids, weights, scales)
        current.weights_received = None if weightless else weights_received
        current.routing = routing if routing is not None else cached[0] if cached else None
        if self._split:
            op.dispatch_recv(**({"call_local_expert_count": True} if counted else {}))
        if "zero-copy" in self._modes:
            current.buffer = op.get_registered_combine_input_buffer(self._dtype, wires.elements(self._problem, rows))
        return Received(
            rows=received if self._wire_dtype is None else received.view(given),
            ids=ids_received,
            weights=weights_received,
            count=total.clone(),
            counter=total,
            source_map=current.source_map if self._mapped else None,
            state=current,
            scales=scales_received,
            expert_count=op.local_expert_count if counted else None,
            buffer=current.buffer,
            replay=current.replay if "handle" in self._modes else None,
        )

    def replay(
        self, before: _Round, rows: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None
    ) -> Received:
        """See :attr:`accelerated.interface.Received.replay`.

        Raises:
            RuntimeError: the round is not finalised, or the operation is closed.
            ValueError: another number of tokens than was dispatched, or weights that do not match its ids.
        """
        if self._op is None:
            raise RuntimeError("replay called on a closed operation")
        if rows.shape[0] != before.tokens:
            raise ValueError(f"{rows.shape[0]} rows to replay a routing of {before.tokens} tokens")
        if "weightless" not in self._modes and (weights is None or weights.shape != before.ids.shape):
            raise ValueError(f"replay takes weights {list(before.ids.shape)}; InterNodeV1 faults without them")
        return self._dispatch(rows, before.ids, weights, scales, before.routing)

    @staticmethod
    def _codes(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of one byte per element, contiguous, in the type whose kernels are launched.

        Raises:
            ValueError: the codes are of another format.
        """
        if rows.dtype not in (torch.uint8, dtype):
            raise ValueError(f"rows are {rows.dtype}; MoRI has kernels for {dtype} here, the codes would be misread")
        return rows.view(torch.uint8).contiguous().view(dtype)

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        """Return ``expert_rows [>= count, H]`` to their sources and sum them; never syncs the host.

        Returns:
            Views of the operator's buffers, overwritten by the next finalize: output ``[n, H]``, and the summed weight
            rows ``[n, k]`` float32, or None if none were dispatched and on AsyncLL, which never writes them.

        Raises:
            RuntimeError: no prepare came before, or ``received`` is of another round.
            ValueError: wider rows or elements than configured, or rows outside of the buffer of a zero-copy round.
        """
        current = self._round
        if current is None:
            raise RuntimeError("finalize called without prepare; MoRI's dispatch and combine alternate")
        if received.state is not current:
            raise RuntimeError("finalize called with the rows of another round")
        if current.buffer is not None and _layout(expert_rows) != _layout(current.buffer):
            # MoRI takes the shape and the type of what it is given, and the rows from its own buffer.
            raise ValueError(
                "expert rows outside of the registered buffer, or of another length or type than its rows; MoRI reads "
                "the buffer whatever it is given"
            )
        self._check_width(expert_rows)
        op = self._op
        expert_rows = expert_rows.contiguous()
        # Weights at full capacity: a rank without rows that passed an empty slice would count as passing none, and then
        # read its peers' slots with another stride. Ids as dispatched by this rank, not as received.
        asked = {} if current.routing is None else {"routing": current.routing}
        given = None if self._split else current.weights_received
        output, weights = op.combine(expert_rows, given, current.ids, **asked)
        if self._split:
            op.combine_recv()
        self._round = None
        tokens = current.tokens
        kernel = str(getattr(op, "_last_combine_kernel_name", "")) if self._names_kernel else ""
        return Combined(output[:tokens], None if self._split or weights is None else weights[:tokens], kernel)

    def _check_width(self, rows: torch.Tensor) -> None:
        if rows.shape[1] > self._hidden or rows.element_size() > self._element_bytes:
            raise ValueError(
                f"rows {tuple(rows.shape)} in {rows.dtype} do not fit hidden {self._hidden} with elements of "
                f"{self._element_bytes} bytes"
            )

    def source_map(self, current: _Round) -> torch.Tensor:
        """See :meth:`_Round.source_map`."""
        if self._round is not current:
            raise RuntimeError("source map asked for after finalize; MoRI keeps it between dispatch and combine only")
        if current.routing is None:
            position = self._op.get_dispatch_src_token_pos().to(torch.int64)
        else:
            # The library's own counter is left alone by a dispatch with a handle, which holds the map itself.
            total = int(current.routing.total_recv_token_num)
            position = current.routing.disp_tok_id_to_src_tok_id_local[:total].to(torch.int64)
        return torch.stack((position // self._stride, position % self._stride), dim=1)

    def close(self) -> None:
        """Delete the library's operator, which frees its symmetric buffers; on every rank in the same order.

        MoRI does not wait for its peers here: every rank must have finished its last round.
        """
        if self._op is None:
            return
        self._round = None
        self._op = None
        self._session.forget(self)


def _layout(rows: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Address, row length and type: all that the library would take from a tensor."""
    return rows.data_ptr(), rows.shape[1], rows.dtype


def _set_heap(world_size: int) -> int:
    """Set the heap size in the environment, where shmem reads it; bytes that the operators share."""
    value = launch.heap_setting(launch.session_heap_bytes(world_size), os.environ.get(launch.HEAP_VARIABLE))
    os.environ[launch.HEAP_VARIABLE] = value
    return launch.parse_size(value)


def _register_group(group: dist.ProcessGroup) -> None:
    registry: Any = torch._C._distributed_c10d
    registry._register_process_group(GROUP_NAME, group)


def _unregister_group() -> None:
    # The registry would keep the group alive past destroy_process_group.
    registry: Any = torch._C._distributed_c10d
    registry._unregister_process_group(GROUP_NAME)
