"""One layer's data, a correct execution of it, and for each negative control what it makes of one token.

Scope: what :mod:`conformance.power_layer` judges. A layer is a list of terms (rank, expert, weight) for each token;
:func:`execute` computes terms as a legal implementation would, in an order of its own, and a control is a token with
other terms, other rows or other matrices. Data are synthetic; none of these faults is a library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from reference.codecs import STANDARD, Codec, PayloadRule
from reference.expert_numerics import ExpertNumerics, SlotSum
from reference.expert_weights import ExpertWeights
from reference.formats import BFLOAT16
from reference.quantisation import dequantise, quantise

#: By name: bf16 and mxfp4 as two kernels with bfloat16 between them, fp8_block as one.
SCHEMES = {
    "bf16": ExpertNumerics(intermediate_store=BFLOAT16, slot_sum=SlotSum.ATOMIC),
    "fp8_token": ExpertNumerics(
        input_codec=STANDARD["token_hip_fn"],
        weight_codec=STANDARD["token_fn"],
        intermediate_store=BFLOAT16,
        intermediate_codec=STANDARD["token_hip_fn"],
        slot_sum=SlotSum.ATOMIC,
    ),
    "fp8_block": ExpertNumerics(
        input_codec=STANDARD["group128_hip_fn"],
        weight_codec=STANDARD["block128_fn"],
        intermediate_codec=STANDARD["group128_hip_fn"],
    ),
    "mxfp4": ExpertNumerics(
        input_codec=STANDARD["mxfp4_even"],
        weight_codec=STANDARD["mxfp4_even"],
        intermediate_store=BFLOAT16,
        intermediate_codec=STANDARD["mxfp4_even"],
        slot_sum=SlotSum.ATOMIC,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Of one layer; one shared expert, the last id, has weight one and is computed by rank 0.

    Raises:
        ValueError: sizes that hold no fault, or that blocks do not divide.
    """

    tokens: int = 1000
    experts: int = 64
    top_k: int = 8
    hidden: int = 256
    intermediate: int = 128
    ranks: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.top_k < 2 or self.ranks < 2 or self.hidden % 128 or self.intermediate % 128:
            raise ValueError(
                f"tokens, top-k, ranks, hidden, intermediate are {self.tokens}, {self.top_k}, {self.ranks}, "
                f"{self.hidden}, {self.intermediate}; give at least 2 of the first three, and multiples of 128"
            )
        if self.experts % self.ranks or self.experts < max(2 * self.ranks, self.top_k + 1):
            raise ValueError(
                f"experts is {self.experts}; give a multiple of {self.ranks} from {2 * self.ranks} on, and more than "
                f"top-k = {self.top_k}"
            )

    def owner(self, expert: int) -> int:
        """Rank that computes an expert."""
        return 0 if expert == self.experts else expert // (self.experts // self.ranks)


@dataclass(frozen=True)
class Layer:
    """Data of one layer.

    Attributes:
        sizes: of it.
        numerics: of its experts.
        rows: ``[T, H]`` bfloat16.
        before: ``[T, H]``, the rows of the round before.
        ids: ``[T, k + 1]``, the shared expert last.
        weights: ``[T, k + 1]`` float32, of a softmax over all experts, renormalised over the k.
        share: ``[T]``, what the k had before that.
        experts: the E + 1.
        w1: ``[E + 1, 2 I, H]`` float32, as stored.
        w2: ``[E + 1, H, I]``.
    """

    sizes: Sizes
    numerics: ExpertNumerics
    rows: torch.Tensor
    before: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    share: torch.Tensor
    experts: ExpertWeights
    w1: torch.Tensor
    w2: torch.Tensor


