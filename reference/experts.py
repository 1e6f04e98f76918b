"""The experts of one rank: one legal execution, and the interval of every legal result.

Semantics (AITER e4048607 aiter/fused_moe.py; vLLM 0.33.0 fused_moe)::

    y[m] = sum over the slots j of row m whose id is local of  w[m, j] * (W2_e act(W1_e x[m] + b1_e) + b2_e)

with the rounding points of :class:`reference.expert_numerics.ExpertNumerics`. Ids of other ranks, -1 and ids out of
range contribute nothing; a row without local slot is zero; an id that a row names twice counts twice.

Bounds: composed of :mod:`reference.expert_gemm`, :mod:`reference.activations`, stores, quantisers
(:func:`reference.bounds.quantise_dequantise`), sums (:func:`reference.sums.add_up`) and, where a kernel does not say
what it does, :mod:`reference.expert_hulls`.

What an accepted result does not prove: that a kernel rounds where it declares, if two declarations are a rounding
apart. Not covered: rows with NaN or infinities, whose result is NaN here (they must not change any other row), overflow
of a partial sum, and matrix cores that cut off more than ``accumulator_ulps`` of a partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.activations import accepted as accepted_activation
from reference.activations import activate
from reference.bounds import quantise_dequantise
from reference.codecs import Codec
from reference.expert_gemm import FLOAT64_TERM, ULP, Dense, dot, grid_of
from reference.expert_hulls import add_parts, quantised_in_any_group, split, stored
from reference.expert_numerics import ExpertNumerics, SlotSum, WeightStage
from reference.expert_weights import ExpertWeights
from reference.formats import Format, Overflow, Ties
from reference.intervals import FLOAT32_NORMAL, Interval, nearest
from reference.quantisation import dequantise, quantise
from reference.rounding import format_of
from reference.sums import add_up

_WHOLE = slice(None)
#: Numbers of the largest tensors at a time; rows are independent of each other.
_AT_ONCE = 1 << 23


@dataclass
class _Pairs:
    """The P (row, slot) pairs whose expert is local, by expert, then row.

    Attributes:
        used: ``[U]``, rows with at least one, ascending.
        row: ``[P]``, index into ``used``.
        place: ``[P]``, how many local slots of its row come before it.
        weight: ``[P]``, routing weights, float32.
        slot: ``[P]``, local slot.
        groups: (slot, first pair, end) of every expert that is hit.
    """

    used: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    weight: torch.Tensor
    slot: torch.Tensor
    groups: list[tuple[int, int, int]]


def local_slots(ids: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
    """Local slot of every id ``[M, k]``, int64, -1 where the expert is elsewhere or there is none.

    Args:
        ids: global ids, any integer type.
        slot_of: int64 ``[ids]``, local slot of each global id, -1 where another rank holds it.
    """
    wide = ids.long()
    valid = (wide >= 0) & (wide < slot_of.shape[0])
    if slot_of.shape[0] == 0:
        return torch.full_like(wide, -1)
    return torch.where(valid, slot_of[torch.where(valid, wide, 0)], -1)


def forward(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights | Dense,
    slot_of: torch.Tensor,
    numerics: ExpertNumerics,
    dtype: torch.dtype,
    *,
    quantised: bool = False,
) -> torch.Tensor:
    """One legal execution in float32 arithmetic, ``[M, H]`` in ``dtype``.

    Args:
        rows: ``[M, H]`` in the element type, or dequantised codes of a wire.
        ids: ``[M, k]`` global ids, any integer type.
        weights: ``[M, k]`` float32.
        local: weights by local slot, or a :class:`Dense` of them, which spares dequantising them again.
        slot_of: int64 ``[ids]``, -1 where another rank holds the expert.
        numerics: rounding points.
        dtype: element type.
        quantised: the rows are a wire's, with the routing weight in them where it goes ON_INPUT: neither
            ``input_codec`` nor that weight is applied again.

    Raises:
        ValueError: shapes that do not fit, the routing weight ON_INPUT with more than one slot, or BEFORE_ACTIVATION
            with a bias of W1.
    """
    dense = local if isinstance(local, Dense) else Dense(local)
    _check(rows.shape, ids, weights, dense.local, numerics)
    output = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
    pairs = _pairs(ids, weights, slot_of)
    if not pairs.groups:
        return output
    x = rows[pairs.used]
    if not quantised:
        x = prepare(x, weights[pairs.used], numerics, dtype)
    product = _first(x.float()[pairs.row], pairs, dense, numerics)
    factor = pairs.weight[:, None]
    gate, up = product.chunk(2, 1)
    hidden = _store(activate(gate, up, numerics.activation, numerics.limit), numerics.intermediate_store)
    if numerics.intermediate_codec is not None:
        hidden = _through(hidden, numerics.intermediate_codec).float()
    terms = _multiply(hidden, pairs, dense, 1)
    bias = _bias(dense, pairs, 1)
    terms = terms if bias is None else terms + bias
    if numerics.weight_stage is WeightStage.AFTER_W2:
        terms = terms * factor
    output[pairs.used] = _add_slots(_by_row(terms, pairs), numerics.slot_sum, dtype).to(dtype)
    return output


def accepted(
    rows: Interval,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights | Dense,
    slot_of: torch.Tensor,
    numerics: ExpertNumerics,
    dtype: torch.dtype,
    *,
    quantised: bool = False,
) -> Interval:
    """Every legal result, ``[M, H]``, stored in ``dtype``.

    Args:
        rows: ``[M, H]``: a point, or with ``quantised`` what a wire may have brought.
        ids: as for :func:`forward`, and so are the others.
        weights: ``[M, k]``.
        local: by local slot.
        slot_of: int64 ``[ids]``.
        numerics: rounding points.
        dtype: element type.
        quantised: as for :func:`forward`.

    Raises:
        ValueError: as :func:`forward` does.
    """
    dense = local if isinstance(local, Dense) else Dense(local)
    _check(rows.shape, ids, weights, dense.local, numerics)
    at_once = _rows_at_once(ids, slot_of, dense.local)
    if rows.shape[0] > at_once:
        parts = [
            accepted(
                rows.apply(lambda end, first=first: end[first : first + at_once]),  # type: ignore[misc]
                ids[first : first + at_once],
                weights[first : first + at_once],
                dense,
                slot_of,
                numerics,
                dtype,
                quantised=quantised,
            )
            for first in range(0, rows.shape[0], at_once)
        ]
        return Interval(*(torch.cat([getattr(part, end) for part in parts]) for end in ("value", "lower", "upper")))
    pairs = _pairs(ids, weights, slot_of)
    if not pairs.groups:
        return Interval.exact(torch.zeros(rows.shape, dtype=torch.float64, device=rows.value.device))
    x = rows.apply(lambda end: end[pairs.used])
    if not quantised:
        x = prepared(x, weights[pairs.used], numerics, dtype)
    grid = grid_of(x.value).amin(1)[pairs.row] if x.is_point else None
    unit = numerics.accumulator_ulps * ULP
    early, late = (None, _bias(dense, pairs, 0)) if numerics.late_bias else (_bias(dense, pairs, 0), None)
    first = dot(x.apply(lambda end: end[pairs.row]), grid, pairs.groups, dense, 0, early, numerics)
    product = first.total
    if numerics.gemm1_partial is not None:
        product = split(product, first.size, first.step, numerics)
    if numerics.weight_stage is WeightStage.BEFORE_ACTIVATION:
        product = _scaled(product, pairs.weight, unit)
    product = _stored(product, numerics.gemm1_store, numerics)
    if late is not None:
        product = (product + Interval.exact(late)).round_float32()
    gate, up = (product.apply(lambda end, half=half: end.chunk(2, 1)[half]) for half in (0, 1))  # type: ignore[misc]
    hidden = accepted_activation(gate, up, numerics.activation, numerics.limit, numerics.function_ulps)
    hidden = _stored(hidden, numerics.intermediate_store, numerics)
    if numerics.intermediate_codec is not None:
        requantised = quantised_in_any_group if numerics.intermediate_any_group else quantise_dequantise
        hidden = requantised(hidden, numerics.intermediate_codec)
    points = (hidden.lower == hidden.upper).all(1)
    grid = torch.where(points, grid_of(hidden.value).amin(1), 0.0) if bool(points.any()) else None
    second = dot(hidden, grid, pairs.groups, dense, 1, _bias(dense, pairs, 1), numerics)
    terms, size = second.total, second.size
    counted = torch.ones_like(pairs.weight)
    if numerics.weight_stage is WeightStage.AFTER_W2:
        terms, size = _scaled(terms, pairs.weight, unit), size * pairs.weight.double().abs()[:, None]
        counted = (pairs.weight != 0).to(counted)
    count = torch.zeros(len(pairs.used), 1, device=counted.device).index_add_(0, pairs.row, counted[:, None])
    by_row = terms.apply(lambda end: _by_row(end, pairs))
    if numerics.inner_parts > 1:
        total = add_parts(by_row, _by_row(size, pairs), count, format_of(dtype), numerics)
    else:
        total = sum_slots(by_row, count, numerics, dtype)

    def placed(end: torch.Tensor) -> torch.Tensor:
        return torch.zeros(rows.shape, dtype=torch.float64, device=end.device).index_copy_(0, pairs.used, end)

    return total.apply(placed)


def prepare(rows: torch.Tensor, weights: torch.Tensor, numerics: ExpertNumerics, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``[M, H]`` as W1 sees them: one legal execution of the weight ON_INPUT and of the input quantiser.

    The routing weight and then the product are rounded to the element type (vLLM 0.33.0 multiplies two tensors of it).
    """
    if numerics.weight_stage is WeightStage.ON_INPUT:
        rows = _weighted(rows.double(), weights, dtype).to(dtype)
    return rows if numerics.input_codec is None else _through(rows, numerics.input_codec)


