"""Scenarios of a coded combine on gloo ranks: bits of the declared execution, levels, what else comes back, refusals.

Scope: results against sums of fractions in slot order, fused or not, of what travels by the definition. A pass proves
nothing about the bounds; see test_combine_codecs_bounds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from random import Random

import pytest
import torch

from conformance.selftest.reference import legal_combines as legal
from conformance.selftest.reference.ranks import World
from reference.bounds import combine_acceptance
from reference.combine_numerics import CombineCodec, combine_codec
from reference.dispatch_combine import CombineResult, Dispatched, combine, dispatch

_PER_RANK, _HIDDEN, _TOKENS, _TOP_K = 2, 12, 10, 5


def _codec(name: str, fp8: str = "float8_e4m3fn", blocks: int = 0, *, partials: bool = False) -> CombineCodec:
    codec = combine_codec(name, fp8=fp8, scale_dim=blocks, rounds_partials=partials)
    assert codec is not None
    return codec


def _routing(world: World, rank: int) -> list[list[int]]:
    random = Random(100 * world.size + rank)
    names = range(-1, world.size * _PER_RANK)
    return [[random.choice(names) for _ in range(_TOP_K)] for _ in range(_TOKENS - rank % 2)]


def _answer(rank: int, source: int, token: int) -> torch.Tensor:
    """The row that rank's experts make of a token, beyond the payload in some blocks."""
    generator = torch.Generator().manual_seed(rank * 1000 + source * 100 + token)
    size = torch.tensor([1.0, 100.0, 3000.0])[torch.randint(3, (_HIDDEN,), generator=generator) * (token % 3 > 0)]
    return (torch.randn(_HIDDEN, generator=generator) * size).bfloat16()


def _sent(world: World) -> tuple[list[list[int]], Dispatched]:
    ids = _routing(world, world.rank)
    routed = torch.tensor(ids, dtype=torch.int32)
    weights = torch.rand(len(ids), _TOP_K, generator=torch.Generator().manual_seed(world.rank))
    return ids, dispatch(torch.zeros(len(ids), 1), routed, weights, experts_per_rank=_PER_RANK, group=world.group)


def _back(world: World, sent: Dispatched, **options: object) -> CombineResult:
    keys = zip(sent.source_rank.tolist(), sent.source_token.tolist(), strict=True)
    rows = [_answer(world.rank, source, token) for source, token in keys]
    answers = torch.stack(rows) if rows else torch.empty(0, _HIDDEN, dtype=torch.bfloat16)
    return combine(answers, sent, sent.weights, group=world.group, **options)  # type: ignore[arg-type]


