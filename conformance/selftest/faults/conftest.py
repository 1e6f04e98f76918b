"""What the fault tests share: one harness per worker, and the gate's cells of a faulty backend.

Scope: set-up only; limits are short because every good case here takes milliseconds. It proves nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.engine.driver import Limits
from conformance.suite import analysis
from conformance.suite.harness import Harness
from conformance.suite.options import Options
from conformance.suite.records import RecordWriter
from reference.catalogue import model_shapes

#: Seconds after which a case counts as hanging.
LIMIT_S = 1.2


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A harness of the gate tier on the CPU, writing below a temporary directory."""
    output = tmp_path_factory.mktemp("faults")
    options = Options(
        backends=(),
        companions=(),
        kernel_types=(),
        ep_sizes=(1, 2, 4, 8),
        device="cpu",
        arch="gfx942",
        tier="gate",
        models=tuple(model_shapes().values()),
        only_models=False,
        require_hardware=False,
        output=output,
        seed=0,
        time_budget_s=60.0,
        reduce_budget_s=90.0,
        replay=(),
    )
    made = Harness(options, RecordWriter(output / "records.jsonl"), limits=Limits(floor_s=LIMIT_S, first_s=10.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "REDUCTION_HANG_FLOOR_S", 0.7 * LIMIT_S)
        yield made
    made.close()
