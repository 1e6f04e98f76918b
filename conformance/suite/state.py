"""State of a run that the pytest hooks share, and how it reaches the workers.

Nothing here outlives the pytest process; what must survive is in the records.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conformance.suite import controller
from conformance.suite.options import Options
from conformance.suite.plan import Plan, PlannedCell
from conformance.suite.summary import Totals


@dataclass
class RunState:
    """Options, run directory and devices of a run; plan and items follow from them."""

    options: Options
    directory: Path = Path()
    devices: tuple[str, ...] = ()
    plan: Plan = field(default_factory=lambda: Plan((), ()))
    items: tuple[PlannedCell, ...] = ()
    replays: tuple[tuple[Path, Any], ...] = ()
    lost_worker: bool = False
    opened: bool = False
    totals: Totals | None = None

    def choose_items(self) -> None:
        """Work out what this run consists of."""
        if self.options.tier == "replay":
            found = controller.replayed_cases(self.options)
            self.replays = tuple(found)
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
            "ep_devices": list(self.devices),
        }

    @classmethod
    def from_worker_input(cls, options: Options, given: dict[str, Any]) -> RunState:
        """The state of a worker."""
        options = replace(options, seed=given["ep_seed"], arch=given["ep_arch"], ep_sizes=tuple(given["ep_sizes"]))
        return cls(options, Path(given["ep_directory"]), tuple(given["ep_devices"]))
