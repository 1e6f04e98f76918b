"""One failure: what the user reads, what is stored, and the two commands that show it again.

A failure's directory holds ``case.json`` (the minimum), ``original.json``, ``report.txt``, ``reproduce.py`` (a torchrun
script that needs nothing from the suite's engine) and the stacks of ranks that did not answer. What a report does not
claim: that the minimum is global; no single reduction step makes it smaller.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from accelerated.mori_ep import transports
from conformance.cases import AnyCase, SequenceCase, encode
from conformance.engine.driver import Outcome
from conformance.row_cases import RowCase
from conformance.suite.describe import describe
from conformance.suite.reproduce import script
from conformance.suite.reproduce_rows import row_files
from conformance.verdicts import Verdict

STANDIN_MARK = "STAND-IN: a software double, no AMD hardware was tested"
DEFAULT_ARCH = "gfx942"
_ENTRY = 'if __name__ == "__main__":'


@dataclass
class Failure:
    """A product failure, reduced and confirmed."""

    backend: str
    standin: bool
    original: AnyCase
    minimal: AnyCase
    outcome: Outcome
    reproduced: bool = False
    failed: int = 1  # of so many runs of the original, the first included
    repeats: int = 1
    tried: int = 0
    exhausted: bool = False
    cut_short: str = ""  # what stopped the analysis, if the harness or the machine failed meanwhile
    directory: Path = Path()
    device: str = "cpu"
    arch: str = DEFAULT_ARCH
    caveat: str = ""  # what the backend says about its own results off its hardware
    transport: str = ""  # of MoRI's puts within a host, where it is not the default
    world: str = ""  # address of the launched world that it happened on
    nodes: int = 1  # of the launched world

    @property
    def verdict(self) -> Verdict:
        return self.outcome.verdict

    @property
    def headline(self) -> str:
        """Verdict, check, and where."""
        cell = self.minimal.cell
        nodes = f", {cell.nodes} nodes" if cell.nodes > 1 else ""
        nodes += f", transport {self.transport}" if self.transport else ""
        return (
            f"{self.verdict.value} {self.outcome.check}: {self.backend} {cell.kernel_type} EP {cell.world_size}{nodes}"
        )

    def report(self) -> str:
        """The text a user reads; stable apart from the paths, stacks and rates."""
        lines = [self.headline]
        if self.standin:
            lines.append(STANDIN_MARK)
        if self.caveat:
            lines.append(self.caveat)
        lines += ["", *describe(self.minimal), "", *self.outcome.text.rstrip().splitlines()]
        lines += ["", self._history(), ""]
        for rank, stack in sorted(self.outcome.stacks.items()):
            lines += [f"rank {rank}, in {self.outcome.phases.get(rank, 'unknown')}:", *_indent(stack), ""]
        case_file = shlex.quote(str(self.directory / "case.json"))
        reproduce = shlex.quote(str(self.directory / "reproduce.py"))
        world_size = self.minimal.cell.world_size
        options = f" --device {self.device}" if self.device != "cpu" else ""
        options += f" --arch {self.arch}" if self.arch != DEFAULT_ARCH else ""
        options += f" --transport {self.transport}" if self.transport else ""
        options += f" --world {self.world}" if self.world else ""
        lines.append(f"replay:      pytest conformance --replay {case_file}{options}")
        started = f"--standalone --nproc-per-node {world_size}"
        if self.world:
            started = f"--nnodes {self.nodes} --nproc-per-node {world_size // self.nodes} --rdzv-endpoint HOST:PORT"
        lines.append(f"stand-alone: torchrun {started} {reproduce}")
        if self.world:
            agents = f"torchrun with -m conformance.agent {self.world} in the place of the script"
            lines.append(f"The stand-alone command is for every node; so is, beside the replay, {agents}.")
        return "\n".join(lines)

    def _history(self) -> str:
        text = f"failed {self.failed} of {self.repeats} runs of case {self.original.id}"
        if self.minimal != self.original:
            before = self.original.cell.world_size
            unit = "calls" if isinstance(self.original, RowCase) else "rounds"
            unit = "steps" if isinstance(self.original, SequenceCase) else unit
            text += (
                f" ({before} ranks, {self.original.steps} {unit}, {self.original.tokens} tokens); "
                f"reduced in {self.tried} candidates"
            )
        if self.exhausted:
            text += ", stopped by the reduction budget"
        if self.cut_short:
            text += f"; the analysis was cut short: {self.cut_short}"
        elif not self.reproduced:
            text += "; the minimal case did not fail again on a fresh pool"
        return text

    def store(self, parent: Path) -> None:
        """Write the failure's directory."""
        self.directory = parent / f"{self.minimal.id}-{self.outcome.check.replace('/', '_')}"
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "case.json").write_bytes(encode(self.minimal))
        (self.directory / "original.json").write_bytes(encode(self.original))
        if isinstance(self.minimal, RowCase):
            for name, content in row_files(self.minimal, self.device, self.arch, self.outcome.check).items():
                (self.directory / name).write_bytes(content)
        else:
            self._store_script(script(self.minimal, self.device, self.arch))
        for rank, stack in self.outcome.stacks.items():
            (self.directory / f"stack-rank{rank}.txt").write_text(stack)
        (self.directory / "report.txt").write_text(self.report() + "\n")

    def _store_script(self, text: str) -> None:
        """Write the stand-alone script, with the environment that chooses the transport."""
        if self.transport:
            chosen = dict(transports.TRANSPORTS[self.transport])
            before, mark, after = text.rpartition(_ENTRY)
            assert mark, "the script has no entry point"
            text = f"{before}# Transport {self.transport}; read when the library initialises.\n"
            text += f"os.environ.update({chosen!r})\n\n{mark}{after}"
        (self.directory / "reproduce.py").write_text(text)


class ConformanceFailure(AssertionError):
    """The product failed a check."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.report())
        self.failure = failure


_types: dict[tuple[Verdict, str], type[ConformanceFailure]] = {}


def failure_type(failure: Failure) -> type[ConformanceFailure]:
    """One exception type per (verdict, check), so that one failure cannot pass for another."""
    key = failure.outcome.key
    if key not in _types:
        name = f"{key[0].value}_{key[1].replace('.', '_')}"
        _types[key] = type(name, (ConformanceFailure,), {"__doc__": f"{key[0].value} of {key[1]}."})
    return _types[key]


def _indent(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]
