"""Agents of a launched world on this host, with torchrun or as any other launcher would start them.

Proves nothing by itself.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from conformance.engine.world_protocol import TOKEN_VARIABLE

TOKEN = secrets.token_hex(16)
WAIT_S = 60


def free_address() -> str:
    """An address of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def torchruns(address: str, nodes: int, per_node: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One torchrun per node, each with its agents; what is left of them is killed at the end."""
    shared = ("--nnodes", str(nodes), "--nproc-per-node", str(per_node), "--rdzv-endpoint", free_address())
    module = ("-m", "torch.distributed.run")
    commands = [
        [sys.executable, *module, *shared, "--node-rank", str(node), "-m", "conformance.agent", address]
        for node in range(nodes)
    ]
    with _started(commands, [{TOKEN_VARIABLE: TOKEN}] * nodes) as processes:
        yield processes


@contextmanager
def agents(
    address: str, nodes: int, per_node: int, token: str = TOKEN, count: int | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The agents alone, in an environment as torchrun's; the first ``count`` of them."""
    meet_host, _, meet_port = free_address().partition(":")
    size = nodes * per_node
    environments = [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": meet_host,
            "MASTER_PORT": meet_port,
            TOKEN_VARIABLE: token,
        }
        for rank in range(size)
    ]
    command = [sys.executable, "-m", "conformance.agent", address, "--wait", str(WAIT_S)]
    with _started([command] * (count or size), environments) as processes:
        yield processes


@contextmanager
def _started(commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen(command, env=_clean(environment), stderr=subprocess.PIPE)
        for command, environment in zip(commands, environments, strict=False)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**mine, **environment}
