"""Dispatch and combine of one MoE layer in pure torch.distributed: the specification the accelerated path is held to.

Semantics (MoRI 624002c8, include/mori/ops/dispatch_combine and python/mori/ops/dispatch_combine.py):

* *dispatch* copies a token once per distinct destination rank, with its whole row of expert ids, its whole row of
  weights and its scales, bit for bit. The owner of expert e is ``e // experts_per_rank``; -1 and ids beyond the last
  expert go nowhere; duplicate ids, or several experts of one rank, still make one row.
* *combine* is the plain, unweighted float32 sum of the rows that the destination ranks produced, rounded once; with
  per-node levels each node's partial sum is rounded first and the nodes are summed in ascending order. Rows of
  weights are summed apart and never applied to the data. A token without destination gets zero.
* a *codec* changes what combine puts on the wire: the rank whose experts made a row codes it, the token's rank decodes
  and sums; on InterNodeV1 each node's partial sum is coded once more (:mod:`reference.combine_codecs`).

Works on any process group (gloo, NCCL, RCCL) and on whatever device the tensors live on. Collectives per call:
dispatch 2 (counts, packed rows), or 1 along the route of an earlier dispatch; combine 1 (rows back). A pass against
this module proves nothing about memory ordering between ranks: its collectives are ordered by torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from reference.combine_codecs import CodedRows, add_product, code_rows, decode_rows, saturated
from reference.combine_numerics import CombineCodec
from reference.rounding import round_to


@dataclass
class Route:
    """Where rows go, and from where they come: what follows from the ids of all ranks alone.

    Attributes:
        destinations: ``[n, W]`` bool, which ranks each of this rank's own tokens goes to.
        owners: ``[n, k]`` int64, owner of each slot of the own tokens, -1 for none.
        send_counts: rows sent to each rank.
        receive_counts: rows received from each rank.
        send_index: ``[2, S]`` int64, (destination rank, token) of each sent row.
        source_rank: ``[R]`` int64, of each received row.
    """

    destinations: torch.Tensor
    owners: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    send_index: torch.Tensor
    source_rank: torch.Tensor


@dataclass
class Dispatched(Route):
    """Rows that this rank received, ascending by (source rank, source token), and the route by which combine returns.

    Attributes:
        rows: ``[R, H]``, any element type.
        ids: ``[R, k]`` int32, the source token's whole row.
        weights: ``[R, k]`` float32, the source token's whole row.
        scales: ``[R, S]`` or None.
        source_token: ``[R]`` int64.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor | None
    source_token: torch.Tensor


