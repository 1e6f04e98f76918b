"""The rules by which AITER and vLLM choose a path of a fused AllReduce + RMSNorm, with their sources: data.

Scope: AITER e4048607 with its environment variables unset and quick-reduce off (its default), and what vLLM 0.33.0
chooses before it calls AITER. A table of branches per operator; the first branch whose rules all hold is taken
(:func:`reference.eligibility.path`). Nothing here imports torch. What a right table does not prove: that a library
keeps to it.

Sources (with line numbers): CC is aiter/dist/device_communicators/communicator_cuda.py, CA is custom_all_reduce.py
beside it, CAR is csrc/include/custom_all_reduce.cuh. vLLM: vllm/_aiter_ops.py.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


class Path(enum.Enum):
    """Which kernels run."""

    ONE_STAGE = "one kernel: every rank sums and normalises every row"
    TWO_STAGE = "one kernel: reduce-scatter into every rank's buffer, a barrier, then every rank normalises every row"
    SPLIT = "two kernels: reduce-scatter into every rank's buffer, then a norm kernel"
    PLAIN_ONE_STAGE = "all-reduce that sums everything everywhere, then a norm kernel"
    PLAIN_TWO_STAGE = "all-reduce by reduce-scatter (from the owner on) and all-gather, then a norm kernel"
    PLAIN_WRITE = "the same, its reduce-scatter by remote writes (from rank 0 on)"
    PLAIN_FROM_SELF = "all-reduce in which every rank sums from itself on, then a norm kernel"
    RCCL = "all-reduce by RCCL, then a norm kernel"
    THROWS = "the library raises"


#: Paths whose all-reduce is a kernel of its own.
PLAIN = frozenset(
    {Path.PLAIN_ONE_STAGE, Path.PLAIN_TWO_STAGE, Path.PLAIN_WRITE, Path.PLAIN_FROM_SELF, Path.RCCL, Path.THROWS}
)


class Quantity(enum.Enum):
    """What a rule limits."""

    ROWS = "rows of the call"
    BYTES = "bytes of one rank's input"
    BYTES_OF_ALL = "bytes of one rank's input times the number of ranks"
    HIDDEN = "elements of a row"
    ELEMENT = "bytes of an element"
    PACKS = "16-byte packs of a row"
    PACKS_LEFT = "16-byte packs of a row modulo the number of ranks"
    RANKS = "ranks"
    ARCH = "gfx architecture"


class Comparison(enum.Enum):
    """How a quantity compares with the limit of a rule."""

    AT_MOST = "<="
    BELOW = "<"
    AT_LEAST = ">="
    ABOVE = ">"
    ONE_OF = "in"
    MULTIPLE_OF = "a multiple of"


Limit = int | tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One comparison that a library makes.

    Attributes:
        quantity: what is compared.
        comparison: how.
        limit: with what; a tuple for ONE_OF.
        source: file and line.
        condition: the rule holds by default where one of these does not.
    """

    quantity: Quantity
    comparison: Comparison
    limit: Limit
    source: str
    condition: tuple[Rule, ...] = ()

    def holds(self, values: Mapping[Quantity, int | str]) -> bool:
        """Whether a call of these sizes keeps the rule."""
        if not all(rule.holds(values) for rule in self.condition):
            return True
        value, limit = values[self.quantity], self.limit
        if isinstance(limit, tuple):
            return value in limit
        assert isinstance(value, int)
        match self.comparison:
            case Comparison.AT_MOST:
                return value <= limit
            case Comparison.BELOW:
                return value < limit
            case Comparison.AT_LEAST:
                return value >= limit
            case Comparison.ABOVE:
                return value > limit
            case _:
                return value % limit == 0

    def last_rows(self, row: Mapping[Quantity, int | str]) -> int | None:
        """Largest row count on the lower side of the rule, given the sizes of one row; None if it is no threshold."""
        if self.quantity not in (Quantity.ROWS, Quantity.BYTES, Quantity.BYTES_OF_ALL):
            return None
        if not isinstance(self.limit, int) or self.comparison is Comparison.MULTIPLE_OF:
            return None
        unit = row[self.quantity]
        assert isinstance(unit, int)
        inside = self.comparison in (Comparison.AT_MOST, Comparison.ABOVE)
        return (self.limit if inside else self.limit - 1) // unit

    def __str__(self) -> str:
        limit = ", ".join(map(str, self.limit)) if isinstance(self.limit, tuple) else self.limit
        return f"{self.quantity.value} {self.comparison.value} {limit} ({self.source})"


@dataclass(frozen=True)
class Branch:
    """``path`` is taken where every rule holds and no branch before was taken."""

    path: Path
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Table:
    """How one operator of one library chooses.

    Attributes:
        branches: in the order in which they are tried.
        fallback: where none is taken: the table of the unquantised operator, with a quantiser after it, or of the plain
            all-reduce.
        quantised: the operator quantises, so its fallback needs a quantiser of its own.
    """

    branches: tuple[Branch, ...]
    fallback: Table | None = None
    quantised: bool = False

    def __iter__(self) -> Iterator[Branch]:
        yield from self.branches
        if self.fallback is not None:
            yield from self.fallback


