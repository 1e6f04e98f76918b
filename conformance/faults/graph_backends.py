"""Backends with a fault of captured calls: a genuine one whose operations and graphs are wrapped.

Scope: construction, without torch until a session opens in a rank process. That a faulty backend opens does not prove
that its defect shows; the selftest does.
"""

from __future__ import annotations

import importlib
from typing import Any

from accelerated.interface import Backend, RankContext
from accelerated.registry import backend
from conformance.faults.graph_catalogue import GRAPH_FAULTS


class FaultyGraphBackend:
    """The backend of a fault; what it declares is the genuine one's."""

    def __init__(self, genuine: Backend, name: str, defect: str) -> None:
        self._genuine, self._defect = genuine, defect
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._genuine, name)

    def open(self, context: RankContext) -> Any:
        """Open the genuine session, and wrap it."""
        module: Any = importlib.import_module("conformance.faults.graphs")
        return module.FaultySession(self._genuine.open(context), context, module.DEFECTS[self._defect]())


def faulty_graphs(fault: str, arch: str) -> FaultyGraphBackend:
    """The backend with one seeded fault, under the name by which the registry finds it again."""
    found = GRAPH_FAULTS[fault]
    return FaultyGraphBackend(backend(found.base, arch), found.backend, found.defect)
