"""Double of ``aiter.dist.parallel_state``: the world group and the tensor-parallel group of all ranks.

Scope: set-up, look-up and end of one tensor-parallel group; pipeline, data and expert parallel groups have size 1 or
are left out. It proves nothing about groups across hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from accelerated.standin.aiter_ops.communicator_cuda import CudaCommunicator


class GroupCoordinator:
    """A group of all ranks with its metadata on gloo.

    Args:
        backend: of the rows.
        local_rank: number of the device.
        communicates: whether to make a device communicator, which a single rank never has.
    """

    def __init__(self, backend: str, local_rank: int, communicates: bool) -> None:
        ranks = list(range(dist.get_world_size()))
        self.rank_in_group, self.local_rank, self.world_size = dist.get_rank(), local_rank, len(ranks)
        gpu = "nccl" in backend
        self.device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
        self.cpu_group = dist.new_group(ranks, backend="gloo")
        self.device_group = dist.new_group(ranks, backend=backend) if gpu else self.cpu_group
        self.device_communicator: CudaCommunicator | None = None
        if communicates and self.world_size > 1:
            custom = _state.custom_all_reduce
            self.device_communicator = CudaCommunicator(self.cpu_group, self.device, self.device_group, custom)

    def communicator(self) -> CudaCommunicator:
        """The device communicator.

        Raises:
            ValueError: there is none, as with one rank (parallel_state.py:710).
        """
        if self.device_communicator is None:
            raise ValueError("the group has no device communicator")
        return self.device_communicator

    def destroy(self) -> None:
        """Destroy both process groups."""
        if self.device_group is not self.cpu_group:
            dist.destroy_process_group(self.device_group)
        dist.destroy_process_group(self.cpu_group)
        self.device_communicator = None


@dataclass
class _State:
    custom_all_reduce: bool = True
    backend: str = "nccl"
    world: GroupCoordinator | None = None
    tp: GroupCoordinator | None = None


_state = _State()


def set_custom_all_reduce(enable: bool) -> None:
    """Whether groups made from now on have a custom all-reduce."""
    _state.custom_all_reduce = enable


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str = "nccl",
    data_parallel_size: int = 1,
    data_parallel_rank: int = 0,
) -> None:
    """Make the default process group if there is none, and the world group."""
    if not dist.is_initialized():
        dist.init_process_group(backend, init_method=distributed_init_method, world_size=world_size, rank=rank)
    if _state.world is None:
        _state.backend = backend
        _state.world = GroupCoordinator(backend, rank if local_rank == -1 else local_rank, communicates=False)
        return
    assert _state.world.world_size == dist.get_world_size(), "the group of all ranks exists and has another size"


def ensure_model_parallel_initialized(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    decode_context_model_parallel_size: int | None = 1,
    backend: str | None = None,
    data_parallel_size: int = 1,
    prefill_context_model_parallel_size: int = 1,
    custom_group_config: dict[str, list[int]] | None = None,
) -> None:
    """Make the tensor-parallel group if there is none.

    Raises:
        NotImplementedError: groups of another shape than all ranks together.
    """
    assert _state.world is not None, "there is no group of all ranks yet"
    if tensor_model_parallel_size != _state.world.world_size or pipeline_model_parallel_size != 1:
        raise NotImplementedError("the double has one tensor-parallel group of all ranks")
    if _state.tp is None:
        _state.tp = GroupCoordinator(backend or _state.backend, _state.world.local_rank, communicates=True)


def model_parallel_is_initialized() -> bool:
    """Whether there is a tensor-parallel group."""
    return _state.tp is not None


def get_tp_group() -> GroupCoordinator:
    """The tensor-parallel group."""
    assert _state.tp is not None, "there is no tensor-parallel group yet"
    return _state.tp


@contextmanager
def graph_capture() -> Iterator[None]:
    """Surrounds the capture of a graph, and the warm-up calls before it, which give zeros."""
    communicator = get_tp_group().device_communicator
    if communicator is None or communicator.ca_comm is None:
        yield
        return
    with communicator.ca_comm.capture():
        yield


def destroy_model_parallel() -> None:
    """Destroy the tensor-parallel group."""
    if _state.tp is not None:
        _state.tp.destroy()
    _state.tp = None


def destroy_distributed_environment() -> None:
    """Destroy the world group and the default process group."""
    if _state.world is not None:
        _state.world.destroy()
    _state.world = None
    if dist.is_initialized():
        dist.destroy_process_group()
