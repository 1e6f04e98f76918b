"""Telling the backend's failures from the harness's.

Scope: exceptions out of backend code, asynchronous ones of a device included, and results that are not what the
interface asks for. What passes here is not proven right; it can be judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BackendError(Exception):
    """The backend raised; its own exception is the cause."""


@contextmanager
def backend_code() -> Iterator[None]:
    """Mark whatever is raised as the backend's.

    Raises:
        BackendError: something was raised; it is the cause.
    """
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(str(error)) from error


def synchronise(device: torch.device) -> None:
    """Wait for the device; what its kernels did wrong shows here.

    Raises:
        BackendError: a kernel of the backend failed.
    """
    if device.type == "cuda":
        with backend_code():
            torch.cuda.synchronize(device)


def expect_tensor(name: str, got: object, device: torch.device) -> None:
    """A result that is no tensor on the rank's device is the backend's failure.

    Raises:
        TypeError: says what it is and what is asked for.
    """
    if not isinstance(got, torch.Tensor):
        raise TypeError(f"{name} is {type(got).__name__}; the interface asks for a tensor")
    if got.device != device:
        raise TypeError(f"{name} is on {got.device}; the interface asks for a tensor on {device}")
