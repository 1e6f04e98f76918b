"""State of a run that the pytest hooks share, and how it reaches the workers.

Nothing here outlives the pytest process; what must survive is in the records.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conformance.cases import AnyCell
from conformance.engine.world import World
from conformance.suite import controller
from conformance.suite.cells import Plan, PlannedCell
from conformance.suite.options import Options
from conformance.suite.summary import Ended


@dataclass
class RunState:
    """Options, run directory and devices of a run; plan and items follow from them."""

    options: Options
    directory: Path = Path()
    machine: controller.Machine = field(default_factory=controller.Machine)
    plan: Plan = field(default_factory=lambda: Plan((), ()))
    items: tuple[PlannedCell, ...] = ()
    replays: tuple[tuple[Path, Any], ...] = ()
    opened: bool = False
    following: AnyCell | None = None  # what this process runs next
    ended: Ended = field(default_factory=Ended)
    summary: str = ""
    world: World | None = None  # launched from outside, driven by this process
    corpus_on: tuple[str, ...] = ()  # the backends that the corpus is replayed on

    def __post_init__(self) -> None:
        # A replay's backends become those of its cases.
        self.corpus_on = self.corpus_on or self.options.backends

    def choose_items(self) -> None:
        """Work out what this run consists of."""
        if self.options.tier == "replay":
            gpus = len(self.machine.uuids) if self.options.device == "cuda" and self.machine.uuids else None
            found, left_out = controller.replayed_cases(self.options, self.corpus_on, gpus)
            self.replays = tuple(found)
            self.plan = Plan((), left_out)
            self.options = controller.options_of_replay(self.options, [case for _, case in found])
            self.items = tuple(controller.planned_for(case) for _, case in found)
            return
        self.plan = controller.plan_of(self.options)
        self.items = self.plan.cells

    @property
    def subjects(self) -> set[str]:
        """Properties that this run has cells of; a test module is named after its property."""
        return {"replay"} if self.options.tier == "replay" else {p.cell.check for p in self.plan.cells}

    def worker_input(self) -> dict[str, Any]:
        """What a worker needs besides the command line: what only the machine or the clock told the controller."""
        return {
            "ep_directory": str(self.directory),
            "ep_seed": self.options.seed,
            "ep_arch": self.options.arch,
            "ep_sizes": list(self.options.ep_sizes),
            "ep_devices": list(self.machine.uuids),
            "ep_gpus": list(self.machine.gpus),
            "ep_workers": self.options.workers,
        }

    @classmethod
    def from_worker_input(cls, options: Options, given: dict[str, Any]) -> RunState:
        """The state of a worker."""
        options = replace(
            options,
            seed=given["ep_seed"],
            arch=given["ep_arch"],
            ep_sizes=tuple(given["ep_sizes"]),
            workers=given["ep_workers"],
        )
        machine = controller.Machine(tuple(given["ep_devices"]), tuple(given["ep_gpus"]))
        return cls(options, Path(given["ep_directory"]), machine)
