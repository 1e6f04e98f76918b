"""AllReduce + residual add + RMSNorm (+ quantisation) in pure torch.distributed, fused and split.

Semantics: :mod:`reference.rms_norm`. The fused form follows the declared numerics as a whole. The split form is what a
framework runs without the fused kernel, in vLLM's order: an AllReduce that returns the element type, then a local norm,
then a quantiser that sees the norm's rounded output (vLLM's FP8 path was decomposed like this, its BF16 and FP4 paths
kept the norm fused).

Each rank gathers the rows of all and sums them in rank order, so all ranks get the same bits by construction; where the
numerics leave the order open, rank order is one of those they allow. Works on any process group (gloo, NCCL, RCCL), on
whatever device the tensors live on. Collectives per call: 1, none without rows.
What a pass against this module does not prove: anything about memory ordering between ranks, which torch.distributed
takes care of here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from reference.codecs import Codec
from reference.norm_numerics import NormNumerics, QuantisedFrom
from reference.quantisation import Quantised, quantise
from reference.rms_norm import check, normalise, ordered_sum, store


@dataclass
class Result:
    """What every rank gets.

    Attributes:
        output: ``[M, N]`` in the rows' type.
        residual: ``[M, N]`` in the rows' type, or None without a residual.
        quantised: codes and scales, or None without a codec.
    """

    output: torch.Tensor
    residual: torch.Tensor | None
    quantised: Quantised | None = None


def gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Rows ``[M, N]`` of all ranks, ``[W, M, N]``; M and N are the same on every rank. One collective if M > 0."""
    world_size = dist.get_world_size(group)
    terms = rows.new_empty(world_size, *rows.shape)
    if rows.numel():
        # Bytes: not every backend knows every element type.
        sent = rows.contiguous().view(-1).view(torch.uint8)
        dist.all_gather(list(terms.view(world_size, -1).view(torch.uint8)), sent, group=group)
    return terms


def all_reduce(rows: torch.Tensor, *, numerics: NormNumerics, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of ``rows [M, N]`` over ranks: float32 additions in rank order, rounded once to the rows' type."""
    return store(ordered_sum(gather(rows, group)), rows.dtype, numerics.store).to(rows.dtype)


def all_reduce_rms_norm(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    *,
    numerics: NormNumerics,
    group: dist.ProcessGroup,
    codec: Codec | None = None,
) -> Result:
    """The fused form. Collective.

    Args:
        rows: ``[M, N]`` bfloat16, float16 or float32, this rank's addend; M may be 0.
        residual: ``[M, N]`` in the rows' type, the same on every rank; None adds nothing, as zeros do.
        weight: ``[N]``.
        epsilon: added to the mean square.
        numerics: rounding points.
        group: process group of the W ranks.
        codec: dynamic quantiser of the output.

    Raises:
        ValueError: shapes that do not fit, an epsilon that is no positive normal float32, or a static codec.
    """
    _check(rows, residual, weight, epsilon, codec)
    return _finish(ordered_sum(gather(rows, group)), residual, weight, epsilon, numerics, rows.dtype, codec)


def split(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    *,
    numerics: NormNumerics,
    group: dist.ProcessGroup,
    codec: Codec | None = None,
) -> Result:
    """The split form; arguments as of :func:`all_reduce_rms_norm`. Collective.

    Whatever the numerics say, the sum is rounded to the rows' type and the quantiser sees the rounded output.
    """
    _check(rows, residual, weight, epsilon, codec)
    total = all_reduce(rows, numerics=numerics, group=group)
    return local_rms_norm(total, residual, weight, epsilon, numerics=split_numerics(numerics), codec=codec)


def split_numerics(numerics: NormNumerics) -> NormNumerics:
    """Rounding points of the split form of an operator with these."""
    return replace(numerics, round_reduced=True, quantised_from=QuantisedFrom.ROUNDED)


def local_rms_norm(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    *,
    numerics: NormNumerics,
    codec: Codec | None = None,
) -> Result:
    """Residual add, RMSNorm and quantiser of local rows; arguments as of :func:`all_reduce_rms_norm`.

    ``torch.compile`` takes it; without a codec as one graph.
    """
    return _finish(rows.float(), residual, weight, epsilon, numerics, rows.dtype, codec)


def _check(
    rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, codec: Codec | None
) -> None:
    """Refuse before any collective, so that no other rank is left waiting in one that this rank would give up."""
    check(rows.shape, residual, weight, epsilon)
    if codec is not None and codec.static:
        raise ValueError("the codec is static and a norm has no scale to give it; use a dynamic one")


def _finish(
    total: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
    codec: Codec | None,
) -> Result:
    norm = normalise(total, residual, weight, epsilon, numerics, dtype)
    seen = norm.output if numerics.quantised_from is QuantisedFrom.ROUNDED else norm.unrounded
    quantised = None if codec is None else quantise(seen, codec)
    return Result(norm.output, None if residual is None else norm.residual, quantised)
