"""Experts and layers judged by the dense oracle, for the specification's own and for cells of placement.

Scope: the oracle's results as acceptance intervals. What agreeing with the oracle does not prove: anything about
communication.
"""

from __future__ import annotations

import torch

from reference.expert_numerics import ExpertNumerics
from reference.expert_oracle import experts_expected
from reference.expert_weights import ExpertWeights
from reference.intervals import Interval
from reference.oracle import Expected


def interval_of(expected: Expected, device: torch.device) -> Interval:
    """The oracle's answer as an acceptance."""
    return Interval(expected.value.to(device), expected.lower.to(device), expected.upper.to(device))


def expected_by_oracle(
    rows: Interval,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: ExpertWeights,
    slot_of: torch.Tensor,
    numerics: ExpertNumerics,
    dtype: torch.dtype,
    *,
    quantised: bool = False,
) -> Interval:
    """What :func:`reference.experts.accepted` is, by the oracle; ``rows`` must be a point."""
    expected = experts_expected(
        rows.value,
        ids.tolist(),
        weights,
        local,
        numerics,
        dtype,
        slot_of=slot_of.tolist(),
        quantised=quantised,
    )
    return interval_of(expected, rows.value.device)
