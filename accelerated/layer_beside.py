"""A second composed layer in a rank process whose libraries are open already.

Scope: a library may be initialised once in a process, so that a layer of another dispatch with the same experts shares
the experts' session, and the dispatch's, too, where it is the same. What a pass does not prove: that two dispatches of
the real libraries share a device without a conflict that neither has alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerated.layer_session import LayerSession, half

if TYPE_CHECKING:
    from accelerated.layer import LayerBackend


class SessionBeside(LayerSession):
    """A session of ``backend`` next to ``held``, a session of ``holder``; what they share stays the other's to close.

    Raises:
        LayerError: the other dispatch does not initialise.
        ValueError: the experts are not the same.
    """

    def __init__(self, backend: LayerBackend, holder: LayerBackend, held: LayerSession) -> None:
        if backend.experts.name != holder.experts.name:
            raise ValueError(f"{backend.name} beside {holder.name}; layers beside each other have the same experts")
        self._backend, self._context = backend, held.context
        self._shared = backend.dispatch.name == holder.dispatch.name
        self._dispatch, self._experts = held.halves
        if not self._shared:
            with half("dispatch", backend.dispatch.name):
                self._dispatch = backend.dispatch.open(held.context)

    def close(self) -> None:
        """Finalise what was opened here.

        Raises:
            LayerError: it does not finalise.
        """
        if not self._shared:
            with half("dispatch", self._backend.dispatch.name):
                self._dispatch.close()
