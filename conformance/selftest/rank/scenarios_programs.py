"""Scenarios of the program on gloo ranks: reference and all-gather pass, each planted defect is named.

Scope: conformance/rank/programs.py with real backends: the reference judged by the oracle, all-gather by both. A pass
says that the two derivations agree on these cases, nothing about a library.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import get_args

import msgspec
import torch

from accelerated.allgather import NAIVE, AllGatherBackend
from accelerated.interface import Backend, Combined, Operation, RankContext, Received
from accelerated.reference_backend import NODE_LEVELS, ONE_LEVEL, ReferenceBackend
from conformance.cases import Case, Cell, Explicit, Placement, Recipe, Round, Values
from conformance.engine.protocol import Mismatch
from conformance.rank.experts import LocalExperts
from conformance.rank.programs import Program
from conformance.row_cases import Mode
from conformance.selftest.reference.ranks import World

_TOP_K = 5


def _cell(world: World, kind: str, dtype: str, mode: Mode, nodes: int = 1, placement: Placement = "linear") -> Cell:
    return Cell("round_trip", "any", kind, world.size, nodes, 12, 6 * world.size, _TOP_K, 8, dtype, mode, placement)


def _rounds(cell: Cell, values: Values, length: int, seed: int) -> tuple[Round, ...]:
    random = Random(seed)
    found = []
    for _ in range(length):
        counts = [random.choice((0, 1, cell.capacity, 3)) for _ in range(cell.world_size)]
        rows = [
            [tuple(random.randrange(-1, cell.experts) for _ in range(cell.top_k)) for _ in range(count)]
            for count in counts
        ]
        found.append(Round(Explicit(tuple(map(tuple, rows))), values, random.randrange(1000)))
    return (*found, Round(Recipe("uniform", (3,) * cell.world_size, 0, seed), values, seed))


class _Lying:
    """An operation with a planted defect in what prepare or finalize returns."""

    def __init__(self, inner: Operation, prepared: Callable[[Received], None], combined: Callable[[Combined], None]):
        self._inner, self._prepared, self._combined = inner, prepared, combined

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        received = self._inner.prepare(rows, ids, weights, scales)
        self._prepared(received)
        return received

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        combined = self._inner.finalize(expert_rows, received)
        self._combined(combined)
        return combined

    def close(self) -> None:
        self._inner.close()


def _nothing(_: object) -> None:
    return None


def _run(
    world: World,
    backend: Backend,
    case: Case,
    judged_by: str,
    prepared: Callable[[Received], None] = _nothing,
    combined: Callable[[Combined], None] = _nothing,
) -> tuple[Mismatch | None, float]:
    cell, device = case.cell, torch.device("cpu")
    context = RankContext(world.rank, world.size, device, world.group, "gfx942")
    operation = backend.open(context).build(cell.problem(), cell.kernel_type)
    contract = backend.contract(cell.problem(), cell.kernel_type)
    program = Program(
        context, _Lying(operation, prepared, combined), contract, judged_by, LocalExperts(cell, world.rank, device)
    )
    return program.run(case, lambda _name, _index: None)


def reference_agrees_with_the_oracle(world: World) -> None:
    for nodes in [n for n in (1, 2, 4) if world.size % n == 0]:
        for dtype in ("bfloat16", "float32"):
            for values in get_args(Values):
                for mode in get_args(Mode):
                    cell = _cell(world, NODE_LEVELS if nodes > 1 else ONE_LEVEL, dtype, mode, nodes)
                    case = Case(cell, _rounds(cell, values, 2, nodes))
                    mismatch, ratio = _run(world, ReferenceBackend(), case, "oracle")
                    assert mismatch is None, mismatch.text()
                    assert ratio <= 1
                    assert values != "integers" or ratio == 0, "one result is accepted where nothing rounds"


def round_robin_agrees_with_the_oracle(world: World) -> None:
    cell = _cell(world, ONE_LEVEL, "bfloat16", "drained", placement="round_robin")
    mismatch, _ = _run(world, ReferenceBackend(), Case(cell, _rounds(cell, "integers", 3, 5)), "oracle")
    assert mismatch is None, mismatch.text()


def allgather_agrees_with_both(world: World) -> None:
    for judged_by in ("oracle", "reference"):
        for dtype in ("bfloat16", "float32"):
            for values in get_args(Values):
                for mode in get_args(Mode):
                    cell = _cell(world, NAIVE, dtype, mode)
                    case = Case(cell, _rounds(cell, values, 2, 3))
                    mismatch, ratio = _run(world, AllGatherBackend(), case, judged_by)
                    assert mismatch is None, (judged_by, values, mismatch.text())
                    assert ratio <= 1


def _full(world: World, kind: str, dtype: str = "bfloat16", mode: Mode = "drained") -> Case:
    """Three tokens of every rank, each token to one expert of its own rank."""
    cell = _cell(world, kind, dtype, mode)
    rows = tuple(((6 * rank,) * _TOP_K,) * 3 for rank in range(world.size))
    return Case(cell, (Round(Explicit(rows), "normal", 1),))


def _expect(world: World, backend: Backend, case: Case, check: str, **lies: Callable[..., None]) -> Mismatch:
    found = []
    for judged_by in ("oracle", "reference"):
        mismatch, _ = _run(world, backend, case, judged_by, **lies)
        assert mismatch is not None, judged_by
        assert mismatch.check == check, mismatch.text()
        found.append(mismatch)
    return found[0]


def a_row_without_local_expert_is_judged_as_well(world: World) -> None:
    if world.size == 1:
        return
    foreign = 0 if world.rank else 3  # row 0 is rank 0's, row 3 is rank 1's

    def flip(received: Received) -> None:
        received.rows.view(torch.int16)[foreign, 7] ^= 1

    def double(received: Received) -> None:
        received.rows[foreign] = received.rows[foreign + 1]

    case = _full(world, NAIVE)
    found = _expect(world, AllGatherBackend(), case, "dispatch.payload", prepared=flip)
    assert (found.source_rank, found.token, found.element) == (foreign // 3, 0, 7)
    _expect(world, AllGatherBackend(), case, "dispatch.rows", prepared=double)


def a_missing_source_map_is_a_failure(world: World) -> None:
    def drop(received: Received) -> None:
        received.source_map = None

    _expect(world, ReferenceBackend(), _full(world, ONE_LEVEL), "dispatch.source_map", prepared=drop)
    free, _ = _run(world, ReferenceBackend(), _full(world, ONE_LEVEL, mode="free-running"), "oracle", drop)
    assert free is None, "free-running rounds ask for no source map"


def one_unit_in_the_last_place_is_a_failure(world: World) -> None:
    def nudge(combined: Combined) -> None:
        combined.output.view(torch.int16)[2, 9] += 1

    found = _expect(world, ReferenceBackend(), _full(world, ONE_LEVEL), "combine.output", combined=nudge)
    assert (found.token, found.element) == (2, 9)


def malformed_results_are_product_failures(world: World) -> None:
    def cut(combined: Combined) -> None:
        combined.output = combined.output[:1]

    def no_weights(combined: Combined) -> None:
        combined.weights = None

    case = _full(world, ONE_LEVEL)
    _expect(world, ReferenceBackend(), case, "combine.output", combined=cut)
    _expect(world, ReferenceBackend(), case, "combine.weights", combined=no_weights)
    _expect(world, AllGatherBackend(), _full(world, NAIVE), "dispatch.count", prepared=_one_too_many)


def _one_too_many(received: Received) -> None:
    received.count = received.count + 1


def _special(world: World, **manner: object) -> Case:
    """Two rounds with a token everywhere, one with whole rows and one with short ones."""
    cell = msgspec.structs.replace(_cell(world, ONE_LEVEL, "bfloat16", "drained"), hidden=256, **manner)
    rows = tuple(((6 * rank, -1, 6 * ((rank + 1) % world.size), 0, 1),) * 3 for rank in range(world.size))
    return Case(cell, (Round(Explicit(rows), "normal", 1), Round(Explicit(rows), "integers", 2, hidden=128)))


def wires_and_modes_agree_with_the_oracle(world: World) -> None:
    for wire in ("", "fp8_token", "fp8_group", "mxfp4", "fp8_tensor", "fp8_raw3x4", "fp8_raw5x1"):
        for mode in ("", "zero-copy", "weightless", "handle", "expert count"):
            case = _special(world, wire=wire, modes=(mode,) if mode else ())
            mismatch, ratio = _run(world, ReferenceBackend(), case, "oracle")
            assert mismatch is None, mismatch.text()
            assert ratio <= 1


def defects_beside_rows_are_named(world: World) -> None:
    def scales(received: Received) -> None:
        assert received.scales is not None
        received.scales[1] = received.scales[0]

    def count(received: Received) -> None:
        assert received.expert_count is not None
        received.expert_count[1] += 1

    def stale(received: Received) -> None:
        first, again = received.rows.clone(), received.replay
        assert again is not None

        def replay(rows: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None) -> Received:
            found = again(rows, weights, scales)
            found.rows = first
            return found

        received.replay = replay

    for manner, lie, check in (
        ({"wire": "fp8_group"}, scales, "dispatch.scales"),
        ({"modes": ("expert count",)}, count, "dispatch.expert_count"),
        ({"modes": ("handle",)}, stale, "replay.dispatch.rows"),
    ):
        mismatch, _ = _run(world, ReferenceBackend(), _special(world, **manner), "oracle", lie)
        assert mismatch is not None
        assert mismatch.check == check, mismatch.text()
