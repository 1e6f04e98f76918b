"""The oracle of the experts on cases computed by hand, what must not change its answer, and its independence.

Scope: reference/expert_oracle.py and reference/oracle_ranges.py; test_expert_oracle_bounds.py has legal kernels and
defects. What a pass does not prove: that a library does what the numerics declare.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference import expert_oracle, oracle_ranges
from reference.codecs import STANDARD, Codec, Granularity, PayloadRule
from reference.expert_numerics import Activation, ExpertNumerics, SlotSum, WeightStage
from reference.expert_oracle import Matrices, Shared, decoded, experts_expected, layer_expected
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16, E2M1, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FLOAT16, Ties
from reference.oracle import Expected, layer_output
from reference.oracle_ranges import Range, nearest, requantised
from reference.quantisation_oracle import quantise
from reference.rounding import round_to_format

BF16 = torch.bfloat16
PLAIN = ExpertNumerics(intermediate_store=BFLOAT16)


def tensor(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.float64)


def scaling(factor: float) -> Matrices:
    """An expert that multiplies a row ``[x, 1]`` by ``factor``: the gate is 128, which a sigmoid leaves alone."""
    return Matrices(tensor([0, 128], [1, 0]), tensor([factor / 128], [0]))


def layer(values: Sequence[float], owner: Sequence[int], **options: object) -> Expected:
    """A token whose slots are worth these values."""
    given: dict[str, object] = {"owner": owner, "world_size": max(owner) + 1, "dtype": BF16, **options}
    ids = [list(range(len(values)))]
    return layer_expected(tensor([1, 1]), ids, tensor(values), lambda e: scaling(1.0), ExpertNumerics(), **given)  # type: ignore[arg-type]


def only(expected: Expected, column: int = 0) -> float:
    """The one result that is accepted."""
    assert expected.lower[0, column] == expected.upper[0, column] == expected.value[0, column]
    return float(expected.value[0, column])


def test_one_expert_by_hand() -> None:
    # gate 64, up 3, whose product is 192; W2 makes 384 and -192 of it, the weight half of that
    weights = ExpertWeights(tensor([8, 28], [1, 1])[None], tensor([2], [-1])[None])
    numerics = replace(PLAIN, gemm1_store=BFLOAT16)
    found = experts_expected(tensor([1, 2]), [[0]], tensor([0.5]), weights, numerics, BF16)
    assert [only(found, 0), only(found, 1)] == [192, -96]
    biased = replace(weights, bias1=torch.tensor([[0.0, 1.0]]), bias2=torch.tensor([[4.0, 0.0]]))
    found = experts_expected(tensor([1, 2]), [[0]], tensor([0.5]), biased, numerics, BF16)
    assert [only(found, 0), only(found, 1)] == [258, -128]


@pytest.mark.parametrize(
    ("activation", "limit", "wanted"),
    [
        (Activation.SILU, None, -1 / (1 + math.e) * 9),
        (Activation.SILU, 4.0, -1 / (1 + math.e) * 4),
        (Activation.GELU, None, -(1 + math.erf(-(0.5**0.5))) / 2 * 9),
        (Activation.SWIGLU, 7.0, -1 / (1 + math.exp(1.702)) * 8),
    ],
)
def test_activations_by_hand(activation: Activation, limit: float | None, wanted: float) -> None:
    weights = ExpertWeights(tensor([-1], [9])[None], tensor([1])[None])
    numerics = ExpertNumerics(activation=activation, limit=limit)
    found = experts_expected(tensor([1]), [[0]], tensor([1]), weights, numerics, torch.float32)
    # To nearest float32.
    assert abs(float(found.value) - wanted) <= 2.0**-24 * abs(wanted)
    assert float(found.lower) < wanted < float(found.upper)
    # Of 2**-24: three GEMMs of K + 1 + scale_roundings = 6 roundings of 2 each, 4 roundings of the activation, those of
    # up + 1, the weight and the store, 6 for SwiGLU's argument (3 times 1.702) and the second order. And 8 units in the
    # last place of a sigmoid; GELU's are of one, with 2 of the argument, halved and times up.
    units = (3 * 6 * 2 + 4 + 3 + 6) * abs(wanted)
    units += (8 + 2) * 2 * 9 / 2 if activation is Activation.GELU else 8 * 2 * abs(wanted)
    assert float(found.upper - found.lower) <= 2 * units * 2.0**-24


def test_where_the_weight_goes() -> None:
    # silu(64) 3 w, against silu(64 w) 3 w
    weights = ExpertWeights(tensor([64], [3])[None], tensor([1])[None])
    stages = {WeightStage.AFTER_W2: 96, WeightStage.BEFORE_ACTIVATION: 48, WeightStage.ON_INPUT: 48}
    for stage, wanted in stages.items():
        numerics = ExpertNumerics(weight_stage=stage)
        assert only(experts_expected(tensor([1]), [[0]], tensor([0.5]), weights, numerics, BF16)) == wanted
    # 0.99 is stored as 0.98828, and 130 times that, 128.48, as 128; 1.4 times that is 179.2
    rounded = replace(weights, w1=tensor([0], [1])[None], w2=tensor([1.4 / 64])[None], bias1=tensor([64, 0]))
    numerics = ExpertNumerics(weight_stage=WeightStage.ON_INPUT)
    assert only(experts_expected(tensor([130]), [[0]], tensor([0.99]), rounded, numerics, BF16)) == 179


def test_each_rank_rounds_its_sum_once() -> None:
    assert only(layer([256.9] * 3, [0, 0, 0])) == 772  # of 770.7
    assert only(layer([256.9] * 3, [0, 1, 2])) == 768  # each travels as 256
    assert only(layer([256.9] * 3, [0, 0, -1])) == 512  # of 513.8; nobody has the last
    assert only(layer([256.9] * 3, [0])) == 256  # no more ids than one


def test_nodes_and_roundings_of_the_sum_over_ranks() -> None:
    values, owner = [256.0, 0.9] * 3, list(range(6))
    assert only(layer(values, owner)) == 772
    assert only(layer(values, owner, nodes=3)) == 768
    every = layer(values, owner, every_addition_rounds=True)
    assert float(every.lower[0, 0]) <= 768
    assert float(every.upper[0, 0]) >= 772


@pytest.mark.parametrize(("nodes", "every"), [(1, False), (2, False), (4, False), (1, True)])
def test_exchanges_like_the_oracle_of_dispatch_and_combine(nodes: int, every: bool) -> None:
    random = torch.Generator().manual_seed(nodes)
    rows = torch.randn(40, 2, generator=random).to(BF16)
    rows[:, 1] = 1
    routing = torch.randint(-1, 8, (40, 4), generator=random).tolist()
    weights = torch.randn(40, 4, generator=random)
    factors = torch.randn(8, generator=random).double()
    given = {"world_size": 4, "dtype": BF16, "nodes": nodes, "every_addition_rounds": every}

    def expert(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([factors[ids][:, None] * x[:, :1], 0 * x[:, 1:]], 1)

    found = layer_expected(
        rows,
        routing,
        weights,
        lambda e: scaling(float(factors[e])),
        ExpertNumerics(),
        owner=lambda e: e // 2,
        **given,  # type: ignore[arg-type]
    )
    wanted = layer_output(rows, routing, weights, expert, experts_per_rank=2, **given)  # type: ignore[arg-type]
    assert torch.equal(found.value, wanted.value)
    assert torch.equal(found.weights, wanted.weights)


def test_shared_experts_are_added_to_the_combined_result() -> None:
    shared = Shared(lambda e: scaling(4.0 + e), 2, ExpertNumerics())
    assert only(layer([256.0], [0], shared=shared)) == 264  # 256 + 9 is half way, and both are exact
    assert only(layer([256.0], [-1], world_size=1, shared=shared)) == 9


def test_slot_sums() -> None:
    found = {}
    for how in SlotSum:
        numerics, weights = ExpertNumerics(slot_sum=how), tensor([256.9, 256.9, 256.9], [256, 0.9, 0.9])
        rows, ids = tensor([1, 1], [1, 1]), [[0, 0, 0]] * 2
        found[how] = experts_expected(rows, ids, weights, lambda e: scaling(1.0), numerics, BF16, slot_of=[0])
    assert only(found[SlotSum.FLOAT32]) == 772
    assert only(found[SlotSum.ROUNDED_TERMS]) == only(found[SlotSum.ATOMIC]) == 768
    # 256.9 and again 256.9 are 256; 0.9 and 0.9 first make 258 of it.
    atomic = found[SlotSum.ATOMIC]
    assert float(atomic.lower[1, 0]) <= 256
    assert float(atomic.upper[1, 0]) >= 258


# What must not change the answer


def _random(codec: str | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 64, generator=random).to(BF16)
    ids = torch.stack([torch.randperm(6, generator=random)[:3] for _ in rows])
    weights = torch.randn(12, 3, generator=random)
    w1, w2 = torch.randn(6, 64, 64, generator=random) / 8, torch.randn(6, 64, 32, generator=random) / 6
    if codec is None:
        return rows, ids, weights, ExpertWeights(w1.to(BF16), w2.to(BF16))
    of = replace(STANDARD[codec], granularity=Granularity.GROUP, group=32)
    bits = torch.randint(0, 2**of.payload.bits - 1, (2, 6, 64, 64), generator=random)
    bits = torch.where(bits == 2 ** (of.payload.bits - 1) - 1, 0, bits)
    scales = torch.exp2(torch.randint(-9, -6, (2, 6, 64, 2), generator=random).double())
    return rows, ids, weights, ExpertWeights(bits[0], bits[1][..., :32], of, scales[0], scales[1][..., :1])


CASES: dict[str, tuple[str | None, ExpertNumerics]] = {
    "bf16": (None, replace(PLAIN, slot_sum=SlotSum.ATOMIC)),
    "mxfp4": (
        "mxfp4_even",
        ExpertNumerics(input_codec=STANDARD["mxfp4_even"], intermediate_codec=STANDARD["mxfp4_up"]),
    ),
    "fp8": ("token_fn", ExpertNumerics(input_codec=STANDARD["token_fn"], intermediate_codec=STANDARD["token_hip_fn"])),
}


def equal(a: Expected, b: Expected) -> bool:
    """Bit for bit: every end was stored as bfloat16, which float64's last bits do not reach."""
    pairs = [(getattr(a, end), getattr(b, end)) for end in ("value", "lower", "upper")]
    return all(torch.equal(x, y) and torch.equal(x, x.to(BF16).double()) for x, y in pairs)


