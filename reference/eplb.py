"""Expert-parallel load balancing: which physical slot holds a copy of which logical expert, and who gets which token.

Scope: tuples of plain integers that restate what vLLM 0.33.0 does with redundant experts: maps between logical and
physical ids, choice of a replica, counting of loads, the rebalance policy (DeepSeek's EPLB) and the copies that take
the weights along. No torch; :mod:`reference.eplb_tensors` has the same on tensors. One call is one layer. What
agreement with this module does not prove: that weights were moved as :func:`moves` says, or that loads were counted on
every rank.

Symbols: L logical experts, R redundant ones, P = L + R physical slots, W ranks. Rank r holds the slots
``[r P / W, (r + 1) P / W)``; ``p2l[slot]`` is the logical expert of a slot, -1 for an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Most redundant experts: vLLM's table of replicas has 1,024 columns, one of them for the expert itself.
MAX_REDUNDANT = 1023
#: Multiplier of the hash that spreads tokens over replicas (2**32 over the golden ratio), and the bits that are kept.
HASH_MULTIPLIER = 2654435769
HASH_MASK = 0xFFFFFFFF


class EplbError(ValueError):
    """An argument is out of range. The message names the value, the limit and the fix."""


class Slot(NamedTuple):
    """A physical slot by its rank and its place there."""

    rank: int
    local: int


@dataclass(frozen=True)
class LogicalMaps:
    """Replicas of every logical expert.

    Attributes:
        physical: L rows, each the ascending physical slots of an expert, padded with -1 to the largest count.
        counts: number of replicas of every expert, at least 1.
    """

    physical: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]


def initial_map(logical: int, redundant: int) -> tuple[int, ...]:
    """The map at start-up: every expert once, then the first ones again, around and around.

    Source: vLLM 0.33.0 ``build_initial_global_physical_to_logical_map``.

    Raises:
        EplbError: a size is out of range.
    """
    _check("logical", logical, 1)
    _check("redundant", redundant, 0)
    if redundant > MAX_REDUNDANT:
        raise EplbError(f"redundant is {redundant}; vLLM's table of replicas allows at most {MAX_REDUNDANT}")
    return (*range(logical), *(extra % logical for extra in range(redundant)))


def slots_per_rank(physical: int, world_size: int) -> int:
    """P / W.

    Raises:
        EplbError: W does not divide P.
    """
    _check("physical", physical, 1)
    _check("world_size", world_size, 1)
    if physical % world_size:
        raise EplbError(
            f"{physical} physical experts do not divide among {world_size} ranks; change the redundant ones"
        )
    return physical // world_size


def place(slot: int, physical: int, world_size: int) -> Slot:
    """Rank and local place of a physical slot.

    Raises:
        EplbError: W does not divide P, or there is no such slot.
    """
    per_rank = slots_per_rank(physical, world_size)
    if not 0 <= slot < physical:
        raise EplbError(f"slot is {slot}; there are {physical}")
    return Slot(*divmod(slot, per_rank))


def logical_maps(p2l: Sequence[int], logical: int) -> LogicalMaps:
    """Invert a physical-to-logical map; empty slots (-1) appear nowhere.

    Source: vLLM 0.33.0 ``compute_logical_maps``, which also returns experts without a slot; here they are an error, for
    no token could reach them.

    Raises:
        EplbError: an entry is out of range, or an expert has no slot.
    """
    replicas: list[list[int]] = [[] for _ in range(logical)]
    for slot, expert in enumerate(p2l):
        if not -1 <= expert < logical:
            raise EplbError(f"slot {slot} holds expert {expert}; there are {logical}, and -1 is an empty slot")
        if expert >= 0:
            replicas[expert].append(slot)
    missing = [expert for expert, slots in enumerate(replicas) if not slots]
    if missing:
        raise EplbError(f"expert {missing[0]} has no physical slot; give each of the {logical} at least one")
    width = max(len(slots) for slots in replicas)
    return LogicalMaps(
        tuple((*slots, *(-1,) * (width - len(slots))) for slots in replicas), tuple(len(slots) for slots in replicas)
    )


def replica(token: int, count: int) -> int:
    """Which of ``count`` replicas serves a token: the same for all its k experts that have as many.

    ``token`` is the row's index in the batch of its own rank, so that equal rows elsewhere may take another replica.
    Counts 2, 4 and 8 give ``token % count``, the multiplier being 1 modulo 8.

    Source: vLLM 0.33.0 ``eplb_map_to_physical_and_record``.
    """
    return ((token * HASH_MULTIPLIER) & HASH_MASK) % count


def physical_id(token: int, expert: int, maps: LogicalMaps) -> int:
    """Physical slot for a logical id in row ``token``; -1 for -1 and for every other id out of range.

    Source: vLLM 0.33.0 ``eplb_map_to_physical_and_record`` on CUDA-like platforms; elsewhere it maps nothing.
    """
    if not 0 <= expert < len(maps.counts):
        return -1
    return maps.physical[expert][replica(token, maps.counts[expert])]


def physical_load(ids: Sequence[Sequence[int]], physical: int, unpadded: int) -> tuple[int, ...]:
    """How often each of P slots is chosen by the first ``unpadded`` rows of one rank's physical ids.

    Counted where tokens come from, for the slots of all ranks; :func:`global_load` adds the ranks up. Counting only
    the slots that the rank itself holds was a defect of older versions.

    Raises:
        EplbError: ``unpadded`` is not a number of rows of ``ids``.
    """
    if not 0 <= unpadded <= len(ids):
        raise EplbError(f"unpadded is {unpadded}; there are {len(ids)} rows")
    load = [0] * physical
    for row in ids[:unpadded]:
        for slot in row:
            if slot >= 0:
                load[slot] += 1
    return tuple(load)


def global_load(loads: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Sum over ranks of :func:`physical_load`."""
    return tuple(sum(column) for column in zip(*loads, strict=True))


