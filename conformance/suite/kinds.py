"""What differs between cases of dispatch/combine, of row operators and of layers, for the rest of the suite.

Scope: one place that tells them apart. What it does not decide: anything about a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis.strategies import SearchStrategy

from accelerated.contract import Contract, MaskedSlots, Standing, exchange
from accelerated.experts import ExpertContract, LayerContract
from accelerated.interface import Backend
from accelerated.operators import NormContract, QuantContract
from accelerated.registry import backend
from accelerated.routers import RouteContract
from accelerated.sorting import SortContract
from conformance import layer_generation, layer_rules
from conformance.case_files import validate, validate_layer
from conformance.cases import (
    AnyCase,
    AnyCell,
    Case,
    CaseError,
    Explicit,
    GraphCase,
    GraphCell,
    LayerCase,
    LayerCell,
    SequenceCase,
    SequenceCell,
)
from conformance.engine.graph_reducer import GraphReducer
from conformance.engine.reducer import Reducer, Reduction, RowReducer
from conformance.generation import MASKED, cases, strata
from conformance.graph_cases import misfit as misfit_graphs
from conformance.graph_cases import validate_graphs
from conformance.graph_generation import first_case, graph_cases, graph_strata
from conformance.layer_pairs import misfit
from conformance.row_cases import RowCase, RowCell
from conformance.row_generation import RowContract, ladder, row_cases, takes
from conformance.sequence_generation import first_sequence, sequence_cases
from conformance.sequence_rules import misfit as misfit_sequence
from conformance.sequence_rules import validate_sequence
from conformance.suite import coverage, graph_coverage, layer_coverage, row_coverage
from conformance.suite.cells import PlannedCell
from reference.problem import ProblemError

Part = tuple[str, int, SearchStrategy[Any]]


def fixed_cases(planned: PlannedCell, contract: object) -> Iterator[AnyCase]:
    """Cases that every run of a cell begins with."""
    if isinstance(planned.cell, RowCell):
        yield from ladder(planned.cell, row_contract(contract), short=planned.short)
    elif isinstance(planned.cell, GraphCell):
        yield first_case(planned.cell, exchange(contract))
    elif isinstance(planned.cell, SequenceCell):
        yield first_sequence(planned.cell, exchange(contract))
    elif isinstance(planned.cell, LayerCell) and not planned.cell.whole:
        experts = _layer_contract(contract)
        assert isinstance(experts, ExpertContract)
        yield from layer_generation.ladder(planned.cell, experts, short=planned.short)
    elif isinstance(planned.cell, LayerCell) and isinstance(contract, LayerContract):
        yield from layer_generation.layer_ladder(planned.cell, contract)


def drawn_parts(cell: AnyCell, contract: object, examples: int) -> list[Part]:
    """Parts of a cell's budget: name, cases, strategy."""
    if isinstance(cell, RowCell):
        return [("", examples, row_cases(cell, row_contract(contract)))] if cell.check != "codecs" else []
    if isinstance(cell, LayerCell):
        layer = _layer_contract(contract)
        shares = layer_generation.strata_of(cell, layer, examples)
        return [(name, share, layer_generation.layer_cases(cell, layer, name)) for name, share in shares if share]
    declared = exchange(contract)
    if isinstance(cell, GraphCell):
        parts = graph_strata(cell, declared, examples)
        return [(name, share, graph_cases(cell, declared, name)) for name, share in parts]
    if isinstance(cell, SequenceCell):
        # The case that a cell begins with is one of its budget, where that leaves masked slots a part of it.
        parts = strata(cell, declared, max(examples - 1, min(examples, 2)))
        return [(name, share, sequence_cases(cell, declared, name)) for name, share in parts]
    return [(name, share, cases(cell, declared, name)) for name, share in strata(cell, declared, examples)]


def classes(case: AnyCase) -> tuple[str, ...]:
    """Input classes that a case hits."""
    if isinstance(case, LayerCase):
        return layer_coverage.classes(case)
    if isinstance(case, GraphCase):
        return graph_coverage.classes(case)
    return row_coverage.classes(case) if isinstance(case, RowCase) else coverage.classes(case)


