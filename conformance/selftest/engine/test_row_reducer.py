"""Reduction of row operators' cases on predicates in pure Python: every step is legal, the minimum is the true one.

Scope: conformance/engine/row_steps.py and RowReducer; no ranks and no backend. A pass does not prove that every
defect's minimum is reached, only those of the shapes written here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import msgspec
import pytest

from accelerated.operators import Family
from conformance.engine import row_steps
from conformance.engine.reducer import Reduction, RowReducer
from conformance.row_cases import EPSILONS, KINDS, Call, Mode, Pattern, RowCase, RowCaseError, RowCell, validate_rows
from reference.problem import ProblemError

Predicate = Callable[[RowCase], bool]
PLAIN = Call(1, (Pattern("zero"),))


def cell(family: Family = Family.QUANTISE, world_size: int = 1, hidden: int = 512, mode: Mode = "drained") -> RowCell:
    return RowCell(family.value, "none", "any", family, world_size, hidden, 130, "bfloat16", mode)


def patterns(random: Random, count: int) -> tuple[Pattern, ...]:
    return tuple(
        Pattern(random.choice(KINDS), random.randrange(-12, 21), random.randrange(256), random.randrange(2**20))
        for _ in range(count)
    )


def large(of: RowCell, length: int = 1, seed: int = 1) -> RowCase:
    """A case with everything in it."""
    random = Random(seed)
    return RowCase(
        of,
        tuple(
            Call(
                rows=97 + index,
                patterns=patterns(random, 4),
                residual=patterns(random, 1) if of.family is not Family.QUANTISE else (),
                num_rows=90 if of.family is Family.QUANTISE else -1,
                scale=0.37,
                weight="normal",
                epsilon=0.01,
                into=True,
                delays_ms=(2, *(0,) * (of.world_size - 1)),
            )
            for index in range(length)
        ),
    )


LARGE = (
    large(cell()),
    large(cell(mode="free-running"), 5),
    large(cell(Family.ALLREDUCE_NORM, 8, 4096, "free-running"), 3),
    RowCase(cell(), (Call(0, ()), Call(130, (Pattern("nan", -12, 3, 4),), num_rows=0))),
)


def well_formed(case: RowCase) -> bool:
    try:
        validate_rows(case)
    except (RowCaseError, ProblemError):
        return False
    return True


def reduce(case: RowCase, fails: Predicate, candidates: int = 2000) -> Reduction[RowCase]:
    """The minimum, which fails and from which no single step leads to a smaller failure."""
    assert fails(case)
    done = RowReducer(fails, well_formed, 60.0, candidates).reduce(case)
    assert fails(done.case)
    assert not done.exhausted
    smaller = [c for make in row_steps.STEPS for c in make(done.case) if row_steps.size(c) < row_steps.size(done.case)]
    assert not [c for c in smaller if well_formed(c) and fails(c)]
    return done


@pytest.mark.parametrize("make", row_steps.STEPS, ids=lambda step: step.__name__)
def test_every_step_is_valid(make: row_steps.Steps) -> None:
    found = 0
    for case in LARGE:
        for candidate in make(case):
            validate_rows(candidate)
            found += row_steps.size(candidate) < row_steps.size(case)
    assert found, "the step makes something smaller"


def test_every_step_is_valid_all_the_way_down() -> None:
    """Random descents, since a step of a small case differs from that of a large one."""
    for seed, case in enumerate(LARGE):
        random, best = Random(seed), case
        for _ in range(150):
            candidates = [c for make in row_steps.STEPS for c in make(best) if row_steps.size(c) < row_steps.size(best)]
            if not candidates:
                break
            best = random.choice(candidates)
            validate_rows(best)
        assert row_steps.size(best) < row_steps.size(case)


@pytest.mark.parametrize("case", LARGE[:3], ids=["one", "calls", "ranks"])
def test_what_always_fails_ends_at_nothing(case: RowCase) -> None:
    done = reduce(case, lambda case: True)
    (call,) = done.case.calls
    ranks = 1 if case.cell.world_size == 1 else 2
    assert (done.case.cell.world_size, done.case.cell.hidden, done.case.cell.mode) == (ranks, 32, "drained")
    residual = (Pattern("zero"),) if call.residual else ()
    assert call == Call(0, (Pattern("zero"),), residual=residual)
    assert done.tried <= 60


def held(case: RowCase, kind: str) -> list[Call]:
    """Calls with a row of that kind."""
    return [c for c in case.calls if any(p.kind == kind for p in c.patterns[: c.rows])]


def test_a_kind_a_row_count_and_a_row_length() -> None:
    def fails(case: RowCase) -> bool:
        return case.cell.hidden >= 64 and any(call.rows >= 3 for call in held(case, "zero_group"))

    for seed in range(4):
        start = large(cell(mode="free-running"), 4, seed)
        palette = (*start.calls[2].patterns[:2], Pattern("zero_group", 7, 200, 999))
        dirty = msgspec.structs.replace(start.calls[2], patterns=palette)
        done = reduce(msgspec.structs.replace(start, calls=(*start.calls[:2], dirty, start.calls[3])), fails)
        assert done.case.calls == (Call(3, (Pattern("zero_group"),)),)
        assert (done.case.cell.hidden, done.case.cell.mode) == (64, "drained")
        assert done.tried <= 150


@pytest.mark.parametrize(("world_size", "least"), [(8, 2), (8, 4), (4, 2)])
def test_ranks(world_size: int, least: int) -> None:
    of = cell(Family.ALLREDUCE_NORM, world_size)
    done = reduce(large(of, 2), lambda case: case.cell.world_size >= least)
    assert done.case.cell.world_size == least
    late = reduce(large(of), lambda case: any(call.delays_ms for call in case.calls) and case.cell.world_size >= least)
    assert late.case.calls[0].delays_ms == (2, *(0,) * (least - 1)), "the delays are those of the ranks that are left"


def test_two_calls_that_belong_together() -> None:
    """The second call sees what the first left: more rows before than now."""

    def stale(case: RowCase) -> bool:
        return any(a.rows > b.rows >= 1 for a, b in zip(case.calls, case.calls[1:], strict=False))

    start = large(cell(mode="free-running"), 6)
    rows = (9, 3, 17, 40, 12, 60)
    calls = tuple(msgspec.structs.replace(c, rows=n, num_rows=-1) for c, n in zip(start.calls, rows, strict=True))
    done = reduce(msgspec.structs.replace(start, calls=calls), stale)
    assert [call.rows for call in done.case.calls] == [2, 1]
    assert all(call.patterns == (Pattern("zero"),) for call in done.case.calls)


@pytest.mark.parametrize(
    ("name", "fails", "wanted"),
    [
        ("num_rows", lambda c: 0 <= c.num_rows < c.rows, Call(1, (Pattern("zero"),), num_rows=0)),
        ("delays", lambda c: any(c.delays_ms) and c.rows, Call(1, (Pattern("zero"),), delays_ms=(2,))),
        ("into", lambda c: c.into and c.rows, Call(1, (Pattern("zero"),), into=True)),
        ("scale", lambda c: c.scale != 1 and c.rows, Call(1, (Pattern("zero"),), scale=0.37)),
        ("weight", lambda c: c.weight != "ones" and c.rows, Call(1, (Pattern("zero"),), weight="twos")),
        ("epsilon", lambda c: c.epsilon != EPSILONS[0] and c.rows, Call(1, (Pattern("zero"),), epsilon=0.01)),
        ("rows", lambda c: c.rows > 64, Call(65, (Pattern("zero"),))),
    ],
)
def test_each_setting_stays_only_where_it_matters(name: str, fails: Callable[[Call], bool], wanted: Call) -> None:
    done = reduce(large(cell(), 3), lambda case: any(map(fails, case.calls)))
    assert done.case.calls == (wanted,), name


@pytest.mark.parametrize(
    ("name", "least", "wanted"),
    [("exponent", 3, Pattern("zero", exponent=3)), ("position", 5, Pattern("zero", position=5))],
)
def test_numbers_of_a_pattern(name: str, least: int, wanted: Pattern) -> None:
    def fails(case: RowCase) -> bool:
        return any(getattr(p, name) >= least for call in case.calls for p in call.patterns[: call.rows])

    start = RowCase(cell(), (Call(5, (Pattern("normal", 20, 250, 4000), Pattern("wide", 13, 201, 77))),))
    done = reduce(start, fails)
    assert done.case.calls == (Call(1, (wanted,)),)


def test_a_negative_exponent_and_a_seed() -> None:
    start = RowCase(cell(), (Call(5, (Pattern("wide", -12, 250, 4000),)),))
    done = reduce(start, lambda case: any(p.exponent < 0 and p.seed for p in case.calls[0].patterns))
    (pattern,) = done.case.calls[0].patterns
    assert pattern == Pattern("zero", exponent=-1, seed=1), "the sign stays"


def test_the_residual_is_made_plain_and_stays() -> None:
    of = cell(Family.ALLREDUCE_NORM, 2)
    done = reduce(large(of), lambda case: case.calls[0].rows > 0)
    assert done.case.calls[0].residual == (Pattern("zero"),), "the operator takes one"


def test_a_plainer_kind_is_an_earlier_one() -> None:
    start = RowCase(cell(), (Call(2, (Pattern("every_code", 3, 9, 5),)),))
    done = reduce(start, lambda case: KINDS.index(case.calls[0].patterns[0].kind) >= KINDS.index("powers"))
    assert done.case.calls[0].patterns == (Pattern("powers"),)


def test_what_is_not_allowed_is_not_tried() -> None:
    seen: list[RowCase] = []

    def fails(case: RowCase) -> bool:
        seen.append(case)
        return True

    done = RowReducer(fails, lambda case: case.cell.hidden >= 256 and case.calls[0].rows > 0, 60.0).reduce(LARGE[1])
    assert done.case.cell.hidden == 256
    assert done.case.calls[0].rows == 1
    assert all(case.cell.hidden >= 256 for case in seen)
    assert len({case.id for case in seen}) == len(seen) == done.tried, "no candidate is tried twice"


def test_the_budget_ends_the_search() -> None:
    few = RowReducer(lambda case: True, well_formed, 60.0, candidates=3).reduce(LARGE[1])
    assert (few.tried, few.exhausted) == (3, True)
    assert row_steps.size(few.case) < row_steps.size(LARGE[1]), "what was found stands"

    def slow(case: RowCase) -> bool:
        time.sleep(0.05)
        return False

    started = time.monotonic()
    late = RowReducer(slow, well_formed, 0.2).reduce(LARGE[1])
    assert late.exhausted
    assert late.case == LARGE[1]
    assert time.monotonic() - started < 1.0
