"""The negative controls of the layer at a reduced size: each is caught on one token, and what is correct is accepted.

Scope: conformance/power_layer.py. Of the other columns only what does not depend on the seed is asserted. Not covered:
a thousand tokens, which ``python -m conformance.power_layer`` prints; declared paths, but for what is said of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from conformance import power_layer_paths as paths
from conformance.power_layer import RULES, WIDE, Table, bound, lines, main, measure, oracle_bound
from conformance.power_layer_faults import CONTROLS, SCHEMES, Sizes, correct, draw

SMALL = Sizes(tokens=48, experts=16, top_k=4, hidden=256, intermediate=128, ranks=4)
SEEDS = (0, 1)


@cache
def _table(scheme: str, seed: int) -> Table:
    return measure(scheme, SMALL, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_control_is_caught_on_one_token_and_what_is_correct_accepted(scheme: str, seed: int) -> None:
    table = _table(scheme, seed)
    assert list(table.controls) == list(CONTROLS)
    assert len(CONTROLS) == 13
    assert not table.correct.caught
    assert table.correct.oracle <= 1
    assert [name for name, found in table.controls.items() if not found.caught] == []
    assert [name for name, found in table.controls.items() if found.oracle <= 1] == []
    assert table.perfect


@pytest.mark.parametrize("scheme", SCHEMES)
def test_controls_change_one_token_or_two(scheme: str) -> None:
    layer = draw(scheme, SMALL)
    output = correct(layer)
    for name, control in CONTROLS.items():
        changed = control(layer, output, 20)
        assert list(changed) == ([20, 21] if name == "two tokens swapped" else [20])
        assert all(not torch.equal(row, output[token]) for token, row in changed.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_two_acceptances_agree_on_the_exact_result(scheme: str) -> None:
    layer = draw(scheme, SMALL)
    ours, oracle = bound(layer), oracle_bound(layer)
    assert torch.equal(ours.value, oracle.value)
    assert bool(((ours.lower <= oracle.upper) & (oracle.lower <= ours.upper)).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_published_tolerances_miss(scheme: str) -> None:
    table = _table(scheme, 0)
    assert all(table.correct.accepted.values())
    assert all(found.accepted["AITER checkAllclose"] for found in table.controls.values())
    if scheme.startswith("fp8"):
        assert all(found.accepted["vLLM combinations"] for found in table.controls.values())
    assert set(table.correct.accepted) == set(RULES)


def test_a_missed_control_is_shown_and_makes_the_table_imperfect() -> None:
    table = _table("bf16", 0)
    missed = replace(table.controls["zeros"], ratio=0.5, oracle=0.5)
    imperfect = replace(table, controls={**table.controls, "zeros": missed})
    assert not imperfect.perfect
    assert any("MISSED, 0.50 of the bound" in line for line in lines(imperfect))
    rejected = replace(table, correct=replace(table.correct, ratio=2.0))
    assert not rejected.perfect
    assert any(line.startswith("| unmodified | REJECTED") for line in lines(rejected))


@pytest.mark.parametrize(
    "arguments", [["--hidden", "200"], ["--ranks", "1"], ["--experts", "12"], ["--path-intermediate", "100"]]
)
def test_sizes_that_hold_no_fault_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give" in capsys.readouterr().err


def test_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"--{name}={value}" for name, value in (("tokens", 8), ("experts", 8), ("top-k", 2), ("ranks", 2))]
    assert main([*sizes, "--only=schemes"]) == 0
    printed = capsys.readouterr().out
    assert "Data and faults are synthetic; no AMD hardware was tested." in printed
    assert all(f"| {scheme} | this project" in printed for scheme in SCHEMES)
    assert "Paths that" not in printed


def _power(**changes: object) -> paths.Power:
    all_tokens = dict.fromkeys(paths.CONTROLS, 8)
    return replace(paths.Power(0.1, 0, all_tokens, all_tokens), **changes)  # type: ignore[arg-type]


MISSED = {**dict.fromkeys(paths.CONTROLS, 8), "zeros": 7}


@pytest.mark.parametrize(
    ("spread", "single", "status", "said"),
    [
        (_power(), _power(), 0, "\n0 of "),
        (_power(caught=MISSED), _power(), WIDE, "WIDE: gfx942+gfx950 fused_moe.bf16, any rows: 0.10 of the mean size"),
        (_power(), _power(caught=MISSED), 1, "MISSED: gfx942+gfx950 fused_moe.bf16, any rows: zeros under single"),
        (_power(rejected=2), _power(), 1, "REJECTED: gfx942+gfx950 fused_moe.bf16, any rows: 2 correct tokens under"),
        (_power(caught=MISSED), _power(rejected=1), 1, "WIDE: gfx942+gfx950 fused_moe.bf16, any rows"),
    ],
)
def test_the_exit_status_and_the_text_name_what_is_wide_and_what_is_wrong(
    spread: paths.Power,
    single: paths.Power,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def judge(path: paths.Path, sizes: Sizes, seed: int) -> paths.Verdict:
        return paths.Verdict(path, {paths.SPREAD: spread, paths.SINGLE: single}, {})

    monkeypatch.setattr(paths, "judge", judge)
    assert main(["--only=paths"]) == status
    printed = capsys.readouterr().out
    assert said in printed
    assert ("| 87% / 100% |" in printed) == (spread.caught is MISSED)
