"""Capture of torch.distributed's collectives on gloo, for selftests: recorded, and run again at a replay.

The recorder of the MoRI double refuses collectives, because gloo cannot capture them and nothing may pretend that it
does. Here they are recorded all the same, so that operations which are to be captured on a GPU are shown to need
nothing of the host, and to read what their tensors hold at the replay. While a capture is going on collectives do run,
on whatever is there, since a caller waits for their work. It proves nothing about CUDA or HIP graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep import graphs


class _Recorder(graphs._Recorder):
    """As the double's, collectives included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return super().__torch_dispatch__(func, types, args, kwargs)
        given = kwargs or {}
        self._graph._record(lambda: _wait(func(*args, **given)))
        results = func(*args, **given)
        _wait(results)
        # Gloo ends a reduce-scatter with a copy in the wait, which is the collective's and must not be recorded itself:
        # the caller waits for something else.
        other: Any = dist.barrier(async_op=True)
        if isinstance(results, torch.ScriptObject):
            return other.boxed()
        return tuple(other.boxed() if isinstance(result, torch.ScriptObject) else result for result in results)


def _wait(results: Any) -> None:
    """Wait for the work among the results of a collective."""
    for result in results if isinstance(results, (tuple, list)) else (results,):
        if isinstance(result, torch.ScriptObject):
            dist.distributed_c10d.Work.unbox(result).wait()


class GlooGraphs:
    """:class:`accelerated.interface.Graphs` of this recorder."""

    def warm_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def capture(self) -> Iterator[graphs.Graph]:
        graph = graphs._state.graph = graphs.Graph()
        try:
            with _Recorder(graph):
                yield graph
        finally:
            graphs._state.graph = None
