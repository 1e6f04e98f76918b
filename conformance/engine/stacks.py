"""Stacks of a rank that does not answer: faulthandler on SIGUSR1, its C watchdog, py-spy where it is installed.

SIGUSR1 reaches Python and native waits; a wait that blocks signals is covered by the watchdog that the rank armed
before the case (see :mod:`conformance.rank.main`). What a stack does not show: device state.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

_DUMP_LIMIT_S = 1.0
_FRAMES = 14


def rank_stack(stack_file: Path, pid: int | None) -> str:
    """Newest stacks of a rank; asks for a fresh dump unless it is dead and ``pid`` None."""
    if pid is not None:
        before = _size(stack_file)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_LIMIT_S
        while _size(stack_file) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # let the dump finish
    text = stack_file.read_text(errors="replace") if stack_file.exists() else ""
    newest = text[text.rfind("Thread ") if "Current thread" not in text else text.rfind("Current thread") :]
    native = _py_spy(pid) if pid is not None else ""
    without = "no stack: the rank ended without leaving one" if pid is None else "no stack: the rank blocks signals"
    return "\n".join(part for part in (_trim(newest), native) if part) or without


def _trim(text: str) -> str:
    return "\n".join(text.strip().splitlines()[: _FRAMES + 1])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _py_spy(pid: int) -> str:
    """Native frames, best effort: py-spy needs ptrace permission."""
    tool = shutil.which("py-spy")
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, "dump", "--native", "--pid", str(pid)], capture_output=True, text=True, timeout=5, check=False
        )
    except subprocess.TimeoutExpired:
        return "py-spy did not answer within 5 s"
    return _trim(done.stdout) if done.returncode == 0 else ""
