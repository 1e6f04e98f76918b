"""Negative controls on the paths that an adapter declares: on what share of tokens each one is caught.

Scope: every numerics that AITER's experts declare on gfx942 and gfx950, on both sides of every boundary in the number
of rows (:func:`accelerated.aiter_ops.experts_contract.contract`). A layer's data are drawn twice: with all routing
weights positive and of similar size ("spread"), and with all but one of each token zero ("single"), so that one expert
is judged by itself. Every token is one trial: it alone is wrong, and its row is judged alone. A path is *wide* if under
"spread" a control is missed on any token; a slot of small weight then hides in the hull of the others.
What this does not prove: anything about hardware or a library, for which :func:`reference.experts.forward` stands;
matrices are synthetic, and hulls grow with the intermediate, and so does what is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from accelerated.aiter_ops.experts_contract import contract, support
from accelerated.aiter_ops.experts_numerics import OPERATORS
from accelerated.contract import Standing
from accelerated.experts import ExpertProblem
from conformance.power_layer_faults import Sizes
from conformance.rank.expert_weights import weights_of
from reference.codecs import Codec
from reference.expert_gemm import Dense
from reference.expert_numerics import ExpertNumerics
from reference.expert_weights import ExpertWeights
from reference.experts import accepted, forward
from reference.formats import BFLOAT16
from reference.intervals import Interval
from reference.sums import add_up

ARCHITECTURES = ("gfx942", "gfx950")
#: Rows enough for every boundary that is declared below the largest tiers.
CAPACITY = 16384
#: Row counts that are looked at beside the declared boundaries; a change between them must have been declared.
_ROWS = (1, 2, 16, 17, 32, 33, 255, 256, 257, CAPACITY)
SPREAD, SINGLE = "spread", "single"
#: Two ranks, four slots of eight on each; an intermediate of two tiles of the one-stage kernels.
SIZES = Sizes(tokens=64, experts=16, top_k=8, hidden=512, intermediate=256, ranks=2)


@dataclass(frozen=True)
class Path:
    """Numerics that an operator declares for a range of row counts.

    Attributes:
        arch: architectures of the same numerics.
        operator: of the adapter.
        rows: range, as text.
        numerics: declared.
        biased: the experts have biases.
        top_k: columns of ids; 1 where the operator takes no more.
    """

    arch: str
    operator: str
    rows: str
    numerics: ExpertNumerics
    biased: bool
    top_k: int

    @property
    def name(self) -> str:
        """For tables and lists."""
        return f"{self.arch} {self.operator}, {self.rows}"


def declared(sizes: Sizes = SIZES) -> list[Path]:
    """Every path of every operator that takes the sizes; equal numerics of two architectures are one path.

    Raises:
        ValueError: numerics change between two row counts of which the contract declares no boundary.
    """
    found: dict[tuple[str, str, ExpertNumerics], Path] = {}
    for operator in OPERATORS:
        for arch in ARCHITECTURES:
            for path in _paths(operator, arch, sizes):
                key = (operator, path.rows, path.numerics)
                both = f"{found[key].arch}+{arch}" if key in found else arch
                found[key] = replace(path, arch=both)
    return list(found.values())


def _paths(operator: str, arch: str, sizes: Sizes) -> Iterator[Path]:
    top_k = 1 if OPERATORS[operator].stage1 else sizes.top_k
    problem = ExpertProblem(sizes.ranks, sizes.hidden, sizes.intermediate, sizes.experts, top_k, CAPACITY)
    if support(problem, operator, arch).standing is Standing.REFUSED:
        return
    promised = contract(problem, operator, arch)
    edges = {side for edge in promised.boundaries for side in (edge, edge + 1)}
    counts = sorted({*_ROWS, *edges})
    starts = [1]
    for before, count in pairwise(counts):
        if promised.numerics(before) != promised.numerics(count):
            if before not in promised.boundaries:
                raise ValueError(
                    f"{operator} on {arch} changes between {before} and {count} rows; declare the boundary"
                )
            starts.append(count)
    for start, following in zip(starts, [*starts[1:], 0], strict=True):
        rows = f"{start}-{following - 1} rows" if following else f"{start} rows on" if start > 1 else "any rows"
        rows = "1 row" if following == 2 else rows
        yield Path(arch, operator, rows, promised.numerics(start), promised.biased, top_k)


@dataclass(frozen=True)
class Terms:
    """What a layer adds up: for each token, terms of a rank, an expert and a weight.

    Attributes:
        rows: ``[T, H]`` bfloat16.
        rank: ``[T, n]``, -1 where there is no term.
        expert: ``[T, n]``; from E on the same with W2 doubled, from 2 E on with gate and up swapped.
        weight: ``[T, n]`` float32.
    """

    rows: torch.Tensor
    rank: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor

    def on(self, rank: int) -> torch.Tensor:
        """Ids ``[T, n]`` of one rank, -1 elsewhere."""
        return torch.where(self.rank == rank, self.expert, -1)

    def differ(self, other: Terms, sizes: Sizes) -> torch.Tensor:
        """``[T]``: whether the two add up other things, terms of weight zero left out; bits may differ by order."""
        return (self.rows != other.rows).any(1) | (self._summed(sizes) != other._summed(sizes)).any(1)

    def _summed(self, sizes: Sizes) -> torch.Tensor:
        """Weights by rank and expert, ``[T, ranks * 3 E]``."""
        place = self.rank * (3 * sizes.experts) + self.expert
        weight = torch.where(self.rank < 0, 0.0, self.weight)
        total = torch.zeros(self.rows.shape[0], sizes.ranks * 3 * sizes.experts)
        return total.scatter_add(1, torch.where(self.rank < 0, 0, place), weight)


@dataclass(frozen=True)
class Trial:
    """A path's data under one weighting.

    Attributes:
        sizes: of the layer.
        numerics: of its experts.
        matrices: of 3 E experts, see :class:`Terms`.
        terms: what is right.
        place: ``[T, 1]``, the slot that faults of one slot hit: the only one that weighs, or the one of median weight.
        before: ``[T, H]``, rows of the round before.
    """

    sizes: Sizes
    numerics: ExpertNumerics
    matrices: Dense
    terms: Terms
    place: torch.Tensor
    before: torch.Tensor

    def execute(self, terms: Terms) -> torch.Tensor:
        """Outputs ``[T, H]`` bfloat16: each rank's experts, added up in float32."""
        total = torch.zeros(terms.rows.shape)
        for rank in reversed(range(self.sizes.ranks)):
            total += self._forward(terms, terms.on(rank)).float()
        return total.bfloat16()

    def _forward(self, terms: Terms, ids: torch.Tensor) -> torch.Tensor:
        slots = torch.arange(3 * self.sizes.experts)
        return forward(terms.rows, ids, terms.weight, self.matrices, slots, self.numerics, torch.bfloat16)

    def bound(self) -> Interval:
        """Acceptance ``[T, H]``."""
        terms, slots = self.terms, torch.arange(3 * self.sizes.experts)
        rows, parts = Interval.exact(terms.rows.double()), []
        for rank in range(self.sizes.ranks):
            ids = terms.on(rank)
            parts.append(accepted(rows, ids, terms.weight, self.matrices, slots, self.numerics, torch.bfloat16))
        stacked = Interval(
            *(torch.stack([getattr(part, end) for part in parts]) for end in ("value", "lower", "upper"))
        )
        reached = torch.stack([(terms.rank == rank).any(1) for rank in range(self.sizes.ranks)]).sum(0)[:, None]
        return add_up(stacked, count=reached, stored=BFLOAT16)

    def instead(self, expert: torch.Tensor) -> torch.Tensor:
        """The terms' experts with this one ``[T, 1]`` at the place."""
        return self.terms.expert.scatter(1, self.place, expert)

    def at_place(self) -> torch.Tensor:
        """Experts ``[T, 1]`` at the place."""
        return self.terms.expert.gather(1, self.place)


