"""Whole runs of the suite in a process of their own, as a user starts them. Proves nothing by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import conformance
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, Record, RunRecord, read_records

ROOT = Path(conformance.__file__).parents[1]
LIMIT_S = 120
#: Both kinds of kernel type, and one operator of each family.
SMALL = (
    *("--tier", "smoke", "--ep-sizes", "1,2", "--backend", "reference"),
    *("--kernel-type", "one-level", "--kernel-type", "node-levels"),
    *("--operator", "token_fn", "--operator", "rms_norm", "--operator", "fused"),
)


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    code: int
    text: str
    output: Path

    @property
    def errors(self) -> list[str]:
        """Lines of the message that ended the run."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        starts = [i for i, line in enumerate(lines) if line.startswith(("ERROR: ", "Exit: "))]
        return lines[starts[0] :] if starts else []

    @property
    def records(self) -> list[Record]:
        """Records of the only run in the output directory."""
        (directory,) = (self.output / "records").iterdir()
        return list(read_records(directory))

    @property
    def opening(self) -> RunRecord:
        (found,) = (r for r in self.records if isinstance(r, RunRecord))
        return found

    @property
    def cells(self) -> dict[str, CellRecord]:
        return {r.label: r for r in self.records if isinstance(r, CellRecord)}

    @property
    def ends(self) -> list[EndRecord]:
        return [r for r in self.records if isinstance(r, EndRecord)]

    def drawn(self) -> dict[str, list[str]]:
        """Ids of the generated cases of each cell, in order."""
        found: dict[str, list[str]] = {}
        for record in self.records:
            if isinstance(record, BeginRecord) and record.origin == "generated":
                found.setdefault(record.cell, []).append(record.case_id)
        return found


def start(
    output: Path, *arguments: str, root: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a run that writes to ``output``."""
    # The run must not take itself for a worker of the one that started it.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "conformance", "--output-dir", str(output), *arguments],
        cwd=root,
        env={**clean, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], output: Path) -> Run:
    """Wait for a run."""
    try:
        text, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        raise TimeoutError(f"the run did not end within {LIMIT_S} s:\n{text}") from None
    return Run(process.returncode, text, output)


def run(output: Path, *arguments: str, root: Path = ROOT, environment: Mapping[str, str] | None = None) -> Run:
    """Run the suite."""
    return finish(start(output, *arguments, root=root, environment=environment), output)


def record_files(output: Path) -> Iterator[Path]:
    """Record files of the workers, named after worker and process id."""
    return (output / "records").glob("*/gw*-*.jsonl")
