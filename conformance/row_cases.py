"""Cases of the row operators: quantisers, norms, AllReduce + RMSNorm, routers.

A call is a number of rows and the patterns they are made from; row i is made from pattern ``i % len(patterns)`` with
the row's number, the rank and the pattern's own seed, so a row stays what it is while others are taken away. Like every
case these hold no tensors. What a case does not hold: anything about the machine.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import msgspec

from accelerated.operators import Family, RowProblem

Mode = Literal["drained", "free-running"]
#: Contents of a row, plainest first; :mod:`conformance.row_values` makes them.
Kind = Literal[
    "zero",
    "one_hot",
    "ones",
    "integers",
    "normal",
    "row_scaled",
    "block_scaled",
    "zero_group",
    "powers",
    "ties",
    "wide",
    "huge",
    "subnormal",
    "nan",
    "infinity",
    "every_code",
    "masked",
    "few_left",
    "all_masked",
    "all_nan",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Kinds of router logits only: -inf for experts that are not to be chosen, or nothing to choose by.
LOGIT_KINDS: tuple[Kind, ...] = ("masked", "few_left", "all_masked", "all_nan")
#: Kinds that hold NaN or infinities.
NONFINITE: tuple[Kind, ...] = ("nan", "infinity")
#: Weights of a norm, then correction biases of a router.
Weight = Literal["ones", "twos", "normal", "zeros", "small", "large", "negative"]
BIASES: tuple[Weight, ...] = ("zeros", "small", "large", "negative")
MAX_ROWS = 1 << 20
EPSILONS = (1e-6, 1e-5, 0.01)


class RowCaseError(ValueError):
    """A case of a row operator does not describe an input. The message names the value, the limit and the fix."""


class RowCell(msgspec.Struct, frozen=True, order=True, tag="rows"):
    """One test item of a row operator: what stays fixed while Hypothesis varies rows and calls."""

    check: str  # the property, i.e. the test module's subject
    backend: str
    operator: str
    family: Family
    world_size: int
    hidden: int
    capacity: int
    dtype: str
    mode: Mode = "drained"

    @property
    def kernel_type(self) -> str:
        """The operator, where records and tables name a kernel type."""
        return self.operator

    @property
    def nodes(self) -> int:
        """Row operators run on one node."""
        return 1

    @property
    def model(self) -> str:
        """Row operators have no model shape."""
        return ""

    def problem(self) -> RowProblem:
        """Sizes as the reference and the backends take them."""
        return RowProblem(self.family, self.world_size, self.hidden, self.capacity, self.dtype)

    @property
    def label(self) -> str:
        """Readable name, unique among all cells of a run."""
        return (
            f"{self.check}-{self.backend}-{self.operator}-w{self.world_size}-n{self.hidden}-m{self.capacity}"
            f"-{self.dtype}-{self.mode}"
        )


class Pattern(msgspec.Struct, frozen=True, order=True):
    """Contents of a row.

    ``exponent`` scales it by a power of two; ``position`` is the element, group or block that differs from the rest.
    """

    kind: Kind
    exponent: int = 0
    position: int = 0
    seed: int = 0


class Call(msgspec.Struct, frozen=True):
    """One call of the operator.

    Attributes:
        rows: M.
        patterns: of the rows; empty only where M is 0.
        residual: patterns of the residual; empty where the operator takes none.
        num_rows: the device row count that is given, or -1 if none is. The rows beyond it hold poison.
        scale: of a static quantiser.
        weight: kind of norm weight, or of a router's correction bias; not looked at where there is neither.
        epsilon: of a norm.
        into: results go into buffers of ours, which hold what an earlier call of the same shape wrote.
        delays_ms: per rank, slept before the call; () is no delay.
    """

    rows: int
    patterns: tuple[Pattern, ...]
    residual: tuple[Pattern, ...] = ()
    num_rows: int = -1
    scale: float = 1.0
    weight: Weight = "ones"
    epsilon: float = EPSILONS[0]
    into: bool = False
    delays_ms: tuple[int, ...] = ()


class RowCase(msgspec.Struct, frozen=True, tag="rows"):
    """A cell and the calls that run on one operator, in order."""

    cell: RowCell
    calls: tuple[Call, ...]

    @property
    def id(self) -> str:
        """First 12 hex digits of a hash of the case's JSON."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=6).hexdigest()

    @property
    def steps(self) -> int:
        """Calls of the operator."""
        return len(self.calls)

    @property
    def tokens(self) -> int:
        """Rows of all calls, each counted once per rank."""
        return sum(call.rows for call in self.calls) * self.cell.world_size


def validate_rows(case: RowCase) -> None:
    """Check that every call fits the cell.

    Raises:
        RowCaseError: names the call, the value and the limit.
        ProblemError: a size of the cell is out of range.
    """
    cell = case.cell
    cell.problem()
    if not 1 <= len(case.calls) <= 256:
        raise RowCaseError(f"the case has {len(case.calls)} calls; give 1 to 256")
    for index, call in enumerate(case.calls):
        if not 0 <= call.rows <= min(cell.capacity, MAX_ROWS):
            raise RowCaseError(f"call {index} has {call.rows} rows; give 0 to the capacity, {cell.capacity}")
        if call.rows and not call.patterns:
            raise RowCaseError(f"call {index} has {call.rows} rows and no pattern; give at least one")
        if not -1 <= call.num_rows <= call.rows:
            raise RowCaseError(f"call {index} has num_rows {call.num_rows}; give -1 for none, or 0 to {call.rows}")
        if not 0.0 < call.scale < 2.0**100 or not 2.0**-126 <= call.epsilon < 1.0:
            raise RowCaseError(
                f"call {index} has scale {call.scale}, epsilon {call.epsilon}; give a positive scale below 2**100 and "
                f"an epsilon from 2**-126 to 1"
            )
        if call.delays_ms and len(call.delays_ms) != cell.world_size:
            raise RowCaseError(f"call {index} has {len(call.delays_ms)} delays; give one per rank or none")
        for pattern in (*call.patterns, *call.residual):
            if not (-100 <= pattern.exponent <= 100 and pattern.position >= 0 and pattern.seed >= 0):
                raise RowCaseError(
                    f"call {index} has {pattern}; give exponents from -100 to 100, positions and seeds from 0"
                )
