"""The run as a whole: preflight, plan, run directory, and the exit code, in the process that started pytest.

With xdist this is the controller and the cells run in workers; without, it is the same process. What it never does:
run a case.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from accelerated.contract import Standing, exchange
from accelerated.interface import Backend, Finding
from accelerated.layer import halves_of
from accelerated.mori_ep.backend import torch_builds
from accelerated.mori_ep.launch import session_heap_bytes
from accelerated.mori_ep.library import probe_mori
from accelerated.operators import Family, operators_of
from accelerated.registry import BackendError, backend
from conformance import __version__, sequence_rules
from conformance.case_files import decode
from conformance.cases import AnyCase, AnyCell, CaseError, GraphCase, LayerCase, LayerCell, SequenceCase
from conformance.engine.lease import core_slots
from conformance.layer_pairs import misfit
from conformance.row_cases import RowCase, RowCell
from conformance.suite import graph_plan, kinds, launched, preflight
from conformance.suite.cells import Plan, PlannedCell, Unsupported
from conformance.suite.kernels import refuse_unexpected
from conformance.suite.options import Options, prepare_output
from conformance.suite.plan import make_plan
from conformance.suite.records import RecordWriter, RunRecord
from conformance.suite.seats import facts, mismatches, overrides, sources
from conformance.suite.waiver_state import waiver_states
from conformance.verdicts import ExitCode
from reference.catalogue import architectures

#: Cases worth running on every backend, whatever found them.
CORPUS = Path(__file__).parents[2] / "fixtures" / "corpus"
#: Environment variables that choose among the machine's GPUs.
VISIBLE_DEVICES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Machine:
    """What only this machine tells: the GPUs the ranks run on, if they do, and what may matter and stops no run."""

    uuids: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()  # readable, for the records
    warnings: tuple[str, ...] = ()


def fit_to_machine(options: Options) -> tuple[Options, Machine]:
    """Preflight; the options with what only the machine tells.

    Ends the run with exit 3 and one line per finding.

    Raises:
        pytest.UsageError: the options ask for GPUs or an architecture that this machine does not have.
    """
    findings = preflight.check_torch()
    made = [backend(name, options.arch) for name in (*options.backends, *options.companions)]
    for each in made:
        findings += [f for f in each.preflight(options.device) if f not in findings]
    mori = any(half.name == "mori" and not half.standin for each in made for half in halves_of(each))
    devices: list[preflight.Device] = []
    if options.device != "cuda":
        refuse_unexpected(options, devices)
    if options.device == "cuda" and not findings:
        try:
            devices = preflight.visible_devices()
        except RuntimeError as error:
            findings.append(Finding(str(error), "make sure that torch works on this machine"))
        else:
            refuse_unexpected(options, devices)
            options = _fit_to_devices(options, devices)
            if mori:
                findings += preflight.check_memory(devices, session_heap_bytes(_ranks(options, devices)))
    if mori:
        hosts = len(options.launched.hosts) if options.launched is not None else 1
        findings += preflight.check_rdma(options.transport, hosts)
    if mori and not probe_mori():
        # Whatever else is wrong: a library that does not import is told in its own words.
        findings += preflight.check_mori(next((d.arch for d in devices), ""))
    findings += preflight.check_machine(_ranks(options, devices), options.device, mori=mori)
    if options.launched is not None:
        findings += mismatches(
            options.launched.seats,
            devices,
            fingerprint(),
            cuda=options.device == "cuda",
            expect_arch=options.expect_arch,
            heap_bytes=session_heap_bytes(options.launched.ranks) if mori else 0,
        )
    if findings:
        lines = [f"preflight: {f.what}; {f.remedy}" for f in findings]
        pytest.exit("\n".join(lines), returncode=ExitCode.INFRASTRUCTURE)
    return options, Machine(
        uuids=tuple(device.uuid for device in devices),
        gpus=tuple(f"{device.name} {device.arch}".strip() for device in devices),
        warnings=tuple(preflight.warnings(options.device, mori=mori)),
    )


def _ranks(options: Options, devices: Sequence[preflight.Device]) -> int:
    """Most ranks of a case; what is wider than the machine does not run."""
    if options.launched is not None:
        return options.launched.ranks
    return min(max(options.ep_sizes), len(devices)) if devices else max(options.ep_sizes)


def _fit_to_devices(options: Options, devices: list[preflight.Device]) -> Options:
    """EP sizes up to the number of GPUs unless the user gave them, and the GPUs' own architecture."""
    if not devices:
        raise pytest.UsageError("--device is cuda and torch sees no GPU; make one visible or give --device cpu")
    sizes = options.ep_sizes
    if not options.ep_sizes_given and options.launched is None:
        sizes = tuple(size for size in sizes if size <= len(devices))
    # The cases of a replay are looked at one by one.
    if options.tier != "replay" and options.launched is None and max(sizes) > len(devices):
        raise pytest.UsageError(
            f"--ep-sizes asks for {max(sizes)} GPUs and {len(devices)} are visible; "
            f"give --ep-sizes up to {len(devices)}"
        )
    found = sorted({device.arch for device in devices if device.arch.startswith("gfx")})
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
        operators=options.operators,
        models=options.models,
        only_models=options.only_models,
        device=options.device,
        launched_nodes=options.launched.nodes if options.launched is not None else 0,
    )
    if options.tier == "explore" and plan.cells:
        # As many cells run at a time as there are workers with a core, or device sets, to lease.
        at_a_time = min(len(core_slots()), options.workers) if options.device == "cpu" else 1
        share = options.time_budget_s * at_a_time / len(plan.cells)
        plan = Plan(tuple(replace(cell, seconds=share) for cell in plan.cells), plan.unsupported)
    if options.tier != "replay":
        _check_sizes(options, plan)
        plan = launched.kept(plan, options)
    return plan


