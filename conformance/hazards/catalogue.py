"""All hazards by name, in the order in which a whole run probes them: what may damage the machine comes last.

Scope: data without torch. What is not in it may still be wrong: these are the hazards that are known.
"""

from __future__ import annotations

from conformance.hazards.defects import DEFECTS
from conformance.hazards.probe import Probe
from conformance.hazards.traps import TRAPS

#: Harmless probes first: after the others a device may need its canary.
PROBES: dict[str, Probe] = {
    probe.name: probe for probe in sorted((*DEFECTS, *TRAPS), key=lambda p: (bool(p.harm), p.harm == "hangs"))
}
EVERY = "all"


def chosen(text: str) -> tuple[str, ...]:
    """Names of an option's value: hazards separated by commas, or all of them.

    Raises:
        ValueError: a name that no hazard has, with the list of those there are.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [EVERY]:
        return tuple(PROBES)
    unknown = [name for name in names if name not in PROBES]
    if unknown or not names:
        told = ", ".join(unknown) or "nothing"
        raise ValueError(f"{told} is no hazard; give '{EVERY}' or some of {', '.join(sorted(PROBES))}")
    return tuple(dict.fromkeys(names))
