"""Third-party backends of row operators: the specification's, each with one defect. Proves nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerated import reference_rows
from accelerated.reference_backend import ReferenceBackend, ReferenceSession
from reference.codecs import STANDARD

if TYPE_CHECKING:
    import torch

    from accelerated.interface import RankContext
    from accelerated.operators import NormResult, QuantResult, RowProblem

MODULE = "conformance.selftest.suite.row_backends"


class LastRowWrong(reference_rows.ReferenceQuantiser):
    """With three rows or more, a code of the last one is off by one."""

    def quantise(self, rows: torch.Tensor, **given: Any) -> QuantResult:
        result = super().quantise(rows, **given)
        if rows.shape[0] >= 3:
            result.codes[-1, 5] ^= 1
        return result


class ReadsTooFar(reference_rows.ReferenceQuantiser):
    """What lies in the rows that do not exist spoils the first one that does."""

    def quantise(self, rows: torch.Tensor, *, num_rows: torch.Tensor | None = None, **given: Any) -> QuantResult:
        result = super().quantise(rows, num_rows=num_rows, **given)
        if num_rows is not None and bool(rows[int(num_rows) :].isnan().any()):
            result.codes[0, 0] ^= 1
        return result


class SecondRankForgotten(reference_rows.ReferenceNorm):
    """From two rows on, the last rank's rows count as zeros."""

    def __init__(self, context: RankContext, operator: str) -> None:
        super().__init__(context, reference_rows._REDUCED[operator], local=False)
        self._last = context.rank == context.world_size - 1

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        forgotten = rows.new_zeros(rows.shape) if self._last and rows.shape[0] >= 2 else rows
        return super().normalise(forgotten, residual, weight, epsilon)


class RefusesNothing(SecondRankForgotten):
    """A call without rows raises, although the contract takes one."""

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        if not rows.numel():
            raise RuntimeError("an empty grid was launched")
        return reference_rows.ReferenceNorm.normalise(self, rows, residual, weight, epsilon)


class ReturnsNoResult(reference_rows.ReferenceQuantiser):
    """It returns a tuple, as libraries do and backends may not."""

    def quantise(self, rows: torch.Tensor, **given: Any) -> Any:
        result = super().quantise(rows, **given)
        return result.codes, result.scales


class _Session(ReferenceSession):
    def __init__(self, context: RankContext, kind: str) -> None:
        super().__init__(context)
        self._kind = kind

    def build(self, problem: Any, kernel_type: str) -> Any:
        assert not hasattr(problem, "experts")
        made = globals()[self._kind]
        return made(*self._arguments(made, problem, kernel_type))

    def _arguments(self, made: type, problem: RowProblem, operator: str) -> tuple[Any, ...]:
        if issubclass(made, reference_rows.ReferenceQuantiser):
            return (STANDARD[operator],)
        return self._context, operator


_OFFERED: dict[str, tuple[str, ...]] = {"quantise": ("token_fn",), "allreduce_norm": ("fused",)}


class _RowBackend(ReferenceBackend):
    """One quantiser and one AllReduce + norm, and no dispatch/combine."""

    judged_by = "reference"
    kernel_types: Sequence[str] = ()
    operators = _OFFERED

    def __init__(self, kind: str, family: str) -> None:
        self.name = kind
        self._kind = kind
        self.operators = {family: _OFFERED[family]}

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context, self._kind)


def last_row_wrong() -> _RowBackend:
    return _RowBackend(LastRowWrong.__name__, "quantise")


def reads_too_far() -> _RowBackend:
    return _RowBackend(ReadsTooFar.__name__, "quantise")


def second_rank_forgotten() -> _RowBackend:
    return _RowBackend(SecondRankForgotten.__name__, "allreduce_norm")


def refuses_nothing() -> _RowBackend:
    return _RowBackend(RefusesNothing.__name__, "allreduce_norm")


def returns_no_result() -> _RowBackend:
    return _RowBackend(ReturnsNoResult.__name__, "quantise")