def _rule(quantity: Quantity, comparison: Comparison, limit: Limit, source: str, *condition: Rule) -> Rule:
    return Rule(quantity, comparison, limit, source, condition)


_Q, _C = Quantity, Comparison
_FUSED_RANKS = _rule(_Q.RANKS, _C.ONE_OF, (2, 4, 8), "CC:245 and CA:716")
_ANY_RANKS = _rule(_Q.RANKS, _C.ONE_OF, (2, 4, 6, 8), "CA:716")
_FITS = _rule(_Q.BYTES, _C.AT_MOST, 64 * MIB, "CA:1148, AITER_CUSTOM_AR_MAX_SIZE")
_ALIGNED = _rule(_Q.BYTES, _C.MULTIPLE_OF, 16, "CA:1132")
_BELOW_64_MIB = _rule(_Q.BYTES, _C.BELOW, 64 * MIB, "CC:245")
_WIDTH = _rule(_Q.HIDDEN, _C.AT_MOST, 16384, "CC:245")
_BLOCK = _rule(_Q.PACKS, _C.AT_MOST, 1024, "CAR:4129, 4432, 4591, 4668")
_GFX9 = _rule(_Q.ARCH, _C.ONE_OF, ("gfx942", "gfx950"), "CA:730, CAR")
_GFX1250 = _rule(_Q.ARCH, _C.ONE_OF, ("gfx1250",), "CA:717, custom_all_reduce_gfx1250.cuh:373")

_CUSTOM = (_ANY_RANKS, _FITS, _ALIGNED)
_PLAIN = Table(
    (
        Branch(Path.PLAIN_FROM_SELF, (_GFX1250, _rule(_Q.RANKS, _C.ONE_OF, (2, 4), "CA:828"), _FITS, _ALIGNED)),
        Branch(Path.RCCL, (_GFX1250,)),
        Branch(Path.PLAIN_ONE_STAGE, (*_CUSTOM, _rule(_Q.RANKS, _C.AT_MOST, 2, "CAR:3773"))),
        Branch(
            Path.PLAIN_ONE_STAGE,
            (
                *_CUSTOM,
                _rule(_Q.RANKS, _C.AT_MOST, 4, "CAR:3779"),
                _rule(_Q.BYTES, _C.BELOW, 160 * KIB, "CAR:3779"),
            ),
        ),
        Branch(Path.PLAIN_ONE_STAGE, (*_CUSTOM, _rule(_Q.BYTES, _C.BELOW, 80 * KIB, "CAR:3779"))),
        Branch(
            Path.PLAIN_WRITE,
            (
                *_CUSTOM,
                _rule(_Q.ARCH, _C.ONE_OF, ("gfx942",), "CAR:3799"),
                _rule(_Q.RANKS, _C.AT_LEAST, 8, "CAR:3798"),
                _rule(_Q.BYTES, _C.ABOVE, 4 * MIB, "CAR:3798"),
                _rule(_Q.BYTES, _C.MULTIPLE_OF, 128, "CAR:3823"),
            ),
        ),
        Branch(Path.PLAIN_TWO_STAGE, _CUSTOM),
        Branch(Path.RCCL),
    )
)

_FUSED = (_GFX9, _FUSED_RANKS, _WIDTH, _BELOW_64_MIB, _ALIGNED)
_NORM = Table(
    (
        Branch(Path.THROWS, (_GFX1250,)),
        Branch(
            Path.ONE_STAGE,
            (*_FUSED, _rule(_Q.BYTES_OF_ALL, _C.AT_MOST, 128 * 7168 * 2, "CC:251-260, CAR:4129"), _BLOCK),
        ),
        Branch(
            Path.SPLIT,
            (
                *_FUSED,
                _rule(_Q.PACKS, _C.AT_LEAST, 64, "CAR:4357"),
                _rule(_Q.PACKS, _C.AT_MOST, 2048, "CAR:4309-4352"),
            ),
        ),
        Branch(Path.THROWS, _FUSED),  # "n too small" or "n too large", CAR:4398 and 4352
    ),
    _PLAIN,
)


def _stages(gate: tuple[Rule, ...]) -> tuple[Branch, ...]:
    """The three kernels of both FP8 epilogues."""
    return (
        Branch(Path.ONE_STAGE, (*gate, _rule(_Q.BYTES, _C.AT_MOST, 128 * KIB, "CC:434 and 506, CAR:4468"))),
        Branch(Path.TWO_STAGE, (*gate, _rule(_Q.BYTES, _C.AT_MOST, 512 * KIB, "CAR:4477 and 4604"))),
        Branch(Path.SPLIT, gate),
    )


