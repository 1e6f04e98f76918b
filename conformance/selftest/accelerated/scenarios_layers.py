"""Scenarios of whole layers on gloo ranks: pairs of backends against the specification's layer.

Scope: the output of every token lies in the acceptance that :func:`reference.layer.layer` derives from both halves'
contracts, in every format on the wire; twice on one operator, with ranks that send nothing. A pass proves nothing about
hardware.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.contract import Accumulation, MaskedSlots, Standing
from accelerated.experts import ExpertProblem, LayerContract, LayerProblem
from accelerated.interface import RankContext
from accelerated.layer import LayerBackend
from accelerated.registry import backend
from conformance.rank.expert_weights import weights_of
from conformance.selftest.reference.ranks import World
from reference.dispatch_combine import destination_ranks, slot_owners
from reference.layer import layer
from reference.placement import owned_experts
from reference.problem import Problem

_ARCH = "gfx950"
_HIDDEN, _INTERMEDIATE, _PER_RANK, _TOP_K, _CAPACITY = 256, 128, 2, 3, 12


def _problem(size: int, nodes: int) -> LayerProblem:
    experts, k = _PER_RANK * size, min(_TOP_K, _PER_RANK * size)
    exchange = Problem(size, _HIDDEN, experts, k, _CAPACITY, nodes=nodes)
    return LayerProblem(exchange, ExpertProblem(size, _HIDDEN, _INTERMEDIATE, experts, k, _CAPACITY * size))


def _inputs(rank: int, tokens: int, problem: Problem, seed: int, masked: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(64 * seed + rank)
    rows = torch.randn(tokens, _HIDDEN, generator=generator).bfloat16()
    draws = [torch.randperm(problem.experts, generator=generator)[: problem.top_k] for _ in range(tokens)]
    ids = torch.stack(draws).int() if draws else torch.empty(0, problem.top_k, dtype=torch.int32)
    weights = torch.randn(tokens, problem.top_k, generator=generator)
    if masked and tokens:
        ids[0, :], ids[-1, 0] = -1, -1
    return rows, ids, weights


def _received(world: World, everyone: list[tuple[torch.Tensor, ...]]) -> int:
    """Rows that this rank receives, at least 1."""
    found = [destination_ranks(slot_owners(one[1], _PER_RANK, world.size), world.size) for one in everyone]
    return max(1, sum(int(to[:, world.rank].sum()) for to in found))


def _judged(
    world: World, problem: LayerProblem, operation: Any, declared: LayerContract, counts: list[int], seed: int
) -> None:
    masked = declared.masked_slots is MaskedSlots.DROPPED
    everyone = [_inputs(rank, n, problem.exchange, seed, masked) for rank, n in enumerate(counts)]
    mine = everyone[world.rank]
    owned = owned_experts(problem.experts.experts, world.size, world.rank)
    slot_of = torch.full((problem.experts.experts,), -1, dtype=torch.int64)
    slot_of[list(owned)] = torch.arange(len(owned))
    weights = weights_of(
        owned,
        hidden=_HIDDEN,
        intermediate=_INTERMEDIATE,
        codec=declared.experts.weight_codec,
        dtype=torch.bfloat16,
        biased=declared.experts.biased,
        device=torch.device("cpu"),
    )
    rows, ids, slots = mine
    accepted = layer(
        rows,
        ids,
        slots,
        weights,
        slot_of,
        numerics=declared.numerics(_received(world, everyone)),
        experts_per_rank=_PER_RANK,
        group=world.group,
        wire=declared.experts.wire if declared.wire else None,
        accumulation_element=declared.exchange.accumulation is Accumulation.ELEMENT,
        nodes=problem.nodes if declared.exchange.node_levels else 1,
    ).acceptance
    operation.load(weights, owned)
    kept = [tensor.clone() for tensor in mine]
    output = operation.forward(rows, ids, slots)
    assert (output.shape, output.dtype) == (rows.shape, torch.bfloat16)
    off = ~((accepted.lower <= output.double()) & (output.double() <= accepted.upper))
    assert not off.any(), f"{int(off.sum())} of {off.numel()} elements, first at {off.nonzero()[0].tolist()}"
    assert all(torch.equal(given, was) for given, was in zip(mine, kept, strict=True))
    if counts[world.rank] and masked:
        assert not output[0].any(), "a token whose every slot is masked"
    if counts[world.rank] > 2:
        assert output.double().abs().mean() > 0.1, "an acceptance around zero would prove nothing"


def _pair(world: World, name: str, kernel_type: str, wires: dict[str, str], nodes: int = 1) -> None:
    """Every operator of ``wires`` with the wire it has by contract, and in the element type; both rounds of each."""
    made, problem = backend(name, _ARCH), _problem(world.size, nodes)
    assert isinstance(made, LayerBackend)
    session = made.open(RankContext(world.rank, world.size, torch.device("cpu"), world.group, _ARCH))
    for operator, wire in wires.items():
        for suffix in ("", "@bf16") if wire else ("",):
            path = f"{kernel_type}/{operator}{suffix}"
            standing = made.support(problem, path)
            assert standing.standing is not Standing.REFUSED, standing
            declared = made.contract(problem, path)
            assert declared.wire == ("" if suffix else wire)
            operation = session.build(problem, path)
            for seed, counts in enumerate(([_CAPACITY, 5, 1, 7][: world.size], [0, 3, 0, 2][: world.size])):
                _judged(world, problem, operation, declared, counts, seed)
            operation.close()
    session.close()


#: One format of each kind: scales of a row, of its groups, and of one byte.
_FORMATS = {"bf16": "", "fp8_token": "fp8_token", "fp8_block": "fp8_group", "mxfp4": "mxfp4"}


def _operators(family: str, *schemes: str) -> dict[str, str]:
    return {f"{family}.{scheme}": _FORMATS[scheme] for scheme in schemes or _FORMATS}


def the_specification_with_itself(world: World) -> None:
    schemes = ("bf16", "fp8_block") if world.size == 4 else ()
    _pair(world, "reference+reference", "one-level", _operators("experts", *schemes))


def moris_double_with_the_specification(world: World) -> None:
    if world.size != 4:
        _pair(world, "mori-standin+reference", "IntraNode", _operators("experts"))
        return
    # Partial sums are rounded on either node.
    _pair(world, "mori-standin+reference", "InterNodeV1", _operators("experts", "bf16", "fp8_token"), nodes=2)
    _pair(world, "mori-standin+reference", "AsyncLL", _operators("experts", "fp8_block"))


def all_gather_with_the_specification(world: World) -> None:
    schemes = ("mxfp4",) if world.size == 4 else ()
    _pair(world, "allgather+reference", "naive", _operators("experts", *schemes))


def replicas_with_the_specification(world: World) -> None:
    _pair(world, "replicated+reference", "all-reduce", _operators("experts", "bf16", "fp8_block"))


def both_doubles(world: World) -> None:
    schemes = ("bf16", "fp8_token") if world.size == 4 else ()
    _pair(world, "mori-standin+aiter-standin", "IntraNode", _operators("fused_moe", *schemes))
