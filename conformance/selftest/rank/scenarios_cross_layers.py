"""Scenarios of layers beside another exchange and of loads, on gloo ranks: each planted defect is named.

Scope: conformance/rank/cross_layer.py, load_program.py and what they use, with doubles and with the specification.
A pass proves nothing about a library.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import torch

from accelerated.interface import RankContext
from accelerated.registry import backend
from conformance.cases import Explicit, LayerCase, LayerCell, LayerRound
from conformance.engine.protocol import Mismatch
from conformance.faults.whole_layers import Layer, LoadOfOwnTokens, RowBitFlipped
from conformance.layer_pairs import misfit
from conformance.rank.cross_layer import Neighbours
from conformance.rank.guarded_layers import GuardedLayer
from conformance.rank.whole_layer import whole_layer
from conformance.selftest.reference.ranks import World

_ARCH = "gfx942"
#: From 17 rows on these experts do not say how they round: 16 tokens on each of two ranks, or 32 on one.
_WIDE = "IntraNode/fused_moe.fp8_token"
_DOUBLES, _ITSELF = "mori-standin+aiter-standin", "reference+reference"
_ALL_GATHER = {"against": "allgather+aiter-standin", "against_type": "naive"}

Defect = Callable[[Any, Any, int], Any]


def _cell(world: World, name: str, path: str, **changes: Any) -> LayerCell:
    cell = LayerCell("layer", name, path, world.size, 1, 256, 4 * world.size, 3, 32, "bfloat16", "drained")
    return msgspec.structs.replace(cell, **changes)


def _case(cell: LayerCell, *, masked: bool = True, repeats: bool = False, **settings: Any) -> LayerCase:
    """Two rounds of up to five tokens a rank; with replicas every expert moves before the second."""
    random = Random(cell.world_size)
    rounds = []
    for number, few in enumerate((5, 3)):
        rows = []
        for rank in range(cell.world_size):
            tokens = [random.sample(range(cell.logical), cell.top_k) for _ in range(few if rank else few - 1)]
            # Experts that are all on one rank get no mask, and drop nothing.
            if masked and tokens and cell.world_size > 1:
                tokens[0][-1] = -1
            if repeats and tokens and cell.top_k > 1:
                tokens[-1][1] = tokens[-1][0]
            rows.append(tuple(map(tuple, tokens)))
        moved = (*reversed(range(cell.logical)), *range(cell.redundant)) if cell.redundant and number else ()
        given: dict[str, Any] = {"values": "normal", "seed": number, "weighting": "single", "physical": moved}
        rounds.append(LayerRound(Explicit(tuple(rows)), **(given | settings)))
    return LayerCase(cell, tuple(rounds))


def _run(
    world: World, case: LayerCase, defect: Defect | None = None, other: Defect | None = None
) -> tuple[Mismatch | None, float]:
    """The verdict of this rank; the cell's own layer has ``defect``, the one beside it ``other``."""
    cell, device = case.cell, torch.device("cpu")
    made: Any = backend(cell.backend, _ARCH)
    context = RankContext(world.rank, world.size, device, world.group, _ARCH)
    session = made.open(context)
    neighbours = Neighbours(made, session, _ARCH)
    built: Any = session.build(cell.problem(), cell.kernel_type)
    if cell.against:
        beside: Any = neighbours.find(cell.against)[1]
        genuine = beside.build
        wrap = other or (lambda layer, problem, rank: layer)
        beside.build = lambda problem, path: wrap(genuine(problem, path), problem, world.rank)
    layer = GuardedLayer(built if defect is None else defect(built, cell.problem(), world.rank))
    held, program = whole_layer(context, neighbours, made, session, layer, cell)
    verdict = program.run(case, lambda _name, _index: None)
    held.close()
    neighbours.close()
    session.close()
    return verdict


class _Doubled(Layer):
    """Every output twice as large."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(rows, ids, weights) * 2


class _DoubledOnRankZero(_Doubled):
    """The same on one rank."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return Layer.forward(self, rows, ids, weights) if self.rank else super().forward(rows, ids, weights)


class _ZerosNegated(Layer):
    """Zeros with the other sign."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = super().forward(rows, ids, weights)
        return torch.where(output == 0, -output, output)


class _OneMore(Layer):
    """The last rank's first expert is said to have one slot more."""

    def expert_load(self) -> torch.Tensor:
        load = super().expert_load()
        load[0] += self.rank == self.problem.world_size - 1
        return load


class _Halves(Layer):
    """Loads as float32 of one expert."""

    def expert_load(self) -> torch.Tensor:
        return super().expert_load()[:1].float()


