"""A layer's calls on halves that only record: what passes between them, in which order, and who is blamed.

Scope: one rank, no communication. A pass does not prove that any library computes a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from accelerated.contract import Contract, ContractError
from accelerated.experts import LayerProblem
from accelerated.interface import Combined, RankContext, Received
from accelerated.layer import LayerBackend
from accelerated.layer_session import ComposedLayer, LayerError, LayerSession
from accelerated.operators import Family, RowProblem
from accelerated.routers import FORMS, Always, RouteContract
from conformance.selftest.accelerated.layer_halves import (
    DENSE,
    EVERYWHERE,
    GROUP,
    Half,
    dispatch,
    experts,
    experts_contract,
    sizes,
)
from reference.expert_weights import ExpertWeights

WEIGHTS = ExpertWeights(torch.zeros(2, 256, 256), torch.zeros(2, 256, 128))


class Sender(Half):
    """Delivers what it was given in a buffer of ``rows`` rows, of which the first count."""

    rows, mute = 16, False

    def prepare(self, rows: Any, ids: Any, weights: Any, *scales: Any) -> Received:
        self._note("prepare")
        self.sent = (rows, ids, weights, *scales)
        room = torch.zeros(self.rows, rows.shape[1], dtype=rows.dtype)
        more = torch.zeros(self.rows, scales[0].shape[1]) if scales and not self.mute else None
        k = ids.shape[1]
        slots = torch.zeros(self.rows, k, dtype=torch.int32), torch.zeros(self.rows, k)
        self.delivered = Received(room, *slots, torch.tensor([3], dtype=torch.int32), scales=more)
        return self.delivered

    def finalize(self, answers: torch.Tensor, received: Received) -> Combined:
        self._note("finalize")
        assert received is self.delivered
        return Combined(answers[:3] + 1, None)


class Mathematician(Half):
    """Returns rows of sevens."""

    kind = torch.bfloat16

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._note("quantise")
        return torch.ones(rows.shape, dtype=torch.uint8), torch.full((rows.shape[0], 2), 0.5)

    def experts(self, rows: torch.Tensor, ids: Any, weights: Any, *, scales: Any = None, num_rows: Any = None) -> Any:
        self._note("experts")
        self.seen = (rows, ids, weights, scales, num_rows)
        return torch.full((rows.shape[0], 256), 7, dtype=self.kind)

    def load(self, weights: ExpertWeights, owned: Any) -> None:
        self._note("load")


def opened(
    path: str = "fast/fp8",
    declared: Contract = DENSE,
    fails: tuple[str, ...] = (),
    problem: LayerProblem | None = None,
    calls: list[str] | None = None,
    **promises: Any,
) -> tuple[LayerSession, ComposedLayer, Sender, Mathematician, list[str]]:
    """A session on rank 1 of 2, a layer, its halves and what they were called with.

    ``fails`` are calls that raise, ``promises`` fields of the contract of ``bf16``.
    """
    noted: list[str] = [] if calls is None else calls
    failing = {name: [c.partition(" ")[2] for c in fails if c.startswith(name)] for name in ("sender", "math")}
    contracts = {"bf16": experts_contract(**promises), "fp8": experts_contract(GROUP)}
    first = Sender(**{**vars(dispatch(declared=declared)), "calls": noted, "fails": failing["sender"]})
    second = Mathematician(**{**vars(experts("math", contracts)), "calls": noted, "fails": failing["math"]})
    group = cast("torch.distributed.ProcessGroup", "the group")
    session = LayerBackend(first, second).open(RankContext(1, 2, torch.device("cpu"), group, "gfx950"))
    return session, session.build(problem or sizes(), path), first, second, noted


def inputs(tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.ones(tokens, 256, dtype=torch.bfloat16),
        torch.zeros(tokens, 2, dtype=torch.int32),
        torch.ones(tokens, 2),
    )


def test_whole_life_in_order() -> None:
    session, layer, first, second, calls = opened()
    layer.load(WEIGHTS, (2, 3))
    output = layer.forward(*inputs())
    layer.close()
    session.close()
    assert calls == [
        *("sender open", "math open", "sender build", "math build", "math load"),
        *("math quantise", "sender prepare", "math experts", "sender finalize"),
        *("math close", "sender close", "math session.close", "sender session.close"),
    ]
    assert output.tolist() == [[8.0] * 256] * 3, "what finalize returned"
    assert (first.sent[0].dtype, first.sent[3].tolist()) == (torch.uint8, [[0.5, 0.5]] * 3)
    rows, ids, weights, scales, num_rows = second.seen
    got = first.delivered
    assert rows is got.rows
    assert (ids, weights, scales, num_rows) == (got.ids, got.weights, got.scales, got.count)


def test_a_router_is_that_of_the_experts() -> None:
    first, second = Sender(**vars(dispatch())), Mathematician(**vars(experts("math")))
    second.operators = {**second.operators, "route": ("best.softmax_k2",)}
    second.declared = {"best.softmax_k2": RouteContract(Always(FORMS["softmax_k2"].numerics))}
    group = cast("torch.distributed.ProcessGroup", "the group")
    session = LayerBackend(first, second).open(RankContext(0, 2, torch.device("cpu"), group, "gfx950"))
    problem = RowProblem(Family.ROUTE, 1, 8, 4)
    session.build(problem, "best.softmax_k2").close()
    assert second.calls == ["math open", "math build", "math close"]
    assert first.calls == ["sender open"]
    with pytest.raises(ContractError, match=r"^math has no router 'best' for a layer; it has best\.softmax_k2$"):
        session.build(problem, "best")
    second.fails = ["build"]
    with pytest.raises(LayerError, match=r"^experts \(math\): OSError: build failed$"):
        session.build(problem, "best.softmax_k2")


def test_without_a_wire_rows_go_as_they_are() -> None:
    for path in ("fast/bf16", "fast/fp8@bf16"):
        _, layer, first, second, calls = opened(path)
        given = inputs()
        layer.forward(*given)
        assert "math quantise" not in calls
        assert len(first.sent) == 3, "a dispatch that knows no scales is not given any"
        assert first.sent[0] is given[0]
        assert second.seen[3] is None


def test_the_count_goes_only_to_experts_that_take_it() -> None:
    exact = replace(DENSE, exact_rows=True)
    _, layer, _, second, _ = opened("fast/bf16", exact)
    layer.forward(*inputs())
    assert second.seen[4] is not None
    _, layer, _, second, _ = opened("fast/bf16", exact, takes_num_rows=False)
    layer.forward(*inputs())
    assert second.seen[4] is None


def test_experts_that_take_no_empty_call_are_skipped() -> None:
    _, layer, first, _, calls = opened("fast/bf16", replace(DENSE, exact_rows=True), takes_empty=False)
    first.rows = 0
    assert layer.forward(*inputs()).shape == (0, 256)
    assert "math experts" not in calls
    assert calls[-1] == "sender finalize", "the other ranks wait for it"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("sender prepare", "dispatch (sender): OSError: prepare failed"),
        ("sender finalize", "dispatch (sender): OSError: finalize failed"),
        ("math quantise", "experts (math): OSError: quantise failed"),
        ("math experts", "experts (math): OSError: experts failed"),
    ],
)
def test_the_half_that_fails_is_named(call: str, message: str) -> None:
    _, layer, *_ = opened(fails=(call,))
    with pytest.raises(LayerError) as caught:
        layer.forward(*inputs())
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("call", "message", "last"),
    [
        ("sender open", "dispatch (sender): OSError: open failed", "sender open"),
        ("math open", "experts (math): OSError: open failed", "sender session.close"),
        ("sender build", "dispatch (sender): OSError: build failed", "sender build"),
        ("math build", "experts (math): OSError: build failed", "sender close"),
    ],
)
def test_what_was_opened_before_a_failure_is_closed(call: str, message: str, last: str) -> None:
    calls: list[str] = []
    with pytest.raises(LayerError) as caught:
        opened(fails=(call,), calls=calls)
    assert str(caught.value) == message
    assert calls[-1] == last


def test_the_dispatch_is_closed_even_if_the_experts_do_not_close() -> None:
    session, layer, _, _, calls = opened(fails=("math close", "math session.close"))
    with pytest.raises(LayerError, match=r"^experts \(math\): OSError: close failed$"):
        layer.close()
    assert calls[-1] == "sender close"
    with pytest.raises(LayerError, match=r"^experts \(math\): OSError: session.close failed$"):
        session.close()
    assert calls[-1] == "sender session.close"


def test_what_a_half_gives_against_its_contract_is_its_failure() -> None:
    _, layer, first, second, _ = opened()
    first.rows = 15
    with pytest.raises(
        LayerError, match=r"^dispatch \(sender\): TypeError: 15 rows were received; the contract says a"
    ):
        layer.forward(*inputs())
    first.rows, second.kind = 16, torch.float32
    with pytest.raises(
        LayerError, match=r"^experts \(math\): TypeError: the result is \[16, 256\] torch.float32; a dis"
    ):
        layer.forward(*inputs())
    first.mute = True
    with pytest.raises(LayerError, match=r"^dispatch .* no scales came back from a dispatch of wire 'fp8_group'$"):
        layer.forward(*inputs())


def test_a_dispatch_by_division_wants_its_own_experts() -> None:
    _, layer, *_, calls = opened()
    with pytest.raises(
        LayerError, match=r"owned is \[1, 3\] and more; the dispatch sends rows of the 2 experts from 2 on"
    ):
        layer.load(WEIGHTS, (1, 3))
    assert "math load" not in calls
    _, layer, *_, calls = opened(declared=EVERYWHERE, problem=sizes(placement="round_robin"))
    layer.load(WEIGHTS, (1, 3))
    assert "math load" in calls