@pytest.mark.parametrize("case", CASES)
def test_permutations_change_nothing(case: str) -> None:
    codec, numerics = CASES[case]
    rows, ids, weights, experts = _random(codec)
    wanted = experts_expected(rows, ids.tolist(), weights, experts, numerics, BF16)
    slots = torch.tensor([2, 0, 1])
    assert equal(wanted, experts_expected(rows, ids[:, slots].tolist(), weights[:, slots], experts, numerics, BF16))
    order = torch.randperm(len(rows))
    found = experts_expected(rows[order], ids[order].tolist(), weights[order], experts, numerics, BF16)
    assert all(torch.equal(getattr(found, end), getattr(wanted, end)[order]) for end in ("value", "lower", "upper"))
    moved = torch.randperm(6)
    found = experts_expected(rows, moved.argsort()[ids].tolist(), weights, experts.pick(moved.tolist()), numerics, BF16)
    assert equal(wanted, found)
    found = experts_expected(
        rows, ids.tolist(), weights, experts.pick(moved.tolist()), numerics, BF16, slot_of=moved.argsort().tolist()
    )
    assert equal(wanted, found)


@pytest.mark.parametrize("case", CASES)
def test_columns_that_add_nothing(case: str) -> None:
    codec, numerics = CASES[case]
    rows, ids, weights, experts = _random(codec)
    wanted = experts_expected(rows, ids.tolist(), weights, experts, numerics, BF16)
    column, value = torch.full((len(rows), 1), -1), torch.full((len(rows), 1), 7.0)
    masked = torch.cat([ids, column], 1).tolist(), torch.cat([weights, value], 1)
    assert equal(wanted, experts_expected(rows, *masked, experts, numerics, BF16))
    remote = torch.cat([column + 7, ids], 1).tolist(), torch.cat([value, weights], 1)
    assert equal(wanted, experts_expected(rows, *remote, experts, numerics, BF16))
    zero = torch.cat([ids, column + 1], 1).tolist(), torch.cat([weights, 0 * value], 1)
    found = experts_expected(rows, *zero, experts, numerics, BF16)
    assert torch.equal(found.value, wanted.value)
    assert bool(((found.lower <= wanted.lower) & (found.upper >= wanted.upper)).all())