def prepared(rows: Interval, weights: torch.Tensor, numerics: ExpertNumerics, dtype: torch.dtype) -> Interval:
    """Rows ``[M, H]`` as W1 may see them: what :func:`prepare` is one execution of."""
    if numerics.weight_stage is WeightStage.ON_INPUT:
        ends = [_weighted(end, weights, dtype) for end in (rows.value, rows.lower, rows.upper)]
        rows = Interval(ends[0], torch.minimum(ends[1], ends[2]), torch.maximum(ends[1], ends[2]))
    return rows if numerics.input_codec is None else quantise_dequantise(rows, numerics.input_codec)


def _weighted(rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 rows times their only weight, both factors and the product in the element type."""
    element = format_of(dtype)
    return _nearest(rows * _nearest(weights.double(), element), element)


def _check(
    shape: torch.Size, ids: torch.Tensor, weights: torch.Tensor, local: ExpertWeights, numerics: ExpertNumerics
) -> None:
    """Refuse arguments that do not belong together."""
    if len(shape) != 2 or shape[1] != local.w1.shape[2]:
        raise ValueError(f"rows have shape {list(shape)}; W1 takes [M, {local.w1.shape[2]}]")
    if ids.dim() != 2 or ids.shape[0] != shape[0] or weights.shape != ids.shape:
        raise ValueError(
            f"ids have shape {list(ids.shape)} and weights {list(weights.shape)}; give [{shape[0]}, k] for both"
        )
    if numerics.weight_stage is WeightStage.BEFORE_ACTIVATION and local.bias1 is not None:
        raise ValueError(
            "W1 has a bias and the routing weight goes before the activation; no library defines which first"
        )
    if numerics.weight_stage is WeightStage.ON_INPUT and ids.shape[1] != 1:
        raise ValueError(f"the routing weight goes on the input and k is {ids.shape[1]}; that is defined for k = 1")


def _rows_at_once(ids: torch.Tensor, slot_of: torch.Tensor, local: ExpertWeights) -> int:
    """Rows whose pairs make tensors of about :data:`_AT_ONCE` numbers."""
    pairs = int((local_slots(ids, slot_of) >= 0).sum())
    numbers = max(pairs, 1) * max(local.w1.shape[1], local.w1.shape[2])
    return max(1, ids.shape[0] * _AT_ONCE // numbers)


def _pairs(ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor) -> _Pairs:
    """What of ``ids [M, k]`` is local."""
    slots = local_slots(ids, slot_of)
    here = slots >= 0
    row, column = here.nonzero(as_tuple=True)
    slot = slots[row, column]
    order = torch.argsort(slot, stable=True)
    row, column, slot = row[order], column[order], slot[order]
    used, compact = row.unique(return_inverse=True)
    hit, counts = slot.unique_consecutive(return_counts=True)
    groups, start = [], 0
    for of, count in zip(hit.tolist(), counts.tolist(), strict=True):
        groups.append((of, start, start + count))
        start += count
    place = (here.long().cumsum(1) - 1)[row, column]
    return _Pairs(used, compact, place, weights[row, column].float(), slot, groups)


def _by_row(terms: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
    """Terms ``[P, H]`` as ``[S, U, H]``: the most local slots of a row, in their order, zero where there is none."""
    most = int(pairs.place.max()) + 1
    out = torch.zeros(most, len(pairs.used), terms.shape[1], dtype=terms.dtype, device=terms.device)
    out[pairs.place, pairs.row] = terms
    return out


def _nearest(value: torch.Tensor, to: Format) -> torch.Tensor:
    """Float64 rounded once to ``to``."""
    return nearest(value, to, Ties.EVEN, Overflow.IEEE)


def _store(value: torch.Tensor, to: Format | None) -> torch.Tensor:
    """Float32 rounded to ``to``, as float32."""
    return value if to is None else _nearest(value.double(), to).float()


def _through(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Rows quantised and dequantised, float64."""
    return dequantise(quantise(rows, codec), codec)


def _multiply(x: torch.Tensor, pairs: _Pairs, dense: Dense, which: int, columns: slice = _WHOLE) -> torch.Tensor:
    """Float32 ``[P, K]`` times the matrix of each pair's expert, over some columns."""
    part = x[:, columns]
    return torch.cat(
        [part[first:end] @ dense.matrices(slot)[which].single[:, columns].T for slot, first, end in pairs.groups]
    )


def _first(x: torch.Tensor, pairs: _Pairs, dense: Dense, numerics: ExpertNumerics) -> torch.Tensor:
    """What the activation sees, float32 ``[P, 2 I]``; a split K has as many parts as it may have."""
    to, bias = numerics.gemm1_store, _bias(dense, pairs, 0)
    if numerics.gemm1_partial is None:
        product = _multiply(x, pairs, dense, 0)
    else:
        width = -(-x.shape[1] // numerics.gemm1_parts)
        product = torch.zeros((), device=x.device)
        for start in range(0, x.shape[1], width):
            partial = _multiply(x, pairs, dense, 0, slice(start, start + width))
            if not start and bias is not None and not numerics.late_bias:
                partial = partial + bias
            product = _store(product + _store(partial, numerics.gemm1_partial), to)
    if numerics.gemm1_partial is None and bias is not None and not numerics.late_bias:
        product = product + bias
    if numerics.weight_stage is WeightStage.BEFORE_ACTIVATION:
        product = product * pairs.weight[:, None]
    product = _store(product, to)
    return product + bias if bias is not None and numerics.late_bias else product


def _bias(dense: Dense, pairs: _Pairs, which: int) -> torch.Tensor | None:
    """Float32 bias of each pair's expert, or None."""
    bias = (dense.local.bias1, dense.local.bias2)[which]
    return None if bias is None else bias[pairs.slot].float()


def _add_slots(terms: torch.Tensor, slot_sum: SlotSum, dtype: torch.dtype) -> torch.Tensor:
    """Float32 terms ``[S, U, H]`` added in the order of the slots."""
    element = format_of(dtype)
    if slot_sum is not SlotSum.FLOAT32:
        terms = _store(terms, element)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
        if slot_sum is SlotSum.ATOMIC:
            total = _store(total, element)
    return _store(total, element)


def _stored(value: Interval, to: Format | None, numerics: ExpertNumerics) -> Interval:
    """Float32 results rounded once to ``to``."""
    return value if to is None else stored(value, to, numerics.store_ulps)


def sum_slots(terms: Interval, count: torch.Tensor, numerics: ExpertNumerics, dtype: torch.dtype) -> Interval:
    """Every legal sum of a row's weighted slots ``terms [S, U, H]``; ``count [U, 1]`` of a row are not zero."""
    element, kind = format_of(dtype), numerics.slot_sum
    if kind is not SlotSum.FLOAT32:
        terms = _stored(terms, element, numerics)
    points = (terms.lower == terms.upper).all(0)
    grid = None
    if terms.shape[0] > 2 and bool(points.any()):
        grid = torch.where(points, grid_of(terms.value).amin(0), 0.0)
    if kind is SlotSum.ATOMIC:
        if terms.shape[0] == 1:
            return terms.apply(lambda end: end[0])
        # Terms that are of the element type already, added to a zero.
        return add_up(terms, accumulate=element, count=count, grid=grid)
    if terms.shape[0] == 1:
        return _stored(terms.apply(lambda end: end[0]), element, numerics)
    if numerics.store_ulps <= 0.5:
        return add_up(terms, count=count, grid=grid, stored=element)
    return _stored(add_up(terms, count=count, grid=grid), element, numerics)


def _scaled(terms: Interval, weight: torch.Tensor, unit: float) -> Interval:
    """Terms ``[P, N]`` times their routing weight: one rounding, unless there is nothing to round."""
    factor = weight.double()[:, None]
    value = terms.value * factor
    ends = value if terms.is_point else terms.lower * factor, value if terms.is_point else terms.upper * factor
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    exact = (low == high) & (low == low.float().double())
    return Interval(value, *_off(low, high, torch.where(exact, 0.0, unit + FLOAT64_TERM), FLOAT32_NORMAL))


def _off(
    low: torch.Tensor, high: torch.Tensor, relative: torch.Tensor, absolute: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends moved out by a share of themselves, and by ``absolute`` where they are not exact."""
    least = torch.where((relative == 0) | ((low == 0) & (high == 0)), 0.0, absolute)
    return low - (low.abs() * relative + least), high + (high.abs() * relative + least)
