"""What a cell runs on: leased cores or GPUs, and the driver whose pool uses them.

On CPU every cell leases a core slot and the pool idles between cells. On GPUs a pool belongs to its lease: both are
kept while the next cell of this worker needs the same, and end together otherwise, so no GPU ever serves two pools.
What a lease does not prove: that nobody outside the suite uses the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from accelerated.mori_ep import transports
from accelerated.registry import backend
from conformance.cases import AnyCell
from conformance.engine.driver import Driver, Limits, Outcome
from conformance.engine.lease import core_slots, lease
from conformance.engine.pool import Progress
from conformance.engine.world import World
from conformance.suite.options import Options

Teardown = Callable[[AnyCell, Outcome], None]


class Resources:
    """One worker's lease and driver."""

    def __init__(
        self,
        options: Options,
        devices: Sequence[str],
        limits: Limits | None,
        *,
        progress: Progress,
        on_teardown: Teardown,
        world: World | None = None,
    ) -> None:
        self._options = options
        # Two devices that report the same UUID must not share a lock.
        self._devices = [uuid if devices.count(uuid) == 1 else f"{uuid}-{i}" for i, uuid in enumerate(devices)]
        on_cpu = options.device == "cpu"
        self._limits = limits or (Limits() if on_cpu else replace(Limits(), hang_budget=3, floor_s=30.0))
        self._progress, self._on_teardown = progress, on_teardown
        self._world = world
        self._driver: Driver | None = None
        self._last: AnyCell | None = None
        self._leased = ExitStack()
        self._held: tuple[str, int] | None = None
        self._positions: tuple[int, ...] = ()

    @contextmanager
    def hold(self, cell: AnyCell, following: AnyCell | None) -> Iterator[Driver]:
        """Have the cell's share of the machine for the length of the body."""
        if not self._devices:
            with lease(core_slots(), 1):
                yield self._driver_for(cell)
            return
        wanted = (cell.backend, cell.world_size)
        if self._held != wanted:
            self.release()
            # Which of this host's GPUs the agents of a launched world were given is not known here.
            wide = len(self._devices) if self._world is not None else cell.world_size
            names = self._leased.enter_context(lease(self._devices, wide))
            self._positions = tuple(sorted(self._devices.index(name) for name in names))
            self._held = wanted
        try:
            yield self._driver_for(cell)
        finally:
            if following is None or (following.backend, following.world_size) != wanted:
                self.release()

    def release(self) -> None:
        """End the pool, report it if it did not end well, and give the lease back."""
        if self._driver is not None:
            self._driver.close()
            self._report_teardown()
        self._driver = None
        self._leased.close()
        self._held = None

    def _driver_for(self, cell: AnyCell) -> Driver:
        if self._driver is None or self._driver.backend != cell.backend:
            if self._driver is not None:
                self._driver.close()
                self._report_teardown()
            # Interpreted kernels are not slow because they hang.
            patience = float(getattr(backend(cell.backend, self._options.arch), "patience", 1.0))
            limits = replace(
                self._limits, floor_s=patience * self._limits.floor_s, first_s=patience * self._limits.first_s
            )
            self._driver = Driver(
                cell.backend,
                arch=self._options.arch,
                device=self._options.device,
                environment=transports.TRANSPORTS[self._options.transport],
                limits=limits,
                progress=self._progress,
                world=self._world,
            )
        self._driver.devices = self._positions
        # A pool of another width ends when the first case of this cell asks for its own.
        self._report_teardown()
        self._last = cell
        return self._driver

    def _report_teardown(self) -> None:
        if self._driver is not None and self._driver.teardown is not None and self._last is not None:
            self._on_teardown(self._last, self._driver.teardown)
            self._driver.teardown = None
