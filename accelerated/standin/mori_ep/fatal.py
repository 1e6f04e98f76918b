"""How the double dies where the real library kills the process or faults the GPU, and how it hangs where that waits.

Scope: a message on stderr, then ``os.abort`` or a wait without end, or a device-side assertion where the condition is
only known on a GPU. It does not prove that the real failure has the same text or hits the same rank.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import torch


def die(message: str) -> NoReturn:
    """End the process with SIGABRT after one line on stderr."""
    print(f"mori stand-in: {message}", file=sys.stderr, flush=True)
    os.abort()


def die_if(condition: torch.Tensor, message: str) -> None:
    """Die when the boolean tensor ``condition`` (any shape) holds anywhere.

    On a GPU the check stays on the stream (the real ones are device assertions), so that the host is not synchronised.
    """
    if condition.device.type == "cpu":
        if condition.any():
            die(message)
    else:
        torch._assert_async(~condition.any())


def hang(message: str) -> NoReturn:
    """Wait for ever after one line on stderr; whoever started the process has to end it."""
    print(f"mori stand-in: waiting for ever: {message}", file=sys.stderr, flush=True)
    while True:
        time.sleep(1)