_HALF = _rule(_Q.ELEMENT, _C.AT_MOST, 2, "custom_all_reduce.cu, dispatch of the element type")
_LONG = _rule(_Q.ELEMENT, _C.AT_LEAST, 4, "custom_all_reduce.cu, dispatch of the element type")
_PER_TOKEN_GATE = (
    _GFX9,
    _rule(_Q.ELEMENT, _C.AT_MOST, 2, "CC:426-427", _rule(_Q.HIDDEN, _C.ONE_OF, (6144, 7168), "CC:426")),
    _rule(_Q.HIDDEN, _C.ONE_OF, (512, 1024, 2048, 4096, 6144, 7168), "CC:424-426"),
    _rule(_Q.BYTES, _C.AT_MOST, 4 * MIB, "CC:415 and 430"),
)
_PER_TOKEN = Table(
    # Nothing asks whether the fused kernel takes so many ranks (CC:441): 6 reach its "unsupported world_size".
    (*_stages((*_PER_TOKEN_GATE, _FUSED_RANKS)), Branch(Path.THROWS, _PER_TOKEN_GATE)),
    _NORM,
    quantised=True,
)
#: An exception of the kernel (too wide a row, float32) is swallowed (CC:532), so that the fallback runs.
_PER_GROUP = Table(
    _stages((*_FUSED, _HALF, _rule(_Q.HIDDEN, _C.MULTIPLE_OF, 128, "CC:501"), _BLOCK)), _NORM, quantised=True
)


def _mxfp4(*emitting: Rule) -> Table:
    gate = (_GFX9, _FUSED_RANKS, _FITS, _ALIGNED, _rule(_Q.HIDDEN, _C.MULTIPLE_OF, 32, "CC:646 and 657"))
    two = (
        *gate,
        *emitting,
        _rule(_Q.HIDDEN, _C.AT_MOST, 8192, "CC:659"),
        _rule(_Q.PACKS_LEFT, _C.AT_MOST, 0, "CC:660"),
        _rule(_Q.BYTES, _C.AT_MOST, 512 * KIB, "CC:662"),
    )
    preferred = (
        _rule(_Q.RANKS, _C.AT_LEAST, 8, "CC:665"),
        _rule(_Q.ROWS, _C.AT_LEAST, 16, "CC:665"),
        _rule(_Q.HIDDEN, _C.AT_MOST, 6144, "CC:665"),
    )
    limits = ((16384, 4), (4096, 32), (6144, 16))
    direct = [
        (_rule(_Q.ROWS, _C.AT_MOST, rows, "CC:638-640"), _rule(_Q.HIDDEN, _C.AT_MOST, hidden, "CC:638-648"))
        for hidden, rows in limits
    ]
    direct.append((_rule(_Q.ROWS, _C.AT_MOST, 8, "CC:641"), _rule(_Q.HIDDEN, _C.ONE_OF, (8192,), "CC:641")))
    one_stage = [Branch(Path.ONE_STAGE, (*gate, *rules, _BLOCK)) for rules in direct]
    # Python asks for one stage up to 16,384 columns, the kernel takes 8,192 and raises above (CC:648, CAR:4677).
    throws = Branch(Path.THROWS, (*gate, *direct[0]))
    kernels = (Branch(Path.TWO_STAGE, (*two, *preferred)), *one_stage, throws, Branch(Path.TWO_STAGE, two))
    unknown = tuple(Branch(Path.THROWS, (*branch.rules, _LONG)) for branch in kernels)
    return Table((*unknown, *kernels), _NORM, quantised=True)


_VLLM = "vllm/_aiter_ops.py, _rocm_aiter_fused_allreduce_rmsnorm_impl"
_VLLM_NORM = Table(
    (
        Branch(Path.THROWS, (_GFX1250,)),
        Branch(
            Path.ONE_STAGE,
            (
                *_CUSTOM,
                _FUSED_RANKS,
                _HALF,
                _BLOCK,
                _rule(_Q.ROWS, _C.AT_MOST, 80, _VLLM),
                _rule(_Q.BYTES, _C.BELOW, 256 * KIB, _VLLM, _rule(_Q.RANKS, _C.ONE_OF, (3, 4), _VLLM)),
                _rule(_Q.BYTES, _C.BELOW, 128 * KIB, _VLLM, _rule(_Q.RANKS, _C.AT_LEAST, 5, _VLLM)),
            ),
        ),
        Branch(
            Path.SPLIT,
            (
                *_CUSTOM,
                _FUSED_RANKS,
                _rule(_Q.PACKS, _C.AT_LEAST, 64, "CAR:4357"),
                _rule(_Q.PACKS, _C.AT_MOST, 2048, "CAR:4309-4352"),
            ),
        ),
        Branch(Path.THROWS, _CUSTOM),
    ),
    _PLAIN,
)

#: Table per library and kind of operator.
TABLES: Mapping[str, Mapping[str, Table]] = {
    "aiter": {
        "all_reduce": _PLAIN,
        "norm": _NORM,
        "per_token": _PER_TOKEN,
        "per_group": _PER_GROUP,
        "mxfp4": _mxfp4(),
        "mxfp4_emit": _mxfp4(_rule(_Q.PACKS, _C.MULTIPLE_OF, 32, "CC:661")),
    },
    "vllm": {"all_reduce": _PLAIN, "norm": _VLLM_NORM},
}
