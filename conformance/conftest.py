"""Pytest hooks of the suite: options, preflight, cells as test items, exit code, summary.

Loaded only for tests under this directory, so installing the package changes nobody else's pytest run. Torch is never
imported here or in anything imported from here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import configuration
from rich.console import Console

from conformance.engine.driver import InfraError
from conformance.hazards import command as hazard_command
from conformance.suite import capability_command, controller, launched
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import ConformanceFailure
from conformance.suite.harness import Harness, MistrustedError
from conformance.suite.kernels import compile_kernels
from conformance.suite.options import add_options, read_options
from conformance.suite.records import RecordWriter, read_records
from conformance.suite.state import RunState
from conformance.suite.summary import print_summary, total
from conformance.suite.waived import UnexpectedPassError
from conformance.verdicts import ExitCode

_HERE = Path(__file__).parent
_SELFTEST = _HERE / "selftest"
_STATE = pytest.StashKey[RunState]()
#: What a test item raises whose text is its report.
_TOLD = (ConformanceFailure, InfraError, MistrustedError, UnexpectedPassError)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Answer ``--capabilities`` or ``--hazards`` in the place of a run."""
    if config.getoption("capabilities"):
        return capability_command.run(read_options(config))
    return hazard_command.run(read_options(config)) if config.getoption("hazards") is not None else None


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
    if not _is_worker(config) and state.options.world:
        state.options, state.world = launched.gather(state.options)
        config.add_cleanup(state.world.leave)
        state.choose_items()
    if not _is_worker(config) and not config.getoption("collectonly"):
        state.options, state.machine = controller.fit_to_machine(state.options)
        state.choose_items()
        compile_kernels(state.options, state.plan)
        if state.world is not None:
            launched.compile_elsewhere(state.options, state.plan, state.world)
        state.directory = controller.new_run_directory(state.options)
    configuration.set_hypothesis_home_dir(state.options.output / "hypothesis")
    config.stash[_STATE] = state
    if not _is_worker(config):
        config.pluginmanager.register(_Reports(state))


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _STATE not in config.stash:
        return []
    options = config.stash[_STATE].options
    lines = [f"ep-conformance: tier {options.tier}, backends {', '.join((*options.backends, *options.companions))}"]
    if options.tier == "explore":
        lines.append(f"explore seed: {options.seed} (repeat with --explore-seed {options.seed})")
    return lines + [f"warning: {text}" for text in config.stash[_STATE].machine.warnings]


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
        config.stash[_STATE].ended.lost_worker = True


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
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The yardstick first, because nothing counts if it is off; then the widest cells, because they take longest.

    Cells of one width go by backend, so that pools are kept.
    """
    if _STATE not in config.stash:
        return
    options = config.stash[_STATE].options
    order = {id(item): index for index, item in enumerate(items)}

    def turn(item: pytest.Item) -> tuple[bool, int, str, int]:
        planned = _planned(item)
        if planned is None:
            return (False, 0, "", order[id(item)])
        cell = planned.cell
        return (not controller.is_yardstick(planned, options), -cell.world_size, cell.backend, order[id(item)])

    items.sort(key=turn)


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
    selected = [planned for item in session.items if (planned := _planned(item)) is not None]
    controller.open_run(state.options, selected, state.plan.unsupported, state.directory, state.machine.gpus)
    state.opened = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tell the harness what comes next: a pool on GPUs is kept only for a cell that can use it.

    Nothing runs on a launched world that is over.
    """
    if _STATE in item.config.stash:
        world = item.config.stash[_STATE].world
        if world is not None and world.ended:
            item.session.shouldfail = f"the launched world is over: {world.ended}; what follows is not run"
            return True
        planned = _planned(nextitem) if nextitem is not None else None
        item.config.stash[_STATE].following = planned.cell if planned is not None else None
    return None


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """This worker's harness."""
    state = request.config.stash[_STATE]
    worker = getattr(request.config, "workerinput", {}).get("workerid", "main")
    writer = RecordWriter(state.directory / f"{worker}-{os.getpid()}.jsonl")
    made = Harness(state.options, writer, state.machine.uuids, following=lambda: state.following, world=state.world)
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show a failure as its report, not as a traceback through Hypothesis."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, _TOLD):
        report.longrepr = str(call.excinfo.value)  # type: ignore[attr-defined]
    planned = _planned(item)
    report.ep_cell = planned.cell.label if planned else ""  # type: ignore[attr-defined]  # travels with the report
    return report


class _Reports:
    """Notes what failed, in the process that started pytest: records alone do not tell of what wrote none."""

    def __init__(self, state: RunState) -> None:
        self._failed = state.ended.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.setdefault(report.nodeid, getattr(report, "ep_cell", ""))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed.setdefault(report.nodeid or "the collection", "")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if _STATE not in config.stash or _is_worker(config) or config.getoption("collectonly"):
        return
    if exitstatus in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        return
    state = config.stash[_STATE]
    state.ended.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    text = io.StringIO()
    try:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        width = terminal._tw.fullwidth if terminal else 0
        totals = total(read_records(state.directory), state.ended)
        print_summary(totals, Console(file=text, width=max(width, 100), no_color=True, highlight=False))
        session.exitstatus = totals.exit_code
    except Exception as error:  # noqa: BLE001  Python's own exit code would say that the product failed
        text.write(f"INFRA: the records cannot be totalled: {type(error).__name__}: {error}\n")
        session.exitstatus = ExitCode.INFRASTRUCTURE
    state.summary = f"{text.getvalue()}records: {state.directory}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = config.stash.get(_STATE, None)
    if state is not None and state.summary:
        terminalreporter.section("conformance")
        terminalreporter.write_line(state.summary)
