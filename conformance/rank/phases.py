"""How a program tells what it is doing; readable even after the rank was killed."""

from __future__ import annotations

from collections.abc import Callable

#: Takes the name of a phase and the number of the round or call.
SetPhase = Callable[[str, int], None]
#: Between the name of a phase and the number of the step of a sequence.
AT_STEP = " at step "
