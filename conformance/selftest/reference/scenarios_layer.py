"""Scenarios of the whole layer on gloo ranks: against the dense oracle, by hand on integers, with faults, empty.

Scope: every scenario builds all experts on every rank and knows what each rank should get. A pass proves nothing about
the experts' numerics; see test_expert_bounds.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from unittest import mock

import pytest
import torch

from conformance.selftest.reference.expert_adversary import stored
from conformance.selftest.reference.ranks import World
from reference import expert_oracle
from reference.codecs import STANDARD, Codec
from reference.expert_gemm import Dense
from reference.expert_numerics import ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16
from reference.intervals import Interval
from reference.layer import LayerResult, Shared, layer, masked_all_reduce_layer, pack_wire, unpack_wire
from reference.quantisation import Quantised, accepted_values, quantise
from reference.rounding import encode

_HIDDEN, _INTER, _PER_RANK, _TOP_K = 64, 32, 2, 3
_PLAIN = ExpertNumerics(intermediate_store=BFLOAT16, slot_sum=SlotSum.ATOMIC)


@dataclass
class _Setup:
    """What every rank knows."""

    everything: ExpertWeights
    local: ExpertWeights
    slot_of: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def _setup(world: World, numerics: ExpertNumerics, seed: int, top_k: int = _TOP_K, *, same: bool = False) -> _Setup:
    """Experts that every rank draws alike; rows and routing of its own, or with ``same`` of rank 0."""
    generator = torch.Generator().manual_seed(seed)
    experts = world.size * _PER_RANK
    w1 = torch.randn(experts, 2 * _INTER, _HIDDEN, generator=generator) / 8
    w2 = torch.randn(experts, _HIDDEN, _INTER, generator=generator) / 6
    everything = stored(w1, w2, numerics.weight_codec, torch.bfloat16)
    owned = range(world.rank * _PER_RANK, (world.rank + 1) * _PER_RANK)
    slot_of = torch.full((experts,), -1)
    slot_of[list(owned)] = torch.arange(_PER_RANK)
    rank = 0 if same else world.rank
    own = torch.Generator().manual_seed(1000 * seed + rank)
    n = 0 if rank == 1 and seed % 2 else 5 + 3 * rank
    rows = torch.randn(n, _HIDDEN, generator=own).bfloat16()
    ids = torch.randint(-1, experts + 1, (n, top_k), generator=own).int()
    return _Setup(everything, everything.pick(owned), slot_of, rows, ids, torch.randn(n, top_k, generator=own))


def _judge(world: World, setup: _Setup, numerics: ExpertNumerics, result: LayerResult, **options: object) -> None:
    """The result is accepted by its own acceptance and by the oracle, and neither excludes the other."""
    assert result.output.dtype == setup.rows.dtype
    assert result.output.shape == result.acceptance.shape == setup.rows.shape
    if not result.output.numel():
        return
    assert float(result.acceptance.error_over_bound(result.output).max()) <= 1
    owner = [e // _PER_RANK for e in range(world.size * _PER_RANK)]
    wanted = expert_oracle.layer_expected(
        setup.rows,
        setup.ids.tolist(),
        setup.weights,
        setup.everything,
        numerics,
        owner=owner,
        world_size=world.size,
        dtype=setup.rows.dtype,
        **options,  # type: ignore[arg-type]
    )
    out = result.output.double()
    assert bool(((out >= wanted.lower) & (out <= wanted.upper)).all())
    assert bool((result.acceptance.lower <= wanted.upper).all())
    assert bool((result.acceptance.upper >= wanted.lower).all())


def against_the_oracle(world: World) -> None:
    group, block = replace(STANDARD["group128_fn"], group=32), replace(STANDARD["block128_fn"], group=32, block_rows=32)
    fp8 = replace(_PLAIN, input_codec=group, intermediate_codec=group, weight_codec=block)
    for seed, numerics in enumerate((_PLAIN, replace(_PLAIN, slot_sum=SlotSum.FLOAT32), fp8)):
        setup = _setup(world, numerics, seed)
        arguments = (setup.rows, setup.ids, setup.weights, setup.local, setup.slot_of)
        for nodes in {1, world.size if world.size % 2 else world.size // 2}:
            result = layer(*arguments, numerics=numerics, experts_per_rank=_PER_RANK, group=world.group, nodes=nodes)
            _judge(world, setup, numerics, result, nodes=nodes)
        result = layer(
            *arguments, numerics=numerics, experts_per_rank=_PER_RANK, group=world.group, accumulation_element=True
        )
        _judge(world, setup, numerics, result, every_addition_rounds=True)


def wires(world: World) -> None:
    for seed, (wire, weights) in enumerate((("token_fn", "token_fn"), ("group32", "token_fn"), ("mxfp4_even",) * 2)):
        codec = STANDARD[wire] if wire in STANDARD else replace(STANDARD["group128_hip_fn"], group=32)
        numerics = replace(_PLAIN, input_codec=codec, intermediate_codec=codec, weight_codec=STANDARD[weights])
        setup = _setup(world, numerics, seed)
        dense = Dense(setup.local)
        result = layer(
            setup.rows,
            setup.ids,
            setup.weights,
            dense,
            setup.slot_of,
            numerics=numerics,
            experts_per_rank=_PER_RANK,
            group=world.group,
            wire=codec,
        )
        _judge(world, setup, numerics, result, wire=codec)


def any_legal_quantiser_of_the_wire(world: World) -> None:
    """Ties and reciprocals that a device may take either way: no choice of codes leads outside."""
    codec = STANDARD["token_hip_fn"]
    numerics = replace(_PLAIN, input_codec=codec, weight_codec=STANDARD["token_fn"])
    setup = _setup(world, numerics, 6)
    setup.rows[:, 0] = 7.0  # a scale of 2**-6: every other element is a tie
    setup.rows[:, 1:] = setup.rows[:, 1:].clamp(-4, 4)
    outputs = []
    found: Interval | None = None
    for end in ("value", "lower", "upper"):

        def chosen(rows: torch.Tensor, codec: Codec, end: str = end) -> Quantised:
            scales = quantise(rows, codec).scales
            return Quantised(encode(getattr(accepted_values(rows, scales, codec), end), codec.payload), scales)

        with mock.patch("reference.layer.quantise", chosen):
            result = layer(
                setup.rows,
                setup.ids,
                setup.weights,
                setup.local,
                setup.slot_of,
                numerics=numerics,
                experts_per_rank=_PER_RANK,
                group=world.group,
                wire=codec,
            )
        found = result.acceptance if found is None else found
        outputs.append(result.output)
    assert found is not None
    if outputs[0].any():
        assert max(float(found.error_over_bound(output).max()) for output in outputs) <= 1
        assert not torch.equal(outputs[1], outputs[2])


def wire_bytes_hold_codes_and_scales(world: World) -> None:
    rows = torch.randn(7, 96, generator=torch.Generator().manual_seed(world.rank))
    rows[3] = 0.0
    for name in ("token_fn", "group128_fnuz", "mxfp4_down", "mxfp8_fn_up", "ue8m0_fn"):
        codec = STANDARD[name]
        given = quantise(rows, codec)
        packed, scales = pack_wire(given, codec)
        assert packed.dtype == torch.uint8
        assert scales.dtype == (torch.uint8 if name.startswith("mx") else torch.float32)
        found = unpack_wire(packed, scales, codec, 96)
        assert torch.equal(found.codes, given.codes)
        assert torch.equal(found.scales, given.scales)


def integers_by_hand(world: World) -> None:
    """Experts that scale a row by their number: every sum is exact, every acceptance a point."""
    experts = world.size * _PER_RANK
    w1 = torch.zeros(experts, 2 * _HIDDEN, _HIDDEN)
    w1[:, :_HIDDEN, 0] = 64.0
    w1[:, _HIDDEN:] = torch.eye(_HIDDEN)
    w2 = torch.eye(_HIDDEN) * (torch.arange(experts) + 1.0)[:, None, None] / 64
    everything = ExpertWeights(w1.bfloat16(), w2.bfloat16())
    owned = range(world.rank * _PER_RANK, (world.rank + 1) * _PER_RANK)
    slot_of = torch.full((experts,), -1)
    slot_of[list(owned)] = torch.arange(_PER_RANK)
    random = Random(world.rank)
    rows = torch.tensor([[1.0, *(random.randrange(-2, 3) for _ in range(_HIDDEN - 1))] for _ in range(6)])
    ids = torch.tensor([[random.randrange(-1, experts) for _ in range(2)] for _ in range(6)])
    weights = torch.tensor([[random.choice((1.0, 2.0, -1.0)) for _ in range(2)] for _ in range(6)])
    result = layer(
        rows.bfloat16(),
        ids,
        weights,
        everything.pick(owned),
        slot_of,
        numerics=_PLAIN,
        experts_per_rank=_PER_RANK,
        group=world.group,
    )
    factor = (torch.where(ids >= 0, ids + 1, 0) * weights).sum(1, keepdim=True)
    assert torch.equal(result.output.float(), factor * rows)
    assert torch.equal(result.acceptance.lower, (factor * rows).double())
    assert torch.equal(result.acceptance.upper, (factor * rows).double())


def a_fault_on_one_rank_is_outside(world: World) -> None:
    """One rank's experts are another's: every token that went there, and no other, is outside."""
    setup = _setup(world, _PLAIN, 2)

    def run(local: ExpertWeights) -> LayerResult:
        return layer(
            setup.rows,
            setup.ids,
            setup.weights,
            local,
            setup.slot_of,
            numerics=_PLAIN,
            experts_per_rank=_PER_RANK,
            group=world.group,
        )

    right = run(setup.local)
    wrong = run(setup.local.pick([1, 0]) if world.rank == world.size - 1 else setup.local)
    outside = (right.acceptance.error_over_bound(wrong.output) > 1).any(1)
    first = (world.size - 1) * _PER_RANK
    # A row that names both of them with the same weight would not notice; random weights differ.
    hit = ((setup.ids >= first) & (setup.ids < first + _PER_RANK)).any(1)
    assert torch.equal(outside, hit)


def shared_experts_apart(world: World) -> None:
    setup = _setup(world, _PLAIN, 3)
    generator = torch.Generator().manual_seed(9)
    w1 = torch.randn(2, 2 * _INTER, _HIDDEN, generator=generator) / 8
    shared = stored(w1, torch.randn(2, _HIDDEN, _INTER, generator=generator) / 6, None, torch.bfloat16)
    numerics = replace(_PLAIN, slot_sum=SlotSum.FLOAT32)
    result = layer(
        setup.rows,
        setup.ids,
        setup.weights,
        setup.local,
        setup.slot_of,
        numerics=_PLAIN,
        experts_per_rank=_PER_RANK,
        group=world.group,
        shared=Shared(shared, numerics),
    )
    _judge(world, setup, _PLAIN, result, shared=expert_oracle.Shared(shared, 2, numerics))
    with pytest.raises(ValueError, match="use AFTER_W2"):
        layer(
            setup.rows,
            setup.ids,
            setup.weights,
            setup.local,
            setup.slot_of,
            numerics=_PLAIN,
            experts_per_rank=_PER_RANK,
            group=world.group,
            shared=Shared(shared, replace(numerics, weight_stage=WeightStage.BEFORE_ACTIVATION)),
        )


def weight_on_the_input_goes_in_before_the_wire(world: World) -> None:
    codec = STANDARD["token_fn"]
    numerics = replace(_PLAIN, weight_stage=WeightStage.ON_INPUT, input_codec=codec)
    setup = _setup(world, numerics, 4, top_k=1)
    plain = replace(numerics, weight_stage=WeightStage.AFTER_W2)
    element = setup.weights.bfloat16().float()
    weighted = (setup.rows.float() * element).bfloat16()
    for wire in (None, codec):
        common = {"experts_per_rank": _PER_RANK, "group": world.group, "wire": wire}
        arguments = (setup.ids, setup.weights, setup.local, setup.slot_of)
        result = layer(setup.rows, *arguments, numerics=numerics, **common)  # type: ignore[arg-type]
        ones = (setup.ids, torch.ones_like(setup.weights), setup.local, setup.slot_of)
        other = layer(weighted, *ones, numerics=plain, **common)  # type: ignore[arg-type]
        assert torch.equal(result.output, other.output)
        assert torch.equal(result.acceptance.lower, other.acceptance.lower)
        assert torch.equal(result.acceptance.upper, other.acceptance.upper)


def every_rank_has_every_token(world: World) -> None:
    for seed, element in ((0, False), (2, True)):
        setup = _setup(world, _PLAIN, seed, same=True)
        result = masked_all_reduce_layer(
            setup.rows,
            setup.ids,
            setup.weights,
            setup.local,
            setup.slot_of,
            numerics=_PLAIN,
            group=world.group,
            accumulation_element=element,
        )
        _judge(world, setup, _PLAIN, result, every_addition_rounds=element)


def no_tokens_anywhere(world: World) -> None:
    setup = _setup(world, _PLAIN, 0)
    result = layer(
        setup.rows[:0],
        setup.ids[:0],
        setup.weights[:0],
        setup.local,
        setup.slot_of,
        numerics=_PLAIN,
        experts_per_rank=_PER_RANK,
        group=world.group,
        wire=STANDARD["token_fn"],
    )
    assert result.output.shape == (0, _HIDDEN)


def a_wire_of_several_rows_is_refused(world: World) -> None:
    setup = _setup(world, _PLAIN, 0)
    for name in ("block128_fn", "tensor_static_fn", "tensor_fn"):
        with pytest.raises(ValueError, match="dynamic scales of a token or of its groups"):
            layer(
                setup.rows,
                setup.ids,
                setup.weights,
                setup.local,
                setup.slot_of,
                numerics=_PLAIN,
                experts_per_rank=_PER_RANK,
                group=world.group,
                wire=STANDARD[name],
            )
