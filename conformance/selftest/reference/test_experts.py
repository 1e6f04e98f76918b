"""What the experts compute: against the definition in float64, by hand, and what contributes nothing.

Scope: semantics of ids, slots, weights, biases and activations on one rank. The width of the acceptance is
test_expert_bounds.py's. A pass proves nothing about a library.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from reference import activations
from reference.expert_gemm import Dense
from reference.expert_numerics import SWIGLU_ALPHA, Activation, ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.experts import accepted, forward
from reference.formats import BFLOAT16
from reference.intervals import FLOAT32_NORMAL, Interval

HIDDEN, INTER, GLOBAL, ROWS, TOP_K = 24, 16, 6, 30, 3
_SLOT_OF = torch.tensor([2, -1, 0, 1, -1, 3])
_PLAIN = ExpertNumerics()


def _weights(seed: int = 0, *, biased: bool = False, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(4, 2 * INTER, HIDDEN, generator=generator) / 4
    w2 = torch.randn(4, HIDDEN, INTER, generator=generator) / 4
    if not biased:
        return ExpertWeights(w1.to(dtype), w2.to(dtype))
    bias1, bias2 = (torch.randn(4, n, generator=generator) for n in (2 * INTER, HIDDEN))
    return ExpertWeights(w1.to(dtype), w2.to(dtype), bias1=bias1, bias2=bias2)


def _single_terms() -> ExpertWeights:
    """Matrices with one element in each row: no sum whose order a library may choose by the number of rows."""
    full = _weights()
    first, second = (torch.arange(n)[:, None] % k == torch.arange(k) for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER)))
    return ExpertWeights(full.w1 * first, full.w2 * second)


def _assert_same(found: Interval, wanted: Interval) -> None:
    """Bit for bit."""
    for end in ("value", "lower", "upper"):
        assert torch.equal(getattr(found, end), getattr(wanted, end)), end


def _inputs(seed: int = 0, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, HIDDEN, generator=generator)
    ids = torch.randint(-2, GLOBAL + 3, (ROWS, top_k), generator=generator).int()
    return rows, ids, torch.randn(ROWS, top_k, generator=generator)


def _f(gate: torch.Tensor, up: torch.Tensor, numerics: ExpertNumerics) -> torch.Tensor:
    limit = math.inf if numerics.limit is None else numerics.limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if numerics.activation is Activation.GELU:
        return gate * (1 + torch.erf(gate / math.sqrt(2.0))) / 2 * up
    if numerics.activation is Activation.SWIGLU:
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    return gate / (1 + torch.exp(-gate)) * up


def _definition(
    rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, local: ExpertWeights, numerics: ExpertNumerics
) -> torch.Tensor:
    """Token by token, slot by slot, in float64, without any rounding."""
    out = torch.zeros(rows.shape, dtype=torch.float64)
    stage = numerics.weight_stage
    for m, names in enumerate(ids.tolist()):
        for j, name in enumerate(names):
            slot = int(_SLOT_OF[name]) if 0 <= name < GLOBAL else -1
            if slot < 0:
                continue
            weight = weights[m, j].double()
            x = rows[m].double() * (weight if stage is WeightStage.ON_INPUT else 1.0)
            product = local.w1[slot].double() @ x
            if local.bias1 is not None:
                product = product + local.bias1[slot].double()
            if stage is WeightStage.BEFORE_ACTIVATION:
                product = product * weight
            y = local.w2[slot].double() @ _f(product[:INTER], product[INTER:], numerics)
            if local.bias2 is not None:
                y = y + local.bias2[slot].double()
            out[m] += y * (weight if stage is WeightStage.AFTER_W2 else 1.0)
    return out


def _accepted(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights | Dense,
    numerics: ExpertNumerics = _PLAIN,
    dtype: torch.dtype = torch.float32,
) -> Interval:
    return accepted(Interval.exact(rows), ids, weights, local, _SLOT_OF, numerics, dtype)


@pytest.mark.parametrize("stage", list(WeightStage))
@pytest.mark.parametrize(
    ("activation", "limit", "biased"),
    [
        (Activation.SILU, None, False),
        (Activation.SILU, 0.5, False),
        (Activation.GELU, None, True),
        (Activation.SWIGLU, 1.0, True),
    ],
)
def test_the_definition(activation: Activation, limit: float | None, biased: bool, stage: WeightStage) -> None:
    if stage is WeightStage.BEFORE_ACTIVATION and biased:
        biased = False
    numerics = ExpertNumerics(activation=activation, limit=limit, weight_stage=stage)
    rows, ids, weights = _inputs(top_k=1 if stage is WeightStage.ON_INPUT else TOP_K)
    if stage is WeightStage.ON_INPUT:
        # A product of two bfloat16 numbers is a float32 number.
        rows, weights = rows.bfloat16().float(), weights.bfloat16().float()
    local = _weights(biased=biased)
    wanted = _definition(rows, ids, weights, local, numerics)
    found = _accepted(rows, ids, weights, local, numerics)
    assert float(found.error_over_bound(wanted.float()).max()) <= 1
    # The declared value is the definition, stored: off by half a unit, 2**-24. What float64 rounds in either, the
    # acceptance counts on both sides in units of 2**-24 or more, which are 2**29 times float64's.
    float64 = 2.0**-29 * (found.upper - found.lower)
    assert bool(((found.value - wanted).abs() <= 2.0**-24 * wanted.abs() + float64).all())
    result = forward(rows, ids, weights, local, _SLOT_OF, numerics, torch.float32)
    assert float(found.error_over_bound(result).max()) <= 1


@pytest.mark.parametrize("slot_sum", list(SlotSum))
def test_small_integers_have_one_result(slot_sum: SlotSum) -> None:
    """Sums of integers are exact in any order; a gate of 64 has a sigmoid of one; the store rounds what is left."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-4, 5, (ROWS, HIDDEN), generator=generator).bfloat16()
    x[:, 0] = 1.0
    w1 = torch.randint(-1, 2, (4, 2 * INTER, HIDDEN), generator=generator).bfloat16()
    w1[:, :INTER] = 0.0
    w1[:, :INTER, 0] = 64.0
    w2 = torch.randint(-2, 3, (4, HIDDEN, INTER), generator=generator).bfloat16()
    ids = torch.randint(-1, GLOBAL, (ROWS, 4), generator=generator)
    weights = torch.randint(-2, 3, ids.shape, generator=generator).float() / 2
    numerics = ExpertNumerics(intermediate_store=BFLOAT16, slot_sum=slot_sum)
    local = ExpertWeights(w1, w2)
    found = _accepted(x, ids, weights, local, numerics, torch.float32)
    up = torch.einsum("mh,sih->msi", x.double(), w1[:, INTER:].double())
    experts = torch.einsum("msi,shi->msh", 64 * up, w2.double())
    slots = torch.where((ids >= 0) & (ids < GLOBAL), _SLOT_OF[ids.clamp(0, GLOBAL - 1)], -1)
    wanted = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    for j in range(4):
        chosen = experts[torch.arange(ROWS), slots[:, j].clamp(min=0)]
        wanted += torch.where(slots[:, j : j + 1] >= 0, weights[:, j : j + 1] * chosen, 0.0)
    assert torch.equal(found.value, wanted)
    assert torch.equal(found.lower, wanted)
    assert torch.equal(found.upper, wanted)
    assert torch.equal(forward(x, ids, weights, local, _SLOT_OF, numerics, torch.float32).double(), wanted)