# ---------------------------------------------------------------------------------------------------- two exchanges
def two_exchanges_agree(world: World) -> None:
    paths = (_WIDE, "IntraNode/fused_moe.bf16", "AsyncLL/fused_moe.fp8_block")
    for path in paths if world.size == 2 else paths[:1]:
        for top_k in (3, 1):
            cell = _cell(world, _DOUBLES, path, top_k=top_k, **_ALL_GATHER)
            assert not misfit(cell, backend(_DOUBLES), backend(cell.against))
            mismatch, ratio = _run(world, _case(cell), _ZerosNegated if top_k == 3 else None)
            assert mismatch is None, mismatch.text()
            assert ratio <= 1
    cell = _cell(world, _ITSELF, "one-level/experts.fp8_block", against=_ITSELF, against_type="node-levels")
    mismatch, _ = _run(world, _case(cell, repeats=True))
    assert mismatch is None, mismatch.text()


def a_flipped_bit_is_seen_by_the_comparison_alone(world: World) -> None:
    cell = _cell(world, _DOUBLES, _WIDE)
    mismatch, ratio = _run(world, _case(cell, masked=False), RowBitFlipped)
    assert mismatch is None, "the acceptance is too wide for one bit of a code"
    assert 0 < ratio <= 1
    beside = msgspec.structs.replace(cell, **_ALL_GATHER)
    for change in ({"defect": RowBitFlipped}, {"other": RowBitFlipped}):
        found, _ = _run(world, _case(beside, masked=False), **change)  # type: ignore[arg-type]
        assert found is not None
        assert (found.check, found.round, found.source_rank) == ("layer.equal", 0, world.rank)
        assert "are not those of allgather+aiter-standin, whose experts are the same" in found.message
        assert found.got != found.wanted


def outputs_of_several_terms_are_not_compared(world: World) -> None:
    cell = _cell(world, _DOUBLES, _WIDE, **_ALL_GATHER)
    mismatch, _ = _run(world, _case(cell, masked=False, weighting="signed"), RowBitFlipped)
    assert mismatch is None, mismatch.text()


def either_output_is_judged_by_its_own_acceptance(world: World) -> None:
    case = _case(_cell(world, _DOUBLES, "IntraNode/fused_moe.bf16", **_ALL_GATHER))
    mine, _ = _run(world, case, _Doubled)
    other, _ = _run(world, case, None, _Doubled)
    assert mine is not None
    assert other is not None
    assert (mine.check, other.check) == ("layer.output", "layer.output")
    assert other.message.startswith("allgather+aiter-standin, naive/fused_moe.bf16: ")
    assert other.message.endswith("are outside")


# ---------------------------------------------------------------------------------------------------- loads
def _replicated(world: World, name: str, path: str) -> LayerCell:
    return _cell(world, name, path, check="eplb", experts=3 * world.size, redundant=world.size, top_k=2)


def loads_are_those_of_all_ranks(world: World) -> None:
    for name, path, repeats in (
        (_DOUBLES, "IntraNode/fused_moe.bf16", False),
        ("allgather+aiter-standin", "naive/fused_moe.bf16", False),
        (_ITSELF, "one-level/experts.bf16", True),
    ):
        for mode in ("drained", "free-running") if name == _DOUBLES else ("drained",):
            cell = msgspec.structs.replace(_replicated(world, name, path), mode=mode)
            mismatch, _ = _run(world, _case(cell, repeats=repeats))
            assert mismatch is None, mismatch.text()


def a_wrong_load_is_named(world: World) -> None:
    case = _case(_replicated(world, _DOUBLES, "IntraNode/fused_moe.bf16"))
    mismatch, _ = _run(world, case, LoadOfOwnTokens)
    # On one rank its own tokens are all there are.
    assert (mismatch is None) == (world.size == 1)
    if mismatch is not None:
        assert mismatch.check == "eplb.load"
        assert "the load of this rank's physical experts" in mismatch.message
    mismatch, _ = _run(world, case, _Halves)
    assert mismatch is not None
    assert (mismatch.check, mismatch.message) == ("eplb.load", "returned [1] torch.float32")


def one_ranks_wrong_load_is_seen_by_all(world: World) -> None:
    mismatch, _ = _run(world, _case(_replicated(world, _ITSELF, "one-level/experts.bf16")), _OneMore)
    assert mismatch is not None
    mine = world.rank == world.size - 1
    assert mismatch.check == ("eplb.load" if mine else "eplb.logical_load")
    assert ("of this rank's physical experts" if mine else "summed over replicas") in mismatch.message


def a_rank_that_failed_takes_part_in_the_loads(world: World) -> None:
    mismatch, _ = _run(world, _case(_replicated(world, _DOUBLES, "IntraNode/fused_moe.bf16")), _DoubledOnRankZero)
    assert (mismatch is None) == (world.rank > 0)
    assert mismatch is None or mismatch.check == "layer.output"
