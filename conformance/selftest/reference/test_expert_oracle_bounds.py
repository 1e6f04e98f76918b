"""The oracle of the experts against legal kernels, against defects, and against the reference.

Scope: reference/expert_oracle.py and reference/oracle_ranges.py: no legal kernel of legal_experts.py leaves the bounds,
every defect does, the specification's own execution is inside and its acceptance about as wide. What a pass does not
prove: that no legal kernel errs more than those drawn here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance.power_layer_faults import SCHEMES
from conformance.selftest.reference.adversary import Array
from conformance.selftest.reference.legal_experts import Kernel, experts_of, quantised
from conformance.selftest.reference.norm_adversary import to
from reference.codecs import STANDARD, Codec
from reference.expert_numerics import Activation, ExpertNumerics, SlotSum, WeightStage
from reference.expert_oracle import experts_expected, layer_expected
from reference.expert_weights import ExpertWeights
from reference.experts import accepted, forward
from reference.formats import BFLOAT16, FLOAT16
from reference.intervals import Interval
from reference.oracle import Expected
from reference.oracle_ranges import Range, requantised
from reference.quantisation import quantise

HIDDEN, MIDDLE, EXPERTS, TOP_K, RANKS = 128, 128, 8, 4, 4
OWNER = np.arange(EXPERTS) // (EXPERTS // RANKS)
NUMERICS = {
    **SCHEMES,
    "gelu": ExpertNumerics(activation=Activation.GELU),
    "limited silu": ExpertNumerics(limit=1.5, slot_sum=SlotSum.ROUNDED_TERMS),
    "swiglu": replace(SCHEMES["mxfp4"], activation=Activation.SWIGLU, limit=2.0, input_codec=None),
    "weight first": replace(SCHEMES["fp8_token"], weight_stage=WeightStage.BEFORE_ACTIVATION),
    "weight on input": replace(SCHEMES["fp8_block"], weight_stage=WeightStage.ON_INPUT),
    "stored product": ExpertNumerics(gemm1_store=BFLOAT16, intermediate_store=BFLOAT16, accumulator_ulps=0.5),
    "any neighbour": replace(SCHEMES["bf16"], gemm1_store=BFLOAT16, store_ulps=1.0),
    "split, bias late": ExpertNumerics(
        activation=Activation.SWIGLU,
        limit=2.0,
        weight_codec=STANDARD["mxfp4_even"],
        gemm1_store=BFLOAT16,
        gemm1_partial=BFLOAT16,
        gemm1_parts=3,
        late_bias=True,
        store_ulps=1.0,
    ),
    "split in float16": replace(SCHEMES["fp8_block"], gemm1_partial=FLOAT16, gemm1_parts=4, accumulator_ulps=0.5),
    "inner parts": replace(
        SCHEMES["fp8_block"],
        slot_sum=SlotSum.ATOMIC,
        inner_parts=3,
        store_ulps=1.0,
        intermediate_any_group=True,
        intermediate_codec=STANDARD["token_hip_fn"],
    ),
    "inner parts added in float32": replace(SCHEMES["mxfp4"], slot_sum=SlotSum.ROUNDED_TERMS, inner_parts=4),
    "fp8 without stores": replace(SCHEMES["fp8_token"], intermediate_store=None),
    "mxfp8": replace(
        SCHEMES["mxfp4"], intermediate_codec=STANDARD["mxfp8_fn_up"], input_codec=STANDARD["mxfp8_fn_down"]
    ),
}

#: By how much a larger intermediate is noticed; sums of coarsely rounded parts are not known better.
NOTICED = dict.fromkeys(NUMERICS, 1.01) | {
    "any neighbour": 1.08,
    "split in float16": 1.08,
    "inner parts": 1.6,
    "split, bias late": 2.0,
}


def weights_of(codec: Codec | None, random: np.random.Generator, biased: bool = False) -> ExpertWeights:
    """Normal matrices of every expert."""
    w1 = torch.from_numpy(random.standard_normal((EXPERTS, 2 * MIDDLE, HIDDEN)) / HIDDEN**0.5)
    w2 = torch.from_numpy(random.standard_normal((EXPERTS, HIDDEN, MIDDLE)) / MIDDLE**0.5)
    biases = [torch.from_numpy(random.standard_normal((EXPERTS, n))).float() for n in (2 * MIDDLE, HIDDEN)]
    of_bias = biases if biased else [None, None]
    if codec is None:
        return ExpertWeights(w1.bfloat16(), w2.bfloat16(), bias1=of_bias[0], bias2=of_bias[1])
    first, second = ([quantise(matrix, codec) for matrix in of] for of in (w1, w2))
    codes1, codes2 = (torch.stack([q.codes for q in of]) for of in (first, second))
    scales1, scales2 = (torch.stack([q.scales for q in of]) for of in (first, second))
    return ExpertWeights(codes1, codes2, codec, scales1, scales2, *of_bias)


class Example:
    """One drawn layer, its legal kernels and what the oracle expects."""

    def __init__(self, name: str, seed: int, tokens: int = 6) -> None:
        self.random = np.random.default_rng(seed)
        self.numerics, self.dtype = NUMERICS[name], torch.bfloat16
        self.top_k = 1 if self.numerics.weight_stage is WeightStage.ON_INPUT else TOP_K
        self.weights = weights_of(
            self.numerics.weight_codec, self.random, biased=name in ("swiglu", "split, bias late")
        )
        self.rows = to(self.dtype, self.random.standard_normal((tokens, HIDDEN)).astype(np.float32))
        self.ids = np.stack([self.random.permutation(EXPERTS + 1)[: self.top_k] - 1 for _ in range(tokens)])
        self.routing = self.random.standard_normal((tokens, self.top_k)).astype(np.float32)

    def kernel(self) -> Kernel:
        """A legal one."""
        first, second = (None if b is None else b.numpy() for b in (self.weights.bias1, self.weights.bias2))
        return Kernel(experts_of(self.weights), self.numerics, self.dtype, first, second)

    def tensors(self) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
        """Rows, ids and weights."""
        return torch.from_numpy(self.rows), self.ids.tolist(), torch.from_numpy(self.routing)

    def layer(self, nodes: int, every: bool) -> Expected:
        """What the oracle expects of the layer."""
        return layer_expected(
            *self.tensors(),
            self.weights,
            self.numerics,
            owner=OWNER.tolist(),
            world_size=RANKS,
            dtype=self.dtype,
            nodes=nodes,
            every_addition_rounds=every,
        )


def ratio(result: Array, expected: Expected) -> float:
    """Largest error over bound."""
    interval = Interval(expected.value, expected.lower, expected.upper)
    return float(interval.error_over_bound(torch.from_numpy(result)).max())


@pytest.mark.parametrize(("nodes", "every"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("name", NUMERICS)
def test_legal_layers_stay_inside(name: str, nodes: int, every: bool) -> None:
    example = Example(name, seed=nodes + 2 * every)
    expected, kernel = example.layer(nodes, every), example.kernel()
    assert bool((expected.lower <= expected.value).all())
    assert bool((expected.value <= expected.upper).all())
    for _ in range(3):
        got = kernel.layer(example.rows, example.ids, example.routing, OWNER, example.random, nodes=nodes, every=every)
        assert ratio(got, expected) <= 1


@pytest.mark.parametrize("name", NUMERICS)
def test_legal_experts_stay_inside_and_slightly_wrong_ones_do_not(name: str) -> None:
    example = Example(name, seed=11, tokens=18)
    expected = experts_expected(*example.tensors(), example.weights, example.numerics, example.dtype)
    kernel, ratios = example.kernel(), []
    for _ in range(5):
        got = kernel.rank(example.rows, example.ids, example.routing, example.random)
        ratios.append(ratio(got, expected))
    assert max(ratios) <= 1
    # The bound is not vacuous: a larger intermediate leaves it.
    faulty = replace(kernel, defect=lambda place, x: x * np.float32(NOTICED[name]) if place == "middle" else x)
    got = faulty.rank(example.rows, example.ids, example.routing, example.random)
    assert ratio(got, expected) > 1


def _changed(place: str, change: float, wanted: str, numbers: Array) -> Array:
    if place != wanted:
        return numbers
    numbers = numbers.copy()
    numbers[0] *= np.float32(change)
    return numbers


DEFECTS = {
    "gate and up swapped": lambda place, x: np.roll(x, MIDDLE, axis=1) if place == "product" else x,
    "gate and up interleaved": lambda place, x: (
        x.reshape(len(x), -1, 2).swapaxes(1, 2).reshape(x.shape) if place == "product" else x
    ),
    "no activation's clamp or curve": lambda place, x: np.abs(x) if place == "middle" else x,
    "one row three times as large": lambda place, x: _changed(place, 3.0, "middle", x),
    "last eighth not computed": lambda place, x: (
        np.concatenate([x[:, : -MIDDLE // 8], 0 * x[:, -MIDDLE // 8 :]], 1) if place == "middle" else x
    ),
    "scale of one row doubled": lambda place, x: _changed(place, 2.0, "scales", x),
}


CODED = [name for name, numerics in NUMERICS.items() if numerics.intermediate_codec is not None]


@pytest.mark.parametrize(
    ("defect", "name"),
    [(defect, name) for defect in DEFECTS for name in (CODED if defect.startswith("scale") else NUMERICS)],
)
def test_defects_fall_outside(name: str, defect: str) -> None:
    example = Example(name, seed=21)
    expected = experts_expected(*example.tensors(), example.weights, example.numerics, example.dtype)
    faulty = replace(example.kernel(), defect=DEFECTS[defect])
    got = faulty.rank(example.rows, example.ids, example.routing, example.random)
    assert ratio(got, expected) > 1


@pytest.mark.parametrize("name", SCHEMES)
def test_routing_defects_fall_outside(name: str) -> None:
    example = Example(name, seed=31)
    expected, kernel = example.layer(1, False), example.kernel()
    token, slot = np.argwhere(example.ids >= 0)[0]
    ids, routing = example.ids.copy(), example.routing.copy()
    ids[token, slot] = -1
    routing[token, slot] *= -1
    other = np.where(example.ids == example.ids[token, slot], (example.ids + 1) % EXPERTS, example.ids)
    legal = (example.rows, example.ids, example.routing)
    faulty = {
        "dropped": (example.rows, ids, example.routing),
        "negated": (example.rows, example.ids, routing),
        "wrong expert": (example.rows, other, example.routing),
        "rows of other tokens": (example.rows[::-1], example.ids, example.routing),
        "weights one": (example.rows, example.ids, np.ones_like(routing)),
    }
    for what, (rows, of_ids, of_weights) in {"legal": legal, **faulty}.items():
        got = kernel.layer(rows, of_ids, of_weights, OWNER, example.random)
        assert (ratio(got, expected) > 1) is (what != "legal"), what


@pytest.mark.parametrize("name", NUMERICS)
def test_the_reference_is_inside_and_about_as_wide(name: str) -> None:
    example = Example(name, seed=41, tokens=16)
    rows, ids, routing = example.tensors()
    expected = experts_expected(rows, ids, routing, example.weights, example.numerics, example.dtype)
    given = torch.tensor(ids), routing, example.weights, torch.arange(EXPERTS), example.numerics, example.dtype
    got = forward(rows.bfloat16(), *given)
    assert ratio(got.float().numpy(), expected) <= 1
    theirs = accepted(Interval.exact(rows), *given)
    if example.numerics.intermediate_any_group:
        assert bool(((theirs.value >= expected.lower) & (theirs.value <= expected.upper)).all())
    else:
        assert torch.equal(theirs.value, expected.value)
    # Both hold the exact result, so they overlap; neither is wide enough to prove nothing.
    widths = [
        float((upper - lower).mean())
        for lower, upper in ((expected.lower, expected.upper), (theirs.lower, theirs.upper))
    ]
    assert 0.4 < widths[0] / widths[1] < 2.5


CODECS = sorted(
    {codec for of in NUMERICS.values() for codec in (of.intermediate_codec, of.input_codec) if codec}, key=str
)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", [0.0, 2.0**-20, 2.0**-9, 0.1, 2.0])
def test_quantisers_of_any_number_in_a_range_stay_inside(codec: Codec, width: float) -> None:
    random = np.random.default_rng(51)
    centre = random.standard_normal((64, 128)) * np.exp2(random.integers(-3, 4, (64, 1)))
    centre[0] = 0
    low, high = (to(torch.float32, centre - sign * width * np.abs(centre)) for sign in (1, -1))
    ends = [torch.from_numpy(end.astype(np.float64)) for end in (np.minimum(low, high), np.maximum(low, high))]
    middle = ends[0] if width == 0 else torch.from_numpy(centre).clamp(*ends)
    given = Range.point(middle) if width == 0 else Range(middle, *ends)
    found = requantised(given, codec)
    share = [torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1) / 2, None, None, None]
    for number in range(40):
        at = share[number % 6]
        if at is None:
            at = torch.from_numpy(random.random(middle.shape))
        rows = (ends[0] + at * (ends[1] - ends[0])).float().double().clamp(*ends)
        stored = quantised(rows.float().numpy(), codec, number)
        assert stored.scales is not None
        got = torch.from_numpy(stored.values.astype(np.float64) * stored.scales)
        slack = 0.0 if found.joint is None else found.joint.repeat_interleave(128 // found.joint.shape[1], 1)
        # Times a scale of which joint is known.
        low_end = found.low - slack * found.low.abs()
        high_end = found.high + slack * found.high.abs()
        assert bool(((got >= low_end) & (got <= high_end)).all())
