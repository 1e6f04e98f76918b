"""What each waiver is to a run: applied, idle or stale.

A waiver that covers no cell of the run is idle if it would with other options (other EP sizes, another tier or backend)
and stale if there is no such cell at all. Idle ones are told; a stale one leaves the run incomplete, because what its
user takes for known is looked at by nobody. What being applied does not prove: that any case of these cells is covered;
the summary tells from the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accelerated.registry import backend
from conformance.suite.cells import PlannedCell
from conformance.suite.options import Options
from conformance.suite.plan import DEFAULT_EP_SIZES, make_plan
from conformance.suite.records import WaiverRecord
from conformance.suite.waivers import Waiver
from reference.catalogue import model_shapes

APPLIED, IDLE, STALE = "applied", "idle", "stale"


def waiver_states(
    options: Options, selected: Sequence[PlannedCell], yardsticks: Iterable[str] = ()
) -> tuple[WaiverRecord, ...]:
    """State of every waiver.

    Args:
        options: of the run.
        selected: what the run consists of.
        yardsticks: labels of the cells by which the others are judged; no waiver applies to them.
    """
    excepted = frozenset(yardsticks)
    return tuple(_state(waiver, options, selected, excepted) for waiver in options.waivers)


def _state(
    waiver: Waiver, options: Options, selected: Sequence[PlannedCell], yardsticks: frozenset[str]
) -> WaiverRecord:
    def record(state: str, detail: str = "", cells: int = 0) -> WaiverRecord:
        return WaiverRecord(waiver.entry, waiver.issue, waiver.reason, state, cells, detail)

    if not waiver.in_force(options):
        asked = {condition.field: getattr(options, condition.field) for condition in waiver.run.conditions}
        return record(IDLE, "not about runs with " + ", ".join(f"{name} {value}" for name, value in asked.items()))
    covered = [planned.cell.label for planned in selected if waiver.covers_cell(planned.cell)]
    able = [label for label in covered if label not in yardsticks]
    if able:
        return record(APPLIED, cells=len(able))
    if covered:
        return record(STALE, "it covers only cells by which the others are judged, which cannot be waived")
    names = (*options.backends, *options.companions)
    if not any(waiver.cell.only("backend").holds({"backend": name}.__getitem__) for name in names):
        return record(IDLE, f"not about the backends of this run, {', '.join(names)}")
    if options.tier == "replay":
        return record(IDLE, "it covers none of the recorded cases")
    if any(waiver.covers_cell(planned.cell) for tier in DEFAULT_EP_SIZES for planned in _everything(options, tier)):
        return record(IDLE, "it covers cells that these options leave out")
    return record(STALE, "it covers no cell of any tier; mend its cell table or remove it")


def _everything(options: Options, tier: str) -> tuple[PlannedCell, ...]:
    """What a tier has with the run's backends when no option leaves anything out."""
    sizes = sorted({1, 2, 4, 8, 16, 32, 64, *options.ep_sizes})
    plan = make_plan(
        [
            (name, backend(name, options.arch), name in options.companions)
            for name in (*options.backends, *options.companions)
        ],
        tier=tier,
        ep_sizes=sizes,
        kernel_types=(),
        models=tuple(model_shapes().values()),
        device=options.device,
    )
    return plan.cells
