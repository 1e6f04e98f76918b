"""Two exchanges around the same experts: where the bits of their layers' outputs have to be the same.

Scope: what follows from two contracts, as data without torch. Experts see the same rows whatever brought them, so that
a row's output is the same where its contract says so, and the sum over the ranks rounds nothing where one term at most
is not zero: with one weight that is not zero in a token (``single``), or with one slot. Both accumulations of
:class:`accelerated.contract.Accumulation` and every level of nodes only add zeros then. A zero's sign is no bit of it.

Why it is worth a comparison: experts that do not say how they round have a wide acceptance, in which a row with a
changed bit, or a neighbour's scale, may lie. The other exchange gives the same experts the same rows, and the
comparison has no width at all. What equal outputs do not prove: that either is right (the acceptance judges both),
that experts or quantiser, which both share, are right, or that outputs with several terms are summed alike.
"""

from __future__ import annotations

from accelerated.contract import Contract, MaskedSlots, RowOrder, Standing
from accelerated.experts import ExpertContract, LayerContract
from accelerated.interface import Backend
from conformance.cases import LayerCell, LayerRound
from reference.problem import ProblemError


def one_term(cell: LayerCell, a_round: LayerRound) -> bool:
    """Whether at most one term of every token's sum is not zero."""
    return cell.top_k == 1 or a_round.weighting == "single"


def misfit(cell: LayerCell, made: Backend, other: Backend) -> str:
    """Why the outputs of a cell need not be those of its ``other`` cell bit for bit, or empty.

    Args:
        cell: with ``against``.
        made: the cell's backend.
        other: the backend of ``against``.
    """
    mine, theirs = (getattr(getattr(one, "experts", None), "name", one.name) for one in (made, other))
    if mine != theirs:
        return f"{made.name} has the experts of {mine}, {other.name} those of {theirs}"
    opposite = cell.other
    try:
        found = other.support(opposite.problem(), opposite.kernel_type)
        if found.standing is Standing.REFUSED:
            return f"{other.name}, {opposite.kernel_type}: {found.reason}"
        ours = made.contract(cell.problem(), cell.kernel_type)
        others = other.contract(opposite.problem(), opposite.kernel_type)
    except ProblemError as error:
        return str(error)
    return next(
        (reason for reason in (_exchanges(ours, others), _experts(cell, ours, others)) if reason),
        "",
    )


def _exchanges(mine: LayerContract, other: LayerContract) -> str:
    if mine.wire != other.wire:
        return f"the wires are {mine.wire or 'the element type'} and {other.wire or 'the element type'}"
    if mine.masked_slots is MaskedSlots.DROPPED is not other.masked_slots:
        return f"masked slots are {mine.masked_slots.value} and {other.masked_slots.value}"
    return ""


def _experts(cell: LayerCell, mine: LayerContract, other: LayerContract) -> str:
    """Why a row's output of the experts may differ."""
    experts = mine.experts
    if experts.deterministic and _same_call(mine.exchange, other.exchange):
        return ""
    if not rows_keep_bits(experts):
        return "the experts promise no bits to a row among other rows"
    if mine.buffer_rows is not None and mine.buffer_rows == other.buffer_rows:
        return ""
    sizes = f"the buffers have {_rows(mine)} and {_rows(other)} rows"
    if not experts.bits_at_any_rows:
        return f"{sizes}, and the experts promise no bits to a row at another number of rows"
    most = cell.world_size * cell.capacity
    least = min(most if rows is None else rows for rows in (mine.buffer_rows, other.buffer_rows))
    least = 0 if None in (mine.buffer_rows, other.buffer_rows) else least
    crossed = [boundary for boundary in experts.boundaries if least <= boundary < most]
    return f"{sizes}, and the experts take another path beyond {crossed[0]}" if crossed else ""


def rows_keep_bits(experts: ExpertContract) -> bool:
    """Whether a row of one term has the same bits among any other rows, at the same number of rows."""
    return experts.one_term_bits or (experts.deterministic and experts.rows_alone)


def _same_call(mine: Contract, other: Contract) -> bool:
    """Whether the experts are called with the same rows in the same order, and no others."""
    return all(sent.exact_rows and sent.row_order is RowOrder.SOURCE for sent in (mine, other)) and (
        mine.receive_layout is other.receive_layout
    )


def _rows(layer: LayerContract) -> str:
    return "as many as come" if layer.buffer_rows is None else str(layer.buffer_rows)
