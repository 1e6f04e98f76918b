"""The acceptance intervals of the combine sum: sound against every legal order we can think of, and tight.

Scope: reference/bounds.py. Soundness is tested on at least 10,000 distinct sums per operation and on every order of few
terms; it is not proven by that, the derivation in the module is. Not covered: overflow and flushed subnormals.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from conformance.selftest.reference import adversary as adv
from conformance.selftest.reference.adversary import BFLOAT16, FLOAT32, Array
from reference.bounds import combine_acceptance
from reference.intervals import Interval
from reference.rounding import round_to
from reference.sums import gamma

OPERATIONS = [
    (dtype, nodes, element, grid)
    for dtype in (BFLOAT16, FLOAT32)
    for nodes, element in ((1, False), (2, False), (4, False), (1, True))
    for grid in (None, 2.0**-4)
]


def _bound(
    terms: Array, reached: Array, dtype: torch.dtype, nodes: int = 1, element: bool = False, grid: float | None = None
) -> Interval:
    options = {"nodes": nodes, "element_accumulation": element, "grid": grid}
    return combine_acceptance(torch.from_numpy(terms), torch.from_numpy(reached), dtype, **options)  # type: ignore[arg-type]


def _all_reached(terms: Array) -> Array:
    return np.ones((terms.shape[1], terms.shape[0]), bool)


def _ratio(bound: Interval, result: Array) -> float:
    return float(bound.error_over_bound(torch.from_numpy(np.ascontiguousarray(result))).max())


def _results(terms: Array, dtype: torch.dtype, nodes: int, element: bool, random: np.random.Generator) -> list[Array]:
    """Legal results of an operation, ``[n, H]`` float32 each."""
    if element and dtype == BFLOAT16:
        adds = (adv.add_bfloat16, adv.add_bfloat16_directly)
        return [total for add in adds for total in adv.orders(terms, add, random)]
    if nodes == 1:
        return [adv.representable(total, dtype) for total in adv.orders(terms, adv.add_float32, random)]
    by_node = terms.reshape(nodes, -1, *terms.shape[1:])
    per_node = [list(adv.orders(node, adv.add_float32, random)) for node in by_node]
    found = []
    for way in range(len(per_node[0])):
        # Another order on each node.
        picked = [adv.representable(sums[(way + i) % len(sums)], dtype) for i, sums in enumerate(per_node)]
        totals = list(adv.orders(np.stack(picked), adv.add_float32, random))
        found.append(adv.representable(totals[way], dtype))
    return found


@pytest.mark.parametrize(("dtype", "nodes", "element", "grid"), OPERATIONS)
def test_sound_for_every_order_we_know(dtype: torch.dtype, nodes: int, element: bool, grid: float | None) -> None:
    random = np.random.default_rng(7)
    cases, worst = 0, 0.0
    for ranks in [w for w in adv.RANKS if w % nodes == 0]:
        for name, drawn in adv.families(ranks, dtype, random):
            if grid is not None and name != "integers":
                continue
            for spared in np.linspace(0.0, 0.5, 2 if grid is None else 6):
                reached = random.random((adv.TOKENS, ranks)) >= spared
                terms = adv.representable(drawn, dtype) * reached.T[:, :, None].astype(np.float32)
                bound = _bound(terms, reached, dtype, nodes, element, grid)
                assert bool((bound.lower <= bound.value).all())
                assert bool((bound.value <= bound.upper).all())
                for result in _results(terms, dtype, nodes, element, random):
                    worst = max(worst, _ratio(bound, result))
                    assert worst <= 1.0, (ranks, name, spared)
                cases += terms[0].size
    assert cases >= 10_000  # distinct ones, each in every order
    # The adversary has teeth where rounding leaves room: multiples of the grid round in no float32 sum.
    exact = grid is not None and not (element and dtype == BFLOAT16)
    assert worst > 0.5 or (exact and worst == 0), worst


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_sound_for_all_permutations(dtype: torch.dtype, count: int) -> None:
    random = np.random.default_rng(count)
    for _, drawn in adv.families(count, dtype, random):
        terms = adv.representable(drawn, dtype)
        bound = _bound(terms, _all_reached(terms), dtype)
        element = _bound(terms, _all_reached(terms), dtype, element=True)
        for order in permutations(range(count)):
            one, each = terms[order[0]], terms[order[0]]
            for rank in order[1:]:
                one = adv.add_float32(one, terms[rank])
                each = (adv.add_bfloat16 if dtype == BFLOAT16 else adv.add_float32)(each, terms[rank])
            assert _ratio(bound, adv.representable(one, dtype)) <= 1
            assert _ratio(element, each) <= 1


def _first_then(count: int, *rest: float) -> Array:
    """Terms 1, the given ones, and the last of them again up to ``count``, ``[count, 1, 1]``."""
    column = [1.0, *rest] + [rest[-1]] * count
    return np.array(column[:count], np.float32).reshape(count, 1, 1)


def _in_turn(terms: Array, add: adv.Add) -> Array:
    return next(adv.orders(terms, add, np.random.default_rng()))


@pytest.mark.parametrize("count", range(3, 65))
def test_tight_for_every_number_of_terms(count: int) -> None:
    # 1 + 2**-24 in float32 and 1 + 2**-8 in bfloat16 are ties and go to 1, each time.
    lost, coarse = _first_then(count, 2.0**-24), _first_then(count, 2.0**-8)
    ratios = [
        _ratio(_bound(lost, _all_reached(lost), FLOAT32), _in_turn(lost, adv.add_float32)),
        _ratio(_bound(coarse, _all_reached(coarse), BFLOAT16, element=True), _in_turn(coarse, adv.add_bfloat16)),
    ]
    if count > 3:  # with three, the float32 rounding of the exact sum loses as much
        # The lost terms decide on which side of the midpoint 1 + 2**-8 the sum is stored.
        terms = _first_then(count, 2.0**-8, 2.0**-24)
        stored = adv.to_bfloat16(_in_turn(terms, adv.add_float32))
        ratios.append(_ratio(_bound(terms, _all_reached(terms), BFLOAT16), stored))
        padded = np.concatenate([terms, np.zeros_like(terms)])
        ratios.append(_ratio(_bound(padded, padded[:, :, 0].T > 0, BFLOAT16, nodes=2), stored))
    assert all(0.5 < ratio <= 1 for ratio in ratios), ratios


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_one_step_outside_is_rejected(dtype: torch.dtype) -> None:
    random = np.random.default_rng(3)
    for ranks in (1, 2, 3, 8, 64):
        for name, drawn in adv.families(ranks, dtype, random):
            terms = adv.representable(drawn, dtype)
            for nodes in [n for n in (1, 2) if ranks % n == 0]:
                bound = _bound(terms, _all_reached(terms), dtype, nodes)
                for end, away in ((bound.lower, -torch.inf), (bound.upper, torch.inf)):
                    assert bool((bound.error_over_bound(end) <= 1).all())
                    step = end.to(dtype)
                    assert torch.equal(step.double(), end), "the ends are numbers of the format"
                    outside = torch.nextafter(step, torch.full_like(step, away))
                    assert bool((bound.error_over_bound(outside) > 1).all()), (ranks, name, nodes)


@pytest.mark.parametrize(("dtype", "nodes", "element"), [op[:3] for op in OPERATIONS if op[3]])
def test_exact_data_have_one_result(dtype: torch.dtype, nodes: int, element: bool) -> None:
    random = np.random.default_rng(5)
    for ranks in (4, 8, 64):
        largest = 2 if element and dtype == BFLOAT16 else 255  # multiples that 8 bits hold even when summed
        terms = (random.integers(-largest, largest + 1, (ranks, 4, 32)) / 16).astype(np.float32)
        bound = _bound(terms, _all_reached(terms), dtype, nodes, element, grid=2.0**-4)
        exact = terms.astype(np.float64).reshape(nodes, -1, 4, 32).sum(1).astype(np.float32)
        levels = adv.representable(exact, dtype) if nodes > 1 else exact
        want = torch.from_numpy(adv.representable(levels.sum(0), dtype)).double()
        assert torch.equal(bound.lower, want)
        assert torch.equal(bound.upper, want)
        assert torch.equal(bound.value, want)


def test_grid_stops_where_the_significand_does() -> None:
    fits, exceeds = [2.0**19, 2.0**19 - 1, 0.0625], [2.0**20, 1.0, 0.0625]
    for values, width in ((fits, False), (exceeds, True)):
        terms = np.array(values, np.float32).reshape(3, 1, 1)
        bound = _bound(terms, _all_reached(terms), FLOAT32, grid=2.0**-4)
        assert bool((bound.upper > bound.lower).item()) is width


def test_two_terms_have_one_float32_sum() -> None:
    random = np.random.default_rng(9)
    for _, drawn in adv.families(2, FLOAT32, random):
        terms = drawn.astype(np.float32)
        bound = _bound(terms, _all_reached(terms), FLOAT32)
        assert torch.equal(bound.lower, bound.upper)
        assert torch.equal(bound.value, torch.from_numpy(terms[0] + terms[1]).double())


def test_truncation_and_coarse_accumulation_are_rejected() -> None:
    random = np.random.default_rng(11)
    terms = adv.to_bfloat16(random.standard_normal((8, 64, 64)))
    bound = _bound(terms, _all_reached(terms), BFLOAT16)
    exact = torch.from_numpy(terms.astype(np.float64).sum(0)).float()
    truncated = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    coarse = torch.from_numpy(next(adv.orders(terms, adv.add_bfloat16, random)))
    for wrong in (truncated, coarse):
        assert float((bound.error_over_bound(wrong) > 1).double().mean()) > 0.3
    assert float(bound.error_over_bound(round_to(exact, BFLOAT16)).max()) <= 1


def test_what_is_no_number_is_infinitely_wrong() -> None:
    bound = Interval(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.5, 1.5)))
    for result, want in (
        (torch.nan, torch.inf),
        (torch.inf, torch.inf),
        (1.0, 0.0),
        (1.25, 0.5),
        (2.0, 2.0),
        (0.5, 1.0),
    ):
        assert bound.error_over_bound(torch.tensor([result])).item() == want
    point = Interval(*(torch.zeros(1, dtype=torch.float64) for _ in range(3)))
    assert point.error_over_bound(torch.tensor([-0.0])).item() == 0
    assert point.error_over_bound(torch.tensor([2.0**-149])).item() == torch.inf


def test_helpers() -> None:
    assert gamma(torch.tensor([-1, 0, 4]), 0.125).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"^node levels are modelled for float32 accumulation only; pass nodes=1$"):
        combine_acceptance(torch.ones(2, 1, 1), torch.ones(1, 2) > 0, BFLOAT16, nodes=2, element_accumulation=True)
