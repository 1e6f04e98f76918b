"""Rows and scales as a dispatch with a wire format takes them, checked before a library reads them as raw bytes.

Scope: shapes and element sizes; bytes are moved, whatever they mean. What passes here is not proven to be codes of the
format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reference.problem import WIRES, Problem, wire_format

if TYPE_CHECKING:
    import torch


def row_shape(problem: Problem) -> tuple[int, int]:
    """Elements of one dispatched row, and their size in bytes."""
    if not problem.wire:
        return problem.hidden, problem.element_bytes
    return wire_format(problem.wire).row_bytes(problem.hidden), 1


def scale_shape(problem: Problem) -> tuple[int, int]:
    """Scales of one dispatched row, and their size in bytes; (0, 0) if none travel."""
    if not problem.wire:
        return 0, 0
    wire = wire_format(problem.wire)
    count = wire.scales(problem.hidden)
    return count, wire.scale_bytes if count else 0


def check(problem: Problem, rows: torch.Tensor, scales: torch.Tensor | None, *, narrow: bool = False) -> None:
    """Refuse what is not of the problem's wire; without one, scales only.

    Args:
        problem: of the operation.
        rows: ``[n, H]`` FP8 or ``[n, H / 2]`` packed FP4, one byte each (``torch.uint8`` does as well).
        scales: ``[n, G]`` float32 or bytes; None where the wire has none.
        narrow: rows may be shorter; their scales are as many in any case, because a library is configured with them.

    Raises:
        ValueError: says what was given and what the wire carries.
    """
    if not problem.wire:
        if scales is not None:
            raise ValueError(f"scales given to a dispatch without wire; build it for one of {', '.join(WIRES)}")
        return
    whole, _ = row_shape(problem)
    row = min(rows.shape[1], whole) if narrow else whole
    for name, given, (columns, size) in (("rows", rows, (row, 1)), ("scales", scales, scale_shape(problem))):
        if columns == 0:
            if given is not None:
                raise ValueError(f"{name} given; the wire {problem.wire} carries none")
            continue
        if given is None:
            raise ValueError(f"no {name} given; the wire {problem.wire} carries them")
        if tuple(given.shape) != (rows.shape[0], columns) or given.element_size() != size:
            raise ValueError(
                f"{name} {list(given.shape)} {given.dtype}; the wire {problem.wire} carries "
                f"{[rows.shape[0], columns]} of {size} bytes"
            )


def elements(problem: Problem, rows: torch.Tensor) -> int:
    """Elements of each of ``rows [n, B]``, which may be packed."""
    packed = problem.wire and wire_format(problem.wire).payload == "fp4"
    return rows.shape[1] * (2 if packed else 1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``[n, c]`` of any element type as ``[n, B]`` uint8."""
    import torch

    packed = tensor.contiguous()
    # A column of one element counts as contiguous whatever its stride, which view() refuses.
    return packed.as_strided(packed.shape, (packed.shape[1], 1)).view(torch.uint8)
