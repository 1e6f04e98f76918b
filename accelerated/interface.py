"""The interface every backend implements: factory (driver side) -> session -> operation (rank side).

Scope: prepare -> experts -> finalize with a declared receive layout. The factory half is called in the driver process,
which never imports torch; the session half runs in a rank process. What conforming to this interface does not prove:
that the contract is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from accelerated.contract import Support

    #: A dispatch of ``(rows, weights, scales)`` along a routing that was dispatched before.
    Replay = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], "Received"]


@dataclass(frozen=True)
class Finding:
    """One line of preflight: what is wrong and its remedy."""

    what: str
    remedy: str


@dataclass
class RankContext:
    """What a rank process gives a session: its place in the world and its device.

    ``group`` is the default process group, already initialised (gloo on CPU; ``cpu:gloo,cuda:nccl`` on a GPU).
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    arch: str  # gfx architecture to assume where no device tells, e.g. "gfx942"


@dataclass
class Received:
    """What prepare hands to the experts. Tensors may be views of persistent buffers: clone what must outlive the round.

    Attributes:
        rows: ``[R, H]`` in the problem's dtype, or codes in its wire format: ``[R, H]`` FP8, ``[R, H / 2]`` packed
            FP4. Rows from ``count`` on are undefined.
        ids: ``[R, k]`` int32 global expert ids, the source token's whole row verbatim.
        weights: ``[R, k]`` float32, the source token's whole row verbatim; undefined if none were dispatched.
        count: ``[1]`` int32 on the device, number of valid rows.
        source_map: host-synchronising call giving ``[count, 2]`` int64 (source rank, token), or None. To be called
            after prepare and before finalize.
        state: private to the backend.
        scales: ``[R, G]`` of the wire format, float32 or bytes, the source token's verbatim; None without any.
        expert_count: ``[experts per rank]`` int32 on the device, received slots of each local expert; given in the mode
            ``expert count``.
        buffer: ``[R, H]`` in the problem's dtype, where the experts must write their rows and which finalize is called
            with; given in the mode ``zero-copy``.
        counter: ``[1]`` int32 on the device, the library's own tensor that ``count`` is a copy of, as stable as
            ``rows``; None where ``count`` is that tensor.
        replay: ``(rows, weights, scales) -> Received``, a dispatch of new rows, weights and scales along the same
            routing, into the same places; given in the mode ``handle``. To be called after finalize and before the
            next prepare, at most once for each finalize; after later prepares only if the contract keeps handles.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor
    source_map: Callable[[], torch.Tensor] | None = None
    state: object = field(default=None, repr=False)
    scales: torch.Tensor | None = None
    expert_count: torch.Tensor | None = None
    buffer: torch.Tensor | None = None
    replay: Replay | None = field(default=None, repr=False)
    counter: torch.Tensor | None = None


@dataclass
class Combined:
    """What finalize returns. ``output`` ``[n, H]`` and ``weights`` ``[n, k]`` float32 or None; may be views.

    ``kernel`` is the name of the kernel that was launched, where the library tells it; "" where it does not.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    kernel: str = ""


class Graph(Protocol):
    """Captured calls of operations, and whatever else the device was given meanwhile."""

    def replay(self) -> None:
        """Run them again on the current stream, with what the tensors that they were given hold then. Collective where
        they are; replayed and eager calls together obey the order that the operation asks for.
        """

    def release(self) -> None:
        """Let go of the memory and of the library's state. Before the operation is closed, and before the process group
        is destroyed, which waits for ever for graphs that hold its collectives.
        """


class Graphs(Protocol):
    """Capture on one device. A session may have an attribute ``graphs``; see :func:`accelerated.graphs.graphs_of`."""

    def warm_up(self) -> AbstractContextManager[None]:
        """Run calls eagerly where they will be captured: on the stream of the captures."""

    def capture(self) -> AbstractContextManager[Graph]:
        """Record the calls of the block, which computes nothing, into the graph that it yields. Not to be nested.

        Raises:
            RuntimeError: a call needs the host, or the device could not record it.
        """


class Operation(Protocol):
    """One dispatch/combine operator of fixed geometry, alive until :meth:`close`."""

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        """Dispatch ``rows [n, H]``, ``ids [n, k]`` int32, ``weights [n, k]`` float32. Collective, without host sync.

        With a wire format rows are its codes and ``scales [n, G]`` go with them. In the mode ``weightless`` the weights
        are left alone: neither dispatched nor summed.
        """

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        """Sum ``expert_rows [R, H]`` back to their sources; row i answers received row i. Collective, no host sync.

        In the mode ``zero-copy`` ``expert_rows`` is :attr:`Received.buffer` itself.
        """

    def close(self) -> None:
        """Release the operator. Called in the same order on every rank."""


class Session(Protocol):
    """A library initialised in one rank process. One per process lifetime."""

    def build(self, problem: Any, kernel_type: str) -> Any:
        """Construct an operator. Collective over the default group.

        A ``Problem`` has an :class:`Operation`, a ``RowProblem`` one of those in :mod:`accelerated.operators`.
        """

    def close(self) -> None:
        """Finalise the library; every operation is closed already, the process group is still alive."""


class Backend(Protocol):
    """Factory and contract of one backend. Every attribute and method but :meth:`open` works without torch.

    A backend answers for the problems of what it offers: ``Problem`` for its kernel types, ``RowProblem`` for its
    operators (:mod:`accelerated.operators`).
    """

    name: str
    standin: bool  # True: a double, every report must say so
    judged_by: str  # "reference" or "oracle"
    kernel_types: Sequence[str]  # of dispatch/combine

    def support(self, problem: Any, kernel_type: str) -> Support:
        """Say whether this problem is claimed, unclaimed or refused, with the reason."""

    def contract(self, problem: Any, kernel_type: str) -> Any:
        """Declare the behaviour for a problem that :meth:`support` does not refuse."""

    def preflight(self, device: str) -> list[Finding]:
        """Look, without importing anything heavy, for reasons why :meth:`open` would fail on this machine."""

    def open(self, context: RankContext) -> Session:
        """Initialise the library in a rank process."""
