"""Halves of a layer that do what a test says: a dispatch and experts, without torch until they are opened.

Scope: fakes for the tests of composition. They prove nothing about any library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder, Standing, Support
from accelerated.experts import ExpertContract, ExpertProblem, LayerProblem
from accelerated.interface import Finding
from reference.codecs import STANDARD, Codec
from reference.expert_numerics import ExpertNumerics
from reference.problem import Problem

TOKEN, GROUP = STANDARD["token_fn"], STANDARD["group128_fn"]
FP4, MXFP8 = STANDARD["mxfp4_even"], STANDARD["mxfp8_fn_even"]

DENSE = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED)
EVERYWHERE = Contract(ReceiveLayout.EVERY_ROW, RowOrder.SOURCE, MaskedSlots.DROPPED)
CLAIMED = Support(Standing.CLAIMED)


def experts_contract(codec: Codec | None = None, wire: Codec | None = None, **changes: Any) -> ExpertContract:
    """Experts that quantise with ``codec``; ``wire`` is the same unless told otherwise."""
    numerics = changes.pop("numerics", lambda rows: ExpertNumerics(input_codec=codec))
    return ExpertContract(numerics=numerics, wire=wire or codec, **changes)


def sizes(world_size: int = 2, *, placement: str = "linear", **changes: Any) -> LayerProblem:
    """A small layer; ``changes`` are of the experts."""
    exchange = Problem(world_size, hidden=256, experts=4, top_k=2, capacity=8)
    experts: dict[str, Any] = {
        **{"shards": world_size, "hidden": 256, "intermediate": 128, "experts": 4, "top_k": 2},
        **{"capacity": 8 * world_size, **changes},
    }
    return LayerProblem(exchange, ExpertProblem(**experts), placement)


@dataclass
class Half:
    """A backend whose answers are given; every call of it and of what it opens is written to ``calls``.

    Attributes:
        declared: contract of everything, or of each operator.
        answer: standing of a problem on a kernel type or operator.
        fails: calls that raise, e.g. ``"open"`` or ``"prepare"``.
    """

    name: str
    declared: Any
    kernel_types: Sequence[str] = ()
    operators: Mapping[str, Sequence[str]] = field(default_factory=dict)
    answer: Callable[[Any, str], Support] = lambda problem, name: CLAIMED
    standin: bool = False
    judged_by: str = "reference"
    fails: Sequence[str] = ()
    calls: list[str] = field(default_factory=list)

    def support(self, problem: Any, kernel_type: str) -> Support:
        return self.answer(problem, kernel_type)

    def contract(self, problem: Any, kernel_type: str) -> Any:
        return self.declared[kernel_type] if isinstance(self.declared, dict) else self.declared

    def preflight(self, device: str) -> list[Finding]:
        return [Finding("no torch", "install it"), Finding(f"no {self.name}", "install it")]

    def open(self, context: Any) -> Any:
        self._note("open")
        return SimpleNamespace(build=self._build, close=lambda: self._note("session.close"))

    def _note(self, call: str) -> None:
        self.calls.append(f"{self.name} {call}")
        if call in self.fails:
            raise OSError(f"{call} failed")

    def _build(self, problem: Any, kernel_type: str) -> Any:
        self._note("build")
        names = ("prepare", "finalize", "quantise", "experts", "load")
        made = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return SimpleNamespace(problem=problem, close=lambda: self._note("close"), **made)


def dispatch(name: str = "sender", declared: Contract = DENSE, **changes: Any) -> Half:
    """A dispatch with the kernel types ``fast`` and ``slow``."""
    return Half(name, declared, kernel_types=("fast", "slow"), **changes)


def experts(name: str = "mathematician", declared: Any = None, **changes: Any) -> Half:
    """Experts with the operators ``bf16`` and ``fp8``."""
    contracts = declared or {"bf16": experts_contract(), "fp8": experts_contract(GROUP)}
    return Half(name, contracts, operators={"experts": ("bf16", "fp8")}, **changes)
