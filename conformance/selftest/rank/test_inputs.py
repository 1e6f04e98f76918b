"""Drawn inputs and probe experts: tags, reproducible draws, exactness of the integer values, distinct experts.

Scope: conformance/rank/inputs.py and experts.py on the CPU. What a pass does not prove: that torch draws the same
normal numbers on every processor; only the integers are pinned.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from conformance.cases import MAX_ROUNDS, Case, Cell, Explicit, Placement, Round, Rows, Values
from conformance.rank.experts import LocalExperts, coefficients, dense_experts
from conformance.rank.inputs import (
    INTEGER_GRID,
    PARTS,
    Inputs,
    numbered_inputs,
    read_tags,
    round_inputs,
    row_tags,
    stamp_of,
)
from conformance.rank.routing import wire_rows
from conformance.rank.sequence_program import _DISPATCHED as SEQUENCE_REPLAYS
from conformance.sequence_cases import MAX_STEPS
from reference.catalogue import model_shapes

CPU = torch.device("cpu")
DTYPES = ["bfloat16", "float32"]
PINNED_ROW = [
    0.0,
    1.0,
    0.0,
    0.0,
    5.0,
    2.0,
    -6.0,
    5.0,
    8.0,
    -3.0,
    -5.0,
    -1.0,
    -7.0,
    1.0,
    -3.0,
    7.0,
    5.0,
    -2.0,
    8.0,
    -3.0,
    -8.0,
    -8.0,
    3.0,
    2.0,
]
PINNED_WEIGHTS = [[4, 14], [4, 16], [11, 4]]


def cell(world_size: int = 2, experts: int = 8, top_k: int = 2, dtype: str = "bfloat16", **other: object) -> Cell:
    fixed = {"nodes": 1, "hidden": 24, "capacity": 64, "mode": "drained", **other}
    return Cell("round_trip", "any", "any", world_size=world_size, experts=experts, top_k=top_k, dtype=dtype, **fixed)  # type: ignore[arg-type]


def draw(of: Cell, routing: Rows, rank: int = 0, values: Values = "integers", seed: int = 1, index: int = 0) -> Inputs:
    a_round = Round(Explicit(routing), values, seed)
    return round_inputs(Case(of, (a_round,) * (index + 1)), index, rank, wire_rows(of, routing), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tags_of_every_rank_token_and_round_come_back(dtype: torch.dtype) -> None:
    tokens = torch.arange(65536)
    for rank, index in ((0, 0), (1, 255), (128, 7), (255, 256)):
        tags = read_tags(torch.nn.functional.pad(row_tags(rank, tokens, index), (0, 2), value=9).to(dtype))
        assert torch.equal(tags, torch.stack([torch.full_like(tokens, rank), tokens, tokens * 0 + index % 256], dim=1))
    few = torch.tensor([0, 1, 255, 256, 65535])
    for rank in range(256):
        assert torch.equal(read_tags(row_tags(rank, few, rank).to(dtype))[:, 0], torch.full_like(few, rank))


def test_what_is_no_tag_is_unreadable() -> None:
    for digit in (-1.0, 0.5, 256.0, 1e30, -1e30, torch.nan, torch.inf, -torch.inf):
        for position in range(4):
            row = torch.zeros(1, 6)
            row[0, position] = digit
            assert read_tags(row).tolist() == [[-1, -1, -1]]


def test_draws_are_pinned_and_independent() -> None:
    of, routing = cell(), (((0, 1),) * 3, ((2, 3),) * 3)
    one = draw(of, routing)
    assert one.rows[1].tolist() == PINNED_ROW
    assert (one.weights * 16).int().tolist() == PINNED_WEIGHTS
    assert (one.rows.dtype, one.ids.dtype, one.weights.dtype) == (torch.bfloat16, torch.int32, torch.float32)
    # Another rank's tokens do not matter; rank, round and seed do.
    assert torch.equal(draw(of, (routing[0], ())).rows, one.rows)
    for other in (draw(of, routing, rank=1), draw(of, routing, index=1), draw(of, routing, seed=2)):
        assert not torch.equal(other.rows[:, 4:], one.rows[:, 4:])
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(draw(of, routing).rows, one.rows)


def test_no_part_of_a_seed_is_drawn_like_another_ones() -> None:
    of, routing = cell(1), (((0, 1),) * 3,)
    case = Case(of, tuple(Round(Explicit(routing), "integers", seed) for seed in range(9)))

    def payload(index: int, part: int) -> tuple[float, ...]:
        return tuple(numbered_inputs(case, index, 0, routing, CPU, part, 0).rows[:, 4:].flatten().tolist())

    most = SEQUENCE_REPLAYS + MAX_STEPS  # parts of the replays of a sequence
    assert max(MAX_ROUNDS, most) <= PARTS
    drawn = {payload(index, part) for index in range(9) for part in (*range(0, PARTS, 64), most - 1)}
    assert len(drawn) == 9 * 9
    with pytest.raises(ValueError, match="part is 512; a seed has parts 0 to 511"):
        payload(0, PARTS)


@pytest.mark.parametrize("kind", ["integers", "normal", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_overflows_or_turns_subnormal(kind: Values, dtype: str) -> None:
    """Devices may flush subnormals; neither inputs nor answers nor their differences reach them."""
    of = cell(1, 8, 8, dtype)
    for seed in range(8):
        inputs = draw(of, ((tuple(range(8)),) * 64,), values=kind, seed=seed)
        answers = LocalExperts(of, 0, CPU)(inputs.rows, inputs.ids, inputs.weights)
        for tensor in (inputs.rows, answers):
            size = tensor.float().abs()
            assert bool(size.isfinite().all())
            assert float(size.max()) < 2.0**60
            # A difference of two numbers is a multiple of the smaller one's last place, 2**-24 of it.
            assert float(size[size > 0].min()) > 2.0**-90


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact_at_the_extreme(dtype: str) -> None:
    """16 slots on one rank, the largest coefficients, tags of 255 everywhere, odd sixteenths as weights."""
    of = cell(1, 793, 16, dtype)
    steepest = max(coefficients(e)[0] for e in range(793))
    largest = [e for e in range(793) if coefficients(e)[0] == steepest][-16:]
    ids = torch.tensor([largest, largest[::-1]], dtype=torch.int32)
    for rows in (torch.full((2, 24), 255.0), torch.full((2, 24), -255.0)):
        for weights in (torch.ones(2, 16), torch.arange(1.0, 33.0).reshape(2, 16) % 16 / 16 + 1 / 16):
            got = LocalExperts(of, 0, CPU)(rows, ids, weights)  # float32 rows: nothing is stored narrower
            parts = [weights[:, j : j + 1] * dense_experts(ids[:, j], rows.double()) for j in range(16)]
            assert torch.equal(got.double(), sum(parts[1:], parts[0]))
            assert torch.equal((got / INTEGER_GRID).round() * INTEGER_GRID, got)


def test_integers_stay_within_24_bits_for_every_model_and_ep_size() -> None:
    """A slot adds at most 255 a + |b|, and the slots of a token are shared by its ranks, so no EP size matters."""
    per_slot = max(a * 255 + abs(b) for a, b in map(coefficients, range(793)))
    slots = max(16, *(shape.top_k for shape in model_shapes().values()))
    stored = 1 + 2.0**-8  # each rank's answer and each node's sum may round up
    assert slots * per_slot * stored**2 <= INTEGER_GRID * 2.0**24
    assert max(shape.experts for shape in model_shapes().values()) <= 793


def test_weights_summed_over_64_ranks_are_exact() -> None:
    sixteenths = torch.arange(1, 17) / 16
    for ranks in range(1, 65):
        total = torch.zeros(16)
        for _ in range(ranks):
            total = total + sixteenths
        assert torch.equal(total, ranks * sixteenths)
        assert torch.equal(total.double(), ranks * sixteenths.double())


def test_experts_are_distinct() -> None:
    pairs = [coefficients(e) for e in range(793)]
    assert len(set(pairs)) == 793
    assert coefficients(793) == coefficients(0)
    want = torch.tensor([[a * 2.5 + b] for a, b in pairs])
    assert torch.equal(dense_experts(torch.arange(793), torch.full((793, 1), 2.5)), want)


def test_no_expert_is_the_identity() -> None:
    assert (1, 0) not in [coefficients(e) for e in range(793)]


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_local_experts_add_up_to_the_dense_formula(placement: Placement, dtype: str, world_size: int) -> None:
    of = cell(world_size, 8, 3, dtype, placement=placement)
    names = [[(3 * t + j * j) % 9 - 1 for j in range(3)] for t in range(40)]
    routing: Rows = (tuple(map(tuple, names)), *((),) * (world_size - 1))
    inputs = draw(of, routing)
    rows = inputs.rows.float()  # float32 answers: compare before any store
    got = sum(LocalExperts(of, rank, CPU)(rows, inputs.ids, inputs.weights) for rank in range(world_size))
    want = torch.zeros(40, 24, dtype=torch.float64)
    for slot in range(3):
        name = torch.tensor([row[slot] for row in names])
        term = inputs.weights[:, slot : slot + 1] * dense_experts(name, rows.double())
        want += torch.where(name.unsqueeze(1) >= 0, term, 0.0)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("kind", get_args(Values))
def test_a_single_wrong_expert_always_shows(kind: Values) -> None:
    """Every other expert in every slot, as stored in bfloat16."""
    experts = 61
    of = cell(1, experts, 2)
    inputs = draw(of, (((7, 20),),), values=kind)
    right = LocalExperts(of, 0, CPU)(inputs.rows, inputs.ids, inputs.weights)
    for slot in range(2):
        ids = inputs.ids.repeat(experts, 1)
        ids[:, slot] = torch.arange(experts)
        got = LocalExperts(of, 0, CPU)(inputs.rows.repeat(experts, 1), ids, inputs.weights.repeat(experts, 1))
        same = (got == right).all(1).nonzero().flatten().tolist()
        assert same == [int(inputs.ids[0, slot])]
    dropped = inputs.ids.clone()
    dropped[0, 1] = -1
    assert not torch.equal(LocalExperts(of, 0, CPU)(inputs.rows, dropped, inputs.weights), right)


def test_undefined_rows_never_fault() -> None:
    of = cell(2, 8, 2)
    ids = torch.tensor([[-(2**31), 2**31 - 1], [8, -1], [0, 7]], dtype=torch.int32)
    got = LocalExperts(of, 0, CPU)(torch.ones(3, 24), ids, torch.tensor([[torch.nan] * 2, [torch.inf] * 2, [1.0, 1.0]]))
    assert got[:2].tolist() == [[0.0] * 24] * 2
    assert got[2].tolist() == [2 - 30.0] * 24


def test_random_bits_hold_what_arithmetic_never_makes() -> None:
    rows = draw(cell(1, 8, 8, "bfloat16"), ((tuple(range(8)),) * 512,), values="bits").rows[:, 4:]
    size = rows.float().abs()
    assert bool(rows.isnan().any())
    assert bool(((size > 0) & (size < 2.0**-126)).any())


def test_stamps_tell_rounds_and_runs_apart() -> None:
    stamps = [stamp_of(index, run) for run in range(16) for index in range(16)]
    assert sorted(stamps) == list(range(256))
