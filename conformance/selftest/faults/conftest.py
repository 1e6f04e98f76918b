"""What the fault tests share: options of a gate run, and one harness per worker.

Scope: set-up only; limits are short because every good case here takes milliseconds. It proves nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.engine.driver import Limits
from conformance.suite import analysis
from conformance.suite.harness import Harness
from conformance.suite.options import Options
from conformance.suite.records import RecordWriter

#: Seconds after which a case counts as hanging.
LIMIT_S = 1.2


def gate_options(output: Path, arch: str = "gfx942") -> Options:
    """Options of a gate run on the CPU, writing below ``output``; the harness takes its cells from the tests."""
    return Options(
        backends=(),
        companions=(),
        kernel_types=(),
        ep_sizes=(1, 2, 4, 8),
        device="cpu",
        arch=arch,
        tier="gate",
        models=(),
        only_models=False,
        require_hardware=False,
        output=output,
        seed=0,
        time_budget_s=60.0,
        reduce_budget_s=90.0,
        replay=(),
    )


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A harness of the gate tier on the CPU, writing below a temporary directory."""
    output = tmp_path_factory.mktemp("faults")
    limits = Limits(floor_s=LIMIT_S, first_s=10.0)
    made = Harness(gate_options(output), RecordWriter(output / "records.jsonl"), limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "REDUCTION_HANG_FLOOR_S", 0.7 * LIMIT_S)
        yield made
    made.close()
