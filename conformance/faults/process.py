"""Operators that kill their process or never come back.

Scope: one way each for a rank to be lost: a death by signal, a wait in Python, a native wait that no signal reaches, a
wait inside the communication library, and an exchange that is never entered. They prove nothing about waits on a GPU.
"""

from __future__ import annotations

import ctypes
import resource
import signal
import threading

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep.engine import DispatchCall
from accelerated.standin.mori_ep.ops import EpDispatchCombineOp
from accelerated.standin.mori_ep.wire import Arrival

_FOREVER_S = 1 << 20


class HangOnZero(EpDispatchCombineOp):
    """A rank without tokens does not enter the exchange, and waits for what the others would send."""

    def _run_dispatch(self, call: DispatchCall) -> None:
        if call.rows.size(0) == 0 and self.config.world_size > 1:
            threading.Event().wait()
        super()._run_dispatch(call)


class _Hazard(EpDispatchCombineOp):
    """Something happens to a rank that receives a row for its own last expert from another rank."""

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        last = (self._rank + 1) * self.config.num_experts_per_rank - 1
        hit = (arrival.sections.ids == last).any(1) & (arrival.origin != self._rank)
        if arrival.valid is not None:
            hit &= arrival.valid
        if hit.any():
            self._strike()
        super()._deliver_rows(arrival, slots)

    def _strike(self) -> None:
        raise NotImplementedError


class Segfault(_Hazard):
    """The rank writes to address 0."""

    def _strike(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.memset(0, 0, 1)


class PythonWait(_Hazard):
    """The rank waits for an event that nobody sets."""

    def _strike(self) -> None:
        threading.Event().wait()


class NativeWait(_Hazard):
    """The rank sleeps in native code with the interpreter lock held and every signal blocked."""

    def _strike(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ctypes.PyDLL(None).sleep(_FOREVER_S)


class BlockedInGloo(_Hazard):
    """The rank waits inside the process group for a message that nobody sends."""

    def _strike(self) -> None:
        dist.recv(torch.zeros(1), src=(self._rank + 1) % self.config.world_size, tag=77)
