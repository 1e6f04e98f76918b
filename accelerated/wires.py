"""Rows and scales as a dispatch with a wire format takes them, checked before a library reads them as raw bytes.

Scope: shapes and element sizes; bytes are moved, whatever they mean. What passes here is not proven to be codes of the
format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reference.problem import WIRES, Problem

if TYPE_CHECKING:
    import torch


def row_shape(problem: Problem) -> tuple[int, int]:
    """Elements of one dispatched row, and their size in bytes."""
    if not problem.wire:
        return problem.hidden, problem.element_bytes
    return WIRES[problem.wire].row_bytes(problem.hidden), 1


def scale_shape(problem: Problem) -> tuple[int, int]:
    """Scales of one dispatched row, and their size in bytes; (0, 0) without a wire."""
    if not problem.wire:
        return 0, 0
    wire = WIRES[problem.wire]
    return wire.scales(problem.hidden), wire.scale_bytes


def check(problem: Problem, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Refuse what is not of the problem's wire; without one, scales only.

    Args:
        problem: of the operation.
        rows: ``[n, H]`` FP8 or ``[n, H / 2]`` packed FP4, one byte each (``torch.uint8`` does as well).
        scales: ``[n, G]`` float32 or E8M0 bytes.

    Raises:
        ValueError: says what was given and what the wire carries.
    """
    if not problem.wire:
        if scales is not None:
            raise ValueError(f"scales given to a dispatch without wire; build it for one of {', '.join(WIRES)}")
        return
    for name, given, (columns, size) in (("rows", rows, row_shape(problem)), ("scales", scales, scale_shape(problem))):
        if given is None:
            raise ValueError(f"no {name} given; the wire {problem.wire} carries them")
        if tuple(given.shape) != (rows.shape[0], columns) or given.element_size() != size:
            raise ValueError(
                f"{name} {list(given.shape)} {given.dtype}; the wire {problem.wire} carries "
                f"{[rows.shape[0], columns]} of {size} bytes"
            )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``[n, c]`` of any element type as ``[n, B]`` uint8."""
    import torch

    packed = tensor.contiguous()
    # A column of one element counts as contiguous whatever its stride, which view() refuses.
    return packed.as_strided(packed.shape, (packed.shape[1], 1)).view(torch.uint8)