def test_what_contributes_nothing() -> None:
    rows, _, weights = _inputs()
    local = _single_terms()
    nothing = torch.tensor([[-1, 1, 4], [6, 100, -7], [2**31 - 1, -(2**31), 1]])
    found = _accepted(rows[:3], nothing, weights[:3], local)
    assert not bool(found.value.any() or found.lower.any() or found.upper.any())
    alone = torch.tensor([[0, -1, 4], [-1, 0, 100], [1, 4, 0]])
    single = _accepted(rows[:3], torch.zeros(3, 1), torch.diagonal(weights[:3])[[0, 1, 2]][:, None], local)
    assert bool(single.value.any())
    _assert_same(_accepted(rows[:3], alone, weights[:3], local), single)


def test_a_weight_of_zero_contributes_zero_and_hides_no_nan() -> None:
    rows, _, _ = _inputs()
    local = _single_terms()
    # Of three terms of which one is not zero, no addition rounds.
    ids, weights = torch.tensor([[0, 2, 3], [0, 0, 0]]), torch.tensor([[0.0, 2.0, 0.0], [0.0, -0.0, 0.0]])
    found = _accepted(rows[:2], ids, weights, local)
    other = _accepted(rows[:1], ids[:1, 1:2], weights[:1, 1:2], local)
    _assert_same(found.apply(lambda end: end[:1]), other)
    assert not bool(found.lower[1].any() or found.upper[1].any())
    broken = replace(local, w2=local.w2.clone())
    broken.w2[2] = torch.inf
    for out in (
        _accepted(rows[:2], ids, weights, broken).value,
        forward(rows[:2], ids, weights, broken, _SLOT_OF, _PLAIN, torch.float32),
    ):
        assert bool(out.isnan().all())


