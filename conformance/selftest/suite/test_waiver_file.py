"""A file of waivers: what it may say, and the one line for what it may not.

A pass does not prove that the advice is the best one.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from conformance.cases import Explicit, Recipe
from conformance.engine.driver import Outcome
from conformance.row_cases import Call, Pattern, RowCase, RowCell
from conformance.selftest.engine.backends import Defect
from conformance.selftest.engine.helpers import case, cell
from conformance.selftest.suite.runs import run
from conformance.suite.waivers import Waiver, WaiverError, forbidden, read_waivers
from conformance.verdicts import ExitCode, Verdict

GOOD = {
    "issue": "'ROCm/mori#610'",
    "reason": "'wrong sums'",
    "cell": "{ backend = 'mori' }",
    "expect": "{ verdict = 'FAIL', check = 'combine.output' }",
}
WRONG = Outcome(Verdict.FAIL, "combine.output")


def entry(**change: str | None) -> str:
    """An entry with some keys replaced, or left out where they are None."""
    keys = {**GOOD, **change}
    return "[[waiver]]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items() if value is not None)


def read(tmp_path: Path, text: str) -> tuple[Waiver, ...]:
    path = tmp_path / "known.toml"
    path.write_text(text)
    return read_waivers(path)


def only(tmp_path: Path, **change: str | None) -> Waiver:
    (waiver,) = read(tmp_path, entry(**change))
    return waiver


#: A change of an entry and what the message must hold beside the file and the entry.
REFUSED: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "no issue": ({"issue": None}, ("no issue", "ORG/REPO#NUMBER")),
    "an issue in words": ({"issue": "'the one about sums'"}, ("'the one about sums'", "ORG/REPO#NUMBER")),
    "a number alone": ({"issue": "'#610'"}, ("'#610'", "ROCm/mori#610")),
    "no reason": ({"reason": "' '"}, ("reason", "few words")),
    "unknown key": ({"checks": "'combine.output'"}, ("'checks'", "choose one of", "expect")),
    "no backend": ({"cell": "{ world_size = 4 }"}, ("no backend", "backend = 'mori'")),
    "cell is text": ({"cell": "'mori'"}, ("'mori'", "give a table")),
    "unknown field": ({"cell": "{ backend = 'mori', worldsize = 4 }"}, ("'worldsize'", "'world_size'")),
    "text for a number": ({"cell": "{ backend = 'mori', world_size = '4' }"}, ("world_size is '4'", "whole number")),
    "number for text": ({"cell": "{ backend = 7 }"}, ("backend is 7", "a string")),
    "true for a number": ({"cell": "{ backend = 'mori', world_size = true }"}, ("True", "whole number")),
    "value that there is not": ({"cell": "{ backend = 'mori', mode = 'drain' }"}, ("'drain'", "free-running")),
    "empty list": ({"cell": "{ backend = [] }"}, ("empty list",)),
    "range of text": ({"cell": "{ backend = { min = 1 } }"}, ("backend", "a range")),
    "range upside down": ({"case": "{ tokens = { min = 9, max = 3 } }"}, ("min 9 above max 3", "swap")),
    "range of words": ({"case": "{ tokens = { from = 9 } }"}, ("'from'", "min = ..., max = ...")),
    "unknown fact": ({"case": "{ token = 4 }"}, ("'token'", "'tokens'")),
    "unknown archetype": ({"case": "{ archetype = 'hot' }"}, ("'hot'", "hot-expert")),
    "no expectation": ({"expect": None}, ("no verdict", "check = 'combine.output'")),
    "a verdict that is no failure": ({"expect": "{ verdict = 'INFRA' }"}, ("'INFRA'", "CRASH, FAIL, HANG")),
    "a failure of anything": ({"expect": "{ verdict = 'FAIL' }"}, ("no check", "combine.output")),
    "any failure": ({"expect": "{ verdict = '*' }"}, ("'*'", "CRASH, FAIL, HANG")),
    "a failure as a pattern": ({"expect": "{ verdict = 'F*' }"}, ("'F*'", "CRASH, FAIL, HANG")),
    "a crash of any kind": ({"expect": "{ verdict = 'CRASH' }"}, ("CRASH and no check", "SIGSEGV")),
    "every check": ({"expect": "{ verdict = 'FAIL', check = '*' }"}, ("'*'", "combine, compiled, dispatch")),
    "every check, beside": ({"expect": "{ verdict = ['FAIL', 'HANG'], check = ['*', 'hang'] }"}, ("'*'", "excuses")),
    "every check with an o": ({"expect": "{ verdict = 'FAIL', check = '*o*' }"}, ("'*o*'", "combine, compiled")),
    "every group": ({"expect": "{ verdict = 'FAIL', check = '*.[a-z]*' }"}, ("'*.[a-z]*'", "excuses")),
    "every check of a replay": (
        {"expect": "{ verdict = 'FAIL', check = 'replay.*' }"},
        ("'replay.*'", "replay.combine"),
    ),
    "one that any group might get": ({"expect": "{ verdict = 'FAIL', check = '*ten' }"}, ("'*ten'", "outputs.*")),
    "every exception": ({"expect": "{ verdict = 'FAIL', check = 'raised.*' }"}, ("'raised.*'", "every exception")),
    "a pattern of nothing": (
        {"expect": "{ verdict = 'FAIL', check = 'combined.*' }"},
        ("'combined.*'", "no check matches"),
    ),
    "an unknown check, beside": (
        {"expect": "{ verdict = ['FAIL', 'HANG'], check = ['combine.sum', 'hang'] }"},
        ("'combine.sum'", "combine.output"),
    ),
    "a check of another verdict": ({"expect": "{ verdict = 'FAIL', check = 'SIGSEGV' }"}, ("'SIGSEGV'", "no FAIL has")),
    "no signal": ({"expect": "{ verdict = 'CRASH', check = 'SIG*' }"}, ("'SIG*'", "no CRASH has", "SIGSEGV")),
    "a verdict that no check has": (
        {"expect": "{ verdict = ['FAIL', 'CRASH'], check = 'combine.output' }"},
        ("CRASH and no check of it", "SIGSEGV"),
    ),
    "unknown check": ({"expect": "{ verdict = 'FAIL', check = 'combine.sum' }"}, ("'combine.sum'", "combine.output")),
    "unknown run": ({"run": "{ machine = 'gfx942' }"}, ("'machine'", "arch")),
    "quarantine in words": ({"quarantine": "'yes'"}, ("'yes'", "true or false")),
    "quarantine and expectation": ({"quarantine": "true"}, ("expect", "launches nothing")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_entry_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    change, parts = REFUSED[name]
    with pytest.raises(WaiverError) as caught:
        read(tmp_path, entry() + entry(**change))
    for part in (str(tmp_path / "known.toml"), "waiver 2", *parts):
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [("[[waiver]\n", "not TOML"), ("[waiver]\nissue = 1\n", "two brackets"), ("[[xfail]]\n", "'xfail'")],
)
def test_a_file_of_something_else(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(WaiverError, match=part):
        read(tmp_path, text)


def test_a_file_that_cannot_be_used_is_wrong_usage(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path / "bad.toml"):
        if path.name == "bad.toml":
            path.write_text(entry(issue=None))
        done = run(tmp_path / "out", "--backend", "reference", "--waivers", str(path))
        assert done.code == ExitCode.USAGE, done.text
        assert str(path) in done.text
        assert "Traceback" not in done.text


@pytest.mark.parametrize(
    ("wanted", "covered"),
    [
        ("world_size = 4", True),
        ("world_size = [2, 4]", True),
        ("world_size = { min = 5 }", False),
        ("world_size = { max = 4 }", True),
        ("kernel_type = 'one-*'", True),
        ("kernel_type = ['two-level', 'node-*']", False),
        ("mode = 'drained'", True),
        ("model = ''", True),
        ("label = 'round_trip-*-ep4-*'", True),
        ("shards = 1", False),  # an exchange has none
        ("family = 'quantise'", False),
    ],
)
def test_fields_of_cells(tmp_path: Path, wanted: str, covered: bool) -> None:
    waiver = only(tmp_path, cell=f"{{ backend = '*:Defective', {wanted} }}")
    assert waiver.covers_cell(cell()) is covered
    assert not waiver.covers_cell(cell("DropsARow")), "another backend's"


#: Facts of ``case(cell(), Defect.EXCEPTION)``: one token per rank, two on rank 0, which names expert 6 twice.
FACTS = {
    "max_tokens = 2": True,
    "max_tokens = { min = 3 }": False,
    "min_tokens = 1": True,
    "tokens = 5": True,
    "rounds = 1": True,
    "masked = false": True,
    "masked = true": False,
    "expert_slots = 2": True,
    "received = 4": True,  # rank 0: its own first token and one of each other rank
    "received = { max = 3 }": False,
    "class = 'row crosses ranks'": True,
    "class = ['masked slot', 'duplicate *']": True,
    "class = 'masked slot'": False,
    "values = 'integers'": True,
    "delayed = false": True,
    "archetype = 'uniform'": False,
    "kind = 'normal'": False,
    "tail = 0": False,
    "weighting = 'positive'": False,
}


@pytest.mark.parametrize("wanted", FACTS)
def test_facts_of_cases(tmp_path: Path, wanted: str) -> None:
    waiver = only(tmp_path, cell="{ backend = '*' }", case=f"{{ {wanted} }}")
    assert waiver.covers(case(cell(), Defect.EXCEPTION)) is FACTS[wanted]


def test_facts_of_large_rounds_and_of_rows(tmp_path: Path) -> None:
    plain = case(cell(world_size=2))
    recipe = msgspec.structs.replace(plain.rounds[0], routing=Recipe("hot-expert", (8, 3), 1, 0))
    large = msgspec.structs.replace(plain, rounds=(recipe,))
    hot = only(tmp_path, cell="{ backend = '*' }", case="{ archetype = 'hot-*', expert_slots = 11, max_tokens = 8 }")
    assert hot.covers(large)
    assert not hot.covers(plain)
    where = RowCell("quantise", "b", "hip.per_token", "quantise", 1, 64, 16, "bfloat16")  # type: ignore[arg-type]
    rows = RowCase(where, (Call(3, (Pattern("nan"),)), Call(0, ())))
    nan = only(
        tmp_path, cell="{ backend = 'b', operator = 'hip.*' }", case="{ kind = 'nan', max_tokens = 3, rounds = 2 }"
    )
    assert nan.covers(rows)
    assert not only(tmp_path, cell="{ backend = 'b' }", case="{ masked = false }").covers(rows), "rows have no slots"


def test_only_what_is_said_is_expected(tmp_path: Path) -> None:
    said = only(tmp_path)
    assert said.expects(WRONG)
    assert not said.expects(Outcome(Verdict.FAIL, "dispatch.count"))
    assert not said.expects(Outcome(Verdict.CRASH, "SIGSEGV"))
    assert not said.expects(Outcome(Verdict.PASS))
    died = only(tmp_path, expect="{ verdict = ['CRASH', 'HANG'], check = ['SIGSEGV', 'hang'] }")
    assert died.expects(Outcome(Verdict.CRASH, "SIGSEGV"))
    assert died.expects(Outcome(Verdict.HANG, "hang"))
    assert not died.expects(WRONG)
    assert not died.expects(Outcome(Verdict.CRASH, "SIGBUS"))


def test_a_group_of_checks_may_be_expected(tmp_path: Path) -> None:
    for wanted in ("combine.*", "replay.combine.*", "raised.Mori*", "norm.[a-z]*"):
        said = only(tmp_path, expect=f"{{ verdict = 'FAIL', check = '{wanted}' }}")
        assert said.expects(WRONG) is (wanted == "combine.*")
        assert said.ends_world is wanted.startswith("raised")
    gone = only(tmp_path, expect="{ verdict = 'CRASH', check = ['SIGKILL', 'exit code 3', 'signal 40'] }")
    assert gone.expects(Outcome(Verdict.CRASH, "exit code 3"))
    assert only(tmp_path, expect="{ verdict = 'HANG' }").expects(Outcome(Verdict.HANG, "hang"))


def test_what_a_reduction_leaves_alone(tmp_path: Path) -> None:
    where = case(cell())
    known = (only(tmp_path, cell="{ backend = '*' }", case="{ tokens = 4 }"),)
    assert forbidden(known, where, WRONG)
    assert not forbidden(known, where, Outcome(Verdict.FAIL, "dispatch.count")), "another failure, wherever it is"
    fewer = msgspec.structs.replace(where.rounds[0], routing=Explicit(((), (), (), ())))
    assert not forbidden(known, msgspec.structs.replace(where, rounds=(fewer,)), WRONG)
    barred = only(tmp_path, cell="{ backend = '*' }", expect=None, quarantine="true")
    assert forbidden((barred,), where, Outcome(Verdict.FAIL, "dispatch.count")), "never launched, whatever fails"