def draw(path: Path, weighting: str, sizes: Sizes = SIZES, seed: int = 0) -> Trial:
    """Normal rows, distinct experts in random order; weights as the weighting says."""
    random = torch.Generator().manual_seed(seed)
    rows, before = (torch.randn(sizes.tokens, sizes.hidden, generator=random).bfloat16() for _ in range(2))
    expert = torch.rand(sizes.tokens, sizes.experts, generator=random).topk(path.top_k, dim=1).indices
    # From 3/2 on: a weight near one hides that it was taken for one.
    size = torch.randn(expert.shape, generator=random).abs() + 1.5
    if weighting == SINGLE:
        place = torch.randint(path.top_k, (sizes.tokens, 1), generator=random)
        sign = torch.randint(0, 2, place.shape, generator=random) * 2.0 - 1
        weight = torch.zeros(size.shape).scatter(1, place, size.gather(1, place) * sign)
    else:
        weight = size / size.sum(1, keepdim=True)
        place = weight.argsort(1)[:, path.top_k // 2 :][:, :1]
    matrices = _matrices(path.numerics.weight_codec, path.biased, sizes.experts, sizes.hidden, sizes.intermediate)
    terms = Terms(rows, expert // (sizes.experts // sizes.ranks), expert, weight)
    return Trial(sizes, path.numerics, matrices, terms, place, before)


@lru_cache(1)
def _matrices(codec: Codec | None, biased: bool, experts: int, hidden: int, intermediate: int) -> Dense:
    """Right ones, then with W2 doubled, then with gate and up swapped."""
    right = weights_of(
        range(experts),
        hidden=hidden,
        intermediate=intermediate,
        codec=codec,
        dtype=torch.bfloat16,
        biased=biased,
        device=torch.device("cpu"),
    )
    scaled = right.w2 * 2 if right.w2_scales is None else right.w2
    more = None if right.w2_scales is None else right.w2_scales * 2

    def stacked(first: torch.Tensor, doubled: torch.Tensor, swapped: torch.Tensor) -> torch.Tensor:
        return torch.cat([first, doubled, swapped])

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2, 1)[::-1], 1)

    s1, s2, b1, b2 = right.w1_scales, right.w2_scales, right.bias1, right.bias2
    weights = ExpertWeights(
        stacked(right.w1, right.w1, halves(right.w1)),
        stacked(right.w2, scaled, right.w2),
        codec,
        None if s1 is None else stacked(s1, s1, halves(s1)),
        None if s2 is None or more is None else stacked(s2, more, s2),
        None if b1 is None else stacked(b1, b1, halves(b1)),
        None if b2 is None else stacked(b2, b2, b2),
    )
    return Dense(weights, keep=True)


