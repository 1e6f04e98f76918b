"""``allgather``: all-gather every row to every rank, reduce-scatter the experts' answers (vLLM's default backend).

Scope: the naive path that any accelerated dispatch has to beat, on gloo, NCCL or RCCL and any device. It moves more
bytes than needed and sums in the element type. What a pass does not prove: anything about a library; the collectives
are torch.distributed's.

Source of semantics: vLLM 0.33.0, ``allgather_reducescatter``. One difference: vLLM gathers with per-rank sizes that
the host knows; here every rank's block has the size of the capacity and the counts travel along, so that neither call
synchronises the host and each makes one collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerated import wires
from accelerated.contract import Accumulation, Contract, MaskedSlots, ReceiveLayout, RowOrder, Standing, Support
from accelerated.interface import Combined, Received

if TYPE_CHECKING:
    import torch

    from accelerated.interface import Finding, RankContext
    from reference.problem import Problem

#: The only kernel type.
NAIVE = "naive"

# Sections of a rank's block start at multiples of this, so that each can be viewed in its own element type.
_ALIGNMENT = 16


def plain_calls(problem: Problem) -> Support:
    """Claimed without combine codecs and other ways of calling, which collectives of torch do not have."""
    for asked in (problem.codec, *problem.modes):
        if asked:
            return Support(Standing.REFUSED, f"{asked}: torch's collectives have no such thing; leave it out")
    return Support(Standing.CLAIMED)


class AllGatherOperation:
    """One collective per call. Each rank's block holds rows, ids, weights, scales and the count, in this order.

    With a wire format rows and scales travel as bytes.
    """

    def __init__(self, context: RankContext, problem: Problem) -> None:
        import torch

        self._group, self._problem = context.group, problem
        self._ranks, self._capacity = problem.world_size, problem.capacity
        slots = (problem.capacity, problem.top_k)
        columns, _ = wires.row_shape(problem)
        groups, scale_bytes = wires.scale_shape(problem)
        sections = [
            ((problem.capacity, columns), torch.uint8 if problem.wire else getattr(torch, problem.dtype)),
            (slots, torch.int32),
            (slots, torch.float32),
            ((problem.capacity, groups * scale_bytes), torch.uint8),
            ((1, 1), torch.int32),
        ]
        starts, end = [], 0
        for shape, dtype in sections:
            starts.append(end)
            end += -(-shape[0] * shape[1] * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        device = context.device
        # Views are cut once: prepare copies into the one and selects from the other.
        self._block = torch.zeros(end, dtype=torch.uint8, device=device)
        self._blocks = torch.empty(problem.world_size * end, dtype=torch.uint8, device=device)
        mine, all_ = self._block.view(1, end), self._blocks.view(problem.world_size, end)
        views = [(_section(mine, at, *s)[0], _section(all_, at, *s)) for at, s in zip(starts, sections, strict=True)]
        (self._rows, self._ids, self._weights, self._scales, self._count) = (view[0] for view in views)
        (self._all_rows, self._all_ids, self._all_weights, self._all_scales, self._all_counts) = (
            view[1] for view in views
        )
        self._tokens = torch.arange(problem.capacity, dtype=torch.int32, device=device)
        self._round: torch.Tensor | None = None
        self._sent = 0

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        """Gather ``rows [n, H]``, ``ids [n, k]`` and ``weights [n, k]`` of all ranks; 1 collective, no host sync.

        With a wire format rows are its codes, and ``scales [n, G]`` are gathered, too.

        Returns:
            Fresh ``[W·M, ...]`` tensors whose first ``count`` rows ascend by (source rank, token).

        Raises:
            RuntimeError: the round before is not finalised.
            ValueError: more tokens than the capacity, or rows or scales that are not of the wire.
        """
        import torch

        if self._round is not None:
            raise RuntimeError("prepare called twice: finalize the round before")
        sent = rows.shape[0]
        if sent > self._capacity:
            raise ValueError(f"{sent} tokens; the capacity is {self._capacity}")
        wires.check(self._problem, rows, scales)
        self._rows[:sent].copy_(wires.as_bytes(rows) if self._problem.wire else rows)
        if scales is not None:
            self._scales[:sent].copy_(wires.as_bytes(scales))
        self._ids[:sent].copy_(ids)
        self._weights[:sent].copy_(weights)
        self._count.fill_(sent)
        _all_gather(self._blocks, self._block, self._group)
        counts = self._all_counts.view(self._ranks, 1)
        # Valid rows first, each kind in its old order: this packs without telling the host how many there are.
        valid = (self._tokens < counts).view(-1)
        order = torch.argsort(valid, descending=True, stable=True)
        rank, token = order // self._capacity, order % self._capacity
        total = counts.sum(dim=0, dtype=torch.int32)
        self._round, self._sent = order, sent

        def source_map() -> torch.Tensor:
            n = int(total)
            return torch.stack((rank[:n], token[:n]), dim=1)

        all_rows = self._all_rows[rank, token]
        return Received(
            rows=all_rows.view(rows.dtype) if self._problem.wire else all_rows,
            ids=self._all_ids[rank, token],
            weights=self._all_weights[rank, token],
            count=total,
            source_map=source_map,
            state=order,
            scales=None if scales is None else self._all_scales[rank, token].view(scales.dtype),
        )

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        """Sum ``expert_rows [count..W·M, H]`` of all ranks row by row; 1 collective, no host sync.

        A row that has no expert on this rank must be zero; rows from ``count`` on are ignored.

        Returns:
            Fresh output ``[n, H]`` in the type of ``expert_rows``; no weights.

        Raises:
            RuntimeError: no prepare came before, or ``received`` is of another round.
        """
        order = self._round
        if order is None:
            raise RuntimeError("finalize called without prepare")
        if received.state is not order:
            raise RuntimeError("finalize called with the rows of another round")
        self._round = None
        hidden = expert_rows.shape[1]
        spread = expert_rows.new_empty(order.shape[0], hidden)
        spread.index_copy_(0, order[: expert_rows.shape[0]], expert_rows)
        return Combined(self._reduced(spread)[: self._sent], None)

    def _reduced(self, spread: torch.Tensor) -> torch.Tensor:
        """This rank's part ``[M, H]`` of the sum over ranks of ``spread [W·M, H]``."""
        output = spread.new_empty(self._capacity, spread.shape[1])
        _reduce_scatter(output, spread, self._group)
        return output

    def close(self) -> None:
        """Nothing outlives the tensors."""


