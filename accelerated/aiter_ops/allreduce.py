"""AITER's AllReduce + residual add + RMSNorm behind the operator interface: set-up, argument rules, and results.

Scope: eager calls of the public functions of aiter/dist/communication_op.py on dense rows. The adapter does not know
whether it drives the library or its double. It refuses what AITER would answer with another path than the declared one.
What a pass through it does not prove: that user code follows the same rules, which the library does not check (a weight
of another type is misread, communication_op.py:155).

Set-up as AITER's own tests do it (op_tests/multigpu_tests/test_fused_ar_rms.py:58-64): ``set_custom_all_reduce``,
``init_distributed_environment``, ``ensure_model_parallel_initialized``. With a default process group already there, the
second of them only adds groups (parallel_state.py:1730): each gets a gloo group of its own, which the custom all-reduce
needs (custom_all_reduce.py:798), and on each of more than one rank 1 GiB of input pool and 2 GiB of buffers (``tp`` and
``ep``: 6 GiB a device). The handles of those buffers travel through the store of the default group, which must be a
TCPStore (custom_all_reduce.py:519-529): one is put in its place for the set-up where ranks meet through a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from accelerated.aiter_ops.allreduce_contract import GROUP, At, Operator, contract, operator_of
from accelerated.aiter_ops.library import AiterLibrary
from accelerated.interface import RankContext
from accelerated.operators import NormOperation, NormResult, QuantResult, RowProblem
from reference.eligibility_rules import PLAIN

#: Environment variables that move the thresholds or add a lossy path (communicator_cuda.py:22-28,
#: custom_all_reduce.py:113-131, quick_all_reduce.py:190).
FORBIDDEN_VARIABLES = (
    "AITER_AR_1STAGE",
    "AITER_AR_1STAGE_MAX_KB",
    "AITER_AR_QUANT_MAX_BYTES",
    "AITER_AR_QUANT_NO_PREFILL_MAX_BYTES",
    "AITER_CUSTOM_AR_MAX_SIZE",
    "AITER_CUSTOM_AR_MIN_SIZE",
    "AITER_CUSTOM_AR_DISABLE_GFX1250",
)
QUICK_REDUCE_VARIABLE = "AITER_QUICK_REDUCE_QUANTIZATION"


def build(library: AiterLibrary, context: RankContext, problem: RowProblem, operator: str) -> NormOperation:
    """Set AITER's groups up if they are not, and construct an operation. Collective over the default group.

    Raises:
        ContractError: the operator is unknown, or refused at this problem.
        RuntimeError: the environment moves thresholds, or AITER disabled its custom all-reduce.
        ValueError: the problem is for another number of ranks.
    """
    if problem.world_size != context.world_size:
        raise ValueError(f"the problem is for {problem.world_size} ranks, the group has {context.world_size}")
    at = At(problem, operator, context.arch.partition(":")[0])
    contract(problem, operator, at.arch)
    forbidden = [name for name in FORBIDDEN_VARIABLES if os.environ.get(name)]
    if os.environ.get(QUICK_REDUCE_VARIABLE, "NONE").upper() != "NONE":
        forbidden.append(QUICK_REDUCE_VARIABLE)
    if forbidden:
        raise RuntimeError(f"{', '.join(forbidden)} would move AITER's paths away from the declared ones; unset them")
    return AiterAllReduceNorm(library, _communicator(library, context), at)


def release(library: AiterLibrary) -> None:
    """Destroy AITER's groups and buffers, on every rank; the default group stays. Nothing happens without a set-up.

    ``destroy_distributed_environment`` is not called: it would destroy the default group (parallel_state.py:2131).
    """
    state = library.distributed("parallel_state")
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()


class AiterAllReduceNorm:
    """One operator of :data:`accelerated.aiter_ops.allreduce_contract.OPERATORS`.

    Args:
        library: AITER or its double.
        communicator: ``CustomAllreduce`` of the tensor-parallel group.
        at: the operator and its problem.
    """

    def __init__(self, library: AiterLibrary, communicator: Any, at: At) -> None:
        self._library: AiterLibrary | None = library
        self._calls = library.distributed("communication_op")
        self._communicator = communicator
        self._at = at
        self._operator: Operator = operator_of(at.operator)

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        """Sum ``rows [M, N]`` over ranks, add ``residual [M, N]``, normalise. Collective; never syncs the host.

        Without a residual, zeros are given: AITER has no such form, and an uninitialised buffer would be added
        (vllm#41972). The scales come back as the library laid them out, also the fallback's.

        Raises:
            RuntimeError: the operation is closed, AITER would leave the declared path (the reason is named), or what
                the library raises.
            ValueError: arguments that do not fit each other or the problem.
        """
        if self._library is None:
            raise RuntimeError(f"{self._at.operator} was called after close; build a new operation")
        self._check(rows, residual, weight)
        reason = self._unsuitable(rows)
        if reason:
            raise RuntimeError(f"{self._at.operator}: AITER does not take its custom all-reduce here: {reason}")
        given = torch.zeros_like(rows) if residual is None else residual
        if self._operator.kind == "all_reduce":
            return self._split(self._library, rows, given, weight, epsilon)
        if not self._operator.quantiser:
            output, total = self._calls.tensor_model_parallel_fused_allreduce_rmsnorm(
                rows, given, weight, epsilon, gemma_norm=self._operator.gemma
            )
            return NormResult(output=output, residual=None if residual is None else total)
        codes, total, scales, *emitted = self._calls.tensor_model_parallel_fused_allreduce_rmsnorm_quant(
            rows,
            given,
            weight,
            epsilon,
            quant_type=self._operator.quantiser,
            group_size=GROUP,
            emit_bf16=self._operator.emit,
            transpose_scale=self._operator.transposed,
        )
        return NormResult(
            output=emitted[0] if self._operator.emit else None,
            residual=None if residual is None else total,
            quantised=QuantResult(codes.view(torch.uint8), scales),
        )

    def close(self) -> None:
        """Forget the library. Its groups are shared: :func:`release` ends them."""
        self._library = None
        self._communicator = None

    def _split(
        self, library: AiterLibrary, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        """All-reduce, then add and norm, as AITER's own fallback does (communicator_cuda.py:350-365)."""
        reduced = self._calls.tensor_model_parallel_all_reduce(rows)
        output, total = torch.empty_like(reduced), torch.empty_like(reduced)
        library.rmsnorm.rmsnorm2d_fwd_with_add(
            out=output,
            input=reduced,
            residual_in=residual,
            residual_out=total,
            weight=weight,
            epsilon=epsilon,
            gemma_norm=self._operator.gemma,
            use_model_sensitive_rmsnorm=0,
        )
        return NormResult(output=output, residual=total)

    def _check(self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
        problem = self._at.problem
        if rows.dim() != 2 or rows.shape[1] != problem.hidden or not 1 <= rows.shape[0] <= problem.capacity:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}; give [M, {problem.hidden}] with M from 1 to {problem.capacity}"
            )
        if self._operator.residual != (residual is not None):
            raise ValueError(f"{self._at.operator}: give a residual to an operator that adds one, and only there")
        if residual is not None and residual.shape != rows.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; give {tuple(rows.shape)}, as the rows have")
        if weight.shape != (problem.hidden,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; give ({problem.hidden},)")
        wanted = getattr(torch, problem.dtype)
        for name, value in (("rows", rows), ("residual", residual), ("weight", weight)):
            # The kernels take raw pointers: another type would be misread, a strided tensor goes another way.
            if value is not None and (value.dtype != wanted or not value.is_contiguous()):
                raise ValueError(f"{name} are {value.dtype}, strides {value.stride()}; give contiguous {problem.dtype}")

    def _unsuitable(self, rows: torch.Tensor) -> str:
        """Why AITER would not take its custom all-reduce (custom_all_reduce.py:1127-1157); "" if it would."""
        ca = self._communicator
        if ca.disabled:
            return "it is disabled"
        if ca.should_custom_ar(rows):
            return ""
        size = rows.numel() * rows.element_size()
        limits = f"{size} bytes do not lie in its window or are no multiple of 16"
        path = self._at.route(rows.shape[0]).path
        return f"{limits}; the declared path is {'a plain all-reduce' if path in PLAIN else path.name.lower()}"


def _communicator(library: AiterLibrary, context: RankContext) -> Any:
    """AITER's ``CustomAllreduce`` of the tensor-parallel group, set up if it is not."""
    state = library.distributed("parallel_state")
    cuda = context.device.type == "cuda"
    local_rank = context.rank
    if cuda:
        local_rank = torch.cuda.current_device() if context.device.index is None else context.device.index
    if not state.model_parallel_is_initialized():
        # Read when the groups are made (communicator_cuda.py:41), so it comes first.
        state.set_custom_all_reduce(True)
        with _tcp_store(context):
            state.init_distributed_environment(
                world_size=context.world_size,
                rank=context.rank,
                local_rank=local_rank,
                backend="nccl" if cuda else "gloo",
            )
            state.ensure_model_parallel_initialized(context.world_size, 1)
    group = state.get_tp_group()
    if group.world_size != context.world_size:
        raise RuntimeError(f"AITER's tensor-parallel group has {group.world_size} ranks, not {context.world_size}")
    communicator = group.device_communicator
    quick = getattr(communicator, "qr_comm", None)
    if quick is not None and not quick.disabled:
        raise RuntimeError(f"AITER's quick-reduce, a lossy codec, is on; unset {QUICK_REDUCE_VARIABLE}")
    custom = getattr(communicator, "ca_comm", None)
    if custom is None or custom.disabled:
        raise RuntimeError(
            f"AITER has no custom all-reduce for {context.world_size} ranks here: the library does not load, ranks are "
            "on several hosts or their number is unsupported (custom_all_reduce.py:786-823); its warnings on stderr "
            "say which"
        )
    return custom


@contextmanager
def _tcp_store(context: RankContext) -> Iterator[None]:
    """Put a TCPStore in the place of the default group's store, if it is another kind. Collective.

    AITER reads the store when it makes its buffers and keeps it, so the first one can come back afterwards. The port is
    free because the system chooses it; the server lives on rank 0 as long as a group or a buffer holds the store.
    """
    c10d: Any = dist.distributed_c10d
    stores: Any = dist
    places, default = c10d._world.pg_map, c10d._get_default_group()
    backend, first = places[default]
    inner = first
    while isinstance(inner, stores.PrefixStore):
        inner = inner.underlying_store
    if isinstance(inner, stores.TCPStore):
        yield
        return
    port = torch.zeros(1, dtype=torch.int64)
    master = context.rank == 0
    if master:
        store = stores.TCPStore("127.0.0.1", 0, context.world_size, True, wait_for_workers=False)
        port.fill_(store.port)
    dist.broadcast(port, 0, group=context.group)
    if not master:
        store = stores.TCPStore("127.0.0.1", int(port), context.world_size, False, wait_for_workers=False)
    places[default] = backend, stores.PrefixStore("aiter", store)
    try:
        yield
    finally:
        places[default] = backend, first
