"""Capture and replay on whatever a rank runs: CUDA and HIP graphs of torch on a GPU, a double's recorder elsewhere.

A capture runs on a stream of its own, since the default one cannot be captured; so does a warm-up, because libraries
make workspaces and connections per stream. All graphs of one :class:`DeviceGraphs` share a memory pool, as serving
engines have it: a later graph may use what an earlier one has let go, which is safe where replays follow one another.

What a pass through this module does not prove: anything about graphs that overlap, or about another capture mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import torch

    from accelerated.interface import Graph, Graphs, RankContext

#: Calls that a capture forbids are those of its own thread. In the mode "global" the event queries of other threads, of
#: torch's NCCL watchdog among them, would break it; "relaxed" would let a host synchronisation of ours pass.
ERROR_MODE = "thread_local"


class GraphsUnavailableError(RuntimeError):
    """Nothing here can capture the calls of a session. The message says what could."""


class Recorder(Protocol):
    """Module of a double that records its calls."""

    def capture(self) -> AbstractContextManager[Graph]:
        """See :meth:`accelerated.interface.Graphs.capture`."""


def graphs_of(session: object, context: RankContext) -> Graphs:
    """What captures calls of a session's operations: the session's own ``graphs``, or torch's on a GPU.

    Raises:
        GraphsUnavailableError: neither is there.
    """
    own = getattr(session, "graphs", None)
    if own is not None:
        return cast("Graphs", own)
    if context.device.type != "cuda":
        raise GraphsUnavailableError(
            f"collectives of torch.distributed cannot be captured on {context.device.type}; run on a GPU"
        )
    return DeviceGraphs(context.device)


class DeviceGraphs:
    """``torch.cuda.graph``, which on a ROCm build of torch is a HIP graph.

    The communicators of the collectives must exist before a capture: creating one allocates and waits.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._device = device
        self._stream = self._cuda.Stream(device)
        self._live: set[DeviceGraph] = set()
        self._pool: Any = None

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """See :meth:`accelerated.interface.Graphs.warm_up`."""
        here = self._cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with self._cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    @contextmanager
    def capture(self) -> Iterator[DeviceGraph]:
        """See :meth:`accelerated.interface.Graphs.capture`."""
        if not self._live:
            # torch's allocator takes a pool back with the last of its graphs, and does not give it out again.
            self._pool = self._cuda.graph_pool_handle()
        graph = DeviceGraph(self._cuda.CUDAGraph(), self._cuda, self._device, self._live)
        # Entering it waits for the device, so nothing that came before is still running on another stream.
        with self._cuda.graph(graph.own, pool=self._pool, stream=self._stream, capture_error_mode=ERROR_MODE):
            yield graph


class DeviceGraph:
    """One graph of the device, among those of its pool that are not released."""

    def __init__(self, graph: Any, cuda: Any, device: torch.device, live: set[DeviceGraph]) -> None:
        self.own, self._cuda, self._device, self._live = graph, cuda, device, live
        live.add(self)

    def replay(self) -> None:
        """See :meth:`accelerated.interface.Graph.replay`.

        Raises:
            RuntimeError: it was released.
        """
        if self.own is None:
            raise RuntimeError("the graph was released; capture it again")
        self.own.replay()

    def release(self) -> None:
        """See :meth:`accelerated.interface.Graph.release`; waits for replays in flight."""
        if self.own is not None:
            graph, self.own = self.own, None
            self._cuda.synchronize(self._device)
            graph.reset()
            self._live.discard(self)


class RecordedGraphs:
    """A double's recorder, on the CPU: eager and captured calls come one after another in any case."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def warm_up(self) -> AbstractContextManager[None]:
        """See :meth:`accelerated.interface.Graphs.warm_up`."""
        return nullcontext()

    def capture(self) -> AbstractContextManager[Graph]:
        """See :meth:`accelerated.interface.Graphs.capture`."""
        return self._recorder.capture()
