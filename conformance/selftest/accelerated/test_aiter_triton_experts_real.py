"""Real AITER Triton experts and routers, where the environment names a source tree; not run otherwise: no pass.

Scope: everything happens in a process of its own (``scenarios_aiter_triton_experts.py``), for AITER and what makes it
import change the process. On the CPU no AMD hardware is tested: rounding and saturation are the interpreter's.
"""

from __future__ import annotations

import os

import pytest

from accelerated.aiter_ops.triton_library import SOURCE
from conformance.selftest.reference import ranks

MODULE = "conformance.selftest.accelerated.scenarios_aiter_triton_experts"

pytestmark = pytest.mark.skipif(
    not os.environ.get(SOURCE), reason=f"not run: {SOURCE} names no AITER source tree, so AITER was not tested"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "DEADLINE", 900.0)
        (found,) = ranks.run(1, [MODULE], tmp_path_factory.mktemp("aiter"))
    return found


@pytest.mark.parametrize("scenario", ranks.scenarios_of(MODULE))
def test_real_operators(report: dict[str, str], scenario: str) -> None:
    assert report.get(scenario, "the process ended before this scenario") == ""
