"""Case files of sequences, what is said about them, and their cells in the plan.

Scope: no ranks. A pass says nothing about what the steps do.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from accelerated.registry import backend
from conformance import sequence_rules
from conformance.case_files import decode
from conformance.cases import CaseError, Round, SequenceCase, SequenceCell, encode
from conformance.selftest.suite.sequence_examples import EVERY, every_step, replays
from conformance.sequence_cases import MAX_STEPS, STEP_KINDS, Check, Combine, Delay, Dispatch, Recreate, Sequence
from conformance.suite.case_facts import case_fields, look_at_case
from conformance.suite.coverage import classes
from conformance.suite.describe import describe
from conformance.suite.kinds import drawn_parts, fixed_cases, legal, required
from conformance.suite.plan import make_plan
from conformance.suite.sequence_plan import sequence_cell
from reference.catalogue import KERNEL_TYPES, model_shapes

CASE = every_step("mori-standin", "IntraNode", "drained")
REPLAYED = replays("mori-standin", "InterNodeV1", "free-running")


@pytest.mark.parametrize("case", [CASE, REPLAYED], ids=["every step", "replays"])
def test_round_trip_through_json(case: SequenceCase) -> None:
    again = decode(encode(case), "here")
    assert again == case
    assert again.id == case.id
    assert again.steps == len(case.sequence)


def changed(**changes: object) -> SequenceCase:
    return msgspec.structs.replace(CASE, **changes)  # type: ignore[arg-type]


def celled(**changes: object) -> SequenceCase:
    return changed(cell=msgspec.structs.replace(CASE.cell, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (changed(sequence=EVERY[:-1]), ""),
        (changed(sequence=()), "the sequence has 0 steps; give 1 to 250"),
        (changed(sequence=(*EVERY, *[Check(19)] * MAX_STEPS)), f"has {MAX_STEPS + len(EVERY)} steps; give 1 to 250"),
        (changed(sequence=EVERY[:-4]), "3 rounds are dispatched and there are 4; dispatch each once"),
        (changed(sequence=(*EVERY, Delay(2, 1))), "delays rank 2 by 1 ms; give a rank from 0 to 1"),
        (changed(sequence=(*EVERY, Delay(0, 1000))), "delays rank 0 by 1000 ms"),
        (changed(sequence=(*EVERY, Combine(0))), "step 21: combine on operator 0: operator 0 has dispatched nothing"),
        (changed(sequence=(*EVERY, Recreate(2))), "the cell has 2 operator(s); give 0 to 1"),
        (changed(rounds=tuple(msgspec.structs.replace(r, delays_ms=(1, 0)) for r in CASE.rounds)), "has delays"),
        (celled(second=0), "the cell has 1 operator(s); give 0 to 0"),
        (celled(second=1), "round 1 has 2 tokens on a rank; the capacity is 1"),
        (celled(second=-1), "second is -1; give the capacity of operator 1"),
        (celled(modes=("zero-copy",)), "the experts' rows are the backend's"),
    ],
)
def test_case_files_name_the_value_the_limit_and_the_fix(case: SequenceCase, told: str) -> None:
    if not told:
        assert decode(encode(case), "here") == case
        return
    with pytest.raises(CaseError, match="fix or delete it") as caught:
        decode(encode(case), "here")
    assert told in str(caught.value)


def test_a_backend_is_asked_for_no_more_than_it_promises() -> None:
    late: Sequence = (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0), Check(1), Check(0))
    for name, kernel_type, reason in (
        ("mori-standin", "IntraNode", "operator 0 combined again, at step 3"),
        ("reference", "one-level", ""),
        ("allgather", "naive", ""),
    ):
        cell = msgspec.structs.replace(CASE.cell, backend=name, kernel_type=kernel_type)
        case = SequenceCase(cell, CASE.rounds[:2], late)
        assert decode(encode(case), "here") == case, "a file does not know its backend's contract"
        assert (reason in sequence_rules.misfit(case, backend(name))) == bool(reason) or not reason
        assert legal(backend(name), case, "gfx942") == (not reason)


def test_refused_operators_and_idle_ranks_are_named() -> None:
    odd = celled(kernel_type="IntraNodeLL", top_k=9, experts=18)
    assert sequence_rules.misfit(odd, backend("mori-standin")).startswith("operator 0: top_k is 9")
    idle = Round(CASE.rounds[2].routing)
    empty = msgspec.structs.replace(REPLAYED, rounds=(idle, REPLAYED.rounds[1]))
    assert "round 0 leaves a rank without tokens" in sequence_rules.misfit(empty, backend("mori-standin"))


def test_steps_are_told_and_counted() -> None:
    lines = describe(CASE)
    assert lines[0].endswith("a second operator of capacity 16")
    assert f"  step {len(EVERY) - 1}: check what step 19 returned" in lines
    assert "  step 9: poison ids of step 0" in lines
    assert "  step 2: replay round 0 on operator 0" in describe(REPLAYED)
    assert {"step recreate", "step delay", "poison tail", "poison output"} <= set(classes(CASE))
    assert "step replay" in classes(REPLAYED)
    assert set(look_at_case(CASE)("step")) == set(STEP_KINDS) - {"replay"}  # type: ignore[call-overload]
    assert case_fields()["step"].choices == STEP_KINDS


def test_every_kernel_type_has_sequences_of_both_modes_in_the_gate() -> None:
    plan = make_plan(
        [("mori-standin", backend("mori-standin"), False), ("reference", backend("reference"), True)],
        tier="gate",
        ep_sizes=(1, 2, 4, 8),
        kernel_types=(),
        models=tuple(model_shapes().values()),
    )
    mine = [p.cell for p in plan.cells if p.cell.backend == "mori-standin" and isinstance(p.cell, SequenceCell)]
    assert Counter(c.kernel_type for c in mine if not c.modes) == dict.fromkeys(KERNEL_TYPES, 2)
    assert [c.kernel_type for c in mine if c.modes] == ["InterNodeV1", "InterNodeV1"]
    for kernel_type in KERNEL_TYPES:
        assert {c.mode for c in mine if c.kernel_type == kernel_type} == {"drained", "free-running"}
    assert {c.world_size for c in mine} == {2, 4, 8}
    assert {c.second == c.capacity for c in mine} == {True, False}
    soaks = [p for p in plan.cells if p.cell.check == "soak"]
    assert [(p.cell.kernel_type, p.cell.world_size, p.examples) for p in soaks] == [("IntraNode", 2, 1)]
    beside = [p for p in plan.cells if isinstance(p.cell, SequenceCell) and p.companion]
    assert [(p.cell.backend, p.claimed) for p in beside] == [("reference", True)]


@pytest.mark.parametrize("name", ["mori-standin", "reference", "allgather"])
def test_every_cell_needs_looks_poison_and_replays_and_begins_with_them(name: str) -> None:
    made = backend(name)
    plan = make_plan([(name, made, False)], tier="explore", ep_sizes=(1, 2, 4), kernel_types=(), models=())
    handled = False
    for one in plan.cells:
        if not isinstance(one.cell, SequenceCell):
            continue
        handled = handled or "handle" in one.cell.modes
        contract = made.contract(one.cell.problem(), one.cell.kernel_type)
        parts = drawn_parts(one.cell, contract, one.examples)
        needed = required(one, contract, parts)
        assert {"step check", "step poison"} <= needed
        assert ("step replay" in needed) == ("handle" in one.cell.modes)
        (first,) = fixed_cases(one, contract)
        assert decode(encode(first), "here") == first
        assert legal(made, first, "gfx942")
        assert needed - {"masked slot"} <= set(classes(first))  # type: ignore[arg-type]
        assert sum(share for _, share, _ in parts) + 1 == one.examples
    assert handled == (name != "allgather")


def test_the_first_case_is_one_of_a_cells_budget_unless_that_is_masked_slots() -> None:
    cell = sequence_cell("mori-standin", "IntraNode", (8, 1), "free-running")
    contract = backend("mori-standin").contract(cell.problem(), cell.kernel_type)
    for examples, shares in ((1, [1]), (2, [1, 1]), (3, [1, 1]), (8, [6, 1])):
        assert [share for _, share, _ in drawn_parts(cell, contract, examples)] == shares


def test_explore_has_every_topology_and_way_and_smoke_has_none() -> None:
    planned: dict[str, list[SequenceCell]] = {}
    for tier in ("smoke", "explore"):
        plan = make_plan(
            [("mori-standin", backend("mori-standin"), False)],
            tier=tier,
            ep_sizes=(1, 2, 4, 8, 16),
            kernel_types=("IntraNode", "InterNodeV1"),
            models=tuple(model_shapes().values())[:1],
        )
        planned[tier] = [p.cell for p in plan.cells if isinstance(p.cell, SequenceCell)]
        soaks = {
            p.cell.world_size for p in plan.cells if p.cell.check == "soak" and not getattr(p.cell, "special", False)
        }
        assert soaks == ({2, 4, 8} if tier == "explore" else set())
    assert planned["smoke"] == []
    assert {c.modes for c in planned["explore"]} >= {(), ("handle",), ("zero-copy",), ("weightless",)}
    assert {c.world_size for c in planned["explore"]} == {1, 2, 4, 8}