@pytest.mark.parametrize("case", CASES)
def test_splits_and_wires_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, numerics = CASES[case]
    rows, ids, weights, experts = _random(codec)
    given = {"owner": [0, 0, 1, 1, 2, 2], "world_size": 3, "dtype": BF16}
    wanted = layer_expected(rows, ids.tolist(), weights, experts, numerics, **given)  # type: ignore[arg-type]
    monkeypatch.setattr(expert_oracle, "_CHUNK", 5 * 3 * 64)
    assert equal(wanted, layer_expected(rows, ids.tolist(), weights, experts, numerics, **given))  # type: ignore[arg-type]
    if numerics.input_codec is None:
        return
    for wire in (numerics.input_codec, STANDARD["mxfp8_fn_up"]):
        wired = layer_expected(rows, ids.tolist(), weights, experts, numerics, wire=wire, **given)  # type: ignore[arg-type]
        values, scales = quantise(rows, wire)
        read = values * scales.repeat_interleave(wire.group or 64, 1)[:, :64]
        found = layer_expected(read, ids.tolist(), weights, experts, numerics, quantised=True, **given)  # type: ignore[arg-type]
        assert equal(wired, found)
        plain = replace(numerics, input_codec=None)
        assert equal(wired, layer_expected(read, ids.tolist(), weights, experts, plain, **given))  # type: ignore[arg-type]
        # Another wire is not followed by the experts' own quantiser.
        assert equal(wanted, wired) is (wire is numerics.input_codec)


