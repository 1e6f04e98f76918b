"""The exit code of a run from the verdicts of its cells: the whole table of what outranks what.

A pass does not prove that pytest reports it; the whole runs of the neighbouring modules do.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest

from conformance.selftest.suite.runs import ROOT, SMALL, run
from conformance.verdicts import PRODUCT_FAILURES, ExitCode, Verdict, exit_code

_ALONE = {
    Verdict.PASS: ExitCode.OK,
    Verdict.FAIL: ExitCode.PRODUCT_FAILURE,
    Verdict.CRASH: ExitCode.PRODUCT_FAILURE,
    Verdict.HANG: ExitCode.PRODUCT_FAILURE,
    Verdict.FINDING: ExitCode.OK,
    Verdict.MISTRUSTED: ExitCode.INCOMPLETE,
    Verdict.UNSUPPORTED: ExitCode.INCOMPLETE,  # nothing ran
    Verdict.NOT_RUN: ExitCode.INCOMPLETE,
    Verdict.XFAIL: ExitCode.OK,
    Verdict.XPASS: ExitCode.INCOMPLETE,
    Verdict.QUARANTINED: ExitCode.INCOMPLETE,  # nothing ran
    Verdict.INFRA: ExitCode.INFRASTRUCTURE,
}
_NOTHING_RAN = (Verdict.UNSUPPORTED, Verdict.QUARANTINED)
#: What outranks what, strongest first.
_RANKING = (ExitCode.PRODUCT_FAILURE, ExitCode.INFRASTRUCTURE, ExitCode.INCOMPLETE, ExitCode.OK)


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_has_an_exit_code(verdict: Verdict) -> None:
    assert exit_code([verdict]) is _ALONE[verdict]


def test_the_numbers_are_a_contract() -> None:
    assert [(c.name, c.value) for c in ExitCode] == [
        ("OK", 0),
        ("PRODUCT_FAILURE", 1),
        ("INCOMPLETE", 2),
        ("INFRASTRUCTURE", 3),
        ("USAGE", 4),
    ]


@pytest.mark.parametrize("pair", list(combinations(Verdict, 2)), ids=lambda pair: f"{pair[0].value}+{pair[1].value}")
def test_of_two_verdicts_the_stronger_counts(pair: tuple[Verdict, Verdict]) -> None:
    # UNSUPPORTED and QUARANTINED are no weakness of a run in which something else passed.
    codes = {_ALONE[verdict] for verdict in pair if verdict not in _NOTHING_RAN} or {ExitCode.INCOMPLETE}
    assert exit_code(pair) is next(code for code in _RANKING if code in codes)
    assert exit_code(reversed(pair)) is exit_code(pair)


def test_nothing_at_all_is_incomplete() -> None:
    assert exit_code([]) is ExitCode.INCOMPLETE


@pytest.mark.parametrize("verdict", Verdict)
def test_a_stale_waiver_leaves_a_run_incomplete(verdict: Verdict) -> None:
    expected = max(_ALONE[verdict], ExitCode.INCOMPLETE, key=lambda code: -_RANKING.index(code))
    assert exit_code([verdict], stale_waivers=True) is expected


@pytest.mark.parametrize("verdict", Verdict)
def test_a_lost_worker_spoils_everything_but_a_product_failure(verdict: Verdict) -> None:
    expected = ExitCode.PRODUCT_FAILURE if verdict in PRODUCT_FAILURES else ExitCode.INFRASTRUCTURE
    assert exit_code([verdict, Verdict.PASS], lost_worker=True) is expected


PLUGIN = """
import pytest
import conformance.conftest as suite

@pytest.fixture(autouse=True)
def broken(request):
    if {fixture} and "-rounds-" not in request.node.name and "ep2" in request.node.name:
        raise OSError("no such lease")

if not {fixture}:
    def unreadable(directory):
        raise ValueError("main.jsonl:1 is not a record")
    suite.read_records = unreadable
"""


@pytest.mark.parametrize(
    ("fixture", "part"),
    [(True, "failed outside of its cell"), (False, "the records cannot be totalled: ValueError: main.jsonl:1")],
    ids=["a fixture fails", "records cannot be read"],
)
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "worker"])
def test_a_defect_of_ours_is_never_the_products(
    tmp_path: Path, fixture: bool, part: str, workers: tuple[str, ...]
) -> None:
    (tmp_path / "spoiler.py").write_text(PLUGIN.format(fixture=fixture))
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run(tmp_path / "out", *SMALL, "-p", "spoiler", *workers, environment=environment)
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert part in done.text
    assert not fixture or "exit 3 (infrastructure)" in done.text, "what is printed is what is returned"
