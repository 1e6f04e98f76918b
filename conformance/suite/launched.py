"""What a launched world changes about a run: its EP size, which planned cells fit it, and how its failures show again.

Scope: the process that started pytest. That a cell fits does not prove that the network between the nodes works: the
canary of the first pool asks.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from accelerated.mori_ep.backend import HOSTS_VARIABLE
from conformance.engine.world import World, WorldError
from conformance.engine.world_protocol import Examine, read_token
from conformance.suite.cells import Plan, PlannedCell, Unsupported
from conformance.suite.kernels import wanted_kernels
from conformance.suite.options import Launched, Options
from conformance.suite.seats import seats_of
from conformance.verdicts import ExitCode


def gather(options: Options) -> tuple[Options, World]:
    """Wait for the agents; the options with what came together.

    Ends the run with exit 3 if they do not come.

    Raises:
        pytest.UsageError: the EP sizes that the user gave do not hold the world's.
    """
    print(f"ep-conformance: waiting for agents on {options.world}", flush=True)
    try:
        world = World.gather(options.world, read_token(os.environ), progress=_say)
    except WorldError as error:
        pytest.exit(f"launched world: {error}", returncode=ExitCode.INFRASTRUCTURE)
    launched = Launched(world.world_size, world.nodes, world.hosts)
    _say(f"{launched.text} are there; looking at {', '.join(world.hosts)}")
    names = (*options.backends, *options.companions)
    # A real library counts ranks per host: the contract of every process of this run must know how many there are.
    os.environ[HOSTS_VARIABLE] = str(len(launched.hosts))
    try:
        request = Examine(options.device, options.arch, names, options.transport, len(world.hosts), world.world_size)
        return fitted(options, replace(launched, seats=seats_of(world, request))), world
    except BaseException:
        world.leave()
        raise


def fitted(options: Options, launched: Launched) -> Options:
    """The options of a run on a launched world: its EP size unless sizes were given.

    Raises:
        pytest.UsageError: sizes were given, and that of the world is not among them.
    """
    if options.ep_sizes_given and options.tier != "replay" and launched.ranks not in options.ep_sizes:
        given = ",".join(map(str, options.ep_sizes))
        raise pytest.UsageError(f"--ep-sizes is {given} and the launched world has {launched.text}; leave it out")
    sizes = options.ep_sizes if options.ep_sizes_given else (launched.ranks,)
    return replace(options, ep_sizes=sizes, launched=launched)


def kept(plan: Plan, options: Options) -> Plan:
    """The cells that fit the world; the others are unsupported with the reason.

    Raises:
        pytest.UsageError: none of the backends under test has a cell that fits.
    """
    launched = options.launched
    if launched is None:
        return plan
    cells: list[PlannedCell] = []
    refused: dict[tuple[str, str, int, int], Unsupported] = {}
    for planned in plan.cells:
        cell = planned.cell
        reason = misfit(cell.world_size, cell.nodes, launched)
        if not reason:
            cells.append(planned)
            continue
        key = (cell.backend, cell.kernel_type, cell.world_size, cell.nodes)
        refused[key] = Unsupported(*key, reason)
    if plan.cells and not any(planned.cell.backend in options.backends for planned in cells):
        raise pytest.UsageError(
            f"no cell of {', '.join(options.backends)} fits the launched world of {launched.text}: "
            f"{next(iter(refused.values())).reason}; start another one, or choose other backends"
        )
    return Plan(tuple(cells), (*plan.unsupported, *refused.values()))


def misfit(world_size: int, nodes: int, launched: Launched) -> str:
    """Why a cell does not fit a world; empty if it does."""
    if launched.holds(world_size, nodes):
        return ""
    spread = f" on {nodes} node{'s' if nodes > 1 else ''}" if world_size == launched.ranks else ""
    return f"the launched world has {launched.text}; this needs {world_size}{spread}"


def compile_elsewhere(options: Options, plan: Plan, world: World) -> None:
    """Have MoRI's kernels compiled on the other hosts, too; ends the run with exit 3 if they are not."""
    wanted = wanted_kernels(options, plan)
    if not wanted or len(world.hosts) == 1:
        return
    _say(f"MoRI compiles {', '.join(wanted)} on the other hosts, which may take minutes")
    failed = world.compile(wanted)
    if failed:
        text = "\n".join(f"preflight: MoRI does not compile on {each}" for each in failed)
        pytest.exit(text, returncode=ExitCode.INFRASTRUCTURE)


def _say(text: str) -> None:
    print(f"ep-conformance: {text}", flush=True)