class AllGatherSession:
    """Builds operations of one class over the default process group."""

    def __init__(self, context: RankContext, kernel_types: Sequence[str], operation: type[AllGatherOperation]) -> None:
        self._context, self._kernel_types, self._operation = context, kernel_types, operation

    def build(self, problem: Problem, kernel_type: str) -> AllGatherOperation:
        """Allocate the buffers of one operation.

        Raises:
            ValueError: unknown kernel type, or the problem is for another number of ranks.
        """
        if kernel_type not in self._kernel_types:
            raise ValueError(_unknown(kernel_type, self._kernel_types))
        if problem.world_size != self._context.world_size:
            raise ValueError(f"the problem is for {problem.world_size} ranks, the group has {self._context.world_size}")
        return self._operation(self._context, problem)

    def close(self) -> None:
        """The process group belongs to the rank process."""


class AllGatherBackend:
    """Every row everywhere; needs nothing but torch.distributed."""

    name = "allgather"
    standin = False
    judged_by = "reference"
    kernel_types: Sequence[str] = (NAIVE,)
    #: What its sessions build.
    operation: type[AllGatherOperation] = AllGatherOperation

    def support(self, problem: Problem, kernel_type: str) -> Support:
        """Claimed for every plain problem: no size enters the arithmetic."""
        if kernel_type not in self.kernel_types:
            return Support(Standing.REFUSED, _unknown(kernel_type, self.kernel_types))
        return plain_calls(problem)

    def contract(self, problem: Problem, kernel_type: str) -> Contract:
        """Rows ascend by (source rank, token); the sum over ranks rounds to the element type after every addition."""
        return Contract(
            receive_layout=ReceiveLayout.EVERY_ROW,
            row_order=RowOrder.SOURCE,
            masked_slots=MaskedSlots.DROPPED,
            accumulation=Accumulation.ELEMENT,
            combines_weights=False,
            source_map=True,
            fresh_outputs=True,
            # Nothing but the number of own tokens is known to the host. NCCL connects in the first call of a kind.
            captures=frozenset({"contents", "routing"}),
        )

    def preflight(self, device: str) -> list[Finding]:
        """Nothing can be missing beyond torch."""
        return []

    def open(self, context: RankContext) -> AllGatherSession:
        """The process group is all there is."""
        return AllGatherSession(context, self.kernel_types, self.operation)


def _unknown(kernel_type: str, choices: Sequence[str]) -> str:
    return f"unknown kernel type {kernel_type!r}; choose {', '.join(choices)}"


def _section(blocks: torch.Tensor, start: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """``[ranks, *shape]`` view in ``dtype`` of the bytes that begin at ``start`` of every block."""
    length = shape[0] * shape[1] * dtype.itemsize
    return blocks[:, start : start + length].view(dtype).view(blocks.shape[0], *shape)


def _all_gather(output: torch.Tensor, block: torch.Tensor, group: object) -> None:
    import torch.distributed as dist

    # torch 2.13 renamed the call and warns about the old name each time.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(output, block, group=group)


def _reduce_scatter(output: torch.Tensor, rows: torch.Tensor, group: object) -> None:
    import torch.distributed as dist

    # Renamed as well. On gloo this is an all-reduce of which each rank keeps its part.
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(output, rows, group=group)
