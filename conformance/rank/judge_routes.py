"""Judging one call of a router: ids that are distinct and in range, a legal choice of experts, their weights.

Scope: rows with NaN, +inf or too few finite logits are held to what the contract promises of them, all others to the
reference's acceptance, in which a tie is open and nothing else is. Large calls repeat their rows: a row that is given
and answered like an earlier one is not judged again. What it does not decide: how often ties go one way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from accelerated.routers import RouteContract, RouteOperation, RouteResult
from conformance.engine.protocol import Mismatch
from conformance.rank.row_inputs import RowInputs
from conformance.row_values import DISTINCT
from reference import router_oracle, routers
from reference.intervals import Interval
from reference.router_numerics import RouterNumerics

if TYPE_CHECKING:
    from conformance.rank.judge_rows import Answered

Judgement = tuple[Mismatch | None, float]
#: Logits judged at a time.
_AT_ONCE = 1 << 21


def judge_route(index: int, answered: Answered, contract: RouteContract) -> Judgement:
    """First failed check of one call, or None, and the largest error/bound of a weight."""
    logits, result = answered.terms[0], answered.result
    assert isinstance(result, RouteResult)
    numerics = contract.numerics(len(logits))
    bias = answered.weight if contract.takes_bias else None
    mismatch = layout(index, logits, result, numerics) or _ids(index, logits, result.ids, numerics)
    worst = 0.0
    for part in _parts(logits, result) if mismatch is None else ():
        found, ratio = _judge_part(
            index, logits[part], bias, result.weights[part], result.ids[part], contract, numerics
        )
        worst = max(worst, ratio)
        if found is not None:
            found.token = int(part[found.token])
            return found, worst
    return mismatch, worst


def layout(index: int, logits: torch.Tensor, result: RouteResult, numerics: RouterNumerics) -> Mismatch | None:
    """Shapes and element types."""
    shape = [len(logits), numerics.top_k]
    for name, tensor, dtype in (("weights", result.weights, torch.float32), ("ids", result.ids, torch.int32)):
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{list(tensor.shape)} {tensor.dtype}"
            return Mismatch("route.layout", index, f"{name} came back as {got}", got=got, wanted=f"{shape} {dtype}")
    return None


def _parts(logits: torch.Tensor, result: RouteResult) -> Iterator[torch.Tensor]:
    """Numbers of the rows to judge, so many at a time that float64 copies of them fit."""
    rows, step = len(logits), max(_AT_ONCE // logits.shape[1], 1)
    new = torch.ones(rows, dtype=torch.bool, device=logits.device)
    if rows > DISTINCT:
        held = (logits.view(torch.int16 if logits.element_size() == 2 else torch.int32), result.ids)
        bits = (*held, result.weights.view(torch.int32))
        new[DISTINCT:] = torch.stack([(b[DISTINCT:] != b[:-DISTINCT]).any(1) for b in bits]).any(0)
    which = new.nonzero().squeeze(1)
    return (which[start : start + step] for start in range(0, len(which), step))


def _ids(index: int, logits: torch.Tensor, ids: torch.Tensor, numerics: RouterNumerics) -> Mismatch | None:
    """Ids that are distinct and in range, of rows with NaN, +inf or too few finite logits as far as is promised."""
    experts = logits.shape[1]
    bad = ~routers.promised_ids(logits, ids, numerics)
    if not bool(bad.any()):
        return None
    row = int(bad.nonzero()[0])
    mine = ids[row].tolist()
    wrong = [slot for slot, e in enumerate(mine) if not 0 <= e < experts or e in mine[:slot]]
    wrong += [slot for slot, e in enumerate(mine) if 0 <= e < experts and bool(logits[row, e].isnan())]
    return Mismatch(
        "route.ids",
        index,
        f"{int(bad.sum())} of {len(ids)} rows have ids twice, out of range, or of a NaN that none was to have",
        token=row,
        element=wrong[0],
        got=str(mine),
        wanted=f"{len(mine)} distinct ids from 0 to {experts - 1}",
    )


def _judge_part(
    index: int,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    contract: RouteContract,
    numerics: RouterNumerics,
) -> Judgement:
    experts = logits.shape[1]
    # Where nothing is promised of a row its ids may be no experts.
    ids = torch.where((ids >= 0) & (ids < experts), ids, 0)
    verdicts = routers.accepted_ids(logits, bias, ids, numerics)
    if not bool(verdicts.legal.all()):
        return _wrong_choice(index, int((~verdicts.legal).nonzero()[0]), verdicts, ids, numerics), 0.0
    if contract.descending:
        disorder = verdicts.judged & ~routers.in_order(verdicts.choices, ids)
        if bool(disorder.any()):
            row = int(disorder.nonzero()[0])
            message = "ids are not in order of descending choice"
            return Mismatch("route.choice", index, message, token=row, got=str(ids[row].tolist())), 0.0
    accepted, promised = routers.accepted_weights(logits, bias, ids, numerics, verdicts.scores)
    return _judge_weights(index, weights, ids, accepted, promised)


def _wrong_choice(
    index: int, row: int, verdicts: routers.Verdicts, ids: torch.Tensor, numerics: RouterNumerics
) -> Mismatch:
    """What is wrong with a set of experts: one that is missing, or a group that cannot have been kept."""
    mine, choices = ids[row].tolist(), verdicts.choices
    lower = choices.lower[row].clone()
    lower[mine] = -torch.inf
    size = len(lower) // numerics.groups
    message = f"{int((~verdicts.legal).sum())} of {len(ids)} rows have other experts than the highest-ranked"
    got = f"{mine}, of which the least has at most {float(verdicts.least[row])}"
    if numerics.groups > 1:
        used = sorted({e // size for e in mine})
        message += f"; groups of {size} experts, {numerics.groups_kept} of {numerics.groups} kept"
        got += f", in groups {used}"
    missing = int(lower.argmax())
    best = choices.value[row].topk(min(len(mine), len(lower))).indices.tolist()
    return Mismatch(
        "route.choice",
        index,
        message,
        token=row,
        element=missing,
        got=got,
        wanted=f"expert {missing}, not chosen, has at least {float(lower[missing])}; the highest of all are {best}",
    )


def _judge_weights(
    index: int, weights: torch.Tensor, ids: torch.Tensor, accepted: Interval, promised: torch.Tensor
) -> Judgement:
    if not bool(promised.any()):
        return None, 0.0
    ratio = torch.where(promised.unsqueeze(1), accepted.error_over_bound(weights), 0.0)
    worst = float(ratio.max())
    if worst <= 1.0:
        return None, worst
    row, slot = divmod(int(ratio.argmax()), ratio.shape[1])
    low, high = float(accepted.lower[row, slot]), float(accepted.upper[row, slot])
    mismatch = Mismatch(
        "route.weights",
        index,
        f"{int((ratio > 1).sum())} of {ratio.numel()} weights are outside their interval",
        token=row,
        element=slot,
        got=f"{float(weights[row, slot])} of expert {int(ids[row, slot])}",
        wanted=str(float(accepted.value[row, slot])),
        bound=f"[{low}, {high}]",
    )
    return mismatch, worst


def disturbed(
    index: int, operation: RouteOperation, contract: RouteContract, given: RowInputs, found: RouteResult
) -> Mismatch | None:
    """Rows that a special one beside them changes: the call is made again with zeros in the special ones' place."""
    logits = given.rows
    numerics = contract.numerics(len(logits))
    plain = routers.plain_rows(logits, numerics)
    if not contract.rows_alone or bool(plain.all()) or not bool(plain.any()):
        return None
    bias = given.weight.clone() if contract.takes_bias else None
    again = operation.route(torch.where(plain.unsqueeze(1), logits, 0.0), bias)
    if layout(index, logits, found, numerics) is not None or layout(index, logits, again, numerics) is not None:
        return None  # a malformed result is judged by itself
    same = (found.ids == again.ids).all(1)
    same &= (found.weights.view(torch.int32) == again.weights.view(torch.int32)).all(1)
    if bool((same | ~plain).all()):
        return None
    row = int((plain & ~same).nonzero()[0])
    shown = [f"ids {one.ids[row].tolist()}, weights {one.weights[row].tolist()}" for one in (found, again)]
    message = "a row with NaN, +inf or too few finite logits changed another row"
    return Mismatch("route.rows", index, message, token=row, got=shown[0], wanted=f"{shown[1]}, as beside zeros")


def judge_route_by_oracle(index: int, answered: Answered, contract: RouteContract) -> Judgement:
    """The same by the oracle, which shares no code with the reference."""
    logits, result = answered.terms[0], answered.result
    assert isinstance(result, RouteResult)
    numerics = contract.numerics(len(logits))
    mismatch = layout(index, logits, result, numerics) or _ids(index, logits, result.ids, numerics)
    if mismatch is not None:
        return mismatch, 0.0
    bias = answered.weight.tolist() if contract.takes_bias else None
    for row in (int(r) for part in _parts(logits, result) for r in part):
        ids, weights = result.ids[row].tolist(), result.weights[row].tolist()
        found = router_oracle.objection(logits[row].tolist(), bias, ids, weights, numerics)
        if found is not None:
            return Mismatch(f"route.{found.about}", index, found.reason, token=row, got=f"ids {ids}, {weights}"), 0.0
    return None, 0.0
