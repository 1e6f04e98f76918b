"""Draws depend on the suite version and the cell alone: not on workers, order, loaded modules or the place of install.

Scope: the ordered list of case ids of each cell. A pass does not prove that another Python version draws the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.selftest.suite.runs import ROOT, SMALL, run

#: A plugin that runs the cells in the opposite order.
REVERSED = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.reverse()
"""
#: Literals that Hypothesis would harvest from a module that is loaded and not in site-packages.
NOISE = "VALUES = " + repr([1000 + 7 * n for n in range(800)]) + "\n"

DRAW = """
import sys
from hypothesis import given, seed, settings
from accelerated.registry import backend
from conformance.generation import cases
from conformance.selftest.engine.helpers import cell
from conformance.suite.draws import isolate_draws

if "isolated" in sys.argv:
    isolate_draws()
if "noise" in sys.argv:
    import draw_noise
where = cell()
contract = backend(where.backend).contract(where.problem(), where.kernel_type)

@seed(1)
@settings(max_examples=150, database=None, deadline=None)
@given(case=cases(where, contract))
def one(case):
    print(case.id)

one()
"""


def drawn_by(tmp_path: Path, *words: str) -> list[str]:
    """Case ids that a fresh process draws."""
    (tmp_path / "draw_noise.py").write_text(NOISE)
    # Hypothesis keeps what it harvested in its home directory: tests may not share one.
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "-".join(("home", *words))),
    }
    command = [sys.executable, "-c", DRAW, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_loaded_module_does_not_change_the_draws(tmp_path: Path) -> None:
    assert drawn_by(tmp_path, "isolated", "noise") == drawn_by(tmp_path, "isolated")


def test_without_isolation_it_would(tmp_path: Path) -> None:
    """The control of the test above: if this fails, Hypothesis no longer harvests and the isolation can go."""
    assert drawn_by(tmp_path, "noise") != drawn_by(tmp_path)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Draws of a run without xdist."""
    done = run(tmp_path_factory.mktemp("baseline"), *SMALL)
    assert done.code == 0, done.text
    drawn = done.drawn()
    assert len(drawn) >= 8
    assert all(len(set(ids)) == len(ids) >= 2 for ids in drawn.values())
    return drawn


@pytest.mark.parametrize("workers", [2, 8])
def test_workers_do_not_change_the_draws(tmp_path: Path, baseline: dict[str, list[str]], workers: int) -> None:
    done = run(tmp_path / "out", *SMALL, "-n", str(workers))
    assert done.code == 0, done.text
    assert done.drawn() == baseline


def test_a_ci_machine_does_not_change_the_draws(tmp_path: Path, baseline: dict[str, list[str]]) -> None:
    """Hypothesis takes another profile where CI is set."""
    done = run(tmp_path / "out", *SMALL, environment={"CI": "true"})
    assert done.code == 0, done.text
    assert done.drawn() == baseline


def test_order_does_not_change_the_draws(tmp_path: Path, baseline: dict[str, list[str]]) -> None:
    (tmp_path / "reversed_order.py").write_text(REVERSED)
    done = run(tmp_path / "out", *SMALL, "-p", "reversed_order", environment={"PYTHONPATH": str(tmp_path)})
    assert done.code == 0, done.text
    drawn = done.drawn()
    assert list(drawn) == list(reversed(baseline)), "the plugin did its work"
    assert drawn == baseline


def test_another_checkout_does_not_change_the_draws(tmp_path: Path, baseline: dict[str, list[str]]) -> None:
    """A copy elsewhere that only PYTHONPATH leads to; it comes before an installed checkout."""
    copy = tmp_path / "else" / "where"
    ignored = shutil.ignore_patterns("__pycache__", "selftest")
    for part in ("reference", "accelerated", "conformance", "fixtures"):
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    # The copy tells that it was the one that ran.
    with (copy / "conformance" / "suite" / "controller.py").open("a") as module:
        module.write("\nfingerprint = lambda *_: {'copy': 'yes'}\n")
    done = run(tmp_path / "out", *SMALL, root=copy, environment={"PYTHONPATH": str(copy)})
    assert done.code == 0, done.text
    assert done.opening.fingerprint == {"copy": "yes"}
    assert done.drawn() == baseline
