"""AITER's all-reduce with 6 ranks, which it has, and its fusions, which it has not; and with 3, which it disables.

Scope: what is refused, what falls back, what throws. A pass proves nothing about AMD hardware or AITER.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accelerated.aiter_ops import allreduce, allreduce_contract
from accelerated.contract import ContractError
from conformance.selftest.reference.ranks import World
from conformance.selftest.standin.scenarios_custom_all_reduce import _Checked, _library, _problem


def _message(call: object, *arguments: object, **options: object) -> str:
    try:
        call(*arguments, **options)  # type: ignore[operator]
    except (ContractError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fused_forms_are_refused(world: World) -> None:
    with _library(world, "gfx942") as (library, context):
        for operator in allreduce_contract.OPERATORS:
            if operator != "split" or world.size == 3:
                found = _message(allreduce.build, library, context, _problem(world, 512, 8), operator)
                assert found.startswith(f"ContractError: {operator} does not run this problem: world_size is"), found


def six_ranks_have_the_split_form(world: World) -> None:
    if world.size == 3:
        return
    checked = _Checked(world)
    with _library(world, "gfx942") as (library, context):
        for rows in (1, 79, 80, 130):
            checked.call(library, context, _problem(world, 512, 130), "split", rows)
    checked.conclude()


def what_the_library_itself_does(world: World) -> None:
    rows = torch.ones(2, 512, dtype=torch.bfloat16)
    with _library(world, "gfx942") as (library, context):
        with allreduce._tcp_store(context):
            state = library.distributed("parallel_state")
            state.set_custom_all_reduce(True)
            state.init_distributed_environment(world.size, world.rank, backend="gloo")
            state.ensure_model_parallel_initialized(world.size, 1)
        custom = state.get_tp_group().device_communicator.ca_comm
        assert custom.disabled == (world.size == 3)
        calls = library.distributed("communication_op")
        output, total = calls.tensor_model_parallel_fused_allreduce_rmsnorm(rows, rows, rows[0], 1e-6)
        assert total.unique().tolist() == [world.size + 1]
        assert output.unique().numel() == 1
        found = _message(calls.tensor_model_parallel_fused_allreduce_rmsnorm_quant, rows, rows, rows[0], 1e-6)
        if world.size == 6:
            assert found == "RuntimeError: no fused kernel for 6 ranks"
        else:
            assert found.startswith("TypeError: cannot unpack")
            assert "no custom all-reduce for 3 ranks" in _message(allreduce._communicator, library, context)
        dist.barrier(world.group)