def test_an_id_named_twice_counts_twice() -> None:
    rows, _, _ = _inputs()
    local, ids = _single_terms(), torch.tensor([[3, 3]])
    twice = _accepted(rows[:1], ids, torch.tensor([[0.5, 0.25]]), local)
    once = _accepted(rows[:1], ids[:, :1], torch.tensor([[0.75]]), local)
    # Half of a number and a quarter of it are exact, so float64 rounds both sides once.
    assert torch.equal(twice.value, once.value)
    zero = _accepted(rows[:1], ids, torch.tensor([[1.0, -1.0]]), local)
    assert bool((zero.value == 0).all())
    assert bool((zero.upper > 0).all())


@pytest.mark.parametrize("quantised", [False, True])
def test_a_row_of_nan_changes_no_other_row(quantised: bool) -> None:
    rows, ids, weights = _inputs()
    local = _weights()
    ids[4] = torch.tensor([0, 2, 3])
    bad = rows.clone()
    bad[4] = torch.nan
    bad[7, 3] = torch.inf
    others = [m for m in range(ROWS) if m not in (4, 7)]
    results = []
    for given in (rows, bad):
        found = accepted(
            Interval.exact(given), ids, weights, local, _SLOT_OF, _PLAIN, torch.float32, quantised=quantised
        )
        out = forward(given, ids, weights, local, _SLOT_OF, _PLAIN, torch.float32, quantised=quantised)
        results.append([part[others] for part in (found.value, found.lower, found.upper, out)])
        assert bool(found.value[4].isnan().all()) == (given is bad)
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_experts_that_no_row_names_are_never_read() -> None:
    rows, ids, weights = _inputs()
    ids[ids == 0] = -1
    local = _weights()
    poisoned = ExpertWeights(local.w1.clone(), local.w2.clone())
    poisoned.w1[2], poisoned.w2[2] = torch.nan, torch.nan
    assert torch.equal(_accepted(rows, ids, weights, local).upper, _accepted(rows, ids, weights, poisoned).upper)


@pytest.mark.parametrize("keep", [True, False])
def test_dense_weights_give_the_same(keep: bool) -> None:
    rows, ids, weights = _inputs()
    local = _weights(dtype=torch.bfloat16)
    dense = Dense(local, keep=keep)
    for _ in range(2):
        assert torch.equal(_accepted(rows, ids, weights, dense).lower, _accepted(rows, ids, weights, local).lower)
    assert (dense.matrices(1)[0] is dense.matrices(1)[0]) == keep


def test_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids, weights = _inputs()
    whole = _accepted(rows, ids, weights, _single_terms())
    monkeypatch.setattr("reference.experts._AT_ONCE", 8 * HIDDEN)
    _assert_same(_accepted(rows, ids, weights, _single_terms()), whole)