def draw(scheme: str, sizes: Sizes, seed: int = 0) -> Layer:
    """Normal rows and weights, routing by a softmax; every expert has matrices of its own."""
    random, numerics = torch.Generator().manual_seed(seed), SCHEMES[scheme]
    tokens, hidden, middle, count = sizes.tokens, sizes.hidden, sizes.intermediate, sizes.experts + 1
    rows, before = (torch.randn(tokens, hidden, generator=random).bfloat16() for _ in range(2))
    share, ids = torch.randn(tokens, sizes.experts, generator=random).softmax(1).topk(sizes.top_k, dim=1)
    one = torch.ones(tokens, 1)
    weights = torch.cat([share / share.sum(1, keepdim=True), one], 1)
    ids = torch.cat([ids, torch.full((tokens, 1), sizes.experts)], 1)
    w1 = torch.randn(count, 2 * middle, hidden, generator=random) / hidden**0.5
    w2 = torch.randn(count, hidden, middle, generator=random) / middle**0.5
    experts = _stored(w1, w2, numerics.weight_codec)
    w1, w2 = (matrices.float() for matrices in experts.dequantised())
    return Layer(sizes, numerics, rows, before, ids, weights, share.sum(1), experts, w1, w2)


def _stored(w1: torch.Tensor, w2: torch.Tensor, codec: Codec | None) -> ExpertWeights:
    if codec is None:
        return ExpertWeights(w1.bfloat16(), w2.bfloat16())
    first, second = ([quantise(matrix, codec) for matrix in matrices] for matrices in (w1, w2))
    codes1, codes2 = (torch.stack([q.codes for q in of]) for of in (first, second))
    scales1, scales2 = (torch.stack([q.scales for q in of]) for of in (first, second))
    return ExpertWeights(codes1, codes2, codec, scales1, scales2)


#: (rank, expert, weight) of one token.
Terms = Sequence[tuple[int, int, float]]


def terms_of(layer: Layer, token: int) -> list[tuple[int, int, float]]:
    """What a correct layer adds up for a token."""
    pairs = zip(layer.ids[token].tolist(), layer.weights[token].tolist(), strict=True)
    return [(layer.sizes.owner(expert), expert, weight) for expert, weight in pairs]


def execute(layer: Layer, rows: torch.Tensor, terms: Sequence[Terms]) -> torch.Tensor:
    """Outputs ``[n, H]`` of ``rows [n, H]``, bfloat16: GEMMs over a permuted depth, sums from the last term on."""
    numerics, n, hidden = layer.numerics, len(terms), layer.sizes.hidden
    flat = [(token, *term) for token, of_token in enumerate(terms) for term in of_token]
    token, rank, expert = (torch.tensor([entry[i] for entry in flat], dtype=torch.int64) for i in range(3))
    weight = torch.tensor([entry[3] for entry in flat])[:, None]
    x = _through(rows.float(), numerics.input_codec)[token]
    gate, up = _multiply(x, expert, layer.w1).chunk(2, 1)
    middle = gate * torch.sigmoid(gate) * up
    if numerics.intermediate_store is not None:
        middle = middle.bfloat16().float()
    out = weight * _multiply(_through(middle, numerics.intermediate_codec), expert, layer.w2)
    atomic = numerics.slot_sum is SlotSum.ATOMIC
    total = torch.zeros(layer.sizes.ranks, n, hidden)
    place = torch.tensor([i for of_token in terms for i in range(len(of_token))])
    for i in range(int(place.max()) if flat else -1, -1, -1):
        at = place == i
        if atomic:
            total[rank[at], token[at]] = (total[rank[at], token[at]] + out[at].bfloat16().float()).bfloat16().float()
        else:
            total[rank[at], token[at]] += out[at]
    parts, combined = total.bfloat16().float(), torch.zeros(n, hidden)
    for part in parts.flip(0):
        combined = combined + part
    return combined.bfloat16()


def _through(rows: torch.Tensor, codec: Codec | None) -> torch.Tensor:
    """Quantised and dequantised; a reciprocal that may be approximate is the nearest."""
    if codec is None:
        return rows
    if codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL:
        codec = replace(codec, payload_rule=PayloadRule.RECIPROCAL)
    return dequantise(quantise(rows, codec), codec).float()


def _multiply(x: torch.Tensor, expert: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Each row times its expert's matrix."""
    out = torch.empty(x.shape[0], matrices.shape[1])
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(x.shape[1]))
    for e in expert.unique().tolist():
        at = expert == e
        out[at] = x[at][:, order] @ matrices[e][:, order].T
    return out


def correct(layer: Layer) -> torch.Tensor:
    """Outputs of all tokens, ``[T, H]`` bfloat16."""
    return execute(layer, layer.rows, [terms_of(layer, token) for token in range(layer.sizes.tokens)])


