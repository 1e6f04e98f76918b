"""Capture on a device that only writes down what it is asked for, and who captures what.

Scope: the order of calls into ``torch.cuda``. It proves nothing about a device: that a capture succeeds, a GPU shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from accelerated.graphs import DeviceGraphs, GraphsUnavailableError, RecordedGraphs, graphs_of
from accelerated.interface import RankContext
from accelerated.registry import backend


class FakeCuda:
    """``torch.cuda`` as far as captures use it; every call is a line of the log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pools = 0
        fake = self

        class Stream:
            def __init__(self, device: object, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                fake.log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def replay(self) -> None:
                fake.log.append("replay")

            def reset(self) -> None:
                fake.log.append("reset")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    def current_stream(self, device: object) -> Any:
        return self.Stream(device, "main")

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def synchronize(self, device: object) -> None:
        self.log.append("synchronise")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")

    @contextmanager
    def graph(self, graph: object, *, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")
        yield
        self.log.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def context(device: str) -> RankContext:
    return RankContext(0, 1, torch.device(device), cast(Any, None), "gfx942")


def test_warm_up_and_capture_run_on_one_side_stream(cuda: FakeCuda) -> None:
    graphs = DeviceGraphs(torch.device("cuda:0"))
    with graphs.warm_up():
        cuda.log.append("call")
    with graphs.capture() as graph:
        cuda.log.append("call")
    graph.replay()
    assert cuda.log == [
        "side waits for main",
        "on side",
        "call",
        "off side",
        "main waits for side",
        "capture on side, pool 1, thread_local",
        "call",
        "captured",
        "replay",
    ]


def test_release_waits_and_happens_once(cuda: FakeCuda) -> None:
    with DeviceGraphs(torch.device("cuda:0")).capture() as graph:
        pass
    cuda.log.clear()
    graph.release()
    graph.release()
    assert cuda.log == ["synchronise", "reset"]
    with pytest.raises(RuntimeError, match="released; capture it again"):
        graph.replay()


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(cuda: FakeCuda) -> None:
    graphs = DeviceGraphs(torch.device("cuda:0"))
    made = []
    for _ in range(3):
        with graphs.capture() as graph:
            made.append(graph)
    for graph in made:
        graph.release()
    with graphs.capture() as graph:
        pass
    pools = [line.split("pool ")[1][0] for line in cuda.log if "pool" in line]
    assert pools == ["1", "1", "1", "2"], "a pool that was given back may not be asked for again"


def test_a_capture_that_fails_leaves_a_graph_that_can_be_released(cuda: FakeCuda) -> None:
    graphs = DeviceGraphs(torch.device("cuda:0"))
    kept = []
    with contextlib.suppress(ValueError), graphs.capture() as graph:
        kept.append(graph)
        raise ValueError("no")
    kept[0].release()
    with graphs.capture():
        pass
    assert "pool 2" in cuda.log[-2]


def test_who_captures(cuda: FakeCuda) -> None:
    class Session:
        graphs = RecordedGraphs(cast(Any, None))

    assert graphs_of(Session(), context("cpu")) is Session.graphs
    assert isinstance(graphs_of(object(), context("cuda:0")), DeviceGraphs)
    with pytest.raises(GraphsUnavailableError, match="cannot be captured on cpu; run on a GPU"):
        graphs_of(object(), context("cpu"))


@pytest.mark.parametrize(
    ("name", "devices"), [("mori-standin", ["cpu"]), ("mori", ["cuda"]), ("conformance.faults:stale_capture", ["cpu"])]
)
def test_backends_say_where_they_are_captured(name: str, devices: list[str]) -> None:
    made: Any = backend(name)
    assert list(made.graph_devices) == devices
