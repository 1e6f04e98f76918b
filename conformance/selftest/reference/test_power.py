"""The power table at a reduced size: this project's bound catches every fault and accepts every correct result.

Scope: conformance/power.py. Of the other columns only what does not depend on the seed is asserted. Not covered: the
full size, which ``python -m conformance.power`` prints.
"""

from __future__ import annotations

from functools import cache

import pytest

from conformance.power import OURS, RULES, Table, lines, main, measure

SEEDS = (0, 1, 2)


@cache
def _table(wire: str, seed: int) -> Table:
    return measure(wire, tokens=64, hidden=512, top_k=8, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("wire", "faults"), [("BF16", 8), ("FP8", 10)])
def test_the_bound_catches_all_and_accepts_what_is_correct(wire: str, faults: int, seed: int) -> None:
    table = _table(wire, seed)
    assert len(table.correct) == 5
    assert table.accepts_correct(OURS)
    assert [name for name, row in table.caught.items() if not row[OURS]] == []
    assert table.count(OURS) == faults
    assert table.largest <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_what_published_tolerances_miss(seed: int) -> None:
    bf16, fp8 = _table("BF16", seed), _table("FP8", seed)
    assert all(bf16.accepts_correct(rule) for rule in RULES)
    assert bf16.count("AITER") == 0
    assert bf16.count("torch") == 7
    for rule in RULES:
        assert not bf16.caught["truncation instead of rounding"][rule]
    for rule in ("MoRI", "vLLM MoRI", "DeepEP"):
        assert bf16.count(rule) < 6
        assert fp8.accepts_correct(rule)
        assert fp8.count(rule) < 7
    # Without a model of the wire, and without a tolerance for it.
    assert not fp8.accepts_correct("torch")
    assert not fp8.accepts_correct("AITER")


def test_a_false_alarm_is_shown_instead_of_a_count() -> None:
    *_, last = lines(_table("FP8", 0))
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:3] == ["caught of 10", "10", "rejects correct data"]


def test_sizes_that_hold_no_fault_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--hidden", "200"])
    assert "give at least 4, at least 2, and a multiple of 128 from 256 on" in capsys.readouterr().err


def test_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "4", "--hidden", "256", "--top-k", "2"]) in {0, 1}
    assert "Data and faults are synthetic; no AMD hardware was tested." in capsys.readouterr().out