# Negative controls: the new rows of a token, and in one case of its neighbour

Control = Callable[[Layer, torch.Tensor, int], dict[int, torch.Tensor]]


def _with(layer: Layer, token: int, terms: Terms, rows: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
    given = (layer.rows if rows is None else rows)[token : token + 1]
    return {token: execute(layer, given, [terms])[0]}


def _zeros(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    return {token: torch.zeros_like(output[token])}


def _local_only(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    """The rank that owns most of the token's experts takes its own only."""
    terms = terms_of(layer, token)
    ranks = [rank for rank, _, _ in terms]
    own = max(set(ranks), key=ranks.count)
    return _with(layer, token, [term for term in terms if term[0] == own])


def _dropped(share: float) -> Control:
    """Without the slot that this share of the routed ones weigh less than."""

    def control(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
        terms = terms_of(layer, token)
        routed = sorted(terms[:-1], key=lambda term: term[2])
        return _with(layer, token, [term for term in terms if term is not routed[int(share * len(routed))]])

    return control


def _swapped_tokens(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    other = (token + 1) % layer.sizes.tokens
    return {token: output[other], other: output[token]}


def _weights_one(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    return _with(layer, token, [(rank, expert, 1.0) for rank, expert, _ in terms_of(layer, token)])


def _not_renormalised(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    *routed, shared = terms_of(layer, token)
    share = float(layer.share[token])
    return _with(layer, token, [*((rank, expert, weight * share) for rank, expert, weight in routed), shared])


def _no_shared(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    return _with(layer, token, terms_of(layer, token)[:-1])


def _previous_round(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    return _with(layer, token, terms_of(layer, token), layer.before)


def _wrong_expert(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    """One slot is computed by the next expert that the token does not have, on the right rank."""
    terms = terms_of(layer, token)
    place = layer.sizes.top_k // 2
    rank, expert, weight = terms[place]
    taken = {other for _, other, _ in terms}
    free = (e % layer.sizes.experts for e in range(expert + 1, expert + layer.sizes.experts))
    terms[place] = (rank, next(e for e in free if e not in taken), weight)
    return _with(layer, token, terms)


def _mask_as_map(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
    """Each rank that gets the token takes the mask's 1 for slot 1 and its 0, which hides remote ids, for slot 0."""
    terms, per_rank = terms_of(layer, token), layer.sizes.experts // layer.sizes.ranks
    found = []
    for rank in sorted({rank for rank, _, _ in terms}):
        found += [(rank, rank * per_rank + int(owner == rank), weight) for owner, _, weight in terms]
    return _with(layer, token, found)


def _one_expert(change: Callable[[Layer, int], Layer]) -> Control:
    """The matrices of one of the token's experts are changed."""

    def control(layer: Layer, output: torch.Tensor, token: int) -> dict[int, torch.Tensor]:
        expert = int(layer.ids[token, layer.sizes.top_k // 2])
        return _with(change(layer, expert), token, terms_of(layer, token))

    return control


def _doubled(layer: Layer, expert: int) -> Layer:
    w2 = layer.w2.clone()
    w2[expert] *= 2
    return replace(layer, w2=w2)


def _gate_and_up_swapped(layer: Layer, expert: int) -> Layer:
    w1, middle = layer.w1.clone(), layer.sizes.intermediate
    w1[expert] = torch.cat([w1[expert, middle:], w1[expert, :middle]])
    return replace(layer, w1=w1)


CONTROLS: dict[str, Control] = {
    "zeros": _zeros,
    "local experts only": _local_only,
    "one of k dropped, the median weight": _dropped(0.5),
    "one of k dropped, the least weight": _dropped(0),
    "two tokens swapped": _swapped_tokens,
    "all routing weights one": _weights_one,
    "scales of one W2 doubled": _one_expert(_doubled),
    "previous round's data": _previous_round,
    "gate and up of one expert swapped": _one_expert(_gate_and_up_swapped),
    "wrong expert for one slot": _wrong_expert,
    "0/1 mask taken for the slot map": _mask_as_map,
    "shared expert missing": _no_shared,
    "renormalisation missing": _not_renormalised,
}
