"""The judge of one round, without ranks: each corruption is named by its check and placed, a clean round passes.

Scope: conformance/rank/judge.py on tensors built here. A pass proves nothing about how the tensors came to be; the
fault backends do that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from accelerated.contract import CombineKernels, Contract, MaskedSlots, ReceiveLayout, RowOrder
from conformance.engine.protocol import Mismatch
from conformance.rank.inputs import Inputs, row_tags
from conformance.rank.judge import (
    Delivered,
    ExpectedResult,
    ExpectedRows,
    Observed,
    judge_combine,
    judge_dispatch,
    judge_inputs,
    judge_kernel,
    same_bits,
)
from reference.intervals import Interval

ROUND = 3
#: (source rank, token) of the rows this rank must receive.
KEYS = [(0, 1), (0, 300), (1, 0), (2, 5), (2, 6)]
ROOM, HIDDEN, TOP_K = 8, 6, 2


def contract(order: RowOrder = RowOrder.ANY, weights: bool = True) -> Contract:
    return Contract(ReceiveLayout.DENSE_ROWS, order, MaskedSlots.DROPPED, combines_weights=weights)


@dataclass
class RoundSeen:
    """One round as observed and as expected."""

    seen: Observed
    rows: ExpectedRows
    result: ExpectedResult

    def judge(self, declared: Contract | None = None) -> Mismatch | None:
        declared = declared or contract()
        return (
            judge_dispatch(ROUND, self.seen, self.rows, declared)
            or judge_combine(ROUND, self.seen, self.result, declared)[0]
            or judge_inputs(ROUND, self.seen.inputs, copy.deepcopy(PRISTINE))
        )


def _rows(keys: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    tags = torch.cat([row_tags(rank, torch.tensor([token]), ROUND) for rank, token in keys]).float()
    payload = torch.arange(len(keys) * (HIDDEN - 4)).reshape(len(keys), -1) * 0.5
    return torch.cat([tags, payload], dim=1).to(dtype)


PRISTINE = Inputs(_rows([(1, 0), (1, 1)], torch.float32), torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2))


def a_round(dtype: torch.dtype = torch.bfloat16, order: list[int] | None = None) -> RoundSeen:
    """A clean round; ``order`` is the position of each received row among the keys."""
    order = order if order is not None else [3, 0, 4, 2, 1]
    rows = _rows(KEYS, dtype)
    ids = torch.arange(len(KEYS) * TOP_K, dtype=torch.int32).reshape(-1, TOP_K)
    weights = torch.arange(len(KEYS) * TOP_K).reshape(-1, TOP_K) / 16
    where = torch.tensor(KEYS)
    tail = ROOM - len(order)
    observed = Observed(
        torch.cat([rows[order], torch.full((tail, HIDDEN), torch.nan, dtype=dtype)]),
        torch.cat([ids[order], torch.full((tail, TOP_K), -7, dtype=torch.int32)]),
        torch.cat([weights[order], torch.full((tail, TOP_K), torch.nan)]),
        torch.tensor([len(order)], dtype=torch.int32),
        where[order].clone(),
        torch.tensor([[1.0, 2.0, -4.0], [0.0, 8.0, 16.0]], dtype=dtype),
        torch.tensor([[0.5, 0.25], [0.0, 1.0]]),
        copy.deepcopy(PRISTINE),
        source_map_promised=True,
    )
    value = observed.output.double()
    acceptance = Interval(value.clone(), value - value.abs() / 8, value + value.abs() / 8)
    result = ExpectedResult(acceptance, torch.tensor([[0.5, 0.25], [0.0, 1.0]]), dtype)
    return RoundSeen(observed, ExpectedRows(where, rows, ids, weights), result)


def set_row(name: str, target: int, source: int) -> Callable[[Observed], None]:
    """Corruption: received row ``target`` becomes a copy of row ``source``."""

    def corrupt(seen: Observed) -> None:
        tensor = getattr(seen, name)
        tensor[target] = tensor[source].clone()

    return corrupt


def set_value(name: str, place: tuple[int, ...], value: float) -> Callable[[Observed], None]:
    def corrupt(seen: Observed) -> None:
        getattr(seen, name)[place] = value

    return corrupt


def set_field(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Observed], None]:
    def corrupt(seen: Observed) -> None:
        setattr(seen, name, make(getattr(seen, name)))

    return corrupt


def set_input(name: str) -> Callable[[Observed], None]:
    def corrupt(seen: Observed) -> None:
        getattr(seen.inputs, name)[1, 1] += 1

    return corrupt


def flip_sign_of_zero(seen: Observed) -> None:
    seen.rows[1, 4] = -0.0  # key (0, 1) carries payload 0.0


def flip_lowest_bit(seen: Observed) -> None:
    seen.rows.view(torch.int16)[4, 5] ^= 1


def swap_payloads(seen: Observed) -> None:
    seen.rows[[0, 2], 4:] = seen.rows[[2, 0], 4:]


def swap_rows_only(seen: Observed) -> None:
    seen.rows[[0, 2]] = seen.rows[[2, 0]]


#: Received order: (2, 5) (0, 1) (2, 6) (1, 0) (0, 300). name: corruption, check, part of the message, coordinates.
CORRUPTIONS: dict[str, tuple[Callable[[Observed], None], str, str, dict[str, int]]] = {
    "missing and doubled": (
        set_row("rows", 1, 0),
        "dispatch.rows",
        "missing (rank 0, token 1, round 3); more than once (rank 2, token 5, round 3)",
        {},
    ),
    "stale": (set_value("rows", (1, 3), 2), "dispatch.rows", "from another round (rank 0, token 1, round 2)", {}),
    "foreign": (set_value("rows", (1, 1), 9), "dispatch.rows", "not expected here (rank 0, token 9, round 3)", {}),
    "unreadable": (set_value("rows", (1, 0), 0.5), "dispatch.rows", "1 rows without a readable tag", {}),
    "nan tag": (set_value("rows", (1, 0), torch.nan), "dispatch.rows", "1 rows without a readable tag", {}),
    "all poison": (set_field("rows", lambda t: t * torch.nan), "dispatch.rows", "5 rows without a readable", {}),
    "count too small": (set_value("count", (0,), 4), "dispatch.count", "missing (rank 0, token 300, round 3)", {}),
    "count too big": (
        set_value("count", (0,), 6),
        "dispatch.count",
        "received 6 rows in a buffer of 8, expected 5",
        {},
    ),
    "count beyond the buffer": (set_value("count", (0,), 2**31 - 1), "dispatch.count", "buffer of 8, expected 5", {}),
    "count negative": (set_value("count", (0,), -1), "dispatch.count", "received -1 rows", {}),
    "count zero": (set_value("count", (0,), 0), "dispatch.count", "and 2 more", {}),
    "buffer too short": (set_field("rows", lambda t: t[:4]), "dispatch.ids", "buffer of 4 rows", {}),
    "rows too wide": (set_field("rows", lambda t: t.repeat(1, 2)), "dispatch.payload", "received [8, 12]", {}),
    "rows of another type": (set_field("rows", lambda t: t.float()), "dispatch.payload", "torch.float32", {}),
    "ids of another type": (set_field("ids", lambda t: t.long()), "dispatch.ids", "torch.int64", {}),
    "weights one slot short": (set_field("weights", lambda t: t[:, :1]), "dispatch.weights", "received [8, 1]", {}),
    "payload swapped": (swap_payloads, "dispatch.payload", "4 of 30", {"source_rank": 2, "token": 5, "element": 4}),
    "one bit": (flip_lowest_bit, "dispatch.payload", "1 of 30", {"source_rank": 0, "token": 300, "element": 5}),
    "minus zero": (flip_sign_of_zero, "dispatch.payload", "1 of 30", {"source_rank": 0, "token": 1, "element": 4}),
    "ids of another row": (
        set_row("ids", 0, 1),
        "dispatch.ids",
        "2 of 10",
        {"source_rank": 2, "token": 5, "element": 0},
    ),
    "one weight": (
        set_value("weights", (3, 1), 9),
        "dispatch.weights",
        "1 of 10",
        {"source_rank": 1, "token": 0, "element": 1},
    ),
    "rows without their ids": (swap_rows_only, "dispatch.ids", "4 of 10", {"source_rank": 2, "token": 5}),
    "source map wrong": (set_value("source_map", (2, 1), 5), "dispatch.source_map", "row 2 carries the tag (2, 6)", {}),
    "source map short": (set_field("source_map", lambda t: t[:4]), "dispatch.source_map", "has 4 entries for 5", {}),
    "source map missing": (set_field("source_map", lambda t: None), "dispatch.source_map", "promises", {}),
    "output nan": (set_value("output", (1, 0), torch.nan), "combine.output", "1 elements", {"token": 1, "element": 0}),
    "output infinite": (set_value("output", (0, 2), -torch.inf), "combine.output", "1 el", {"token": 0, "element": 2}),
    "one unit outside": (
        set_value("output", (1, 1), 9 + 2.0**-4),
        "combine.output",
        "(first token 1)",
        {"token": 1, "element": 1},
    ),
    "not quite zero": (set_value("output", (1, 0), 2.0**-133), "combine.output", "1 el", {"token": 1, "element": 0}),
    "output too long": (set_field("output", lambda t: t.repeat(2, 1)), "combine.output", "combine returned [4, 3]", {}),
    "output too precise": (set_field("output", lambda t: t.float()), "combine.output", "torch.float32", {}),
    "weights missing": (set_field("combined_weights", lambda t: None), "combine.weights", "none came back", {}),
    "a combined weight": (
        set_value("combined_weights", (1, 1), 1 + 2.0**-23),
        "combine.weights",
        "1 of 4",
        {"token": 1, "slot": 1},
    ),
    "combined weight nan": (
        set_value("combined_weights", (0, 1), torch.nan),
        "combine.weights",
        "1 of 4",
        {"token": 0, "slot": 1},
    ),
    "combined weights short": (set_field("combined_weights", lambda t: t[:1]), "combine.weights", "weights [1, 2]", {}),
    "combined weights wide": (set_field("combined_weights", lambda t: t.double()), "combine.weights", "float64", {}),
    "input rows": (set_input("rows"), "inputs.modified", "input rows", {}),
    "input ids": (set_input("ids"), "inputs.modified", "input ids", {}),
    "input weights": (set_input("weights"), "inputs.modified", "input weights", {}),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_named_and_placed(name: str) -> None:
    corrupt, check, message, coordinates = CORRUPTIONS[name]
    one = a_round()
    assert one.judge() is None
    corrupt(one.seen)
    found = one.judge()
    assert found is not None
    assert (found.check, found.round) == (check, ROUND)
    assert message in found.message
    for place, want in coordinates.items():
        assert getattr(found, place) == want, place
    assert found.text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_clean_round_passes_in_any_order(dtype: torch.dtype) -> None:
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [3, 0, 4, 2, 1]):
        one = a_round(dtype, order)
        assert one.judge() is None
        assert judge_combine(ROUND, one.seen, one.result, contract()) == (None, 0.0)


def test_the_ratio_of_an_accepted_error_is_reported() -> None:
    one = a_round(torch.float32)
    one.seen.output[1, 2] += 1
    assert judge_combine(ROUND, one.seen, one.result, contract()) == (None, 0.5)


def test_nan_payload_passes_bit_for_bit_and_fails_by_one_bit() -> None:
    one = a_round(torch.float32)
    one.rows.rows.view(torch.int32)[0, 5] = one.seen.rows.view(torch.int32)[1, 5] = 0x7FC00001
    assert one.judge() is None
    one.seen.rows.view(torch.int32)[1, 5] = 0x7FC00002
    found = one.judge()
    assert found is not None
    assert (found.check, found.source_rank, found.token, found.element) == ("dispatch.payload", 0, 1, 5)


def test_promised_order() -> None:
    grouped, ascending = contract(RowOrder.GROUPED_BY_SOURCE_RANK), contract(RowOrder.SOURCE)
    within = a_round(order=[1, 0, 2, 4, 3])
    assert within.judge(grouped) is None
    found = within.judge(ascending)
    assert found is not None
    assert (found.check, found.message.split(" ")[:2]) == ("dispatch.order", ["row", "1"])
    across = a_round(order=[0, 1, 3, 2, 4]).judge(grouped)
    assert across is not None
    assert across.check == "dispatch.order"
    assert a_round(order=[0, 1, 2, 3, 4]).judge(ascending) is None


def test_what_the_contract_does_not_promise_is_not_asked_for() -> None:
    one = a_round()
    one.seen.combined_weights = one.seen.source_map = None
    one.seen.source_map_promised = False
    assert one.judge(contract(weights=False)) is None


def test_nothing_received_and_nothing_sent() -> None:
    one = a_round(order=[])
    seen, rows, want = one.seen, one.rows, one.result.output
    assert rows.weights is not None
    empty = ExpectedRows(rows.keys[:0], rows.rows[:0], rows.ids[:0], rows.weights[:0])
    assert judge_dispatch(ROUND, seen, empty, contract(RowOrder.SOURCE)) is None
    seen = replace(seen, output=seen.output[:0], combined_weights=torch.empty(0, 2))
    none = ExpectedResult(Interval(want.value[:0], want.lower[:0], want.upper[:0]), torch.empty(0, 2), torch.bfloat16)
    assert judge_combine(ROUND, seen, none, contract()) == (None, 0.0)


def test_same_bits() -> None:
    zero = torch.zeros(2, 1)
    assert same_bits(zero, torch.zeros(2).as_strided((2, 1), (1, 0)))  # counts as contiguous
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert not same_bits(zero, torch.zeros(2, 2))
    assert same_bits(torch.empty(0, 3), torch.empty(0, 3))
    assert same_bits(torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().contiguous())


def a_special_round() -> RoundSeen:
    """A clean round with scales, a count per expert and a codec whose absence would add 1/4 to everything."""
    one = a_round()
    scales = torch.arange(len(KEYS) * 3, dtype=torch.uint8).reshape(-1, 3)
    one.rows.scales, one.rows.expert_count = scales, torch.tensor([2, 0, 5], dtype=torch.int32)
    one.seen.scales = torch.cat([scales[[3, 0, 4, 2, 1]], scales.new_full((3, 3), 255)])
    one.seen.expert_count = one.rows.expert_count.clone()
    point = one.result.output.value
    one.result.output = Interval(point, point, point)
    one.result.otherwise = lambda: Interval(point + 0.25, point + 0.25, point + 0.25)
    one.result.swapped = "the codec did not run"
    return one


@pytest.mark.parametrize(
    ("corrupt", "check", "message"),
    [
        (set_row("scales", 2, 0), "dispatch.scales", "3 of 15"),
        (set_field("scales", lambda t: t[:, :2]), "dispatch.scales", "received [8, 2]"),
        (set_value("expert_count", (1,), 1), "dispatch.expert_count", "local expert 1 is counted in 1 received slots"),
        (set_field("output", lambda t: t + 0.25), "combine.codec", "the codec did not run: 6 elements of 2 tokens"),
        (set_value("output", (0, 1), 2.25), "combine.output", "1 elements of 1 tokens"),
    ],
)
def test_what_is_beside_rows_is_judged(corrupt: Callable[[Observed], None], check: str, message: str) -> None:
    one = a_special_round()
    assert one.judge() is None
    corrupt(one.seen)
    found = one.judge()
    assert found is not None
    assert found.check == check
    assert message in found.message


def test_weights_that_are_not_dispatched_are_not_judged() -> None:
    one = a_special_round()
    one.rows.weights = None
    one.seen.weights[:] = torch.nan
    one.seen.combined_weights = None
    assert one.judge(contract(weights=False)) is None


def test_changed_input_scales_are_named() -> None:
    handed, pristine = copy.deepcopy(PRISTINE), copy.deepcopy(PRISTINE)
    handed.scales, pristine.scales = torch.zeros(2, 3), torch.zeros(2, 3)
    assert judge_inputs(ROUND, handed, pristine) is None
    handed.scales = handed.scales + 1
    found = judge_inputs(ROUND, handed, pristine)
    assert found is not None
    assert "input scales" in found.message


def test_the_room_of_received_tensors_is_the_promised_one() -> None:
    one = a_round()
    for room, check in ((None, None), (ROOM, None), (2 * ROOM, "dispatch.room"), (ROOM - 1, "dispatch.room")):
        found = replace(one, rows=replace(one.rows, room=room)).judge()
        assert (found.check if found else None) == check
    found = replace(one, rows=replace(one.rows, room=2 * ROOM)).judge()
    assert found is not None
    assert (found.got, found.wanted) == (str(ROOM), str(2 * ROOM))


def test_the_kernel_that_ran_is_the_contract_s() -> None:
    seen = a_round().seen  # its output has rows of three elements
    for fast, kernel, right in (
        ((), "", True),
        ((), "generic", True),
        ((), "fast", False),
        (((3, "fast"),), "fast", True),
        (((3, "fast"),), "generic", False),
        (((4, "fast"),), "fast", False),
    ):
        declared = replace(contract(), kernels=CombineKernels("generic", fast))
        found = judge_kernel(ROUND, replace(seen, kernel=kernel), declared)
        assert (found is None) == right
        assert found is None or found.check == "combine.kernel"
    assert judge_kernel(ROUND, replace(seen, kernel="any"), contract()) is None, "the contract names none"


@pytest.mark.parametrize("order", [[3, 0, 4, 2, 1], [3, 4, 0, 2, 1], [0, 1, 2, 3, 4]])
def test_a_replay_delivers_where_the_dispatch_did(order: list[int]) -> None:
    again = a_round()
    first = a_round(order=order).seen
    first.rows[:, 3] = 9  # the stamp of another dispatch
    first.rows[:, 4:] = torch.nan
    again.seen.repeated = Delivered(first.rows, first.count)
    found = again.judge()
    if order == [3, 0, 4, 2, 1]:
        assert found is None, found.text()
        return
    assert found is not None
    row, moved = (1, 2) if order[0] == 3 else (0, 5)
    now, then = KEYS[[3, 0][row]], KEYS[order[row]]
    assert (found.check, found.source_rank, found.token) == ("dispatch.places", *now), found.text()
    assert f"{moved} of 5 rows are in other places" in found.text()
    assert f"row {row}, (source rank, token) {then} then" in found.text()


def test_a_replay_of_fewer_rows() -> None:
    again = a_round()
    first = a_round().seen
    again.seen.repeated = Delivered(first.rows, first.count - 1)
    found = again.judge()
    assert found is not None
    assert (found.check, found.got, found.wanted) == ("dispatch.places", "5", "4")
