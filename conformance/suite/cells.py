"""What a plan consists of: cells with their budgets, and refusals.

Scope: plain data. That a cell is planned does not prove that it ran; the records do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conformance.cases import AnyCell


@dataclass(frozen=True)
class PlannedCell:
    """A cell, its budget of cases, and whether a failure of it gates."""

    cell: AnyCell
    examples: int
    claimed: bool
    companion: bool = False
    short: bool = False  # the ladder of a row operator leaves out the kinds of rows, which another of its cells has
    seconds: float = math.inf  # explore: how long to go on drawing batches


@dataclass(frozen=True)
class Unsupported:
    """A combination that the backend refuses."""

    backend: str
    kernel_type: str
    world_size: int
    nodes: int
    reason: str
    manner: str = ""  # of the calls that are refused, as :func:`conformance.suite.capabilities.manner` has it


@dataclass(frozen=True)
class Plan:
    """Everything a run intends to do."""

    cells: tuple[PlannedCell, ...]
    unsupported: tuple[Unsupported, ...]