# Negative controls: what a fault adds up instead, for every token by itself

Control = Callable[[Trial], Terms]


def _with(**changes: Callable[[Trial], torch.Tensor]) -> Control:
    """Terms of which some fields are others."""
    return lambda trial: replace(trial.terms, **{name: of(trial) for name, of in changes.items()})


def _local_only(trial: Trial) -> torch.Tensor:
    """The rank that owns most of the token's slots, the first of several, takes its own only."""
    rank = trial.terms.rank
    most = torch.stack([(rank == one).sum(1) for one in range(trial.sizes.ranks)]).argmax(0)
    return torch.where(rank == most[:, None], rank, -1)


def _without(place: Callable[[Trial], torch.Tensor]) -> Callable[[Trial], torch.Tensor]:
    return lambda trial: trial.terms.rank.scatter(1, place(trial), -1)


def _least(trial: Trial) -> torch.Tensor:
    return trial.terms.weight.abs().argmin(1, keepdim=True)


def _next_expert(trial: Trial) -> torch.Tensor:
    """The next expert that the token does not have, on the right rank."""
    count, wrong = trial.sizes.experts, trial.at_place()
    taken = torch.ones_like(wrong, dtype=torch.bool)
    while bool(taken.any()):
        wrong = torch.where(taken, (wrong + 1) % count, wrong)
        taken = (trial.terms.expert == wrong).any(1, keepdim=True)
    return trial.instead(wrong)


def _swapped(trial: Trial) -> Terms:
    """Every token gets the result of the next one."""
    own = trial.terms
    return Terms(*(field.roll(-1, 0) for field in (own.rows, own.rank, own.expert, own.weight)))


def _mask_as_map(trial: Trial) -> Terms:
    """Each rank that gets the token takes the mask's 1 for slot 1 and its 0, which hides remote ids, for slot 0."""
    terms, per_rank, ranks, experts = trial.terms, trial.sizes.experts // trial.sizes.ranks, [], []
    for rank in range(trial.sizes.ranks):
        own = terms.rank == rank
        ranks.append(torch.where(own.any(1, keepdim=True), rank, -1).expand_as(own))
        experts.append(rank * per_rank + own.long())
    weight = terms.weight.repeat(1, trial.sizes.ranks)
    return Terms(terms.rows, torch.cat(ranks, 1), torch.cat(experts, 1), weight)


