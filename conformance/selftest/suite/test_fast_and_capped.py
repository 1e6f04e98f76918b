"""Fast kernels of combine and caps of the receive capacity: planned, drawn, told by a case, and recorded.

Scope: the gate's cells on the double, their draws, and one pool. A pass does not prove that a GPU's fast kernel differs
from its generic one.
"""

from __future__ import annotations

import pytest
from hypothesis import given, seed, settings

from accelerated.contract import exchange
from accelerated.registry import backend
from conformance.case_files import validate
from conformance.cases import Case, CaseError, Cell, Explicit, Recipe, Round
from conformance.engine import steps
from conformance.engine.driver import Driver
from conformance.suite import coverage, kinds
from conformance.suite.call_plan import call_cells
from conformance.suite.case_facts import look_at_case
from conformance.suite.cells import PlannedCell

NAME = "mori-standin"
PLACES = [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)]
GENERIC = "EpCombineIntraNodeKernel_bf16_nop2p_"


def gate(arch: str = "gfx942", places: list[tuple[int, int]] = PLACES) -> list[PlannedCell]:
    made = backend(NAME, arch)
    found = call_cells(NAME, made, companion=False, tier="gate", kernel_types=made.kernel_types, topologies=places)
    return [one for one in found if isinstance(one, PlannedCell)]


def cell_of(planned: PlannedCell) -> Cell:
    assert isinstance(planned.cell, Cell)
    return planned.cell


def drawn(planned: PlannedCell) -> list[Case]:
    """A budget of the cell's cases, in the parts that a run has."""
    found: list[Case] = []
    contract = backend(NAME).contract(cell_of(planned).problem(), planned.cell.kernel_type)
    for _, share, strategy in kinds.drawn_parts(planned.cell, contract, planned.examples):

        @seed(3)
        @settings(max_examples=share, database=None, deadline=None)
        @given(case=strategy)
        def one(case: Case) -> None:
            found.append(case)

        one()
    return found


@pytest.mark.parametrize(("arch", "codecs"), [("gfx942", ["fp8"]), ("gfx950", ["fp8", "fp4"])])
def test_the_gate_has_a_claimed_cell_for_every_kernel_of_a_blockwise_combine(arch: str, codecs: list[str]) -> None:
    made = backend(NAME, arch)
    seen = set()
    for planned in gate(arch):
        cell = cell_of(planned)
        declared = exchange(made.contract(cell.problem(), cell.kernel_type)).kernels
        if declared is not None and planned.claimed:
            seen.add((cell.kernel_type, declared.of(cell.hidden)))
    fast = [f"_noweight_block{width}_vec8{nine}" for width in (128, 256) for nine in ("", "_top9")]
    wanted = {("IntraNode", f"{GENERIC}{codec}_blockwise{end}") for codec in codecs for end in ("", *fast)}
    # IntraNodeLL has eight slots at most.
    wanted |= {(f"{kernel}LL", name) for kernel, name in wanted if not name.endswith("_top9")}
    assert wanted <= seen, sorted(wanted - seen)
    slots = {cell_of(p).top_k for p in gate(arch) if p.cell.kernel_type == "AsyncLL" and _fast(cell_of(p))}
    assert slots == {8, 9}


def _fast(cell: Cell) -> bool:
    return coverage.combine_of(cell, cell.hidden) == "fast"


def test_whole_rows_are_drawn_where_they_are_fast_and_required() -> None:
    cells = [planned for planned in gate() if _fast(cell_of(planned))]
    assert len(cells) >= 8
    for planned in cells:
        cases = drawn(planned)
        assert any(round_.hidden == 0 for case in cases for round_ in case.rounds)
        assert any("fast combine" in kinds.classes(case) for case in cases)
        contract = backend(NAME).contract(cell_of(planned).problem(), planned.cell.kernel_type)
        parts = kinds.drawn_parts(planned.cell, contract, planned.examples)
        assert "fast combine" in kinds.required(planned, contract, parts)
    slow = next(planned for planned in gate() if cell_of(planned).codec and not _fast(cell_of(planned)))
    assert "fast combine" not in kinds.required(slow, contract, parts)


def test_a_case_tells_which_rows_are_added_up_fast() -> None:
    planned = next(planned for planned in gate() if _fast(cell_of(planned)))
    rounds = tuple(Round(Recipe("uniform", (1,) * 8, 0, 1), hidden=hidden) for hidden in (0, 256))
    case = Case(cell_of(planned), rounds)
    assert look_at_case(case)("combine") == ("fast", "generic")
    assert "fast combine" not in kinds.classes(Case(case.cell, rounds[1:]))
    other = next(cell_of(planned) for planned in gate() if not cell_of(planned).codec)
    assert look_at_case(Case(other, rounds[:1]))("combine") is None


def test_capped_cells_fill_the_cap_and_never_exceed_it() -> None:
    capped = [planned for planned in gate() if "capped" in cell_of(planned).modes]
    kernel_types = {cell_of(planned).kernel_type for planned in capped}
    assert kernel_types == {"IntraNode", "IntraNodeLL", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL"}
    for planned in capped:
        cell = cell_of(planned)
        most = -(-cell.capacity // 2)
        counts = [count for case in drawn(planned) for of_round in case.token_counts() for count in of_round]
        assert max(counts) == most, cell.label
        assert not planned.claimed, "upstream runs no cap that has an effect"


def test_more_tokens_than_a_cap_leaves_room_for_are_no_case() -> None:
    cell = Cell("round_trip", NAME, "InterNodeV1", 2, 1, 64, 4, 1, 5, "bfloat16", "drained", modes=("capped",))
    rows = (((0,),) * 3, ((1,),) * 2)
    full = Case(cell, (Round(Explicit(rows)),))
    validate(full)
    with pytest.raises(CaseError, match="half of the capacity, the cap, is 3"):
        validate(Case(cell, (Round(Explicit((((0,),) * 4, ()))),)))
    for smaller in (*steps.lower_capacity(full), *steps.rank_moves(full), *steps.all_alike(full)):
        validate(smaller)
    assert "rank at capacity" in kinds.classes(full)


def test_the_kernel_of_combine_is_in_the_outcome() -> None:
    cell = Cell("round_trip", NAME, "IntraNode", 2, 1, 64, 4, 1, 5, "bfloat16", "drained")
    coded = Cell(
        "round_trip", NAME, "IntraNode", 2, 1, 64, 4, 1, 5, "bfloat16", "drained", codec="fp8_blockwise", scale_dim=2
    )
    driver = Driver(NAME)
    try:
        for one, kernels in ((cell, ()), (coded, (f"{GENERIC}fp8_blockwise",))):
            outcome = driver.run(Case(one, (Round(Explicit((((2,),), ()))),)))
            assert outcome.passed, outcome.text
            assert outcome.kernels == kernels
    finally:
        driver.close()