def _order(row: Sequence[int], fold: str) -> list[int]:
    """Destination ranks of a row in the order in which they are summed."""
    slots: dict[int, int] = {}
    for slot, e in enumerate(row):
        if e >= 0 and (fold == "last" or e // _PER_RANK not in slots):
            slots[e // _PER_RANK] = slot
    return sorted(slots, key=slots.__getitem__)


def _in_turn(parts: Sequence[legal.Part], fused: bool) -> Fraction:
    total = Fraction(0)
    for value, scale in parts:
        product = value * scale if fused else legal.nearest(value * scale, legal.FLOAT32)
        total = legal.nearest(total + product, legal.FLOAT32)
    return legal.nearest(total, legal.BFLOAT16)


def declared_execution_bit_for_bit(world: World) -> None:
    ids, sent = _sent(world)
    codecs = [
        _codec("fp8_direct_cast"),
        _codec("fp8_direct_cast", "float8_e4m3fnuz"),
        _codec("fp8_blockwise", blocks=5),
    ]
    outputs = {}
    for codec in [*codecs, _codec("fp8_blockwise", "float8_e4m3fnuz", 1), _codec("fp4_blockwise", blocks=3)]:
        for fold, fused in (("first", True), ("last", True), ("first", False)):
            back = _back(world, sent, fold=fold, codec=codec, fused=fused)
            for token, row in enumerate(ids):
                order = _order(row, fold)
                coded = [legal.coded_row(_answer(r, world.rank, token).tolist(), codec) for r in order]
                want = [float(_in_turn([c[h] for c in coded], fused)) for h in range(_HIDDEN)]
                assert back.output[token].tolist() == want, (codec.name, fold, fused, token)
            bound = combine_acceptance(back.terms, back.destinations, torch.bfloat16, codec=codec)
            assert float(bound.error_over_bound(back.output).max()) <= 1
            outputs[codec.name, fold, fused] = back.output
    if world.size >= 4:  # the cases can tell the codecs apart
        assert len({o.float().numpy().tobytes() for (_, fold, fused), o in outputs.items() if fused}) >= 3


def partial_sums_are_coded_again(world: World) -> None:
    ids, sent = _sent(world)
    for fp8 in ("float8_e4m3fn", "float8_e4m3fnuz"):
        codec = _codec("fp8_direct_cast", fp8, partials=True)
        for nodes in [n for n in (1, 2, 4) if world.size % n == 0]:
            back = _back(world, sent, nodes=nodes, codec=codec)
            for token, row in enumerate(ids):
                node_of = {r: r // (world.size // nodes) for r in _order(row, "first")}
                coded = {r: legal.coded_row(_answer(r, world.rank, token).tolist(), codec) for r in node_of}
                for h in range(_HIDDEN):
                    by_node = [[coded[r][h] for r in node_of if node_of[r] == n] for n in range(nodes)]
                    assert back.output[token, h].item() == float(legal.two_levels(by_node, codec)), (nodes, token, h)
            bound = combine_acceptance(back.terms, back.destinations, torch.bfloat16, nodes=nodes, codec=codec)
            assert float(bound.error_over_bound(back.output).max()) == 0


def the_rest_comes_back_as_without_a_codec(world: World) -> None:
    ids, sent = _sent(world)
    beside = torch.full((sent.rows.shape[0], 2), world.rank + 0.5)
    plain = _back(world, sent, beside=beside)
    for codec in (_codec("fp8_direct_cast"), _codec("fp8_blockwise", blocks=5), _codec("fp4_blockwise", blocks=3)):
        back = _back(world, sent, beside=beside, codec=codec)
        for name in ("terms", "weights", "destinations", "beside"):
            assert torch.equal(getattr(back, name), getattr(plain, name)), name
        assert back.output.dtype == torch.bfloat16
        for rank in range(world.size):
            for token in range(len(ids)):
                reached = bool(back.destinations[token, rank])
                want = _answer(rank, world.rank, token).float() if reached else torch.zeros(_HIDDEN)
                assert torch.equal(back.terms[rank, token], want)


def nothing_at_all_coded(world: World) -> None:
    sent = dispatch(
        torch.empty(0, 1),
        torch.empty(0, 3, dtype=torch.int32),
        torch.empty(0, 3),
        experts_per_rank=1,
        group=world.group,
    )
    for codec in (_codec("fp8_direct_cast"), _codec("fp8_blockwise", blocks=5), _codec("fp4_blockwise", blocks=3)):
        back = combine(torch.empty(0, _HIDDEN, dtype=torch.bfloat16), sent, codec=codec, group=world.group)
        assert back.output.shape == (0, _HIDDEN)
        assert combine_acceptance(back.terms, back.destinations, torch.bfloat16, codec=codec).shape == (0, _HIDDEN)


def refusals_of_a_coded_combine(world: World) -> None:
    sent = dispatch(
        torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), experts_per_rank=1, group=world.group
    )
    rows = torch.ones(sent.rows.shape[0], 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^rows are torch.float32; a combine codes bfloat16 rows"):
        combine(rows.float(), sent, codec=_codec("fp8_direct_cast"), group=world.group)
    if world.size % 2 == 0:
        with pytest.raises(ValueError, match=r"^nodes is 2 with fp8_direct_cast, which rounds no partial sums"):
            combine(rows, sent, nodes=2, codec=_codec("fp8_direct_cast"), group=world.group)
