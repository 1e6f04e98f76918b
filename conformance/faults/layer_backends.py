"""Faulty backends of experts and layers: a stand-in whose operations are wrapped.

Scope: construction, without torch until a session opens in a rank process. That a faulty backend opens does not prove
that its defect shows; the selftest does.
"""

from __future__ import annotations

import importlib
from typing import Any

from accelerated.experts import ExpertProblem, LayerProblem
from accelerated.interface import Backend, RankContext, Session
from accelerated.operators import RowProblem
from accelerated.registry import backend
from conformance.faults.layer_catalogue import LAYER_FAULTS


class FaultyBackend:
    """The backend of a fault, with that fault in its experts or its layer; everything else is the genuine one's."""

    def __init__(self, genuine: Backend, name: str, fault: str) -> None:
        self._genuine, self._fault = genuine, fault
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._genuine, name)

    def open(self, context: RankContext) -> FaultySession:
        """Open the genuine session."""
        return FaultySession(self._genuine.open(context), context, self._fault)


class FaultySession:
    """Wraps the operations that the fault is in."""

    def __init__(self, genuine: Session, context: RankContext, fault: str) -> None:
        self._genuine, self._context, self._fault = genuine, context, fault
        self._layer: Any = None

    def build(self, problem: Any, kernel_type: str) -> Any:
        """Build the genuine operation, and wrap it."""
        built = self._genuine.build(problem, kernel_type)
        if isinstance(problem, RowProblem):
            # A router of the layer that was built last.
            return self._layer.router(built) if hasattr(self._layer, "router") else built
        defect: Any = _defect(self._fault)
        if isinstance(problem, LayerProblem):
            self._layer = defect(built, problem, self._context.rank)
            return self._layer
        return defect(built, problem) if isinstance(problem, ExpertProblem) else built

    def __getattr__(self, name: str) -> Any:
        return getattr(self._genuine, name)

    def close(self) -> None:
        """Close the genuine session."""
        self._genuine.close()


def _defect(fault: str) -> Any:
    routed: dict[str, Any] = importlib.import_module("conformance.faults.routed_layers").ROUTED_DEFECTS
    every: dict[str, Any] = importlib.import_module("conformance.faults.layers").DEFECTS
    company: dict[str, Any] = importlib.import_module("conformance.faults.company").COMPANY_DEFECTS
    return (every | routed | company)[fault]


def faulty_layer(fault: str, arch: str) -> FaultyBackend:
    """The backend with one seeded fault, under the name by which the registry finds it again."""
    found = LAYER_FAULTS[fault]
    return FaultyBackend(backend(found.base, arch), found.backend, fault)