@pytest.mark.parametrize("shape", [(0, TOP_K), (2, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    rows, ids, weights = torch.ones(shape[0], HIDDEN), torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
    found = _accepted(rows, ids, weights, _weights(), dtype=torch.bfloat16)
    out = forward(rows, ids, weights, _weights(), _SLOT_OF, _PLAIN, torch.bfloat16)
    assert found.shape == out.shape == rows.shape
    assert out.dtype == torch.bfloat16
    assert not bool(out.any())


def test_refusals() -> None:
    rows, ids, weights = _inputs()
    cases: list[tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor], ExpertWeights, ExpertNumerics]] = [
        ("W1 takes [M, 24]", (rows[:, 1:], ids, weights), _weights(), _PLAIN),
        ("give [30, k] for both", (rows, ids[1:], weights), _weights(), _PLAIN),
        ("give [30, k] for both", (rows, ids, weights[:, 1:]), _weights(), _PLAIN),
        ("k is 3", (rows, ids, weights), _weights(), replace(_PLAIN, weight_stage=WeightStage.ON_INPUT)),
        (
            "W1 has a bias",
            (rows, ids, weights),
            _weights(biased=True),
            replace(_PLAIN, weight_stage=WeightStage.BEFORE_ACTIVATION),
        ),
    ]
    for text, (x, names, factors), local, numerics in cases:
        with pytest.raises(ValueError) as caught:
            _accepted(x, names, factors, local, numerics)
        assert text in str(caught.value)
        with pytest.raises(ValueError) as caught:
            forward(x, names, factors, local, _SLOT_OF, numerics, torch.float32)
        assert text in str(caught.value)


_KINDS = [(Activation.SILU, None), (Activation.GELU, None), (Activation.SWIGLU, 7.0), (Activation.SILU, 2.0)]


@pytest.mark.parametrize(("activation", "limit"), _KINDS)
def test_activations_reach_their_limits_without_nan(activation: Activation, limit: float | None) -> None:
    gate = torch.tensor([-1e30, -1e4, -745.0, -104.0, -88.8, -87.0, -1e-40, 0.0, 1e-40, 20.0, 88.8, 1e4, 1e30])
    up = torch.tensor([2.0, -2.0, 0.5]).repeat_interleave(len(gate))
    gate = gate.repeat(3)
    found = activations.accepted(Interval.exact(gate), Interval.exact(up), activation, limit, 8.0)
    result = activations.activate(gate, up, activation, limit)
    assert bool(result.isfinite().all())
    assert float(found.error_over_bound(result).max()) <= 1
    far = gate < -200 if activation is not Activation.GELU else torch.zeros_like(gate, dtype=torch.bool)
    assert bool((found.lower[far] <= 0).all())
    assert bool((found.upper[far] >= 0).all())
    # A sigmoid below float32's least normal number may come out as any up to it, and so may either product be off.
    reach = FLOAT32_NORMAL * (1 + gate.double().abs()) * (2 + up.double().abs())
    assert bool((torch.maximum(found.upper, -found.lower)[far] <= reach[far]).all())
    zero = gate == 0
    assert not bool(found.lower[zero].any() or found.upper[zero].any())


def test_the_roundings_of_products_are_counted() -> None:
    """With a sigmoid rounded correctly, the products err by as much again."""
    generator = torch.Generator().manual_seed(4)
    gate, up = torch.rand(200000, generator=generator) + 1, torch.rand(200000, generator=generator) + 1
    found = activations.accepted(Interval.exact(gate), Interval.exact(up), Activation.SILU, None, 0.5)
    result = gate * torch.sigmoid(gate.double()).float() * up
    # More than a bound without the products has: half a unit in the last place of the sigmoid, at most 2**-24 of it,
    # and its argument's two units, of which 0.28 reach it.
    assert float((result.double() / found.value - 1).abs().max()) > (1 + 2 * 0.28) * 2.0**-24
    assert float(found.error_over_bound(result).max()) <= 1


@pytest.mark.parametrize("slope", [1.0, 1.702])
def test_a_float32_exponential_of_a_rounded_argument_is_accepted(slope: float) -> None:
    """Its error grows with the argument: far from zero it is many units, whatever the exponential itself errs by."""
    gate = -torch.rand(20000, generator=torch.Generator().manual_seed(2)) * 84 / slope
    up = torch.ones_like(gate)
    activation = Activation.SILU if slope == 1 else Activation.SWIGLU
    shifted = up if slope == 1 else up - 1
    found = activations.accepted(Interval.exact(gate), Interval.exact(shifted), activation, 100.0, 2.0)
    result = gate * (1.0 / (1.0 + torch.exp2(gate * slope * -1.4426950408889634)))
    assert float(found.error_over_bound(result).max()) <= 1
    # A bound that did not grow would be that of a gate at 0: 2 units in the last place of the sigmoid, three products
    # or additions, and 0.28 of the argument's four units.
    assert float((result.double() / found.value - 1).abs().max()) > (2 * 2 + 3 + 4 * 0.28) * 2.0**-24


@pytest.mark.parametrize(("activation", "limit"), _KINDS)
@pytest.mark.parametrize("width", [1e-6, 1e-3, 0.1, 3.0])
def test_activations_of_intervals_hold_all_and_hardly_more(
    activation: Activation, limit: float | None, width: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    gate = torch.randn(4000, generator=generator).double() * 3
    ends = [gate - width * torch.rand(4000, generator=generator), gate + width * torch.rand(4000, generator=generator)]
    one = Interval.exact(torch.full_like(gate, 1.5))
    found = activations.accepted(Interval(gate, *ends), one, activation, limit, 1.0)
    numerics = ExpertNumerics(activation=activation, limit=limit)
    share = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    sampled = _f(ends[0] + share * (ends[1] - ends[0]), one.value, numerics)
    least, most = sampled.amin(0), sampled.amax(0)
    assert bool((found.lower <= least).all())
    assert bool((found.upper >= most).all())
    # In units of 2**-24: one unit in the last place of the function (2), three roundings, one for the second order.
    units, reach = torch.full_like(gate, 6.0), torch.maximum(-ends[0], ends[1])
    absolute = torch.zeros_like(gate)
    if activation is Activation.GELU:
        # Half of what the erf is off by, times gate and up: a unit of one, and less than half of its argument's two.
        absolute = (1 + 2 / 2) / 2 * reach * one.value
    else:
        # Four units of the argument x, of which a sigmoid sees 0.28 above 0 and as much as |x| below.
        units = units + 4 * (0.28 + (-SWIGLU_ALPHA * ends[0]).clamp(min=0))
    # The curves bend by at most half of SwiGLU's slope, up by 2.5: a sample may miss the minimum by half a step.
    missed = 2.5 * SWIGLU_ALPHA / 2 * ((ends[1] - ends[0]) / 800).square() / 2
    spare = (units * torch.maximum(least.abs(), most.abs()) + absolute) * 2.0**-24 + missed
    assert bool((least - found.lower <= spare).all())
    assert bool((found.upper - most <= spare).all())
