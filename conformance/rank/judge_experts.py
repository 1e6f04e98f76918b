"""Judging of experts' outputs on one rank: layout, and every element against its acceptance interval.

Each check has a name; the first that fails is the rank's verdict, with the coordinates of one bad element and the
experts that its token visits. Not judged here: rows beyond the valid ones, which are undefined.
"""

from __future__ import annotations

import torch

from conformance.engine.protocol import Mismatch
from reference.intervals import Interval


def judge_layout(
    check: str, index: int, got: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Mismatch | None:
    """Shape and element type of an output."""
    if tuple(got.shape) == shape and got.dtype == dtype:
        return None
    message = f"returned {list(got.shape)} {got.dtype}"
    return Mismatch(check, index, message, got=message, wanted=f"{list(shape)} {dtype}")


def judge_output(
    check: str, index: int, got: torch.Tensor, accepted: Interval, ids: torch.Tensor, *, where: str = "", rank: int = -1
) -> tuple[Mismatch | None, float]:
    """Compare ``got [n, H]`` with its acceptance; ``ids [n, k]`` are the tokens' experts, ``where`` begins the text."""
    if got.numel() == 0:
        return None, 0.0
    ratio = accepted.error_over_bound(got)
    largest = float(ratio.max())
    if largest <= 1.0:
        return None, largest
    bad = ratio > 1.0
    token, element = divmod(int(ratio.argmax()), got.shape[1])
    place = (token, element)
    lower, upper = float(accepted.lower[place]), float(accepted.upper[place])
    rows = int(bad.any(1).sum())
    text = f"{where}{int(bad.sum())} of {got.numel()} elements in {rows} of {got.shape[0]} rows are outside"
    mismatch = Mismatch(
        check,
        index,
        text,
        source_rank=rank,
        token=token,
        element=element,
        got=str(float(got[place])),
        wanted=str(float(accepted.value[place])),
        bound=f"{lower} to {upper}",
        routed=str(ids[token].tolist()),
    )
    return mismatch, largest


def judge_same_bits(check: str, index: int, got: torch.Tensor, wanted: torch.Tensor, text: str) -> Mismatch | None:
    """Bits of two outputs ``[n, H]`` that are promised to be the same."""
    differ = got.contiguous().view(torch.int16 if got.element_size() == 2 else torch.int32) != wanted.contiguous().view(
        torch.int16 if wanted.element_size() == 2 else torch.int32
    )
    if not bool(differ.any()):
        return None
    token, element = differ.nonzero()[0].tolist()
    return Mismatch(
        check,
        index,
        f"{text}: {int(differ.sum())} of {got.numel()} elements have other bits",
        token=token,
        element=element,
        got=str(float(got[token, element])),
        wanted=str(float(wanted[token, element])),
        bound="the same bits",
    )


def judge_equal(
    check: str,
    index: int,
    got: torch.Tensor,
    other: torch.Tensor,
    rows: tuple[tuple[int, ...], ...],
    rank: int,
    whose: str,
) -> Mismatch | None:
    """Compare two outputs ``[n, H]`` of one layer: NaN is a difference, the sign of a zero is none.

    Args:
        check: what is said to have failed.
        index: of the round.
        got: the one.
        other: the one that it has to be.
        rows: experts of the tokens.
        rank: of these tokens.
        whose: ``other`` in words.
    """
    differs = ~(got == other)
    if not bool(differs.any()):
        return None
    token, element = differs.nonzero()[0].tolist()
    return Mismatch(
        check,
        index,
        f"{int(differs.sum())} of {got.numel()} elements in {int(differs.any(1).sum())} of {got.shape[0]} rows are not "
        f"{whose}",
        source_rank=rank,
        token=token,
        element=element,
        got=repr(float(got[token, element])),
        wanted=repr(float(other[token, element])),
        bound="the same bits, a zero's sign apart",
        routed=str(list(rows[token])),
    )
