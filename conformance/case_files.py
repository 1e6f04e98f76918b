"""Case files: reading a case, and what its cell has to hold of it.

Scope: everything that a file or a reduction may get wrong, told with the value, the limit and the fix. A valid case is
not proven to be one that a backend takes.
"""

from __future__ import annotations

import msgspec

from accelerated.routers import form_of
from conformance.cases import (
    MAX_REPLAYED,
    MAX_ROUNDS,
    MIN_HIDDEN,
    AnyCase,
    Case,
    CaseError,
    Explicit,
    GraphCase,
    LayerCase,
    Recipe,
    SequenceCase,
    narrow_sizes,
    routing_counts,
)
from conformance.graph_cases import validate_graphs
from conformance.row_cases import RowCase, validate_rows
from conformance.sequence_rules import validate_sequence

_decoder = msgspec.json.Decoder(AnyCase)


def decode(data: bytes, origin: str) -> AnyCase:
    """Read a case from JSON and check it against its own cell.

    Raises:
        CaseError: not JSON, not a case, or a case that its cell cannot hold; ``origin`` is named in the message.
    """
    try:
        case: AnyCase = _decoder.decode(data)
        if isinstance(case, RowCase):
            validate_rows(case)
        else:
            validate(case)
        if isinstance(case, LayerCase):
            validate_layer(case)
        if isinstance(case, GraphCase):
            validate_graphs(case)
        if isinstance(case, SequenceCase):
            validate_sequence(case)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CaseError(f"{origin} is not a valid case: {error}; fix or delete it") from error
    return case


def validate(case: Case) -> None:
    """Check that every round fits the cell.

    Raises:
        CaseError: names the round, the value and the limit.
    """
    cell = case.cell
    cell.problem()
    for name, value, low, high in (
        ("hidden", cell.hidden, MIN_HIDDEN, 1 << 20),
        ("capacity", cell.capacity, 1, 1 << 16),
        ("world_size", cell.world_size, 1, 256),
        ("number of rounds", len(case.rounds), 0, MAX_ROUNDS),
    ):
        # Tags and seeds hold no more.
        if not low <= value <= high:
            raise CaseError(f"{name} is {value}; give {low} to {high}")
    if not case.rounds:
        raise CaseError("the case has no rounds; give at least one")
    if "handle" in cell.modes and len(case.rounds) > MAX_REPLAYED and not isinstance(case, GraphCase | SequenceCase):
        raise CaseError(f"{len(case.rounds)} rounds are replayed each; give at most {MAX_REPLAYED}")
    for index, a_round in enumerate(case.rounds):
        counts = routing_counts(a_round.routing)
        if len(counts) != cell.world_size:
            raise CaseError(f"round {index} routes {len(counts)} ranks; the cell has {cell.world_size}")
        room = case.room(index)
        if max(counts) > room or min(counts) < 0:
            limit = "half of the capacity, the cap," if "capped" in cell.modes else "the capacity"
            raise CaseError(f"round {index} has {max(counts)} tokens on a rank; {limit} is {room}")
        if a_round.delays_ms and len(a_round.delays_ms) != cell.world_size:
            raise CaseError(f"round {index} has {len(a_round.delays_ms)} delays; give one per rank or none")
        if a_round.values == "bits" and cell.codec and not cell.wire:
            raise CaseError(
                f"round {index} has values 'bits' and combine codes rows as {cell.codec}: NaN and infinities have no "
                "code; give other values, or no codec"
            )
        if a_round.hidden and a_round.hidden not in narrow_sizes(cell):
            raise CaseError(
                f"round {index} has rows of {a_round.hidden} elements; give 0 or one of {narrow_sizes(cell)}, which "
                "the wire and the codec divide evenly"
            )
        if isinstance(a_round.routing, Recipe):
            continue
        for rank, rows in enumerate(a_round.routing.rows):
            for token, row in enumerate(rows):
                if len(row) != cell.top_k or not all(-1 <= e < cell.experts for e in row):
                    raise CaseError(
                        f"round {index}, rank {rank}, token {token} is routed to {row}; give {cell.top_k} ids "
                        f"from -1 to {cell.experts - 1}"
                    )


def validate_layer(case: LayerCase) -> None:
    """Check what a layer's rounds have beyond those of an exchange.

    Raises:
        CaseError: names the round, the value and the limit.
    """
    cell = case.cell
    if cell.shards < 1 or cell.experts % cell.shards:
        raise CaseError(f"shards is {cell.shards}; give a number that divides the {cell.experts} experts")
    if not 0 <= cell.redundant < cell.experts:
        raise CaseError(f"redundant is {cell.redundant}; give 0 to {cell.experts - 1}")
    if bool(cell.against) != bool(cell.against_type) or (
        cell.against and (not cell.whole or cell.router or cell.redundant)
    ):
        raise CaseError(
            f"against is {cell.against!r} and against_type {cell.against_type!r}; give both to a layer without "
            f"replicas and without a router, or neither"
        )
    if cell.router:
        _validate_router(case)
    for index, a_round in enumerate(case.rounds):
        room = cell.rows - sum(routing_counts(a_round.routing))
        if not 0 <= a_round.tail <= room:
            raise CaseError(f"round {index} has a tail of {a_round.tail} rows; give 0 to {room}, which the buffer has")
        if a_round.physical and sorted(set(a_round.physical)) != list(range(cell.logical)):
            raise CaseError(
                f"round {index} places {sorted(set(a_round.physical))}; each of {cell.logical} experts once"
            )
        if a_round.physical and len(a_round.physical) != cell.experts:
            raise CaseError(f"round {index} fills {len(a_round.physical)} physical experts; there are {cell.experts}")
        if isinstance(a_round.routing, Explicit):
            largest = max((e for rows in a_round.routing.rows for row in rows for e in row), default=-1)
            if largest >= cell.logical:
                raise CaseError(f"round {index} routes to expert {largest}; there are {cell.logical} logical ones")


def _validate_router(case: LayerCase) -> None:
    """Check that the rounds are what a router may be asked to choose.

    Raises:
        CaseError: names the router, the round, the value and the limit.
    """
    cell = case.cell
    if not cell.whole:
        raise CaseError(f"router is {cell.router} and {cell.kernel_type} is no layer; leave it empty")
    top_k = form_of(cell.router).numerics.top_k
    if top_k != cell.top_k:
        raise CaseError(f"{cell.router} chooses {top_k} experts and top_k is {cell.top_k}; make them the same")
    for index, a_round in enumerate(case.rounds):
        rows = a_round.routing.rows if isinstance(a_round.routing, Explicit) else ()
        for row in (row for tokens in rows for row in tokens):
            if min(row) < 0 or len(set(row)) < len(row):
                raise CaseError(f"round {index} routes to {row}; a router chooses {top_k} experts, each once")
