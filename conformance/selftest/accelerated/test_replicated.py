"""What ``allgather`` and ``replicated`` share, and in what they differ, in one process.

Scope: names of kernel types, refusals, and which collective ends a round of ``replicated``; collectives are replaced by
arithmetic. A pass does not prove that rows arrive or that sums over ranks are right: the scenarios on gloo ranks do.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from accelerated import allgather
from accelerated.contract import Standing, Support
from accelerated.interface import RankContext, Session
from accelerated.registry import backend
from reference.problem import Problem

PROBLEM = Problem(2, 4, 4, 1, 2, "float32")
KINDS = {"allgather": "naive", "replicated": "all-reduce"}


def opened(name: str) -> Session:
    """A session of rank 1 of 2; without a process group, so that no collective of torch.distributed can run."""
    return backend(name).open(RankContext(1, 2, torch.device("cpu"), None, "gfx942"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("asked", ["naive", "all-reduce", "other"])
def test_kernel_types(name: str, asked: str) -> None:
    made = backend(name)
    assert tuple(made.kernel_types) == (KINDS[name],)
    if asked == KINDS[name]:
        assert made.support(PROBLEM, asked) == Support(Standing.CLAIMED)
        opened(name).build(PROBLEM, asked)
        return
    text = f"unknown kernel type {asked!r}; choose {KINDS[name]}"
    assert made.support(PROBLEM, asked) == Support(Standing.REFUSED, text)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        opened(name).build(PROBLEM, asked)


@pytest.mark.parametrize("name", KINDS)
def test_another_number_of_ranks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^the problem is for 5 ranks, the group has 2$"):
        opened(name).build(Problem(5, 4, 5, 1, 2), KINDS[name])


def both_send_the_same(blocks: torch.Tensor, block: torch.Tensor, group: object) -> None:
    blocks.view(2, -1).copy_(block.expand(2, -1))


def test_replicated_takes_its_own_tokens_of_an_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allgather, "_all_gather", both_send_the_same)
    monkeypatch.setattr(dist, "all_reduce", lambda rows, group: rows.mul_(2))
    operation = opened("replicated").build(PROBLEM, "all-reduce")
    received = operation.prepare(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    answers = torch.arange(16.0).view(4, 4)
    assert torch.equal(operation.finalize(answers, received).output, 2 * answers[2:])
