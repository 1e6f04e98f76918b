"""Transports of MoRI's puts between ranks of one host, and the environment that chooses them.

Scope: what shmem reads once, when it initialises (MoRI 624002c8, src/application/context/context.cpp:52 and the default
policy there): SDMA where it is enabled, else P2P where it is not disabled, else RDMA through the host's own NIC. Ranks
of different hosts use RDMA whatever is chosen. Stores through peer pointers, which are all that IntraNode and
IntraNodeLL do, use no transport: the pointers are mapped even where P2P is disabled (``CanUseP2P``). A choice does not
prove that the machine has the engines or the NIC: without engines shmem takes the next in that order and says nothing,
and where none is left it aborts (src/application/context/context.cpp:325,332).
"""

from __future__ import annotations

from collections.abc import Mapping

DISABLE_P2P, ENABLE_SDMA = "MORI_DISABLE_P2P", "MORI_ENABLE_SDMA"

#: Both variables for each transport: an enabled SDMA outranks a disabled P2P, so one alone says nothing.
TRANSPORTS: dict[str, tuple[tuple[str, str], ...]] = {
    "p2p": ((DISABLE_P2P, "0"), (ENABLE_SDMA, "0")),
    "rdma": ((DISABLE_P2P, "1"), (ENABLE_SDMA, "0")),
    "sdma": ((DISABLE_P2P, "0"), (ENABLE_SDMA, "1")),
}
DEFAULT = "p2p"
_OFF = ("", "0", "false", "off", "no")


def in_force(environment: Mapping[str, str]) -> str:
    """Transport that an environment chooses; any value but an empty one and those for off is on (env_utils.hpp:109)."""
    if environment.get(ENABLE_SDMA, "").lower() not in _OFF:
        return "sdma"
    return "rdma" if environment.get(DISABLE_P2P, "").lower() not in _OFF else DEFAULT
