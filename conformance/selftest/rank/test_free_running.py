"""Nothing of ours waits for the device, or copies to it, between the first prepare and the last finalize.

Scope: the program's free-running rounds on one rank with an exchange that does not wait either, on the CPU for what it
computes and on a GPU, where there is one, for its waits; and tables of the experts on a device without storage, for
their copies. A pass on the CPU says nothing about waits; one on a GPU, nothing about those that torch does not report.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder
from accelerated.interface import Combined, RankContext, Received
from conformance.cases import Case, Cell, Explicit, Round, Values
from conformance.rank.elements import elements
from conformance.rank.experts import LocalExperts
from conformance.rank.programs import Program

CELL = Cell("rounds", "any", "any", 1, 1, 64, 4, 2, 4, "bfloat16", "free-running")
CONTRACT = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED, source_map=False)
KINDS: tuple[Values, ...] = ("integers", "normal", "edges")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are reported on a GPU only")


class Copies(TorchDispatchMode):
    """Operations with tensors on more than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len({one.device for one in (*args, result) if isinstance(one, torch.Tensor)}) > 1:
            self.found.append(str(func))
        return result


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """As many rows as the capacity."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, CELL.capacity - len(tensor)))


class Alone:
    """The exchange of one rank with itself; torch tells of every wait between its first and its last call."""

    def __init__(self, rounds: int) -> None:
        self._left = rounds

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        if rows.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        tokens = len(rows)
        count = torch.full((1,), tokens, dtype=torch.int32, device=rows.device)
        held = None if scales is None else _held(scales)
        return Received(_held(rows), _held(ids), _held(weights), count, state=tokens, scales=held)

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        assert isinstance(received.state, int)
        self._left -= 1
        if expert_rows.is_cuda and not self._left:
            torch.cuda.set_sync_debug_mode("default")
        return Combined(expert_rows[: received.state], received.weights[: received.state])

    def close(self) -> None:
        return None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=NEEDS_GPU)])
@pytest.mark.parametrize("wire", ["", "fp8_token", "mxfp4"])
def test_free_running_rounds_wait_for_nothing(wire: str, device: str) -> None:
    cell = msgspec.structs.replace(CELL, wire=wire)
    routing = Explicit((((0, 1), (3, 2), (1, 3)),))
    case = Case(cell, tuple(Round(routing, kind, seed) for seed, kind in enumerate(KINDS)))
    where = torch.device(device)
    group: Any = None  # the oracle needs none
    context = RankContext(0, 1, where, group, "gfx942")
    program = Program(context, Alone(len(KINDS)), CONTRACT, "oracle", LocalExperts(cell, 0, where))
    try:
        mismatch, ratio = program.run(case, lambda name, index: None)
    finally:
        if where.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert mismatch is None, mismatch.text()
    assert ratio <= 1


@pytest.mark.parametrize("wire", ["fp8_token", "mxfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_goes_to_a_device_once(wire: str, kind: Values) -> None:
    cell = msgspec.structs.replace(CELL, wire=wire)
    rows = torch.empty(4, 32 if wire == "mxfp4" else 64, dtype=torch.uint8, device="meta")
    assert elements(rows, cell, kind, torch.bfloat16).shape == (4, 64)
    with Copies() as copies:
        found = elements(rows, cell, kind, torch.bfloat16)
    assert (found.device.type, found.dtype) == ("meta", torch.bfloat16)
    assert copies.found == [], "a copy from pageable memory waits for the device"
