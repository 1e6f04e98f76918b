"""The MoRI double kills the process where the real library would: exit by SIGABRT with a message on stderr.

Scope: one spawn per cause. A pass proves nothing about AMD hardware or about MoRI's own messages.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.standin import ranks

MODULE = "conformance.selftest.standin.scenarios_deaths"


@pytest.mark.parametrize(
    ("scenario", "world", "message"),
    [
        ("gpu_per_node_too_large", 1, "power of two"),
        ("gpu_per_node_no_power_of_two", 1, "power of two"),
        ("too_many_ranks", 1, "holds 8 ranks"),
        ("too_many_ranks_low_latency", 1, "holds 8 ranks"),
        ("no_shmem", 1, "shmem is not initialised"),
        ("hidden_too_large", 1, "hidden size 9"),
        ("combine_hidden_too_large", 1, "hidden size 9"),
        ("weights_missing_v1", 1, "memory fault"),
        ("weights_missing_v1ll", 1, "memory fault"),
        ("weights_missing_async", 1, "memory fault"),
        ("negative_async_single_expert", 1, "received expert id"),
        ("past_experts_async", 1, "received expert id"),
        ("past_experts_v1_nodes", 2, "another node"),
        ("negative_v1ll_single_expert", 2, "another node"),
        ("receive_overflow", 1, "max_total_recv_tokens"),
        ("scales_overrun_staging", 1, "bytes of scales a row overrun"),
    ],
)
def test_rank_dies(scenario: str, world: int, message: str, tmp_path: Path) -> None:
    for report in ranks.run(world, MODULE, [scenario], tmp_path, join=scenario != "no_shmem"):
        assert report["exit"] == "-6", report
        assert message in report["stderr"]
        assert scenario not in report
