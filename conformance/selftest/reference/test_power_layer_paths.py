"""What the declared paths of AITER's experts catch: everything where one slot is judged alone, and which are wide else.

Scope: conformance/power_layer_paths.py with 16 tokens in place of 64. A path that is wide and not in :data:`WIDE` fails
here: declare it narrower, or add it and say why. Not covered: intermediates of more than two tiles, where hulls are
wider yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from accelerated.aiter_ops.experts_contract import contract
from accelerated.aiter_ops.experts_numerics import OPERATORS
from accelerated.experts import ExpertContract, ExpertProblem
from conformance import power_layer_paths as paths
from conformance.power_layer_paths import CONTROLS, SINGLE, SIZES, SPREAD, Path, Verdict
from reference.intervals import Interval

SMALL = replace(SIZES, tokens=16)
PATHS = {path.name: path for path in paths.declared(SMALL)}

#: By path: the fields whose hull hides one slot of eight behind the others.
WIDE = {
    "gfx942 fused_moe.fp8_token, 17 rows on": {"inner_parts", "intermediate_any_group", "store_ulps"},
    "gfx950 fused_moe.fp8_token, 17 rows on": {"inner_parts", "intermediate_any_group", "store_ulps"},
    "gfx942 fused_moe.fp8_block, 1 row": {"gemm1_parts"},
    "gfx950 fused_moe.fp8_block, 1 row": {"gemm1_parts"},
    "gfx942 fused_moe.fp8_block, 33 rows on": {"inner_parts", "intermediate_any_group", "store_ulps"},
    "gfx950 fused_moe.fp8_block, 33 rows on": {"inner_parts", "intermediate_any_group", "store_ulps"},
    "gfx950 fused_moe.mxfp4_swiglu, 1-255 rows": {"gemm1_parts", "store_ulps"},
}
#: They take one column of ids: their only slot is judged alone, whatever the weighting.
ONE_SLOT = {name for name in PATHS if "fp8_token_stage1" in name}


@cache
def _verdict(name: str) -> Verdict:
    return paths.judge(PATHS[name], SMALL)


def _first(operator: str) -> Path:
    return next(path for path in PATHS.values() if path.operator == operator)


@pytest.mark.parametrize("name", PATHS)
def test_where_one_slot_weighs_every_control_is_caught_on_every_token_that_it_changes(name: str) -> None:
    verdict = _verdict(name)
    assert [power.rejected for power in verdict.powers.values()] == [0] * len(verdict.powers)
    power = verdict.powers[SINGLE]
    assert power.caught == power.changed
    assert verdict.sound
    # Nothing is lost with a slot that weighs nothing, nor with the other rank's where there is one slot.
    none = {control for control, changed in power.changed.items() if not changed}
    assert none == ({"local only"} if name in ONE_SLOT else {"least dropped"})
    assert list(power.changed) == list(CONTROLS)


def test_every_path_that_misses_a_control_where_all_slots_weigh_is_listed() -> None:
    missing = {name: _verdict(name).powers[SPREAD].missed for name in PATHS if name not in ONE_SLOT}
    assert {name for name, missed in missing.items() if missed} == set(WIDE)
    assert all(set(_verdict(name).closed) == fields for name, fields in WIDE.items())
    assert all(set(_verdict(name).powers) == {SINGLE} for name in ONE_SLOT)
    # A slot of eight weighs enough to be seen on the others; every token is changed by each control but of fixed ids.
    for name in set(PATHS) - set(WIDE) - ONE_SLOT:
        changed = _verdict(name).powers[SPREAD].changed
        assert min(changed.values()) == SMALL.tokens


def test_closing_the_fields_makes_a_wide_path_narrower() -> None:
    for name in WIDE:
        verdict = _verdict(name)
        assert verdict.closed
        assert max(verdict.closed.values()) < verdict.powers[SPREAD].width


def test_a_narrow_path_that_is_declared_wider_becomes_wide() -> None:
    narrow = _first("fused_moe.bf16")
    assert not _verdict(narrow.name).wide
    wider = replace(narrow, numerics=replace(narrow.numerics, inner_parts=16))
    assert paths.judge(wider, SMALL).wide
    assert set(paths.closed(wider, SPREAD, SMALL)) == {"inner_parts"}


def test_a_correct_result_that_the_bound_rejects_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    path, true = PATHS["gfx942 fused_moe.fp8_block, 2-32 rows"], paths.Trial.bound

    def of_other_numerics(trial: paths.Trial) -> Interval:
        return true(replace(trial, numerics=replace(path.numerics, input_codec=None, intermediate_codec=None)))

    monkeypatch.setattr(paths.Trial, "bound", of_other_numerics)
    power = paths.measure(path, SINGLE, SMALL)
    assert power.rejected == SMALL.tokens
    assert not Verdict(path, {SINGLE: power}, {}).sound


def test_a_control_that_is_missed_where_one_slot_weighs_is_counted() -> None:
    path = _first("fused_moe.bf16")
    far = replace(path, numerics=replace(path.numerics, inner_parts=120))
    power = paths.measure(far, SINGLE, SMALL)
    assert {"gate/up swapped", "W2 doubled"} <= set(power.missed)
    assert not Verdict(far, {SINGLE: power}, {}).sound


def test_both_sides_of_every_boundary_are_paths() -> None:
    by_operator = {operator: {p.arch for p in PATHS.values() if p.operator == operator} for operator in OPERATORS}
    assert by_operator["fused_moe.bf16"] == {"gfx942+gfx950"}
    assert by_operator["fused_moe.mxfp4"] == {"gfx950"}
    assert {arch for archs in by_operator.values() for arch in archs} == {"gfx942", "gfx950", "gfx942+gfx950"}
    assert all(by_operator.values())
    rows = [path.rows for path in PATHS.values() if (path.arch, path.operator) == ("gfx942", "fused_moe.fp8_block")]
    assert rows == ["1 row", "2-32 rows", "33 rows on"]


def test_numerics_that_change_where_no_boundary_is_declared_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(problem: ExpertProblem, operator: str, arch: str) -> ExpertContract:
        return replace(contract(problem, operator, arch), boundaries=())

    monkeypatch.setattr(paths, "contract", silent)
    with pytest.raises(ValueError, match="changes between 16 and 17 rows"):
        paths.declared(SMALL)


@pytest.mark.parametrize("weighting", [SPREAD, SINGLE])
def test_weights_are_what_the_weighting_says(weighting: str) -> None:
    trial = paths.draw(_first("fused_moe.bf16"), weighting, SMALL)
    weighs = trial.terms.weight != 0
    if weighting == SPREAD:
        assert bool((trial.terms.weight > 0).all())
        assert float(trial.terms.weight.max() / trial.terms.weight.min()) < 4
    else:
        assert bool((weighs.sum(1) == 1).all())
        assert bool(weighs.gather(1, trial.place).all())


def test_terms_in_another_order_or_of_weight_zero_are_no_difference() -> None:
    terms = paths.draw(_first("fused_moe.bf16"), SINGLE, SMALL).terms
    turned = paths.Terms(terms.rows, terms.rank.flip(1), terms.expert.flip(1), terms.weight.flip(1))
    assert not bool(terms.differ(turned, SMALL).any())
    assert not bool(terms.differ(replace(terms, rank=torch.where(terms.weight == 0, -1, terms.rank)), SMALL).any())
    assert bool(terms.differ(replace(terms, weight=-terms.weight), SMALL).all())
    assert bool(terms.differ(replace(terms, rows=-terms.rows), SMALL).all())
