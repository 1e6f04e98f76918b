"""Which path a fused AllReduce + RMSNorm takes, and at which row counts the path changes.

Scope: AITER e4048607 with its environment variables unset and quick-reduce off (its default); vLLM 0.33.0's pass and
the choice that it makes before it calls AITER. The rules themselves are in :mod:`reference.eligibility_rules`. Sizes
are those of one rank's input; rows are dense and as wide as the weight. Nothing here imports torch. What a right
prediction does not prove: that the path computes the right thing, or that the library took it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from reference.eligibility_rules import MIB, TABLES, Path, Quantity, Table
from reference.formats import FORMATS
from reference.problem import ProblemError


class Sizes(Protocol):
    """What the rules look at; any row problem has it."""

    @property
    def world_size(self) -> int:
        """Ranks."""

    @property
    def hidden(self) -> int:
        """Elements of a row."""

    @property
    def capacity(self) -> int:
        """Most rows of a call."""

    @property
    def dtype(self) -> str:
        """Element type, a name of :data:`reference.formats.FORMATS`."""


@dataclass(frozen=True)
class Route:
    """A path, and whether a quantiser runs as a kernel of its own after it."""

    path: Path
    separate_quantiser: bool = False


def path(sizes: Sizes, rows: int, kind: str, arch: str, library: str = "aiter") -> Route:
    """What a call with ``rows`` rows takes.

    Args:
        sizes: of the problem.
        rows: of the call, at least 1.
        kind: of :data:`TABLES`.
        arch: gfx architecture.
        library: of :data:`TABLES`.

    Raises:
        ProblemError: no rows, or an unknown kind, library or element type.
    """
    if rows < 1:
        raise ProblemError(f"rows is {rows}; the rules are for calls with at least 1")
    try:
        table: Table | None = TABLES[library][kind]
    except KeyError:
        known = ", ".join(f"{name} {each}" for name, kinds in TABLES.items() for each in kinds)
        raise ProblemError(f"no rules for {library} {kind}; choose one of {known}") from None
    values = measure(sizes, rows, arch)
    separate = False
    while table is not None:
        for branch in table.branches:
            if all(rule.holds(values) for rule in branch.rules):
                return Route(branch.path, separate)
        separate = separate or table.quantised
        table = table.fallback
    raise AssertionError("the plain all-reduce ends with a branch without rules")


def boundaries(sizes: Sizes, kind: str, arch: str, library: str = "aiter") -> tuple[int, ...]:
    """Row counts m below ``capacity`` of which m and m + 1 take different paths, ascending."""
    row = measure(sizes, 1, arch)
    thresholds = {rule.last_rows(row) for branch in TABLES[library][kind] for rule in branch.rules}
    counts = sorted(m for m in thresholds if m is not None and 1 <= m < sizes.capacity)
    return tuple(m for m in counts if path(sizes, m, kind, arch, library) != path(sizes, m + 1, kind, arch, library))


def measure(sizes: Sizes, rows: int, arch: str) -> dict[Quantity, int | str]:
    """Every quantity of a call.

    Raises:
        ProblemError: unknown element type.
    """
    if sizes.dtype not in FORMATS:
        raise ProblemError(f"no format is modelled for {sizes.dtype}; use one of {', '.join(sorted(FORMATS))}")
    element = FORMATS[sizes.dtype].bits // 8
    total, packs = rows * sizes.hidden * element, sizes.hidden * element // 16
    return {
        Quantity.ROWS: rows,
        Quantity.BYTES: total,
        Quantity.BYTES_OF_ALL: total * sizes.world_size,
        Quantity.HIDDEN: sizes.hidden,
        Quantity.ELEMENT: element,
        Quantity.PACKS: packs,
        Quantity.PACKS_LEFT: packs % sizes.world_size,
        Quantity.RANKS: sizes.world_size,
        Quantity.ARCH: arch,
    }


@dataclass(frozen=True)
class Fusion:
    """What vLLM's compilation makes of all-reduce, add, RMSNorm and a quantiser.

    Attributes:
        all_reduce_norm: all-reduce and norm are one operator.
        quantiser: "none", "in the all-reduce", "with the norm" or "alone".
    """

    all_reduce_norm: bool
    quantiser: str


#: Fusions by output. "37891" is vLLM's pull request of that number, which decomposed FP8 and was superseded by 37646
#: and 38762; an output that an entry lacks is never fused there.
VLLM_FUSIONS: Mapping[str, Mapping[str, Fusion]] = {
    "0.33.0": {
        "element": Fusion(True, "none"),
        "fp8_per_group": Fusion(True, "in the all-reduce"),
        "fp8_per_token": Fusion(False, "with the norm"),
        "fp8_per_tensor": Fusion(False, "with the norm"),
        "mxfp4": Fusion(True, "alone"),
    },
    "37891": {
        "element": Fusion(True, "none"),
        "fp8_per_token": Fusion(False, "with the norm"),
        "fp8_per_tensor": Fusion(False, "with the norm"),
        "mxfp4": Fusion(True, "alone"),
    },
}
#: The epsilons for which the pass registers patterns; no other fuses.
VLLM_EPSILONS: Sequence[float] = (1e-5, 1e-6)
#: Bytes of input up to which the pass applies: half of AITER's buffer of 8192 * 1024 * 8 * 2.
VLLM_MAX_BYTES = 64 * MIB


@dataclass(frozen=True)
class VllmPass:
    """vLLM 0.33.0's AllReduce + RMSNorm pass, before any path is chosen.

    Attributes:
        max_num_batched_tokens: the scheduler's limit.
        epsilons: see :data:`VLLM_EPSILONS`.
        fusions: by output.
    """

    max_num_batched_tokens: int
    epsilons: Sequence[float] = VLLM_EPSILONS
    fusions: Mapping[str, Fusion] = field(default_factory=lambda: VLLM_FUSIONS["0.33.0"])

    def max_token_num(self, sizes: Sizes) -> int:
        """Largest end of a compile range that the pass applies to."""
        row_bytes = measure(sizes, 1, "")[Quantity.BYTES]
        assert isinstance(row_bytes, int)
        return min(VLLM_MAX_BYTES // row_bytes, self.max_num_batched_tokens)

    def fuses(self, sizes: Sizes, rows: int, epsilon: float, output: str = "element") -> bool:
        """Whether a compile range that ends at ``rows`` gets the fused all-reduce and norm."""
        fusion = self.fusions.get(output)
        known = any(math.isclose(epsilon, each, rel_tol=1e-12) for each in self.epsilons)
        return (
            sizes.world_size > 1
            and known
            and rows <= self.max_token_num(sizes)
            and fusion is not None
            and fusion.all_reduce_norm
        )
