"""A whole layer in one rank process: quantise, dispatch, experts, combine.

Scope: the order of the calls and what passes between the halves, the row count on the device included; what each half
does is its own. What a pass does not prove: that another order, another stream or overlapped layers work.

Source of semantics: vLLM 0.33.0, modular kernels (``prepare``, ``apply``, ``finalize``); MoRI's received buffer is
given to the experts whole, with the count on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, overload

import torch

from accelerated.contract import ReceiveLayout
from accelerated.experts import ExpertOperation, LayerContract, LayerProblem
from accelerated.interface import Operation, RankContext, Received, Session
from accelerated.layer import split_path
from accelerated.layer_load import LoadCounter
from accelerated.operators import RowProblem
from accelerated.routers import RouteOperation
from reference.expert_weights import ExpertWeights
from reference.placement import owned_experts

if TYPE_CHECKING:
    from accelerated.layer import LayerBackend


class LayerError(RuntimeError):
    """One half of a layer failed; the message names it, its own exception is the cause."""


@contextmanager
def half(role: str, name: str) -> Iterator[None]:
    """Name the half that an exception comes from.

    Raises:
        LayerError: something was raised; it is the cause.
    """
    try:
        yield
    except Exception as error:
        raise LayerError(f"{role} ({name}): {type(error).__name__}: {error}") from error


class LayerSession:
    """Two libraries initialised in one rank process: the dispatch's first, closed last.

    Raises:
        LayerError: one does not initialise; the other is closed again.
    """

    def __init__(self, backend: LayerBackend, context: RankContext) -> None:
        self._backend, self._context = backend, context
        with half("dispatch", backend.dispatch.name):
            self._dispatch = backend.dispatch.open(context)
        try:
            with half("experts", backend.experts.name):
                self._experts = backend.experts.open(context)
        except LayerError:
            self._dispatch.close()
            raise

    @property
    def context(self) -> RankContext:
        """Of the rank."""
        return self._context

    @property
    def halves(self) -> tuple[Session, Session]:
        """Sessions of dispatch and experts, for a layer that shares one: see :mod:`accelerated.layer_beside`."""
        return self._dispatch, self._experts

    @overload
    def build(self, problem: LayerProblem, path: str) -> ComposedLayer: ...

    @overload
    def build(self, problem: RowProblem, path: str) -> RouteOperation: ...

    def build(self, problem: LayerProblem | RowProblem, path: str) -> ComposedLayer | RouteOperation:
        """Construct both operators, the dispatch's first. Collective. Of a router's problem: the experts' router.

        Raises:
            ContractError: no such path.
            LayerError: a half refuses; it is named.
        """
        if isinstance(problem, RowProblem):
            return self._router(problem, path)
        backend, parts = self._backend, split_path(path)
        declared = backend.contract(problem, path)
        carrying = backend.exchange_problem(problem, path)
        with half("dispatch", backend.dispatch.name):
            dispatch = self._dispatch.build(carrying, parts.kernel_type)
        try:
            with half("experts", backend.experts.name):
                experts = self._experts.build(problem.experts, parts.operator)
        except LayerError:
            dispatch.close()
            raise
        names = (backend.dispatch.name, backend.experts.name)
        return ComposedLayer(self._context, problem, declared, dispatch, experts, names)

    def _router(self, problem: RowProblem, operator: str) -> RouteOperation:
        """A router of the experts' half.

        Raises:
            ContractError: it offers no such router.
            LayerError: it refuses.
        """
        self._backend.route_contract(problem, operator)
        with half("experts", self._backend.experts.name):
            router: RouteOperation = self._experts.build(problem, operator)
        return router

    def close(self) -> None:
        """Finalise the experts' library, then the dispatch's, even if the first one fails.

        Raises:
            LayerError: one does not finalise.
        """
        try:
            with half("experts", self._backend.experts.name):
                self._experts.close()
        finally:
            with half("dispatch", self._backend.dispatch.name):
                self._dispatch.close()


class ComposedLayer:
    """One layer: an :class:`accelerated.experts.LayerOperation`.

    Args:
        context: of the rank.
        problem: sizes.
        declared: contract of the path.
        dispatch: carries the wire that the contract names.
        experts: of this rank.
        names: of the two backends.
    """

    def __init__(
        self,
        context: RankContext,
        problem: LayerProblem,
        declared: LayerContract,
        dispatch: Operation,
        experts: ExpertOperation,
        names: tuple[str, str],
    ) -> None:
        self._context, self._problem, self._declared = context, problem, declared
        self._dispatch, self._experts = dispatch, experts
        self._names = names
        self._dtype: torch.dtype = getattr(torch, problem.exchange.dtype)
        self._load = LoadCounter(problem.exchange.experts, context.device)

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """See :meth:`accelerated.experts.ExpertOperation.load`.

        Raises:
            LayerError: the dispatch sends rows by division, and ``owned`` are not the experts it sends here; or the
                experts refuse the weights.
        """
        sent, rank = self._problem.exchange, self._context.rank
        with half("experts", self._names[1]):
            if self._declared.exchange.receive_layout is not ReceiveLayout.EVERY_ROW:
                expected = owned_experts(sent.experts, sent.world_size, rank)
                if tuple(owned) != expected:
                    raise ValueError(
                        f"owned is {list(owned)[:8]} and more; the dispatch sends rows of the {len(expected)} experts "
                        f"from {expected[0]} on to rank {rank}: load these, under ids that are physical positions"
                    )
            self._experts.load(weights, owned)
        self._load.place(owned)

    def record_load(self) -> None:
        """See :meth:`accelerated.experts.LayerOperation.record_load`."""
        self._load.recording = True

    def expert_load(self) -> torch.Tensor:
        """See :meth:`accelerated.experts.LayerOperation.expert_load`.

        Raises:
            RuntimeError: nothing was counted.
        """
        return self._load.last()

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Output ``[n, H]`` of ``rows [n, H]``, ``ids [n, k]`` int32 and ``weights [n, k]`` float32; no host sync.

        Returns:
            As the dispatch's finalize returns it; possibly a view that the next call overwrites.

        Raises:
            LayerError: a half failed, or gives the other what its contract does not say.
        """
        dispatch, experts = self._names
        codes, scales = rows, None
        if self._declared.wire:
            with half("experts", experts):
                codes, scales = self._experts.quantise(rows)
        with half("dispatch", dispatch):
            received = self._prepare(codes, ids, weights, scales)
            self._check(received)
            self._load.count(received)
        with half("experts", experts):
            answers = self._apply(received)
        with half("dispatch", dispatch):
            return self._dispatch.finalize(answers, received).output

    def _prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> Received:
        if scales is None:
            return self._dispatch.prepare(rows, ids, weights)
        return self._dispatch.prepare(rows, ids, weights, scales)

    def _apply(self, received: Received) -> torch.Tensor:
        rows, hidden = received.rows.shape[0], self._problem.exchange.hidden
        declared = self._declared.experts
        if rows == 0 and not declared.takes_empty:
            return torch.empty(0, hidden, dtype=self._dtype, device=received.rows.device)
        answers = self._experts.experts(
            received.rows,
            received.ids,
            received.weights,
            scales=received.scales,
            num_rows=received.count if declared.takes_num_rows else None,
        )
        if tuple(answers.shape) != (rows, hidden) or answers.dtype != self._dtype:
            raise TypeError(
                f"the result is {list(answers.shape)} {answers.dtype}; a dispatch of {rows} rows takes back "
                f"{[rows, hidden]} {self._dtype}"
            )
        return answers

    def _check(self, received: Received) -> None:
        """What the contract says about the buffer, as far as the host knows."""
        rows, wanted = received.rows.shape[0], self._declared.buffer_rows
        if wanted is not None and rows != wanted:
            raise TypeError(f"{rows} rows were received; the contract says a buffer of {wanted}, valid or not")
        if bool(self._declared.wire) != (received.scales is not None):
            state = "no scales" if received.scales is None else "scales"
            raise TypeError(f"{state} came back from a dispatch of wire {self._declared.wire!r}")

    def close(self) -> None:
        """Release the experts, then the dispatch, even if the first one fails; in the same order on every rank.

        Raises:
            LayerError: one does not close.
        """
        try:
            with half("experts", self._names[1]):
                self._experts.close()
        finally:
            with half("dispatch", self._names[0]):
                self._dispatch.close()