def logical_load(p2l: Sequence[int], load: Sequence[float], logical: int) -> tuple[float, ...]:
    """Load of every logical expert: the sum over its replicas. It is what :func:`rebalance` weighs."""
    total: list[float] = [0] * logical
    for expert, count in zip(p2l, load, strict=True):
        if expert >= 0:
            total[expert] += count
    return tuple(total)


def rank_loads(p2l: Sequence[int], weights: Sequence[float], world_size: int) -> tuple[float, ...]:
    """Load of every rank if each expert's load splits evenly over its replicas.

    Raises:
        EplbError: W does not divide P, or an expert has no slot.
    """
    per_rank = slots_per_rank(len(p2l), world_size)
    counts = logical_maps(p2l, len(weights)).counts
    return tuple(
        sum(weights[expert] / counts[expert] for expert in p2l[start : start + per_rank] if expert >= 0)
        for start in range(0, len(p2l), per_rank)
    )


def pack(weights: Sequence[float], packs: int) -> tuple[tuple[int, ...], ...]:
    """Greedy packing of items into packs of equal size: heaviest first, each into the lightest pack with room.

    Equal items go by ascending index, equal packs too. One item per pack is the identity, whatever the weights.

    Returns:
        For every pack its items in the order in which they came.

    Source: DeepSeek EPLB ``balanced_packing``. Upstream leaves the order of equal items to the sorting routine.

    Raises:
        EplbError: ``packs`` does not divide the number of items.
    """
    if packs < 1 or len(weights) % packs:
        raise EplbError(f"{len(weights)} items do not divide among {packs} packs; change either")
    room = len(weights) // packs
    if room == 1:
        return tuple((item,) for item in range(packs))
    contents: list[list[int]] = [[] for _ in range(packs)]
    totals = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((p for p in range(packs) if len(contents[p]) < room), key=lambda p: totals[p])
        contents[lightest].append(item)
        totals[lightest] += weights[item]
    return tuple(map(tuple, contents))