def test_shards_add_up() -> None:
    rows, ids, weights, _ = _random(None)
    # Integers, and experts that multiply by one: no sum rounds.
    rows = torch.stack([rows[:, 0].double().mul(8).round(), torch.ones(len(rows)).double()], 1)
    held = [list(range(6)), *([slot if slot % 2 == rank else -1 for slot in range(6)] for rank in range(2))]
    whole, *parts = (
        experts_expected(
            rows, ids.tolist(), weights.mul(8).round(), lambda slot: scaling(slot + 1.0), ExpertNumerics(),
            torch.float32, slot_of=slots,
        ).value
        for slots in held
    )  # fmt: skip
    assert all(bool(part.any()) for part in parts)
    assert torch.equal(parts[0] + parts[1], whole)


# Parts


@pytest.mark.parametrize("payload", [E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1])
@pytest.mark.parametrize("granularity", Granularity)
def test_weights_are_decoded_like_the_reference_does(payload: object, granularity: Granularity) -> None:
    assert payload in (E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1)
    grouped = granularity in (Granularity.GROUP, Granularity.BLOCK)
    codec = Codec(
        payload,  # type: ignore[arg-type]
        granularity,
        payload.max,  # type: ignore[attr-defined]
        group=32 * grouped,
        block_rows=24 * (granularity is Granularity.BLOCK),
    )
    codes = torch.arange(64 * 80).reshape(1, 64, 80) % 2**codec.payload.bits
    rows = {Granularity.TENSOR: 1, Granularity.BLOCK: 3}.get(granularity, 64)
    scales = torch.rand(1, rows, 3 if grouped else 1, dtype=torch.float64)
    weights = ExpertWeights(codes, codes, codec, scales, scales)
    found, (wanted, _) = decoded(weights)(0), weights.dequantised()
    assert torch.equal(found.w1.nan_to_num(nan=1e9), wanted[0].nan_to_num(nan=1e9))
    assert torch.equal(found.w2.nan_to_num(nan=1e9), wanted[0].nan_to_num(nan=1e9))


DECIDED = [
    name
    for name, codec in STANDARD.items()
    if codec.granularity in (Granularity.TOKEN, Granularity.GROUP)
    and codec.payload_rule is not PayloadRule.APPROXIMATE_RECIPROCAL
]


