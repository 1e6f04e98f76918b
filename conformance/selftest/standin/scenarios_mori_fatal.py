"""Scenarios on one rank for the hazards that end the process, on and off.

Scope: each sets the switch itself, in a process of its own. Passing proves nothing about MoRI.
"""

from __future__ import annotations

import os

import pytest
import torch

from accelerated.standin.mori_ep import hazards
from conformance.selftest.standin.ranks import build, indices, rows, weights


def receive_overflow_intranode_on(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "intranode-receive-overflow"
    op, ids = build(rank, world, max_total_recv_tokens=2), indices(*[[0, 1]] * 4)
    out, *_ = op.dispatch(rows(rank, 1), None, None, ids[:1])
    combined, combined_weights = op.combine(out, torch.ones(2, 2), ids[:1])
    assert combined_weights is not None
    kept, kept_weights = combined.clone(), combined_weights.clone()
    *_, total = op.dispatch(rows(rank, 4) + 9, weights(rank, 4), None, ids)
    assert int(total) == 4
    assert not torch.equal(combined[0], kept[0])
    assert not torch.equal(combined_weights[0], kept_weights[0])


def receive_overflow_intranode_off(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "none"
    op = build(rank, world, max_total_recv_tokens=2)
    op.dispatch(rows(rank, 4), None, None, indices(*[[0, 1]] * 4))


def gpu_per_node_on(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "gpu-per-node-aborts"
    build(rank, world, gpu_per_node=8)


def gpu_per_node_off(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "none"
    with pytest.raises(ValueError, match="power of two"):
        build(rank, world, gpu_per_node=8)


def hidden_on(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "host-assert-kills"
    build(rank, world).dispatch(rows(rank, 1, 9), None, None, indices([0, 1]))


def hidden_off(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "none"
    with pytest.raises(ValueError, match="hidden size 9"):
        build(rank, world).dispatch(rows(rank, 1, 9), None, None, indices([0, 1]))


def no_weights_on(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "weights-required"
    build(rank, world, "InterNodeV1").dispatch(rows(rank, 1), None, None, indices([0, 1]))


def no_weights_off(rank: int, world: int) -> None:
    os.environ[hazards.VARIABLE] = "none"
    for kind in ("InterNodeV1", "InterNodeV1LL", "AsyncLL"):
        op = build(rank, world, kind)
        out, *_ = op.dispatch(rows(rank, 1), None, None, indices([0, 1]))
        if kind == "AsyncLL":
            op.dispatch_recv()
        assert torch.equal(out[0], rows(rank, 1)[0])
