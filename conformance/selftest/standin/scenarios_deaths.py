"""Scenarios in which a rank of the MoRI double must die, as the real process would.

Scope: each function ends in SIGABRT. It proves nothing about the message or the rank of the real failure.
"""

from __future__ import annotations

import os

import torch

from conformance.selftest.standin.ranks import build, indices, rows, weights


def gpu_per_node_too_large(rank: int, world: int) -> None:
    build(rank, world, gpu_per_node=8)


def gpu_per_node_no_power_of_two(rank: int, world: int) -> None:
    build(rank, world, gpu_per_node=3)


def too_many_ranks(rank: int, world: int) -> None:
    build(rank, 16)


def too_many_ranks_low_latency(rank: int, world: int) -> None:
    build(rank, 16, "IntraNodeLL")


def no_shmem(rank: int, world: int) -> None:
    build(rank, world)


def hidden_too_large(rank: int, world: int) -> None:
    build(rank, world).dispatch(rows(rank, 1, 9), None, None, indices([0, 1]))


def combine_hidden_too_large(rank: int, world: int) -> None:
    op = build(rank, world)
    op.dispatch(rows(rank, 1), None, None, indices([0, 1]))
    op.combine(torch.zeros(4, 9), None, indices([0, 1]))


def weights_missing_v1(rank: int, world: int) -> None:
    build(rank, world, "InterNodeV1").dispatch(rows(rank, 1), None, None, indices([0, 1]))


def weights_missing_v1ll(rank: int, world: int) -> None:
    build(rank, world, "InterNodeV1LL").dispatch(rows(rank, 1), None, None, indices([0, 1]))


def weights_missing_async(rank: int, world: int) -> None:
    build(rank, world, "AsyncLL").dispatch(rows(rank, 1), None, None, indices([0, 1]))


def negative_async_single_expert(rank: int, world: int) -> None:
    op = build(rank, world, "AsyncLL", num_experts_per_rank=1)
    op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([-1, 0]))
    op.dispatch_recv()


def past_experts_async(rank: int, world: int) -> None:
    op = build(rank, world, "AsyncLL")
    op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([2 * world, 0]))
    op.dispatch_recv()


def past_experts_v1_nodes(rank: int, world: int) -> None:
    op = build(rank, world, "InterNodeV1", gpu_per_node=1, rdma_block_num=8)
    op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([4, 2 * (1 - rank)]))


def negative_v1ll_single_expert(rank: int, world: int) -> None:
    op = build(rank, world, "InterNodeV1LL", gpu_per_node=1, num_experts_per_rank=1, rdma_block_num=8)
    op.dispatch(rows(rank, 1), weights(rank, 1), None, indices([-1, 0]))


def receive_overflow(rank: int, world: int) -> None:
    op = build(rank, world, "IntraNodeLL", max_total_recv_tokens=2)
    op.dispatch(rows(rank, 4), None, None, indices(*[[0, 1]] * 4))


def scales_overrun_staging(rank: int, world: int) -> None:
    os.environ["MORI_GPU_ARCHS"] = "gfx1250"
    op = build(rank, world, max_num_inp_token_per_rank=16385, scale_dim=512, scale_type_size=4)
    op.dispatch(rows(rank, 1), None, torch.zeros(1, 512), indices([0, 1]))