def _check_sizes(options: Options, plan: Plan) -> None:
    """Whether a backend under test can do the EP sizes that the user gave; of the default ones, any will do.

    Raises:
        pytest.UsageError: it cannot.
    """
    unable: dict[tuple[str, int], str] = {}
    for refused in plan.unsupported:
        # One node is asked first, and is what the user thinks of.
        unable.setdefault((refused.backend, refused.world_size), refused.reason)
    mine = [p.cell for p in plan.cells if p.cell.backend in options.backends]
    able = {cell.world_size for cell in mine}
    local = bool(mine) and all(_is_local(cell) for cell in mine)
    missing = [size for size in options.ep_sizes if size not in able]
    if local and missing and not any((name, missing[0]) in unable for name in options.backends):
        return  # local operators have no EP size
    if missing and (options.ep_sizes_given or not able):
        name = next((n for n in options.backends if (n, missing[0]) in unable), options.backends[0])
        reason = unable.get((name, missing[0]), "it offers no such cell")
        raise pytest.UsageError(f"backend {name!r} cannot do EP {missing[0]}: {reason}; give another --ep-sizes")


def _is_local(cell: AnyCell) -> bool:
    """Whether one process plays every rank."""
    if isinstance(cell, LayerCell):
        return not cell.whole
    return isinstance(cell, RowCell) and cell.family is not Family.ALLREDUCE_NORM


