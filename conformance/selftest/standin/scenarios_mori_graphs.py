"""Scenarios on four ranks: calls of the MoRI double captured once and replayed with other contents.

Scope: EPR = 2, so expert e lives on rank e // 2. Passing proves that the recorder keeps its own rules, nothing about
device graphs.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from accelerated.standin.mori_ep import graphs
from conformance.selftest.standin.ranks import build, indices, rows, weights

IDS = indices([0, 1], [2, 5], [7, 6], [-1, 3])
FACTOR = torch.tensor([[1.0], [2], [1], [1]])


def replay_reads_contents_as_they_are(rank: int, world: int) -> None:
    for kind in ("IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL"):
        op, ids, x, w = build(rank, world, kind), IDS.clamp(min=2), rows(rank, 4), weights(rank, 4)
        with graphs.capture() as graph:
            out, out_weights, _, out_ids, total = op.dispatch(x, w, None, ids)
            if kind == "AsyncLL":
                op.dispatch_recv()
            answer = out * 2
            combined, combined_weights = op.combine(answer, out_weights, ids)
            if kind == "AsyncLL":
                op.combine_recv()
        assert out.isnan().all(), "a capture runs nothing, warm or cold"
        assert combined.isnan().all()
        assert combined_weights is not None
        for repeat in (1, 2, 3):
            x.copy_(rows(rank, 4) * repeat)
            ids.copy_(IDS.roll(repeat, 0).clamp(min=2))
            graph.replay()
            factor = FACTOR.roll(repeat, 0)
            assert torch.equal(combined.float(), 2 * repeat * rows(rank, 4).float() * factor), (kind, repeat)
            assert kind == "AsyncLL" or torch.equal(combined_weights, w * factor)
            assert int(total) == (len(op.get_dispatch_src_token_pos()) if kind == "AsyncLL" else 0)
            assert rank == 0 or (out_ids < 8).any()
        graph.release()
        with pytest.raises(RuntimeError, match="released"):
            graph.replay()


def phases_in_graphs_of_their_own(rank: int, world: int) -> None:
    op = build(rank, world)
    first, second = rows(rank, 4), rows(rank, 2)
    captured = []
    for x in (first, second):  # two sizes on one operator
        n = len(x)
        with graphs.capture() as forth:
            out, *_, total = op.dispatch(x, None, None, IDS[:n], call_local_expert_count=True)
        with graphs.capture() as back:
            combined, _ = op.combine(out, None, IDS[:n])
        captured.append((forth, back, total, combined))
    for index in (0, 1, 1, 0):
        forth, back, total, combined = captured[index]
        forth.replay()
        count = op.local_expert_count.sum()
        assert len(op.get_dispatch_src_token_pos()) == int(total) == sum([[4, 8, 4, 4], [4, 4, 4, 0]][index][rank:][:1])
        assert int(count) == [[8, 8, 4, 8], [8, 4, 4, 0]][index][rank]
        back.replay()
        n = (4, 2)[index]
        assert torch.equal(combined[:n].float(), (first, second)[index].float() * FACTOR[:n])


def eager_calls_between_replays(rank: int, world: int) -> None:
    op, x = build(rank, world), rows(rank, 4)
    with graphs.capture() as graph:
        out, *_ = op.dispatch(x, None, None, IDS)
        combined, _ = op.combine(out, None, IDS)
    for _ in range(3):
        eager, *_ = op.dispatch(rows(rank, 1), None, None, indices([0, 2]))
        op.combine(eager, None, indices([0, 2]))
        assert torch.equal(combined[0].float(), 2 * rows(rank, 1)[0].float())
        graph.replay()
        assert torch.equal(combined.float(), x.float() * FACTOR)


def token_counts_are_frozen(rank: int, world: int) -> None:
    op = build(rank, world)
    out, *_ = op.dispatch(rows(rank, 2), None, None, IDS[:2])
    with graphs.capture() as back:
        combined, _ = op.combine(out, None, IDS[:2])
    back.replay()
    assert combined[2:].isnan().all()
    op.dispatch(2 * rows(rank, 4), None, None, IDS)
    back.replay()
    assert torch.equal(combined[:2].float(), 2 * rows(rank, 2).float() * FACTOR[:2])
    assert combined[2:].isnan().all()


def handles_in_a_graph(rank: int, world: int) -> None:
    op, x, ids = build(rank, world, "InterNodeV1", gpu_per_node=2, rdma_block_num=8), rows(rank, 4), IDS.clone()
    with graphs.capture() as graph:
        *first, handle = op.dispatch(x, weights(rank, 4), None, ids, return_routing=True)
        op.dispatch(x + x, weights(rank, 4), None, ids, routing=handle)
        combined, _ = op.combine(first[0], None, ids, routing=handle)
    for repeat in (0, 1):
        ids.copy_(IDS.roll(repeat, 0))
        graph.replay()
        assert torch.equal(combined.float(), 2 * x.float() * FACTOR.roll(repeat, 0))


def host_reads_are_refused(rank: int, world: int) -> None:
    op, x = build(rank, world), rows(rank, 4)
    with graphs.capture() as graph:
        _, _, _, _, total = op.dispatch(x, None, None, IDS)
        for read in (
            total.item,
            lambda: int(total),
            lambda: bool(total > 0),
            x.nonzero,
            lambda: x[x > 1],
            op.get_dispatch_src_token_pos,
            lambda: build(rank, world),
            graph.replay,
            torch.distributed.barrier,
        ):
            with pytest.raises(RuntimeError, match="not permitted while a graph is captured"):
                read()
        with pytest.raises(RuntimeError, match="second capture"), graphs.capture():
            pass
        with pytest.raises(ValueError, match="combine indices"):  # arguments are checked as ever
            op.combine(x, None, IDS[:1])
    assert not graphs.is_capturing()
    assert len(graph) >= 1


def operator_gone(rank: int, world: int) -> None:
    """A replay of calls of a dropped operator ends the process; in one of its own."""
    if rank:
        return
    code = (
        "import tempfile, torch, torch.distributed as dist\n"
        "from accelerated.standin.mori_ep import graphs, ops, shmem\n"
        "from conformance.selftest.standin.ranks import build, indices, rows\n"
        "store = dist.FileStore(tempfile.mktemp(), 1)\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "torch._C._distributed_c10d._register_process_group('default', dist.group.WORLD)\n"
        "shmem.shmem_torch_process_group_init('default')\n"
        "op = build(0, 1)\n"
        "with graphs.capture() as graph:\n"
        "    op.dispatch(rows(0, 1), None, None, indices([0, 1]))\n"
        "graph.replay()\n"
        "del op\n"
        "graph.replay()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "operator that is gone" in done.stderr) == (-6, True), done.stderr
