"""Expert placement: which rank owns which expert, and in which local slot.

Scope: tuples of plain integers that restate what vLLM 0.33.0 hands to its kernels (expert map, AITER mask, round-robin
routing tables) and the owner that MoRI and DeepEP derive by division. No torch. What agreement with this module does
not prove: that weights were loaded into the slots it names, or that a kernel reads the map and not the mask.

Symbols: W ranks, E experts, S fused shared experts, ``base = E // W``, ``rem = E % W``. The first ``rem`` ranks own
``base + 1`` experts, the others ``base``; no rank differs from another by more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Values of vLLM's ``--expert-placement-strategy``.
STRATEGIES: tuple[str, ...] = ("linear", "round_robin")

#: All-to-all backends that carry routing tables, so that a round-robin placement reaches the right rank.
TABLE_BACKENDS: tuple[str, ...] = ("deepep_low_latency", "nixl_ep")

#: Values of vLLM 0.33.0's ``--all2all-backend``.
ALL2ALL_BACKENDS: tuple[str, ...] = (
    "allgather_reducescatter",
    "deepep_high_throughput",
    "deepep_low_latency",
    "deepep_v2",
    "flashinfer_all2allv",
    "flashinfer_nvlink_one_sided",
    "flashinfer_nvlink_two_sided",
    "moonep",
    "mori_high_throughput",
    "mori_low_latency",
    "naive",
    "nixl_ep",
    "passthrough",
    "pplx",
)


class PlacementError(ValueError):
    """A placement argument is out of range. The message names the value, the limit and the fix."""


def _check_integer(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlacementError(f"{name} is {value!r}; it must be an integer of at least {minimum}")


def _check_sizes(experts: int, world_size: int) -> None:
    _check_integer("experts", experts, 1)
    _check_integer("world_size", world_size, 1)


def _check_rank(rank: int, world_size: int) -> None:
    _check_integer("rank", rank, 0)
    if rank >= world_size:
        raise PlacementError(f"rank is {rank}; with {world_size} ranks it must be at most {world_size - 1}")


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise PlacementError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")


def local_count(experts: int, world_size: int, rank: int) -> int:
    """Number of routed experts a rank owns, the same under both strategies.

    Source: vLLM 0.33.0 ``determine_expert_map``. Its docstring gives the remainder to the last rank; the code gives it
    to the first ranks, and the code is what counts. vLLM's ``ExpertMapManager.local_num_experts`` adds the S fused
    shared experts to this number.

    Raises:
        PlacementError: a size is below 1 or the rank is not below the world size.
    """
    _check_sizes(experts, world_size)
    _check_rank(rank, world_size)
    return experts // world_size + (rank < experts % world_size)


def owned_experts(experts: int, world_size: int, rank: int, strategy: str = "linear") -> tuple[int, ...]:
    """Global ids a rank owns, by ascending local slot (which is ascending id under both strategies).

    ``linear``: a block of consecutive ids. ``round_robin``: ``rank, rank + W, rank + 2 W, ...``.

    Source: vLLM 0.33.0 ``determine_expert_map``.

    Raises:
        PlacementError: a size, the rank or the strategy is out of range.
    """
    _check_strategy(strategy)
    count = local_count(experts, world_size, rank)
    if strategy == "round_robin":
        return tuple(range(rank, experts, world_size))
    start = rank * (experts // world_size) + min(rank, experts % world_size)
    return tuple(range(start, start + count))


def expert_map(experts: int, world_size: int, rank: int, strategy: str = "linear") -> tuple[int, ...] | None:
    """Local slot of every global expert, -1 where another rank owns it (int32 in vLLM); None for a single rank.

    Source: vLLM 0.33.0 ``determine_expert_map``, which returns no map at all for ``ep_size == 1``.

    Raises:
        PlacementError: a size, the rank or the strategy is out of range.
    """
    owned = owned_experts(experts, world_size, rank, strategy)
    if world_size == 1:
        return None
    slots = [-1] * experts
    for slot, expert in enumerate(owned):
        slots[expert] = slot
    return tuple(slots)


def extended_expert_map(
    experts: int, world_size: int, rank: int, strategy: str = "linear", shared_experts: int = 0
) -> tuple[int, ...] | None:
    """:func:`expert_map` with S fused shared experts: global id ``E + i`` has slot ``local_count + i`` on every rank.

    Source: vLLM 0.33.0 ``determine_expert_map`` with ``return_expert_mask=True``.

    Raises:
        PlacementError: a size, the rank, the strategy or ``shared_experts`` is out of range.
    """
    _check_integer("shared_experts", shared_experts, 0)
    routed = expert_map(experts, world_size, rank, strategy)
    if routed is None:
        return None
    count = local_count(experts, world_size, rank)
    return (*routed, *range(count, count + shared_experts))


def expert_mask(
    experts: int, world_size: int, rank: int, strategy: str = "linear", shared_experts: int = 0
) -> tuple[int, ...] | None:
    """AITER's 0/1 mask of length ``E + S + 1``: 1 where this rank computes the expert; None for a single rank.

    Shared experts are 1 on every rank. The last element belongs to the sentinel id ``E + S`` and is always 0: a slot
    that carries the sentinel is computed nowhere. Passing the map where the mask is expected (or the reverse) raises no
    error in the kernels and gives garbage.

    Source: vLLM 0.33.0 ``determine_expert_map`` with ``return_expert_mask=True``.

    Raises:
        PlacementError: a size, the rank, the strategy or ``shared_experts`` is out of range.
    """
    _check_integer("shared_experts", shared_experts, 0)
    routed = expert_map(experts, world_size, rank, strategy)
    if routed is None:
        return None
    return (*(int(slot > -1) for slot in routed), *(1 for _ in range(shared_experts)), 0)


def global_to_physical(experts: int, world_size: int) -> tuple[int, ...]:
    """Position of every global expert when the ranks' round-robin experts are laid end to end (int64 in vLLM).

    A dispatcher that derives the owner by division needs ids in this order; vLLM maps ids before dispatch and again at
    combine. The composition with :func:`owner_by_division` is only right if W divides E.

    Source: vLLM 0.33.0 ``ExpertMapManager`` round-robin routing tables.

    Raises:
        PlacementError: a size is below 1.
    """
    _check_sizes(experts, world_size)
    base, rem = divmod(experts, world_size)
    return tuple(
        owner * base + min(owner, rem) + local
        for local, owner in (divmod(expert, world_size) for expert in range(experts))
    )


def physical_to_global(experts: int, world_size: int) -> tuple[int, ...]:
    """Inverse permutation of :func:`global_to_physical`.

    Source: vLLM 0.33.0 ``ExpertMapManager`` round-robin routing tables.

    Raises:
        PlacementError: a size is below 1.
    """
    forward = global_to_physical(experts, world_size)
    inverse = [0] * experts
    for expert, position in enumerate(forward):
        inverse[position] = expert
    return tuple(inverse)


def local_to_global(experts: int, world_size: int, rank: int) -> tuple[int, ...]:
    """Global id of every local slot of a rank under round-robin: the rank's block of :func:`physical_to_global`.

    Source: vLLM 0.33.0 ``ExpertMapManager`` round-robin routing tables.

    Raises:
        PlacementError: a size or the rank is out of range.
    """
    return owned_experts(experts, world_size, rank, "round_robin")


def owner_by_division(expert: int, experts: int, world_size: int) -> int | None:
    """Rank that MoRI, DeepEP low latency and NIXL send an expert id to, or None if no rank owns it.

    The owner is ``expert // (E // W)``; the ids from ``W * (E // W)`` on and the negative ones have none. If W divides
    E this is the owner under the linear placement. Otherwise the two rules disagree, which vLLM 0.33.0 does not check:
    such sizes lie outside the contract of these backends. With fewer experts than ranks no id has an owner.

    Source: MoRI 624002c8 src/ops/dispatch_combine/intranode.hpp:128; vLLM 0.33.0 passes ``E // W`` as
    ``num_experts_per_rank``. What a kernel does with an id that has no owner depends on the kernel type.

    Raises:
        PlacementError: a size is below 1 or the id is not an integer.
    """
    _check_sizes(experts, world_size)
    if not isinstance(expert, int) or isinstance(expert, bool):
        raise PlacementError(f"expert is {expert!r}; it must be an integer (any sign)")
    per_rank = experts // world_size
    if expert < 0 or expert >= world_size * per_rank:
        return None
    return expert // per_rank


@dataclass(frozen=True)
class EffectiveStrategy:
    """The strategy vLLM really runs.

    Attributes:
        strategy: ``"linear"`` or ``"round_robin"``.
        reason: why the request was replaced; empty if it was honoured.
        routing_tables: True if the all-to-all backend maps ids through :func:`global_to_physical`.
    """

    strategy: str
    reason: str = ""
    routing_tables: bool = False


def effective_strategy(
    requested: str,
    *,
    world_size: int,
    expert_groups: int | None,
    redundant_experts: int = 0,
    eplb: bool = False,
    all2all_backend: str | None = None,
    expert_parallel: bool = True,
    shared_experts: int = 0,
) -> EffectiveStrategy:
    """Apply vLLM's fall-backs from round-robin to linear, in its order; it logs a warning and carries on.

    Args:
        requested: ``"linear"`` or ``"round_robin"``.
        world_size: EP size; 1 if expert parallelism is off.
        expert_groups: the model's ``n_group``, or None if it has no groups.
        redundant_experts: physical experts beyond the logical ones.
        eplb: expert-parallel load balancing is on.
        all2all_backend: backend whose kernels are in use, or None if none are (tensor parallel ranks without data
            parallelism: every rank sees every token and the map alone selects).
        expert_parallel: False if expert parallelism is off: vLLM then skips the checks of groups and backend.
        shared_experts: S, shared experts fused into the routed ones (AITER); vLLM asserts 0 where it builds tables.

    Source: vLLM 0.33.0 ``determine_expert_placement_strategy`` and ``ExpertMapManager``.

    Raises:
        PlacementError: an argument is out of range or the arguments contradict one another.
    """
    _check_strategy(requested)
    _check_integer("world_size", world_size, 1)
    _check_integer("redundant_experts", redundant_experts, 0)
    _check_integer("shared_experts", shared_experts, 0)
    if expert_groups is not None:
        _check_integer("expert_groups", expert_groups, 0)
    if all2all_backend is not None and all2all_backend not in ALL2ALL_BACKENDS:
        raise PlacementError(
            f"all2all_backend is {all2all_backend!r}, which vLLM 0.33.0 does not accept; "
            f"choose one of {', '.join(ALL2ALL_BACKENDS)}, or None"
        )
    if not expert_parallel and world_size != 1:
        raise PlacementError(
            f"world_size is {world_size} but expert_parallel is False; without it the EP size is 1: pass world_size=1"
        )
    if requested == "linear":
        return EffectiveStrategy("linear")
    reason = ""
    if expert_parallel:
        reason = _round_robin_refusal(expert_groups, redundant_experts, eplb, all2all_backend)
    if not reason and world_size == 1:
        reason = "the EP size is 1: one rank owns every expert"
    if reason:
        return EffectiveStrategy("linear", reason)
    tables = all2all_backend in TABLE_BACKENDS
    if tables and shared_experts:
        raise PlacementError(
            f"shared_experts is {shared_experts}; round_robin with the routing tables of {all2all_backend} allows "
            "only 0: switch shared-expert fusion off or use linear"
        )
    return EffectiveStrategy("round_robin", routing_tables=tables)


def _round_robin_refusal(
    expert_groups: int | None, redundant_experts: int, eplb: bool, all2all_backend: str | None
) -> str:
    if expert_groups is None or expert_groups <= 1:
        return f"the model has no more than one expert group (expert_groups is {expert_groups})"
    if redundant_experts:
        return f"there are redundant experts ({redundant_experts})"
    if eplb:
        return "expert-parallel load balancing (EPLB) is on"
    if all2all_backend is not None and all2all_backend not in TABLE_BACKENDS:
        return f"all-to-all backend {all2all_backend} has no routing tables; only {' and '.join(TABLE_BACKENDS)} do"
    return ""