def replayed_cases(
    options: Options, subjects: Sequence[str], gpus: int | None = None
) -> tuple[list[tuple[Path, AnyCase]], tuple[Unsupported, ...]]:
    """Recorded cases to run: the named files and directories, or the corpus and every stored failure.

    A case of the corpus belongs to no backend: it runs on the first one under test that takes it. What was not named as
    a file and cannot run here is left out and told.

    Args:
        options: options of the run.
        subjects: backends that the corpus runs on.
        gpus: number of visible GPUs; None if the ranks run on the CPU or it is not known yet.

    Raises:
        pytest.UsageError: a file is missing or not a case, a named one cannot run here, or there is nothing to replay.
    """
    found = []
    left_out: list[Unsupported] = []
    for path in _replay_files(options):
        try:
            case = decode(path.read_bytes(), str(path))
        except OSError as error:
            raise pytest.UsageError(f"--replay {path} cannot be read ({error.strerror}); name a case.json") from error
        except CaseError as error:
            raise pytest.UsageError(str(error)) from error
        if CORPUS in path.parents:
            case = _rebound(case, subjects, options)
        reason = _refusal(case, options, gpus)
        if not reason:
            found.append((path, case))
        elif path in options.replay:
            raise pytest.UsageError(f"--replay {path}: {reason}; leave the file out")
        else:
            cell = case.cell
            told = f"{path.name if CORPUS in path.parents else path}: {reason}"
            left_out.append(Unsupported(cell.backend, cell.kernel_type, cell.world_size, cell.nodes, told))
    if not found:
        places = ", ".join(map(str, options.replay)) or f"neither {CORPUS} nor {options.failures}"
        reason = f"left out: {left_out[0].reason}" if left_out else f"{places} holds a case"
        if options.replay and not left_out:
            reason = f"no *.json in {places}"
        raise pytest.UsageError(f"nothing to replay: {reason}; name a case.json of this backend with --replay")
    return found, tuple(left_out)


def _rebound(case: AnyCase, subjects: Sequence[str], options: Options) -> AnyCase:
    """The case on the first backend that takes it, or on the first."""
    on = [_on(case, name) for name in subjects]
    return next((one for one in on if not _refusal(one, options, None)), on[0])


def _on(case: AnyCase, name: str) -> AnyCase:
    if isinstance(case, RowCase):
        return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, backend=name))
    return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, backend=name))


def _replay_files(options: Options) -> list[Path]:
    if not options.replay:
        return sorted(CORPUS.glob("*.json")) + sorted(options.failures.glob("*/case.json"))
    return [file for path in options.replay for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def is_yardstick(planned: PlannedCell, options: Options) -> bool:
    """Whether the other backends of the run are judged by this cell's: if it is off, nothing is known of them."""
    return planned.companion and backend(planned.cell.backend, options.arch).judged_by == "oracle"


def open_run(
    options: Options,
    selected: Sequence[PlannedCell],
    unsupported: Sequence[Unsupported],
    directory: Path,
    gpus: Sequence[str] = (),
) -> None:
    """Write the opening record of a run."""
    yardsticks = tuple(p.cell.label for p in selected if is_yardstick(p, options))
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
            fingerprint=fingerprint(gpus) | facts(options.launched.seats if options.launched else ()),
            planned=tuple(p.cell.label for p in selected),
            unsupported=tuple(msgspec.to_builtins(vars(u)) for u in unsupported),
            unclaimed=tuple(p.cell.label for p in selected if not p.claimed),
            yardsticks=yardsticks,
            caveats=_caveats(names, options),
            transport=options.transport,
            world=f"{options.launched.text}: {', '.join(options.launched.hosts)}" if options.launched else "",
            waivers=waiver_states(options, selected, yardsticks),
        )
    )
    writer.close()


def _caveats(names: Sequence[str], options: Options) -> tuple[str, ...]:
    """What backends say about their own results off their hardware."""
    said = ((name, kinds.caveat(backend(name, options.arch), options.device)) for name in names)
    return tuple(f"{name}: {text}" for name, text in said if text)