CONTROLS: dict[str, Control] = {
    "zeros": _with(rank=lambda trial: torch.full_like(trial.terms.rank, -1)),
    "local only": _with(rank=_local_only),
    "one of k dropped": _with(rank=_without(lambda trial: trial.place)),
    "least dropped": _with(rank=_without(_least)),
    "tokens swapped": _swapped,
    "weights one": _with(weight=lambda trial: torch.ones_like(trial.terms.weight)),
    "W2 doubled": _with(expert=lambda trial: trial.instead(trial.at_place() + trial.sizes.experts)),
    "previous round": _with(rows=lambda trial: trial.before),
    "gate/up swapped": _with(expert=lambda trial: trial.instead(trial.at_place() + 2 * trial.sizes.experts)),
    "wrong expert": _with(expert=_next_expert),
    "mask as map": _mask_as_map,
}


@dataclass(frozen=True)
class Power:
    """What a path's acceptance catches under one weighting.

    Attributes:
        width: half the width of the interval over the mean size of the exact result, on average.
        rejected: tokens of a legal execution that are not accepted.
        caught: by control, on how many of the tokens that it changes.
        changed: by control.
    """

    width: float
    rejected: int
    caught: dict[str, int]
    changed: dict[str, int]

    @property
    def missed(self) -> list[str]:
        """Controls that change a token and are accepted."""
        return [name for name, changed in self.changed.items() if self.caught[name] < changed]


def measure(path: Path, weighting: str, sizes: Sizes = SIZES, seed: int = 0) -> Power:
    """Judge a legal execution, and every control on every token that it changes."""
    trial = draw(path, weighting, sizes, seed)
    limits = trial.bound()

    def outside(terms: Terms) -> torch.Tensor:
        return (limits.error_over_bound(trial.execute(terms)) > 1).any(1)

    caught, changed = {}, {}
    for name, control in CONTROLS.items():
        terms = control(trial)
        differs = terms.differ(trial.terms, sizes)
        changed[name], caught[name] = int(differs.sum()), int((outside(terms) & differs).sum())
    return Power(_width(limits), int(outside(trial.terms).sum()), caught, changed)


@dataclass(frozen=True)
class Verdict:
    """What is known of one path.

    Attributes:
        path: of the adapter.
        powers: by weighting; an operator of one slot has "single" alone.
        closed: :func:`closed` under "spread", of a wide path.
    """

    path: Path
    powers: dict[str, Power]
    closed: dict[str, float]

    @property
    def wide(self) -> bool:
        """A control is missed under "spread"."""
        return SPREAD in self.powers and bool(self.powers[SPREAD].missed)

    @property
    def sound(self) -> bool:
        """No correct result is rejected, and under "single" no control is missed."""
        return not self.powers[SINGLE].missed and all(power.rejected == 0 for power in self.powers.values())


def judge(path: Path, sizes: Sizes = SIZES, seed: int = 0) -> Verdict:
    """Both weightings of one path, and if it is wide, which field makes it so."""
    weightings = (SPREAD, SINGLE) if path.top_k > 1 else (SINGLE,)
    found = Verdict(path, {weighting: measure(path, weighting, sizes, seed) for weighting in weightings}, {})
    return replace(found, closed=closed(path, SPREAD, sizes, seed)) if found.wide else found


def _width(limits: Interval) -> float:
    return float((limits.upper - limits.lower).mean() / 2 / limits.value.abs().mean())


def closed(path: Path, weighting: str, sizes: Sizes = SIZES, seed: int = 0) -> dict[str, float]:
    """Half-width over mean size if one field that leaves a choice open were closed; by each that does."""
    numerics = path.numerics
    narrower = {
        "inner_parts": replace(numerics, inner_parts=1),
        "intermediate_any_group": replace(numerics, intermediate_any_group=False),
        "gemm1_parts": replace(numerics, gemm1_partial=None, gemm1_parts=1),
        "store_ulps": replace(numerics, store_ulps=0.5),
    }
    trial = draw(path, weighting, sizes, seed)
    open_ones = {name: replace(trial, numerics=other) for name, other in narrower.items() if other != numerics}
    return {name: _width(other.bound()) for name, other in open_ones.items()}