@dataclass
class CombineResult:
    """What the tokens of this rank got back.

    Attributes:
        output: ``[n, H]`` in the element type of the expert rows, summed in the declared order.
        weights: ``[n, k]`` float32 or None.
        terms: ``[W, n, H]`` float32, contribution of each destination rank, zero where there is none; the error bound
            follows from it. With a codec, the rows before they were coded.
        destinations: ``[n, W]`` bool.
        beside: ``[W, n, B]`` float32 or None, what travelled along, zero where nothing came.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    terms: torch.Tensor
    destinations: torch.Tensor
    beside: torch.Tensor | None = None


def slot_owners(ids: torch.Tensor, experts_per_rank: int, world_size: int) -> torch.Tensor:
    """Owner rank of every slot of ``ids [n, k]``, int64, -1 where the id names no expert."""
    valid = (ids >= 0) & (ids < experts_per_rank * world_size)
    owners = torch.div(ids.long(), experts_per_rank, rounding_mode="floor")
    return torch.where(valid, owners, -1)


def destination_ranks(owners: torch.Tensor, world_size: int) -> torch.Tensor:
    """``[n, W]`` bool from ``owners [n, k]``: the distinct ranks that each token goes to."""
    # Column W collects the slots without owner and is cut off.
    hit = torch.zeros(owners.shape[0], world_size + 1, dtype=torch.bool, device=owners.device)
    hit.scatter_(1, torch.where(owners < 0, world_size, owners), True)
    return hit[:, :world_size]


def _exchange(packed: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Move rows of bytes ``[sum(send), B]``; one collective."""
    out = packed.new_empty(sum(receive), packed.shape[1])
    dist.all_to_all_single(out, packed.contiguous(), receive, send, group=group)
    return out


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``[n, c]`` of any element type as ``[n, B]`` uint8."""
    rows = tensor.contiguous()
    # A column of one element may count as contiguous with stride 0, which view() refuses.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


class _Unpacker:
    """Cut the columns of a packed row off one after another."""

    def __init__(self, packed: torch.Tensor) -> None:
        self._packed = packed
        self._offset = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        width = like.shape[1] * like.element_size()
        columns = self._packed[:, self._offset : self._offset + width]
        self._offset += width
        # A copy in any case: the columns of a single row count as contiguous where they are, at an offset that an
        # element of several bytes may not have.
        own = columns.clone(memory_format=torch.contiguous_format)
        return own.view(like.dtype).reshape(self._packed.shape[0], like.shape[1])


def plan_route(ids: torch.Tensor, experts_per_rank: int, group: dist.ProcessGroup) -> Route:
    """Where every token of ``ids [n, k]`` goes. Collective; 1 collective, after which the host reads the counts."""
    world_size = dist.get_world_size(group)
    owners = slot_owners(ids, experts_per_rank, world_size)
    destinations = destination_ranks(owners, world_size)
    send = destinations.sum(0)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    send_counts, receive_counts = torch.stack([send, receive]).tolist()
    return Route(
        destinations=destinations,
        owners=owners,
        send_counts=send_counts,
        receive_counts=receive_counts,
        send_index=destinations.t().nonzero().t(),
        source_rank=torch.repeat_interleave(torch.arange(world_size, device=ids.device), receive),
    )


def dispatch(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    experts_per_rank: int,
    group: dist.ProcessGroup,
    route: Route | None = None,
) -> Dispatched:
    """Send every token to the distinct ranks that own its experts. Collective; 2 collectives, 1 along a known route.

    Args:
        rows: ``[n, H]``, any element type, moved as bytes; n may differ per rank and may be 0.
        ids: ``[n, k]`` int32, or int64 that fit int32, global expert ids; ids outside ``[0, W * experts_per_rank)``
            go nowhere.
        weights: ``[n, k]`` float32.
        scales: ``[n, S]`` of any element type, or None; given on all ranks or on none.
        experts_per_rank: experts that each rank owns.
        group: process group of the W ranks.
        route: of these ids, from an earlier dispatch, on all ranks or on none; the host then waits for nothing, so the
            call may be captured in a CUDA or HIP graph.

    Raises:
        ValueError: the row counts of the arguments differ, or that of the route.
    """
    for name, tensor in (("ids", ids), ("weights", weights), ("scales", scales)):
        if tensor is not None and tensor.shape[0] != rows.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} rows and rows has {rows.shape[0]}; give one row per token")
    if route is not None and route.owners.shape[0] != rows.shape[0]:
        raise ValueError(f"the route has {route.owners.shape[0]} tokens and rows has {rows.shape[0]}; give its tokens")
    if route is None:
        route = plan_route(ids, experts_per_rank, group)
    token = route.send_index[1]
    columns = [rows, ids.int(), weights, *([] if scales is None else [scales])]
    packed = torch.cat([_bytes(column) for column in columns], dim=1)[token]
    packed = torch.cat([packed, _bytes(token.int().unsqueeze(1))], dim=1)

    unpack = _Unpacker(_exchange(packed, route.send_counts, route.receive_counts, group))
    received_rows, received_ids, received_weights = unpack.take(rows), unpack.take(ids.int()), unpack.take(weights)
    received_scales = None if scales is None else unpack.take(scales)
    source_token = unpack.take(torch.empty(0, 1, dtype=torch.int32)).flatten().long()
    return Dispatched(
        rows=received_rows,
        ids=received_ids,
        weights=received_weights,
        scales=received_scales,
        source_token=source_token,
        destinations=route.destinations,
        owners=route.owners,
        send_counts=route.send_counts,
        receive_counts=route.receive_counts,
        send_index=route.send_index,
        source_rank=route.source_rank,
    )


def combine(
    expert_rows: torch.Tensor,
    dispatched: Dispatched,
    weights: torch.Tensor | None = None,
    *,
    beside: torch.Tensor | None = None,
    fold: str = "first",
    nodes: int = 1,
    codec: CombineCodec | None = None,
    fused: bool = True,
    group: dist.ProcessGroup,
) -> CombineResult:
    """Return one row per received row to its source and sum per token. Collective; 1 collective.

    Args:
        expert_rows: ``[R, H]`` bfloat16 or float32, row i answers ``dispatched.rows[i]``.
        dispatched: what :func:`dispatch` returned.
        weights: ``[R, k]`` float32 in received-row layout, or None; given on all ranks or on none.
        beside: ``[R, B]`` of an element type that float32 holds, or None: returned with the rows, not summed; given on
            all ranks or on none.
        fold: position of a destination in the sum: its ``"first"`` or its ``"last"`` slot in the token's row.
        nodes: rounding levels; 1 rounds the sum over all destinations once, N > 1 rounds each node's partial sum and
            then the sum over nodes in ascending order (MoRI InterNodeV1, internode_v1.cpp:1365).
        codec: what travels, or None for the rows as they are; the same on all ranks. The rows themselves then travel
            along, for ``terms`` only.
        fused: whether a decoded product is added by a fused multiply-add or rounded before; both are legal, and without
            scales the same.
        group: process group of the W ranks.

    Raises:
        ValueError: ``expert_rows`` does not have one row per received row, ``fold`` is unknown, ``nodes`` does not
            divide the ranks, or is above 1 with a codec that rounds no partial sums; rows that the codec refuses
            (:func:`reference.combine_codecs.code_rows`).
    """
    if expert_rows.shape[0] != dispatched.rows.shape[0]:
        raise ValueError(
            f"expert_rows has {expert_rows.shape[0]} rows but {dispatched.rows.shape[0]} were received; give one each"
        )
    if fold not in ("first", "last"):
        raise ValueError(f"fold is {fold!r}; choose 'first' or 'last'")
    n, world_size = dispatched.destinations.shape
    if world_size % nodes:
        raise ValueError(f"nodes is {nodes}; it must divide the {world_size} ranks")
    if codec is not None and nodes > 1 and not codec.rounds_partials:
        raise ValueError(f"nodes is {nodes} with {codec.name}, which rounds no partial sums; pass nodes=1")
    coded = None if codec is None else code_rows(expert_rows, codec)
    sent = () if coded is None else (coded.codes, coded.scales)
    columns = [column for column in (*sent, expert_rows, weights, beside) if column is not None]
    packed = torch.cat([_bytes(column) for column in columns], dim=1)
    returned = _exchange(packed, dispatched.receive_counts, dispatched.send_counts, group)
    unpack = _Unpacker(returned)
    rank, token = dispatched.send_index

    def placed(returned: torch.Tensor) -> torch.Tensor:
        by_rank = torch.zeros(world_size, n, returned.shape[1], dtype=torch.float32, device=returned.device)
        by_rank[rank, token] = returned.float()
        return by_rank

    values, scales = None, None
    if codec is not None and coded is not None:
        arrived = CodedRows(unpack.take(coded.codes), None if coded.scales is None else unpack.take(coded.scales))
        values, scales = (
            None if part is None else placed(part) for part in decode_rows(arrived, codec, expert_rows.shape[1])
        )
    terms = placed(unpack.take(expert_rows))
    weight_sum = None
    if weights is not None:
        weight_sum = torch.zeros(n, weights.shape[1], dtype=torch.float32, device=weights.device)
        weight_sum.index_add_(0, token, unpack.take(weights))
    addends = terms if values is None else values
    output = _fold_ranks(addends, scales, dispatched.owners, fold, nodes, expert_rows.dtype, codec, fused)
    along = None if beside is None else placed(unpack.take(beside))
    return CombineResult(output.to(expert_rows.dtype), weight_sum, terms, dispatched.destinations, along)


def _fold_ranks(
    addends: torch.Tensor,
    scales: torch.Tensor | None,
    owners: torch.Tensor,
    fold: str,
    nodes: int,
    dtype: torch.dtype,
    codec: CombineCodec | None,
    fused: bool,
) -> torch.Tensor:
    """Sum ``addends [W, n, H]``, times scales if any, per token in slot order, rounded per level; float32."""
    world_size, n, hidden = addends.shape
    top_k = owners.shape[1]
    # slot[t, r]: the slot that places rank r in token t's sum; top_k for ranks that take no part.
    slot = torch.full((n, world_size + 1), top_k, device=addends.device)
    slots = torch.arange(top_k, device=addends.device).expand(n, top_k)
    reduce = "amin" if fold == "first" else "amax"
    column = torch.where(owners < 0, world_size, owners)
    slot = slot.scatter_reduce(1, column, slots, reduce, include_self=False)[:, :world_size]
    per_node, tokens = world_size // nodes, torch.arange(n, device=addends.device)
    total = torch.zeros(n, hidden, dtype=torch.float32, device=addends.device)
    for node in range(nodes):
        first = node * per_node
        order = torch.argsort(slot[:, first : first + per_node], dim=1, stable=True) + first
        partial = torch.zeros_like(total)
        for position in range(min(per_node, top_k)):
            at = order[:, position], tokens
            if scales is None:
                partial = partial + addends[at]
            else:
                partial = add_product(partial, addends[at], scales[at], fused=fused)
        if codec is not None and codec.rounds_partials:
            partial = saturated(partial, codec.payload)
        elif nodes > 1:
            partial = round_to(partial, dtype)
        total = total + partial
    return round_to(total, dtype)
