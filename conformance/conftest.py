"""Pytest hooks of the suite: options, preflight, cells as test items, exit code, summary.

Loaded only for tests under this directory, so installing the package changes nobody else's pytest run. Torch is never
imported here or in anything imported from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import configuration
from rich.console import Console

from conformance.engine.driver import InfraError
from conformance.suite import controller
from conformance.suite.failure import ConformanceFailure
from conformance.suite.harness import Harness, MistrustedError
from conformance.suite.options import add_options, read_options
from conformance.suite.plan import PlannedCell
from conformance.suite.records import RecordWriter, read_records
from conformance.suite.state import RunState
from conformance.suite.summary import print_summary, total
from conformance.verdicts import ExitCode

_HERE = Path(__file__).parent
_SELFTEST = _HERE / "selftest"
_STATE = pytest.StashKey[RunState]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The selftests judge the harness, not the product: they run only when asked for by path."""
    state = config.stash.get(_STATE, None)
    if state is not None and collection_path.parent == _HERE and collection_path.name.startswith("test_"):
        # A module without cells would only add a skip.
        subject = collection_path.stem.removeprefix("test_")
        return None if subject in state.subjects else True
    if collection_path != _SELFTEST:
        return None
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    return None if any(path == _SELFTEST or _SELFTEST in path.parents for path in asked) else True


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _only_selftests(config: pytest.Config) -> bool:
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    return all(path == _SELFTEST or _SELFTEST in path.parents for path in asked)


def pytest_configure(config: pytest.Config) -> None:
    if _only_selftests(config):
        return
    if _is_worker(config):
        state = RunState.from_worker_input(read_options(config), config.workerinput)  # type: ignore[attr-defined]
    else:
        state = RunState(read_options(config))
    # Wrong arguments are told before a machine is looked at.
    state.choose_items()
    if not _is_worker(config) and not config.getoption("collectonly"):
        state.options, state.devices = controller.fit_to_machine(state.options)
        state.choose_items()
        state.directory = controller.new_run_directory(state.options)
    configuration.set_hypothesis_home_dir(state.options.output / "hypothesis")
    config.stash[_STATE] = state


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _STATE not in config.stash:
        return []
    options = config.stash[_STATE].options
    lines = [f"ep-conformance: tier {options.tier}, backends {', '.join((*options.backends, *options.companions))}"]
    if options.tier == "explore":
        lines.append(f"explore seed: {options.seed} (repeat with --explore-seed {options.seed})")
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Hand the run directory, seed and devices to an xdist worker."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    if _STATE in config.stash:
        node.workerinput.update(config.stash[_STATE].worker_input())  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """A worker that goes down with an error is lost: the run is not to be trusted as complete."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    if error and _STATE in config.stash:
        config.stash[_STATE].lost_worker = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    state = metafunc.config.stash.get(_STATE, None)
    if state is not None and "recorded" in metafunc.fixturenames:
        recorded = [(*pair, planned) for pair, planned in zip(state.replays, state.items, strict=True)]
        metafunc.parametrize("recorded", recorded, ids=[case.id for _, case, _ in recorded])
    if state is None or "planned" not in metafunc.fixturenames:
        return
    check = metafunc.module.CHECK
    cells = [p for p in state.plan.cells if p.cell.check == check]
    metafunc.parametrize("planned", cells, ids=[p.cell.label for p in cells])


def _planned(item: pytest.Item) -> PlannedCell | None:
    """The cell of a test item."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "recorded" in parameters:
        parameters = {"planned": parameters["recorded"][2]}
    planned = parameters.get("planned")
    return planned if isinstance(planned, PlannedCell) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Widest cells first, so that a run does not end on the slowest; then by backend, so that pools are kept."""
    order = {id(item): index for index, item in enumerate(items)}

    def width(item: pytest.Item) -> tuple[int, str, int]:
        planned = _planned(item)
        return (
            (-planned.cell.world_size, planned.cell.backend, order[id(item)]) if planned else (0, "", order[id(item)])
        )

    items.sort(key=width)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Open the run: with xdist, worker gw0 knows what was selected; without, this process does."""
    config = session.config
    if _STATE not in config.stash or config.getoption("collectonly"):
        return
    state = config.stash[_STATE]
    worker = getattr(config, "workerinput", {}).get("workerid", "gw0")
    distributed = not _is_worker(config) and bool(config.getoption("numprocesses", None))
    if worker != "gw0" or distributed or state.opened:
        return
    labels = [planned.cell.label for item in session.items if (planned := _planned(item)) is not None]
    controller.open_run(state.options, state.plan, tuple(labels), state.directory)
    state.opened = True


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """This worker's harness."""
    state = request.config.stash[_STATE]
    worker = getattr(request.config, "workerinput", {}).get("workerid", "main")
    made = Harness(state.options, RecordWriter(state.directory / f"{worker}-{os.getpid()}.jsonl"), state.devices)
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show a failure as its report, not as a traceback through Hypothesis."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, ConformanceFailure | InfraError | MistrustedError):
        report.longrepr = str(call.excinfo.value)  # type: ignore[attr-defined]
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if _STATE not in config.stash or _is_worker(config) or config.getoption("collectonly"):
        return
    state = config.stash[_STATE]
    if exitstatus in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        return
    state.totals = total(read_records(state.directory), lost_worker=state.lost_worker)
    code = state.totals.exit_code
    if exitstatus == pytest.ExitCode.INTERRUPTED and code is ExitCode.OK:
        code = ExitCode.INCOMPLETE
    # A test that failed without a cell record is a defect of the harness.
    if exitstatus == pytest.ExitCode.TESTS_FAILED and code is ExitCode.OK:
        code = ExitCode.INFRASTRUCTURE
    session.exitstatus = code


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = config.stash.get(_STATE, None)
    if state is None or state.totals is None:
        return
    terminalreporter.section("conformance")
    width = terminalreporter._tw.fullwidth
    console = Console(file=terminalreporter._tw._file, width=max(width, 100), no_color=True, highlight=False)
    print_summary(state.totals, console)
    console.print(f"records: {state.directory}", soft_wrap=True)
