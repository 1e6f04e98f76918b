"""Experts that go wrong only where one rank holds every expert.

Scope: defects that the acceptance of the shards need not show; see
:mod:`conformance.faults.layer_catalogue`. They prove nothing about defects inside a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.faults.layers import Experts, Given


class AloneWithoutTheLast(Experts):
    """``alone_without_the_last``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        last = (ids == self.owned[-1]) & (self.problem.shards == 1)
        return rows, ids, torch.where(last, 0.0, weights), num_rows


#: Classes by name of the fault.
COMPANY_DEFECTS: dict[str, type[Experts]] = {
    "alone_without_the_last": AloneWithoutTheLast,
}