def required(planned: PlannedCell, contract: object, parts: list[Part]) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing."""
    cell = planned.cell
    if isinstance(cell, GraphCell):
        return graph_coverage.required(cell, exchange(contract))
    if isinstance(cell, RowCell):
        return row_coverage.required(cell, empty=row_contract(contract).takes_empty, short=planned.short)
    if isinstance(cell, LayerCell):
        layer = _layer_contract(contract)
        names = {name for name, _, _ in parts}
        return layer_coverage.required(
            cell,
            short=planned.short,
            masked=MASKED in names if isinstance(layer, LayerContract) else layer.drops_masked,
            quantised=isinstance(layer, ExpertContract) and layer.wire is not None,
            duplicates=layer_rules.takes_duplicates(layer),
            round_robin=layer_generation.ROUND_ROBIN in names,
            counted=isinstance(layer, ExpertContract) and layer.takes_num_rows,
            relations=layer_rules.relations_of(layer, cell) if isinstance(layer, ExpertContract) else (),
        )
    fast = coverage.combine_of(cell, cell.hidden) == "fast"
    needed = coverage.required(cell.world_size, masked=len(parts) > 1, coded=bool(cell.codec), fast=fast)
    return needed | coverage.required_steps(cell) if isinstance(cell, SequenceCell) else needed


def reduced(
    case: AnyCase, fails: Callable[[Any], bool], allowed: Callable[[Any], bool], budget_s: float
) -> Reduction[Any]:
    """Smallest case that a search from ``case`` finds."""
    if isinstance(case, RowCase):
        return RowReducer(fails, allowed, budget_s).reduce(case)
    if isinstance(case, GraphCase):
        return GraphReducer(fails, allowed, budget_s).reduce(case)
    return Reducer(fails, allowed, budget_s).reduce(case)


def legal(made: Backend, case: AnyCase, arch: str) -> bool:
    """Whether a reduced case is one the generator could have drawn: supported, and only what the contract takes."""
    try:
        problem = case.cell.problem()
    except ProblemError:
        return False
    if made.support(problem, case.cell.kernel_type).standing is Standing.REFUSED:
        return False
    if isinstance(case, RowCase):
        return takes(row_contract(made.contract(problem, case.cell.operator)), case)
    if isinstance(case, LayerCase):
        try:
            validate_layer(case)
        except CaseError:
            return False
        router = case.cell.router
        if router and made.support(case.cell.route_problem(), router).standing is Standing.REFUSED:
            return False
        if case.cell.against and misfit(case.cell, made, backend(case.cell.against, arch)):
            return False
        return layer_rules.takes(_layer_contract(made.contract(problem, case.cell.kernel_type)), case)
    contract = exchange(made.contract(problem, case.cell.kernel_type))
    if isinstance(case, GraphCase) and not captured(case, contract):
        return False
    if isinstance(case, SequenceCase) and not sequence_legal(case, made):
        return False
    if case.cell.special and not _takes_calls(contract, case):
        return False
    if contract.masked_slots is MaskedSlots.DROPPED:
        return True
    explicit = (a_round.routing for a_round in case.rounds if isinstance(a_round.routing, Explicit))
    return not any(-1 in row for routing in explicit for rows in routing.rows for row in rows)


def _takes_calls(contract: Contract, case: Case) -> bool:
    """Whether the lengths of rows and the idle ranks of a case are what its cell and contract take."""
    try:
        validate(case)
    except CaseError:
        return False
    narrow = any(a_round.hidden for a_round in case.rounds)
    idle = any(0 in counts for counts in case.token_counts())
    return (contract.narrow_rows or not narrow) and (contract.idle_ranks or not idle)


def sequence_legal(case: SequenceCase, made: Backend) -> bool:
    """Whether a sequence is well-formed and the backend promises what it relies on."""
    try:
        validate(case)
        validate_sequence(case)
    except CaseError:
        return False
    return not misfit_sequence(case, made)


def captured(case: GraphCase, contract: Contract) -> bool:
    """Whether a case of captured calls is well-formed and its contract promises what it asks."""
    try:
        validate(case)
        validate_graphs(case)
    except CaseError:
        return False
    return not misfit_graphs(case, contract)


def caveat(made: Backend, device: str) -> str:
    """What a backend that is no stand-in says about its own results off its hardware; empty on a GPU."""
    return str(getattr(made, "caveat", "")) if device == "cpu" else ""


def row_contract(contract: object) -> RowContract:
    """A contract that is a row operator's."""
    assert isinstance(contract, QuantContract | NormContract | RouteContract)
    return contract


def _layer_contract(contract: object) -> ExpertContract | LayerContract:
    if isinstance(contract, SortContract):
        return layer_rules.as_experts(contract)
    assert isinstance(contract, ExpertContract | LayerContract)
    return contract
