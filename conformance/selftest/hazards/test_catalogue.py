"""The catalogue of hazards is whole: every switch of the double, every item of the contract's lists, every trap.

Scope: names and references. That an entry is there does not prove that its probe can tell; the other tests do.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from accelerated.standin.mori_ep.hazards import HAZARDS
from conformance.hazards.catalogue import PROBES, chosen
from conformance.hazards.probe import PLACE, undetected
from conformance.selftest.suite.runs import ROOT

#: The traps of section 7.2 of the contract, in its order, and the probes for each.
TRAPS = {
    "the default of gpu_per_node aborts below 8 ranks": {"gpu-per-node-aborts"},
    "quantisation and geometry are ignored in silence": {"codec-ignored", "dispatch-ignores-geometry"},
    "zero-copy ignores its input": {"zero-copy-ignores-input"},
    "weights in source order": {"source-layout-weights"},
    "outputs are capacity-sized": {"capacity-sized-outputs"},
    "the counter is zeroed by combine": {"combine-clears-total"},
    "reset() does nothing": {"reset-does-nothing"},
    "a routing handle without tokens": {"handle-without-tokens"},
    "int64 ids": {"int64-ids-misread"},
    "host assertions kill the process": {"host-assert-kills"},
    "operators of one kernel type share a module": {"shared-module"},
    "every rank must build": {"construction-is-collective"},
    "a stale lock": {"stale-lock-hangs"},
    "dispatch_send drops the expert count": {"send-drops-expert-count"},
}
#: What no probe looks at, and why it may be left out.
NEVER = {"standard-moe-inert", "epv2-handles-alias", "fp4-auto-tuning", "shared-module"}


def about(section: str) -> set[str]:
    """Probes of a section or an item, such as ``7.1#3`` or ``10.2c``."""
    return {name for name, probe in PROBES.items() if section in re.split(r", ", probe.reference)}


def test_every_switch_of_the_double_has_a_probe_and_nothing_else_has() -> None:
    assert set(PROBES) == set(HAZARDS) | NEVER
    assert {name for name, probe in PROBES.items() if probe.never} == NEVER


def test_the_double_and_the_catalogue_refer_to_the_same_place() -> None:
    assert {n: h.reference for n, h in HAZARDS.items()} == {n: PROBES[n].reference for n in HAZARDS}


@pytest.mark.parametrize("item", [*(f"7.1#{i}" for i in range(1, 11)), *(f"10.2{letter}" for letter in "abcd")])
def test_every_numbered_item_has_a_probe(item: str) -> None:
    assert about(item)


def test_every_trap_has_a_probe() -> None:
    assert about("7.2") == set().union(*TRAPS.values())


@pytest.mark.parametrize("name", [name for name in PROBES if name not in NEVER])
def test_an_entry_says_what_it_is_about_and_its_function_is_there(name: str) -> None:
    probe = PROBES[name]
    assert probe.text
    assert probe.seen
    assert probe.module.startswith(PLACE)
    assert getattr(importlib.import_module(probe.module), probe.function).__doc__
    assert bool(probe.death or probe.hang) <= bool(probe.harm)
    assert sum(len(part.kernel_types) for part in probe.runs) == len(probe.kernel_types)


def test_what_may_damage_the_machine_comes_last() -> None:
    harms = [probe.harm for probe in PROBES.values()]
    first = next(i for i, harm in enumerate(harms) if harm)
    assert all(harms[first:])
    assert not any(harms[:first])


def test_names_are_chosen_once_and_unknown_ones_are_refused() -> None:
    assert chosen("push-fence, weights-disagree,push-fence") == ("push-fence", "weights-disagree")
    assert chosen("all") == tuple(PROBES)
    for wrong in ("push_fence", "all,push-fence", "", " , "):
        with pytest.raises(ValueError, match="weights-disagree"):
            chosen(wrong)


def test_the_rate_that_rounds_exclude() -> None:
    for rounds in (1, 10, 100):
        assert (1 - undetected(rounds)) ** rounds == pytest.approx(0.05)


def test_the_drivers_half_imports_no_torch() -> None:
    code = "import sys; import conformance.hazards.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
