"""The run as a whole: preflight, plan, run directory, and the exit code, in the process that started pytest.

With xdist this is the controller and the cells run in workers; without, it is the same process. What it never does:
run a case.
"""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from accelerated.contract import Standing
from accelerated.interface import Finding
from accelerated.mori_ep.launch import session_heap_bytes
from accelerated.registry import BackendError, backend
from conformance import __version__
from conformance.cases import Case, CaseError, decode
from conformance.engine.lease import core_slots
from conformance.suite import preflight
from conformance.suite.options import Options, prepare_output
from conformance.suite.plan import Plan, PlannedCell, make_plan
from conformance.suite.records import RecordWriter, RunRecord
from conformance.verdicts import ExitCode
from reference.catalogue import architectures

#: Cases worth running on every backend, whatever found them.
CORPUS = Path(__file__).parents[2] / "fixtures" / "corpus"


def fit_to_machine(options: Options) -> tuple[Options, tuple[str, ...]]:
    """Preflight; the options with what only the machine tells, and the UUIDs of the GPUs, if the ranks run on them.

    Ends the run with exit 3 and one line per finding.

    Raises:
        pytest.UsageError: the options ask for GPUs or an architecture that this machine does not have.
    """
    findings = preflight.check_torch()
    for name in (*options.backends, *options.companions):
        findings += [f for f in backend(name, options.arch).preflight(options.device) if f not in findings]
    devices: list[preflight.Device] = []
    if options.device == "cuda" and not findings:
        try:
            devices = preflight.visible_devices()
        except RuntimeError as error:
            findings.append(Finding(str(error), "make sure that torch works on this machine"))
        else:
            options = _fit_to_devices(options, devices)
            if "mori" in options.backends:
                findings += preflight.check_memory(devices, session_heap_bytes(max(options.ep_sizes)))
    findings += preflight.check_machine(max(options.ep_sizes), options.device)
    if findings:
        lines = [f"preflight: {f.what}; {f.remedy}" for f in findings]
        pytest.exit("\n".join(lines), returncode=ExitCode.INFRASTRUCTURE)
    return options, tuple(device.uuid for device in devices)


def _fit_to_devices(options: Options, devices: list[preflight.Device]) -> Options:
    """EP sizes up to the number of GPUs unless the user gave them, and the GPUs' own architecture."""
    if not devices:
        raise pytest.UsageError("--device is cuda and torch sees no GPU; make one visible or give --device cpu")
    sizes = options.ep_sizes
    if not options.ep_sizes_given:
        sizes = tuple(size for size in sizes if size <= len(devices))
    if max(sizes) > len(devices):
        raise pytest.UsageError(
            f"--ep-sizes asks for {max(sizes)} GPUs and {len(devices)} are visible; "
            f"give --ep-sizes up to {len(devices)}"
        )
    found = sorted({device.arch for device in devices if device.arch})
    if len(found) > 1:
        raise pytest.UsageError(f"the visible GPUs differ ({', '.join(found)}); make those of one architecture visible")
    arch = found[0] if found else options.arch
    if options.arch_given and arch != options.arch:
        raise pytest.UsageError(f"--arch is {options.arch} and the GPUs are {arch}; leave --arch out")
    if arch not in architectures():
        known = ", ".join(sorted(architectures()))
        raise pytest.UsageError(f"the GPUs are {arch}, for which there is no contract; known are {known}")
    return replace(options, ep_sizes=sizes, arch=arch)


def plan_of(options: Options) -> Plan:
    """The plan that follows from the options."""
    made = [(n, backend(n, options.arch), False) for n in options.backends]
    made += [(n, backend(n, options.arch), True) for n in options.companions]
    plan = make_plan(
        made,
        tier=options.tier,
        ep_sizes=options.ep_sizes,
        kernel_types=options.kernel_types,
        models=options.models,
        only_models=options.only_models,
    )
    if options.tier == "explore" and plan.cells:
        # As many cells run at a time as there are cores or device sets to lease.
        share = options.time_budget_s * (len(core_slots()) if options.device == "cpu" else 1) / len(plan.cells)
        plan = Plan(tuple(replace(cell, seconds=share) for cell in plan.cells), plan.unsupported)
    unable: dict[tuple[str, int], str] = {}
    for refused in plan.unsupported:
        # One node is asked first, and is what the user thinks of.
        unable.setdefault((refused.backend, refused.world_size), refused.reason)
    for name in options.backends:
        for size in options.ep_sizes:
            able = any(p.cell.backend == name and p.cell.world_size == size for p in plan.cells)
            if not able and options.tier != "replay":
                reason = unable.get((name, size), "it offers no such cell")
                raise pytest.UsageError(f"backend {name!r} cannot do EP {size}: {reason}; give another --ep-sizes")
    return plan


