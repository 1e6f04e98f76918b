"""Loads of a rank's experts, counted on the device from what a dispatch delivered; and layers that share libraries.

Scope: accelerated/layer_load.py and layer_beside.py on rows and halves made up here. A pass proves nothing about a
dispatch.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from accelerated.interface import RankContext, Received
from accelerated.layer import LayerBackend
from accelerated.layer_beside import SessionBeside
from accelerated.layer_load import LoadCounter
from accelerated.layer_session import LayerError
from conformance.selftest.accelerated.layer_halves import EVERYWHERE, dispatch, experts, sizes
from conformance.selftest.accelerated.test_layer_session import inputs, opened

CPU = torch.device("cpu")


def received(ids: list[list[int]], count: int) -> Received:
    """A buffer with these ids, of which the first ``count`` rows are valid."""
    rows = torch.zeros(len(ids), 4)
    tensor = torch.tensor(ids, dtype=torch.int32).reshape(len(ids), 2)
    return Received(rows, tensor, torch.zeros(tensor.shape), torch.tensor([count], dtype=torch.int32))


def counter(owned: tuple[int, ...], experts: int = 6) -> LoadCounter:
    made = LoadCounter(experts, CPU)
    made.place(owned)
    made.recording = True
    return made


@pytest.mark.parametrize(
    ("ids", "count", "load"),
    [
        ([[2, 3], [3, 0]], 2, [1, 2]),
        ([[2, 3], [3, 0]], 1, [1, 1]),
        ([[2, 3], [3, 0]], 0, [0, 0]),
        ([[2, -1], [-1, -1]], 2, [1, 0]),
        ([[2, 2], [3, 5]], 2, [2, 1]),
        ([[7, 2], [-9, 3]], 2, [1, 1]),
        ([], 0, [0, 0]),
    ],
)
def test_valid_slots_of_local_experts_count(ids: list[list[int]], count: int, load: list[int]) -> None:
    made = counter((2, 3))
    made.count(received(ids, count))
    assert (made.last().tolist(), made.last().dtype) == (load, torch.int64)


def test_masked_slots_and_unknown_ids_are_nobodys() -> None:
    for owned in ((0, 1), (4, 5)):
        made = counter(owned)
        made.count(received([[-1, -1], [-7, 6], [9, 2]], 3))
        assert made.last().tolist() == [0, 0]


def test_slots_follow_the_owned_ids() -> None:
    made = counter((1, 4, 6))  # a shared expert's id lies beyond the routed ones
    made.count(received([[4, 1], [4, 0]], 2))
    first = made.last()
    assert first.tolist() == [1, 2]
    made.place((0, 5))
    made.count(received([[0, 0]], 1))
    assert made.last().tolist() == [2, 0]
    assert first.tolist() == [1, 2], "a load outlives the next pass"


def test_nothing_is_counted_unasked() -> None:
    made = LoadCounter(4, CPU)
    made.place((0, 1))
    made.count(received([[0, 1]], 1))
    with pytest.raises(RuntimeError, match="call record_load before the forward pass"):
        made.last()


def test_a_layer_counts_what_its_dispatch_delivers() -> None:
    _, layer, first, *_ = opened("fast/bf16")
    layer.load(cast("Any", None), (2, 3))
    layer.record_load()
    genuine = first.prepare

    def delivered(*sent: Any) -> Received:
        result = genuine(*sent)
        result.ids[:4] = torch.tensor([[2, 0], [3, 2], [1, 3], [3, 3]])  # three rows are valid
        return result

    object.__setattr__(layer._dispatch, "prepare", delivered)
    layer.forward(*inputs())
    assert layer.expert_load().tolist() == [2, 2]


# ---------------------------------------------------------------------------------------------------- beside a layer
def beside(fails: tuple[str, ...] = (), name: str = "other") -> tuple[Any, SessionBeside, list[str]]:
    """A session, another one that shares its experts, and what was called."""
    calls: list[str] = []
    context = RankContext(0, 2, CPU, cast("torch.distributed.ProcessGroup", "the group"), "gfx942")
    holder = LayerBackend(dispatch("sender", calls=calls), experts(calls=calls))  # type: ignore[arg-type]
    held = holder.open(context)
    second = LayerBackend(dispatch(name, EVERYWHERE, calls=calls, fails=fails), experts(calls=calls))  # type: ignore[arg-type]
    return held, SessionBeside(second, holder, held), calls


def test_experts_are_opened_once_and_closed_by_their_owner() -> None:
    held, second, calls = beside()
    assert calls == ["sender open", "mathematician open", "other open"]
    layer: Any = second.build(sizes(), "slow/bf16")
    assert calls[3:] == ["other build", "mathematician build"]
    layer.close()
    second.close()
    assert calls[5:] == ["mathematician close", "other close", "other session.close"]
    held.close()
    assert calls[8:] == ["mathematician session.close", "sender session.close"]


def test_the_same_dispatch_is_shared_too() -> None:
    _, second, calls = beside(name="sender")
    second.close()
    assert calls == ["sender open", "mathematician open"]


def test_whoever_fails_is_named() -> None:
    with pytest.raises(LayerError, match=r"^dispatch \(other\): OSError: open failed$"):
        beside(fails=("open",))
    holder = LayerBackend(dispatch(), experts())  # type: ignore[arg-type]
    stranger = LayerBackend(dispatch("other"), experts("poet"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers beside each other have the same experts"):
        SessionBeside(stranger, holder, cast("Any", None))