def replicate(weights: Sequence[float], slots: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give every expert a slot, and each further slot to the expert with the largest load per replica.

    Equal loads go by ascending index. No other counts make the largest load per replica smaller.

    Returns:
        The expert of every slot, and the number of replicas of every expert.

    Source: DeepSeek EPLB ``replicate_experts``.

    Raises:
        EplbError: fewer slots than experts.
    """
    if slots < len(weights):
        raise EplbError(f"{slots} slots cannot hold {len(weights)} experts; give at least as many")
    counts = [1] * len(weights)
    held = list(range(len(weights)))
    for _ in range(slots - len(weights)):
        busiest = max(range(len(weights)), key=lambda expert: weights[expert] / counts[expert])
        counts[busiest] += 1
        held.append(busiest)
    return tuple(held), tuple(counts)


def rebalance(
    weights: Sequence[float],
    physical: int,
    groups: int,
    nodes: int,
    world_size: int,
    old: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """New physical-to-logical map of a layer for the given loads of its logical experts.

    Hierarchical where ``nodes`` divides ``groups``: groups of experts are packed onto nodes, experts replicated within
    their node, replicas packed onto its ranks. Otherwise the same with one group on one node.

    Args:
        weights: load of every logical expert, at least 0.
        physical: P.
        groups: of consecutive experts, of equal size; 1 where the model has none.
        nodes: N.
        world_size: W.
        old: the map in use: experts that stay on a rank keep their slot, and only those that come are copied.

    Source: vLLM 0.33.0 ``DefaultEplbPolicy.rebalance_experts``, DeepSeek EPLB. Loads are float32 there, where counts
    are exact up to 2**24, and quotients float64, as here.

    Raises:
        EplbError: sizes do not divide one another, a weight is negative or NaN, or ``old`` has another length.
    """
    _check("nodes", nodes, 1)
    per_rank = slots_per_rank(physical, world_size)
    bad = [(expert, weight) for expert, weight in enumerate(weights) if not weight >= 0]
    if bad:
        raise EplbError(f"the load of expert {bad[0][0]} is {bad[0][1]}; loads are counts, at least 0")
    if old is not None and len(old) != physical:
        raise EplbError(f"old has {len(old)} slots; to keep them the new map must have as many, not {physical}")
    if groups < 1 or groups % nodes:
        groups, nodes = 1, 1
    for name, value, divisor in (("experts", len(weights), groups), ("ranks", world_size, nodes)):
        if value % divisor:
            raise EplbError(
                f"{value} {name} do not divide among {divisor} {'groups' if name == 'experts' else 'nodes'}"
            )
    group_size = len(weights) // groups
    group_loads = [sum(weights[start : start + group_size]) for start in range(0, len(weights), group_size)]
    new: list[int] = []
    for members in pack(group_loads, nodes):
        experts = [group * group_size + offset for group in members for offset in range(group_size)]
        held, counts = replicate([weights[expert] for expert in experts], physical // nodes)
        shares = [weights[experts[index]] / counts[index] for index in held]
        for slots in pack(shares, world_size // nodes):
            new.extend(experts[held[slot]] for slot in slots)
    return tuple(new) if old is None else _keep_slots(new, old, per_rank)


def _keep_slots(new: Sequence[int], old: Sequence[int], per_rank: int) -> tuple[int, ...]:
    """Reorder each rank's part: experts that it has already stay where they are, the others fill the gaps in order."""
    kept: list[int] = []
    for start in range(0, len(new), per_rank):
        coming = list(new[start : start + per_rank])
        stays: list[int | None] = []
        for expert in old[start : start + per_rank]:
            found = expert in coming
            stays.append(expert if found else None)
            if found:
                coming.remove(expert)
        arrivals = iter(coming)
        kept.extend(next(arrivals) if expert is None else expert for expert in stays)
    return tuple(kept)


def moves(old: Sequence[int], new: Sequence[int], world_size: int) -> tuple[Slot | None, ...]:
    """Where the weights of every slot of ``new`` come from: a place in ``old``, or None for an empty slot.

    The slot itself if it keeps its expert, else another of the same rank, else the first that holds the expert.
    Upstream spreads the copies over the ranks that hold a replica; replicas are equal bit for bit, so that the result
    is the same.

    Raises:
        EplbError: the maps differ in length, W does not divide it, or ``old`` has no copy of an expert.
    """
    if len(old) != len(new):
        raise EplbError(f"the maps have {len(old)} and {len(new)} slots; they must have as many")
    per_rank = slots_per_rank(len(new), world_size)
    sources: list[Slot | None] = []
    for slot, expert in enumerate(new):
        if expert < 0:
            sources.append(None)
            continue
        own = slot - slot % per_rank
        nearest = (slot, *range(own, own + per_rank), *range(len(old)))
        source = next((candidate for candidate in nearest if old[candidate] == expert), None)
        if source is None:
            raise EplbError(f"slot {slot} is to hold expert {expert}, of which the old map has no copy")
        sources.append(place(source, len(old), world_size))
    return tuple(sources)


def _check(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise EplbError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