@pytest.mark.parametrize("name", DECIDED)
def test_rows_are_quantised_as_by_the_other_oracle(name: str) -> None:
    random, codec = torch.Generator().manual_seed(len(name)), STANDARD[name]
    rows = torch.randn(24, 160, generator=random) * torch.exp2(torch.arange(24.0)[:, None] * 3 - 36)
    rows[3] = 0
    rows[4] = rows[4].to(BF16).float()
    values, scales = quantise(rows, codec)
    wanted = values * scales.repeat_interleave(codec.group or 160, 1)[:, :160]
    found = requantised(Range.point(rows.double()), codec)
    assert torch.equal(found.value, wanted)
    assert torch.equal(found.low, wanted)
    assert torch.equal(found.high, wanted)


@pytest.mark.parametrize("to", [BFLOAT16, FLOAT16, E4M3FN, E2M1])
@pytest.mark.parametrize("ties", Ties)
def test_rounding_by_scaling(to: object, ties: Ties) -> None:
    assert to in (BFLOAT16, FLOAT16, E4M3FN, E2M1)
    value = torch.randn(4000, dtype=torch.float64) * torch.exp2(torch.randint(-9, 3, (4000,)).double())
    value = torch.cat([value, value.to(torch.float16).double(), torch.arange(-6, 6.5, 0.125).double()]).clamp(-6, 6)
    assert torch.equal(nearest(value, to, ties), round_to_format(value, to, ties=ties))  # type: ignore[arg-type]
    if to is FLOAT16:
        assert nearest(tensor([65520, -1e9]), FLOAT16).tolist() == [[math.inf, -math.inf]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"input_codec": STANDARD["tensor_fn"]}, {}, "per tensor"),
        ({"intermediate_codec": STANDARD["tensor_static_fn"]}, {}, "is static"),
        ({"weight_stage": WeightStage.ON_INPUT}, {}, "top_k is 2"),
        ({}, {"dtype": torch.float64}, "dtype is torch.float64"),
        ({}, {"nodes": 2}, "must divide the 1 ranks"),
        ({}, {"world_size": 2, "combine": False}, "without a combine"),
        ({}, {"owner": [3]}, "owned by rank 3 of 1"),
    ],
)
def test_what_it_refuses(change: dict[str, object], options: dict[str, object], message: str) -> None:
    numerics = replace(ExpertNumerics(), **change)  # type: ignore[arg-type]
    given: dict[str, object] = {"owner": [0], "world_size": 1, "dtype": BF16, **options}
    with pytest.raises(ValueError, match=message):
        layer_expected(tensor([1, 1]), [[0, 0]], tensor([1, 1]), lambda e: scaling(1), numerics, **given)  # type: ignore[arg-type]


def test_biases_before_a_weight_are_refused() -> None:
    biased = replace(scaling(1), bias1=torch.zeros(2, dtype=torch.float64))
    numerics = ExpertNumerics(weight_stage=WeightStage.BEFORE_ACTIVATION)
    with pytest.raises(ValueError, match="libraries disagree"):
        experts_expected(tensor([1, 1]), [[0]], tensor([1]), lambda e: biased, numerics, BF16, slot_of=[0])
    with pytest.raises(ValueError, match="give slot_of"):
        experts_expected(tensor([1, 1]), [[0]], tensor([1]), lambda e: biased, numerics, BF16)


def test_no_tokens() -> None:
    found = layer_expected(
        torch.empty(0, 2), [], torch.empty(0, 3), lambda e: scaling(1), PLAIN, owner=[0], world_size=1, dtype=BF16
    )
    assert [t.shape for t in (found.value, found.lower, found.upper, found.weights)] == [(0, 2)] * 3 + [(0, 3)]


def test_it_shares_no_code_with_what_it_judges() -> None:
    data = {"codecs", "expert_numerics", "expert_weights", "formats"}
    for module, others in ((expert_oracle, {"oracle", "oracle_ranges"}), (oracle_ranges, set())):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name.removeprefix("reference.") for name in names if name.startswith("reference")}
        assert ours <= data | others
        assert "dequantised()" not in ast.unparse(tree)
