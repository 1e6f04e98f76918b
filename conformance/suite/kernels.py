"""Before any case runs: is this the machine that was expected, and does MoRI compile its kernels on it?

Both end a run as a failure of the infrastructure. That a kernel compiles does not prove that it loads or works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from accelerated.experts import SEPARATOR
from accelerated.layer import JOIN
from accelerated.mori_ep.contract import resolve
from conformance.cases import AnyCell, Cell, LayerCell
from conformance.suite import seats
from conformance.suite.cells import Plan
from conformance.suite.options import Options
from conformance.suite.preflight import Device
from conformance.suite.waivers import in_force
from conformance.verdicts import ExitCode
from reference.catalogue import architecture


def refuse_unexpected(options: Options, devices: Sequence[Device]) -> None:
    """End the run with exit 3 on a machine other than the one that ``--expect-arch`` names, or where none can tell."""
    for finding in seats.overridden(os.environ) if options.expect_arch else ():
        pytest.exit(f"preflight: {finding.what}; {finding.remedy}", returncode=ExitCode.INFRASTRUCTURE)
    wrong = [device for device in devices if device.arch != options.expect_arch]
    if not options.expect_arch or (devices and not wrong):
        return
    seen = ", ".join(sorted({f"{device.name} ({device.arch or 'no gfx architecture'})" for device in wrong}))
    if not devices:
        seen = "no visible GPU" if options.device == "cuda" else f"the CPU, with the contract of {options.arch}"
    pytest.exit(
        f"preflight: --expect-arch is {options.expect_arch} and this is {seen}; run on such a machine, make only its "
        "GPUs visible, or leave --expect-arch out",
        returncode=ExitCode.INFRASTRUCTURE,
    )


def compile_kernels(options: Options, plan: Plan) -> None:
    """Have MoRI compile the kernels of every planned kernel type; end the run with exit 3 if one does not compile."""
    for name, reason in uncompiled_kernels(options, plan).items():
        pytest.exit(f"preflight: MoRI does not compile {name}: {reason}", returncode=ExitCode.INFRASTRUCTURE)


def mori_kernel(cell: AnyCell, arch: str) -> str | None:
    """MoRI's kernel type behind a cell; None where the real MoRI is not asked."""
    if not isinstance(cell, Cell) or cell.backend.partition(JOIN)[0] != "mori":
        return None
    problem = Cell.problem(cell) if isinstance(cell, LayerCell) else cell.problem()
    return resolve(cell.kernel_type.partition(SEPARATOR)[0], problem, architecture(arch))


def wanted_kernels(options: Options, plan: Plan) -> list[str]:
    """MoRI's kernel types that a plan launches on GPUs."""
    if options.device != "cuda":
        return []
    # What is never launched is not compiled either.
    barred = [w for w in in_force(options.waivers, options) if w.quarantine and w.whole]
    cells = [p.cell for p in plan.cells if not any(w.covers_cell(p.cell) for w in barred)]
    return sorted({name for cell in cells if (name := mori_kernel(cell, options.arch)) is not None})


def uncompiled_kernels(options: Options, plan: Plan) -> dict[str, str]:
    """Compile what a plan needs, in processes that nothing of ours kills; what does not compile, with the last words.

    MoRI's compile lock has no owner and no timeout: a rank killed while it compiles would block every later run. Ctrl-C
    does not reach the compiler either, which runs in a session of its own.
    """
    failed = {}
    for name in wanted_kernels(options, plan):
        print(f"ep-conformance: MoRI compiles {name}, which may take minutes", flush=True)
        command = [sys.executable, "-m", "accelerated.mori_ep.warmup", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode:
            failed[name] = " | ".join(done.stderr.strip().splitlines()[-4:])
    return failed