def replayed_cases(options: Options) -> list[tuple[Path, Case]]:
    """Recorded cases to run: the named files and directories, or the corpus and every stored failure.

    A case of the corpus belongs to no backend: it runs on the one under test.

    Raises:
        pytest.UsageError: a file is missing or not a case, or there is nothing to replay.
    """
    found = []
    for path in _replay_files(options):
        try:
            case = decode(path.read_bytes(), str(path))
            if CORPUS in path.parents:
                case = msgspec.structs.replace(
                    case, cell=msgspec.structs.replace(case.cell, backend=options.backends[0])
                )
            _check_replay(path, case, options)
            found.append((path, case))
        except OSError as error:
            raise pytest.UsageError(f"--replay {path} cannot be read ({error.strerror}); name a case.json") from error
        except CaseError as error:
            raise pytest.UsageError(str(error)) from error
    if not found:
        raise pytest.UsageError(f"nothing to replay: neither {CORPUS} nor {options.failures} holds a case")
    return found


def _replay_files(options: Options) -> list[Path]:
    if not options.replay:
        return sorted(CORPUS.glob("*.json")) + sorted(options.failures.glob("*/case.json"))
    return [file for path in options.replay for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def open_run(options: Options, plan: Plan, labels: tuple[str, ...], directory: Path) -> None:
    """Write the opening record of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    names = (*options.backends, *options.companions)
    writer = RecordWriter(directory / "controller.jsonl")
    writer.write(
        RunRecord(
            suite_version=__version__,
            tier=options.tier,
            backends=names,
            standins=tuple(n for n in names if backend(n, options.arch).standin),
            device=options.device,
            arch=options.arch,
            fingerprint=fingerprint(),
            planned=labels,
            unsupported=tuple(msgspec.to_builtins(vars(u)) for u in plan.unsupported),
        )
    )
    writer.close()


def fingerprint() -> dict[str, str]:
    """Versions and machine, for every run's opening record."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}
    for name in ("torch", "hypothesis", "pytest", "numpy", "amd_mori", "amd-mori-nightly"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def new_run_directory(options: Options) -> Path:
    """A directory of its own for the records of this run."""
    prepare_output(options)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = options.records / f"{stamp}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise pytest.UsageError(f"{options.records} is full of runs of this second; remove old ones")


def planned_for(case: Case) -> PlannedCell:
    """The planned cell of a replayed case; a recorded failure always gates."""
    return PlannedCell(case.cell, 1, claimed=True)


def options_of_replay(options: Options, cases: list[Case]) -> Options:
    """Options of a replay: its backends and EP sizes are those of the cases, so the banner tells what really ran."""
    names = tuple(dict.fromkeys(case.cell.backend for case in cases))
    sizes = tuple(sorted({case.cell.world_size for case in cases}))
    return replace(options, backends=names, companions=(), ep_sizes=sizes, ep_sizes_given=True)


def _check_replay(path: Path, case: Case, options: Options) -> None:
    """Whether the backend of a recorded case is to be had and takes it.

    Raises:
        pytest.UsageError: it is unknown, a stand-in where hardware is required, or refuses the case.
    """
    cell = case.cell
    try:
        made = backend(cell.backend, options.arch)
    except BackendError as error:
        raise pytest.UsageError(f"--replay {path}: {error}") from error
    if options.require_hardware and made.standin:
        raise pytest.UsageError(f"--require-hardware refuses --replay {path}: {cell.backend!r} is a stand-in")
    support = made.support(cell.problem(), cell.kernel_type)
    if support.standing is Standing.REFUSED or cell.kernel_type not in (
        *made.kernel_types,
        *getattr(made, "aliases", ()),
    ):
        reason = support.reason or f"choose one of {', '.join(made.kernel_types)}"
        raise pytest.UsageError(
            f"--replay {path}: backend {cell.backend!r} does not take kernel type {cell.kernel_type!r} with this "
            f"problem: {reason}; leave the file out"
        )
