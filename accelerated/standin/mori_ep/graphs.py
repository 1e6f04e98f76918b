"""Capture and replay without a GPU: a recorder with the rules of stream capture.

::

    with graphs.capture() as graph:        # nothing runs: calls are recorded, outputs keep what they held
        out, *_ = op.dispatch(x, w, None, ids)
        y = out * 2                        # torch operations are recorded, too
        op.combine(y, None, ids)
    x.copy_(...)                           # tensors are held by reference: a replay reads what they hold then
    graph.replay()                         # collective where the recorded calls are
    graph.release()                        # forgets the records; replay raises from then on

While capturing, results of torch operations have their memory but no content (integers 0, floats NaN), operations that
write in place write nothing, and whatever needs a value on the host raises RuntimeError: ``item()``, data-dependent
shapes, ``get_dispatch_src_token_pos()``, the construction of an operator, a torch.distributed call. ``tolist()`` and
``numpy()`` of a CPU tensor pass unseen and give stale contents. Token counts, pointers and geometry are frozen. A graph
does not keep operators alive: replaying calls of one that is gone ends the process, as freed device memory may. Threads
other than the capturing one are not seen.

Scope: CPU tensors. It proves nothing about CUDA or HIP graphs, streams, or memory pools of a capture.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accelerated.standin.mori_ep.fatal import die


class Graph:
    """A recorded sequence of calls."""

    def __init__(self) -> None:
        self._records: list[Callable[[], None]] | None = []

    def __len__(self) -> int:
        """Calls recorded."""
        return len(self._records or ())

    def replay(self) -> None:
        """Run the recorded calls in order. Collective where they are.

        Raises:
            RuntimeError: the graph was released, or a capture is going on.
        """
        if self._records is None:
            raise RuntimeError("the graph was released; capture it again")
        refuse("a graph replay")
        for record in self._records:
            record()

    def release(self) -> None:
        """Forget the records and the tensors they hold."""
        self._records = None

    def _record(self, call: Callable[[], None]) -> None:
        if self._records is not None:
            self._records.append(call)


@dataclass
class _State:
    graph: Graph | None = None


_state = _State()


def is_capturing() -> bool:
    """Whether calls are being recorded."""
    return _state.graph is not None


def refuse(what: str) -> None:
    """Raise RuntimeError while capturing: ``what`` needs the host."""
    if is_capturing():
        raise RuntimeError(f"{what} is not permitted while a graph is captured: it needs the host; move it outside")


@contextmanager
def capture() -> Iterator[Graph]:
    """Record every operator call and torch operation of the block into the graph that it yields.

    Raises:
        RuntimeError: a capture is going on already.
    """
    refuse("a second capture")
    graph = _state.graph = Graph()
    try:
        with _Recorder(graph):
            yield graph
    finally:
        _state.graph = None


def submit(owner: object, call: Callable[..., None], *arguments: Any) -> None:
    """Run ``call(owner, *arguments)``, or record it; the record does not keep ``owner`` alive."""
    graph = _state.graph
    if graph is None:
        call(owner, *arguments)
        return
    reference = weakref.ref(owner)

    def record() -> None:
        alive = reference()
        if alive is None:
            die("a graph replays calls of an operator that is gone: its memory is freed")
        call(alive, *arguments)

    graph._record(record)


class _Recorder(TorchDispatchMode):
    """Records torch operations: views run, results are allocated, writes wait for the replay."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing here is compiled, and keeping the compiler off imports all of it into every rank (1.5 s)."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d" or _reads_values(func, args):
            refuse(str(func))
        returns = func._schema.returns
        if func._schema.is_mutable:
            self._graph._record(lambda: func(*args, **kwargs))
            return _written(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(value.alias_info is not None for value in returns):
            return result  # a view: fixed by the addresses alone
        outputs = [value for value in _flat(result) if isinstance(value, torch.Tensor)]

        def record() -> None:
            fresh = [value for value in _flat(func(*args, **kwargs)) if isinstance(value, torch.Tensor)]
            for output, value in zip(outputs, fresh, strict=True):
                output.copy_(value)

        self._graph._record(record)
        for output in outputs:
            _poison(output)
        return result


def _reads_values(func: Any, args: Any) -> bool:
    """Whether the result's shape, or a number on the host, depends on the content of a tensor."""
    if func.namespace == "aten" and func.__name__.split(".")[0] == "index":
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _poison(output: torch.Tensor) -> None:
    if output.itemsize == 1:
        output.view(torch.uint8).fill_(0xFF if output.is_floating_point() else 0)
    else:
        output.fill_(math.nan if output.is_floating_point() else 0)


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an in-place or out= operation returns: the arguments that its schema marks as returned."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    marked = {
        next(iter(argument.alias_info.before_set)): named.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    found = [marked[next(iter(value.alias_info.before_set))] for value in func._schema.returns if value.alias_info]
    return found[0] if len(found) == 1 else tuple(found) if found else None
