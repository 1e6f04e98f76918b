"""Routing archetypes: how few numbers become the expert ids of every token.

The same expansion serves large rounds (recipes, expanded in the ranks and by the reducer) and the palettes of small
rounds. It uses :meth:`random.Random.random` alone, whose sequence Python guarantees, so a recipe means the same rows on
every machine. Archetypes are the shapes of load that break EP kernels: hot experts, hot ranks, ranks that receive
nothing, purely local and purely remote traffic, duplicates. What they do not cover: rows that a real router would
correlate with values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Row = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """Where a row is drawn: the layer's sizes, the source rank, and the archetype's parameter."""

    experts: int
    top_k: int
    world_size: int
    nodes: int
    rank: int
    parameter: int

    @property
    def per_rank(self) -> int:
        """Experts of one rank."""
        return self.experts // self.world_size


def _distinct(random: Random, pool: Sequence[int], k: int) -> list[int]:
    """k picks from ``pool``, distinct while the pool lasts."""
    rest = list(pool)
    picked = []
    for _ in range(k):
        if not rest:
            rest = list(pool)
        picked.append(rest.pop(int(random.random() * len(rest))))
    return picked


def _uniform(random: Random, site: Site) -> list[int]:
    return _distinct(random, range(site.experts), site.top_k)


def _hot_expert(random: Random, site: Site) -> list[int]:
    hot = site.parameter % site.experts
    others = [e for e in range(site.experts) if e != hot] or [hot]
    row = [hot, *_distinct(random, others, site.top_k - 1)]
    turn = int(random.random() * site.top_k)
    return row[turn:] + row[:turn]


def _experts_of(site: Site, ranks: Sequence[int]) -> list[int]:
    return [r * site.per_rank + i for r in ranks for i in range(site.per_rank)]


def _hot_rank(random: Random, site: Site) -> list[int]:
    return _distinct(random, _experts_of(site, [site.parameter % site.world_size]), site.top_k)


def _local(random: Random, site: Site) -> list[int]:
    return _distinct(random, _experts_of(site, [site.rank]), site.top_k)


def _remote(random: Random, site: Site) -> list[int]:
    ranks = [r for r in range(site.world_size) if r != site.rank] or [site.rank]
    return _distinct(random, _experts_of(site, ranks), site.top_k)


def _avoid_rank(random: Random, site: Site) -> list[int]:
    ranks = [r for r in range(site.world_size) if r != site.parameter % site.world_size] or [0]
    return _distinct(random, _experts_of(site, ranks), site.top_k)


def _spread(random: Random, site: Site) -> list[int]:
    ranks = _distinct(random, range(site.world_size), site.top_k)
    return [r * site.per_rank + int(random.random() * site.per_rank) for r in ranks]


def _one_node(random: Random, site: Site) -> list[int]:
    per_node = site.world_size // site.nodes
    node = site.parameter % site.nodes
    return _distinct(random, _experts_of(site, range(node * per_node, (node + 1) * per_node)), site.top_k)


def _duplicates(random: Random, site: Site) -> list[int]:
    few = _distinct(random, range(site.experts), max(1, site.top_k // 2))
    return [few[int(random.random() * len(few))] for _ in range(site.top_k)]


def _masked(random: Random, site: Site) -> list[int]:
    row = _uniform(random, site)
    if random.random() < 0.25:
        return [-1] * site.top_k
    return [-1 if random.random() < 0.4 else e for e in row]


#: Every archetype by name. ``masked`` is drawn only where the contract says that -1 is dropped.
ARCHETYPES: dict[str, Callable[[Random, Site], list[int]]] = {
    "uniform": _uniform,
    "hot-expert": _hot_expert,
    "hot-rank": _hot_rank,
    "local": _local,
    "remote": _remote,
    "avoid-rank": _avoid_rank,
    "spread": _spread,
    "one-node": _one_node,
    "duplicates": _duplicates,
    "masked": _masked,
}


def explicit_rows(
    archetype: str,
    counts: Sequence[int],
    parameter: int,
    seed: int,
    *,
    experts: int,
    top_k: int,
    nodes: int,
    only: int | None = None,
) -> tuple[tuple[Row, ...], ...]:
    """Rows ``[rank][token][slot]`` of a recipe; with ``only``, every other rank's are left empty.

    Raises:
        ValueError: the archetype is unknown.
    """
    if archetype not in ARCHETYPES:
        raise ValueError(f"archetype is {archetype!r}; choose one of {', '.join(ARCHETYPES)}")
    draw = ARCHETYPES[archetype]
    world_size = len(counts)
    rows: list[tuple[Row, ...]] = []
    for rank, count in enumerate(counts):
        if only is not None and rank != only:
            rows.append(())
            continue
        site = Site(experts, top_k, world_size, nodes, rank, parameter)
        random = Random(seed * 1_000_003 + rank)
        rows.append(tuple(tuple(draw(random, site)) for _ in range(count)))
    return tuple(rows)