def fingerprint(gpus: Sequence[str] = ()) -> dict[str, str]:
    """Versions, machine and environment, for every run's opening record."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}
    found |= {"sources": sources(), **overrides(os.environ)}
    for name in ("torch", "hypothesis", "pytest", "numpy", "amd_mori", "amd-mori-nightly", "amd-aiter", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    found.update({f"torch.{name}": version for name, version in torch_builds().items() if version})
    found.update({f"gpu{index}": gpu for index, gpu in enumerate(gpus)})
    for name, value in sorted(os.environ.items()):
        if name.startswith(("MORI_", "AITER_", "EP_AITER_", "STANDIN_")) or name in VISIBLE_DEVICES:
            found[name] = value
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


def planned_for(case: AnyCase) -> PlannedCell:
    """The planned cell of a replayed case; a recorded failure always gates."""
    return PlannedCell(case.cell, 1, claimed=True)


def options_of_replay(options: Options, cases: list[AnyCase]) -> Options:
    """Options of a replay: its backends and EP sizes are those of the cases, so the banner tells what really ran."""
    names = tuple(dict.fromkeys(case.cell.backend for case in cases))
    sizes = tuple(sorted({case.cell.world_size for case in cases}))
    return replace(options, backends=names, companions=(), ep_sizes=sizes, ep_sizes_given=True)


def _refusal(case: AnyCase, options: Options, gpus: int | None) -> str:
    """Why a recorded case cannot run here; empty if it can."""
    cell = case.cell
    try:
        made = backend(cell.backend, options.arch)
    except BackendError as error:
        return str(error)
    if options.require_hardware and made.standin:
        return f"--require-hardware refuses the stand-in {cell.backend!r}"
    support = made.support(cell.problem(), cell.kernel_type)
    rows = (name for family in operators_of(made).values() for name in family)
    offered = (*made.kernel_types, *getattr(made, "aliases", ()), *rows)
    if support.standing is Standing.REFUSED or cell.kernel_type not in offered:
        reason = support.reason or f"choose one of {', '.join(made.kernel_types)}"
        return f"backend {cell.backend!r} does not take kernel type {cell.kernel_type!r} with this problem: {reason}"
    if options.launched is not None and (reason := launched.misfit(cell.world_size, cell.nodes, options.launched)):
        return reason
    if options.launched is None and gpus is not None and cell.world_size > gpus:
        return f"the case needs {cell.world_size} GPUs and {gpus} are visible"
    reason = ""
    if isinstance(case, SequenceCase):
        reason = sequence_rules.misfit(case, made)
    elif isinstance(case, GraphCase):
        reason = graph_plan.refusal(case, made, options.device)
    elif isinstance(cell, LayerCell) and cell.router:
        support = made.support(cell.route_problem(), cell.router)
        if support.standing is Standing.REFUSED:
            reason = f"backend {cell.backend!r} does not take router {cell.router!r}: {support.reason}"
    if not reason and isinstance(cell, LayerCell) and cell.against:
        reason = _apart(cell, made, options)
    if not reason and (untaken := _untaken(case, made, options.arch)):
        # What would happen is undefined, and no failure of the backend.
        reason = f"the contract of backend {cell.backend!r} for this cell does not take {untaken}"
    return reason


def _untaken(case: AnyCase, made: Backend, arch: str) -> str:
    """What of a case its cell's contract does not take; empty if it takes all."""
    if not isinstance(case, RowCase | LayerCase):
        contract = exchange(made.contract(case.cell.problem(), case.cell.kernel_type))
        if not contract.idle_ranks and any(0 in counts for counts in case.token_counts()):
            return "a rank without a token; give every rank one in every round"
        if not contract.narrow_rows and any(a_round.hidden for a_round in case.rounds):
            return "rows shorter than the cell's; make hidden 0 in every round"
    return "" if kinds.legal(made, case, arch) else "masked slots, duplicates, counts or lengths that the case has"


def _apart(cell: LayerCell, made: Backend, options: Options) -> str:
    """Why a layer cannot be compared with what its case names; empty if it can."""
    try:
        reason = misfit(cell, made, backend(cell.against, options.arch))
    except BackendError as error:
        reason = str(error)
    return f"outputs of {cell.against}, {cell.against_type}: {reason}" if reason else ""
