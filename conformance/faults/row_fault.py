"""What a seeded fault of a row operator is: where it applies, which property and check catch it, its minimum.

Scope: plain data without torch; the faults are in :mod:`conformance.faults.row_catalogue`. It says nothing about how
likely a fault is to be met.
"""

from __future__ import annotations

from dataclasses import dataclass

from conformance.faults.backends import backend_name
from conformance.row_cases import Kind, Weight


@dataclass(frozen=True)
class MinimalCall:
    """One call of a minimum; what its patterns are beside their kinds depends on the operator and is left open.

    Attributes:
        kinds: of the rows.
        rows: M.
        residual: kinds of the residual.
        num_rows: the device row count, or -1.
        weight: of a norm.
        into: results go into the suite's buffers.
    """

    kinds: tuple[Kind, ...] = ("zero",)
    rows: int = 1
    residual: tuple[Kind, ...] = ()
    num_rows: int = -1
    weight: Weight = "ones"
    into: bool = False


@dataclass(frozen=True)
class RowMinimum:
    """The smallest case that shows a fault.

    Attributes:
        calls: of the operator, in order.
        hidden: N.
        world_size: ranks.
    """

    calls: tuple[MinimalCall, ...]
    hidden: int = 32
    world_size: int = 1


@dataclass(frozen=True)
class RowFault:
    """A seeded fault of a row operator.

    Attributes:
        name: what :mod:`conformance.faults` calls it.
        description: what goes wrong.
        source: the real defect that it repeats; "" where it stands for a kind of defect.
        operator: whose cells catch it.
        check: what the failing check is called.
        minimum: the true minimum.
        subject: the property that catches it.
        arch: architecture on which it is one.
    """

    name: str
    description: str
    source: str
    operator: str
    check: str
    minimum: RowMinimum
    subject: str
    arch: str = "gfx942"

    @property
    def backend(self) -> str:
        """What ``--backend`` takes."""
        return backend_name(self.name)


def one(*kinds: Kind, rows: int = 1, hidden: int = 32, num_rows: int = -1, into: bool = False) -> RowMinimum:
    """One call of a quantiser, or of a norm without a residual."""
    return RowMinimum((MinimalCall(kinds, rows, num_rows=num_rows, into=into),), hidden)


def added(row: Kind, residual: Kind, *, rows: int = 1, hidden: int = 32, ranks: int = 1) -> RowMinimum:
    """One call of a norm with a residual."""
    return RowMinimum((MinimalCall((row,), rows, residual=(residual,)),), hidden, ranks)


def quantise(
    name: str,
    description: str,
    source: str,
    operator: str,
    check: str,
    minimum: RowMinimum,
    subject: str = "quantise",
    arch: str = "gfx942",
) -> RowFault:
    """A fault of a quantiser."""
    return RowFault(name, description, source, operator, check, minimum, subject, arch)


def norm(
    name: str,
    description: str,
    source: str,
    operator: str,
    check: str,
    minimum: RowMinimum,
    arch: str = "gfx942",
) -> RowFault:
    """A fault of a norm."""
    return RowFault(name, description, source, operator, check, minimum, "norm", arch)


def reduce(name: str, description: str, source: str, operator: str, check: str, minimum: RowMinimum) -> RowFault:
    """A fault of AllReduce + norm."""
    return RowFault(name, description, source, operator, check, minimum, "allreduce_norm")
