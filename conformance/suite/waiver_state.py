"""What each waiver is to a run: applied, idle or stale.

A waiver that covers no cell of the run is idle if it would with other options (other EP sizes, another tier or backend,
a launched world, another device or architecture) and stale if there is no such cell at all. Idle ones are told; a stale
one leaves the run incomplete, because what its user takes for known is looked at by nobody. What being applied does not
prove: that any case of these cells is covered; the summary tells from the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from accelerated.layer import JOIN
from accelerated.mori_ep.backend import HOSTS_VARIABLE
from accelerated.registry import backend
from conformance.cases import AnyCell
from conformance.suite.cells import PlannedCell
from conformance.suite.options import Options
from conformance.suite.plan import DEFAULT_EP_SIZES, HOST_RANKS, make_plan
from conformance.suite.predicates import Range
from conformance.suite.records import WaiverRecord
from conformance.suite.waivers import Waiver
from reference.catalogue import architectures, model_shapes

APPLIED, IDLE, STALE = "applied", "idle", "stale"
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_DEVICES = ("cpu", "cuda")


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
        barred = options.launched is not None and waiver.ends_world
        return record(APPLIED, "quarantined on a launched world" if barred else "", len(able))
    if covered:
        return record(STALE, "it covers only cells by which the others are judged, which cannot be waived")
    names = (*options.backends, *options.companions)
    if not any(waiver.cell.only("backend").holds({"backend": name}.__getitem__) for name in names):
        return record(IDLE, f"not about the backends of this run, {', '.join(names)}")
    if options.tier == "replay":
        return record(IDLE, "it covers none of the recorded cases")
    where = _elsewhere(waiver, options)
    if where:
        return record(IDLE, f"it covers cells {where}")
    return record(STALE, "it covers no cell of any tier; mend its cell table or remove it")


@dataclass(frozen=True)
class _Setting:
    """What decides on the cells that there are, when no option leaves anything out."""

    backends: tuple[str, ...]
    companions: frozenset[str]
    arch: str
    device: str
    ep_sizes: tuple[int, ...]
    nodes: int = 0  # of a launched world
    hosts: int = 0  # that it has; 0: as many as this run
    kernel_types: tuple[str, ...] = ()


def _elsewhere(waiver: Waiver, options: Options) -> str:
    """Where the cells of a waiver are that covers none of this run; empty if there are none."""
    names = (*options.backends, *options.companions)
    nodes = options.launched.nodes if options.launched is not None else 0
    sizes = tuple(sorted({*_SIZES, *options.ep_sizes, *_named_sizes(waiver)}))
    here = _Setting(names, frozenset(options.companions), options.arch, options.device, sizes, nodes)
    # Vendor names of kernel types are planned only where they are asked for.
    aliases = {alias for name in names for alias in getattr(backend(name, options.arch), "aliases", ())}
    if _covers(waiver, here) or (aliases and _covers(waiver, replace(here, kernel_types=tuple(sorted(aliases))))):
        return "that these options leave out"
    mine = [name for name in names if waiver.cell.only("backend").holds({"backend": name}.__getitem__)]
    if not any(JOIN in name for name in mine):  # layers are paired with those of other backends
        here = replace(here, backends=tuple(mine))
    for world_size, count in _worlds(waiver, sizes):
        if _covers(waiver, replace(here, ep_sizes=(world_size,), nodes=count, hosts=count)):
            return f"of a launched world of {world_size} ranks on {count} nodes"
    real = any(not backend(name, options.arch).standin for name in mine)
    if real and _covers(waiver, replace(here, hosts=max(sizes) // HOST_RANKS)):
        return "of a launched world of several hosts"
    for fact, values in (("device", _DEVICES), ("arch", sorted(architectures()))):
        asked = waiver.run.only(fact)
        others = [v for v in values if v != getattr(options, fact) and asked.holds({fact: v}.__getitem__)]
        found = [v for v in others if _covers(waiver, replace(here, **{fact: v}))]  # type: ignore[arg-type]
        if found:
            wanted = f"'{found[0]}'" if len(found) == 1 else str(found)
            return f"of runs with {fact} {' or '.join(found)} only; add run = {{ {fact} = {wanted} }}"
    return ""


def _named_sizes(waiver: Waiver) -> Iterator[int]:
    """EP sizes that a waiver names, and those at which eight ranks share each node of a number that it names."""
    for field, factor in (("world_size", 1), ("nodes", HOST_RANKS)):
        for wanted in (wanted for c in waiver.cell.only(field).conditions for wanted in c.wanted):
            for one in (wanted.low, wanted.high) if isinstance(wanted, Range) else (wanted,):
                if isinstance(one, int) and 1 <= one * factor <= max(_SIZES):
                    yield one * factor


def _worlds(waiver: Waiver, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Launched worlds that a waiver is about, if it says something of nodes: ranks and nodes."""
    nodes, labels = waiver.cell.only("nodes"), waiver.cell.only("label").conditions
    named = [str(wanted) for condition in labels for wanted in condition.wanted]
    for size in sizes:
        if not waiver.cell.only("world_size").holds({"world_size": size}.__getitem__):
            continue
        for count in (count for count in range(2, size + 1) if size % count == 0):
            said = bool(nodes.conditions) and nodes.holds({"nodes": count}.__getitem__)
            if said or any(f"{count}nodes" in label for label in named):
                yield size, count


def _covers(waiver: Waiver, setting: _Setting) -> bool:
    return any(waiver.covers_cell(cell) for tier in DEFAULT_EP_SIZES for cell in _everything(setting, tier))


@lru_cache(maxsize=64)
def _everything(setting: _Setting, tier: str) -> tuple[AnyCell, ...]:
    """What a tier has."""
    with _on_hosts(setting.hosts):
        plan = make_plan(
            [(name, backend(name, setting.arch), name in setting.companions) for name in setting.backends],
            tier=tier,
            ep_sizes=setting.ep_sizes,
            kernel_types=setting.kernel_types,
            models=tuple(model_shapes().values()),
            device=setting.device,
            launched_nodes=setting.nodes,
        )
    return tuple(planned.cell for planned in plan.cells)


@contextmanager
def _on_hosts(hosts: int) -> Iterator[None]:
    """Have a real library take its ranks for spread over so many hosts, of which it asks the environment."""
    before = os.environ.get(HOSTS_VARIABLE)
    try:
        if hosts:
            os.environ[HOSTS_VARIABLE] = str(hosts)
        yield
    finally:
        if before is None:
            os.environ.pop(HOSTS_VARIABLE, None)
        else:
            os.environ[HOSTS_VARIABLE] = before
