"""In which order probes of races call, and what may stand between; how far an overrun reaches on the double's heap.

Scope: calls recorded in the place of a library, and arithmetic. A pass does not prove that a race shows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.damage import HEAP_ALIGNMENT, next_on_heap, overrun, staging_bytes
from conformance.engine.pool import PoolKey
from conformance.hazards.catalogue import PROBES
from conformance.hazards.pool import ProbePool
from conformance.hazards.probe import Probe
from conformance.hazards.protocol import read_seen
from conformance.hazards.rank import memory, races
from conformance.hazards.rank.bench import Bench, RefusedError
from conformance.selftest.hazards.test_prober import bad


class Recorded(Bench):
    """A rank alone, whose operator notes what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setup: Any = SimpleNamespace(rank=0, world_size=1, directory="")
        super().__init__(SimpleNamespace(), setup, torch.device("cpu"), self._noted, ("IntraNode",), 1, 2)  # type: ignore[arg-type]
        self.calls: list[str] = []
        monkeypatch.setattr("time.sleep", lambda seconds: self.calls.append("sleep"))

    def _noted(self, phase: str, index: int) -> None:
        self.calls.append(f"phase {phase}")

    def build(self, kind: str = "", phase: str = "build", **changes: object) -> Any:
        return self

    def dispatch(self, op: Any, *arguments: Any, **options: Any) -> Any:
        return (arguments[0],)

    def combine(self, *arguments: Any, **options: Any) -> Any:
        """The operator's and, as long as it is given one, the bench's own with its wait."""
        if arguments[0] is self:
            return super().combine(*arguments, **options)
        self.calls.append("combine")
        return arguments[0], None

    def asynchronous(self, op: Any) -> bool:
        return False

    def wait(self) -> None:
        self.calls.append("wait")

    def meet(self) -> None:
        self.calls.append("meet")


def test_combines_follow_each_other_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Recorded(monkeypatch)
    races.combine_twice_hangs(bench)
    first, last = bench.calls.index("combine"), len(bench.calls) - 1 - bench.calls[::-1].index("combine")
    between = bench.calls[first:last]
    assert between.count("combine") >= 1
    assert not {"wait", "meet", "sleep"} & set(between), bench.calls
    assert bench.calls[:first][-2:] == ["sleep", "phase combine"], "ranks come late to the first one"
    phases = [call for call in bench.calls if call.startswith("phase")]
    assert phases[-1] == f"phase {PROBES['combine-twice-hangs'].hang}"
    assert bench.calls[last + 1] == "wait"


def test_every_question_draws_delays_of_its_own() -> None:
    pool = ProbePool(PoolKey(2, "mori-standin"))
    probe: Probe = bad("sleeps")
    told = [pool.ask(probe, 10, 30.0).answers for _ in range(2)]
    pool.kill()
    drawn = [read_seen(answers[rank].text).text for answers in told for rank in (0, 1)]
    assert all(one.count(",") == 9 for one in drawn), drawn
    assert len(set(drawn)) == 4, drawn


def config(hidden: int) -> EpDispatchCombineConfig:
    """The capped probe's, with rows of another size."""
    sizes: dict[str, Any] = dict.fromkeys(("scale_dim", "scale_type_size"), 0)
    sizes |= dict.fromkeys(("num_experts_per_rank", "num_experts_per_token"), 2)
    sizes |= dict.fromkeys(("world_size", "max_num_inp_token_per_rank", "max_total_recv_tokens", "gpu_per_node"), 4)
    return EpDispatchCombineConfig(torch.bfloat16, 3, hidden_dim=hidden, max_token_type_size=4, **sizes)


@pytest.mark.parametrize("hidden", [8, memory.WIDE])
def test_an_overrun_must_pass_the_gap_before_the_next_allocation(hidden: int) -> None:
    """Rank 3's own four rows, which it stages in the last four of sixteen slots."""
    chosen = config(hidden)
    buffers = Buffers(chosen, torch.device("cpu"))
    buffers.out.zero_()
    rows = torch.ones(4, hidden, dtype=torch.bfloat16)
    plan = SimpleNamespace(nothing=4)
    done: Any = SimpleNamespace(n=4, lookup=torch.arange(4), owners=torch.full((4, 1), 3), plan=plan)
    overrun(buffers, rows, done, chosen, "IntraNode", None, hidden, rows, False)
    end, behind = 16 * 2 * hidden, next_on_heap(staging_bytes(chosen, "IntraNode", None))
    assert behind % HEAP_ALIGNMENT == 0
    reached = int(buffers.out.nonzero().max()) + 1 if buffers.out.any() else 0
    assert reached == max(end - behind, 0)
    assert (end > behind) == (hidden == memory.WIDE)


def test_a_refusal_is_any_exception_but_a_device_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Recorded(monkeypatch)

    def fails(error: Exception) -> None:
        raise error

    for refusal in (TypeError("no weights by default"), AssertionError("id"), RuntimeError("three warps"), KeyError(1)):
        with pytest.raises(RefusedError, match=type(refusal).__name__):
            bench.misuse(fails, refusal)
    for lost in (RuntimeError("HIP error 98: launch"), ImportError("x"), RuntimeError("[mori] kernel failed to load")):
        with pytest.raises(type(lost)):
            bench.misuse(fails, lost)
