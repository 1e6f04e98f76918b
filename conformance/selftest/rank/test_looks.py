"""A look at what a dispatch returned: the backend's own tensors against what they held then.

Scope: tensors in this process. Which faults looks bring out is the business of the seeded faults.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from accelerated.interface import Received
from conformance.rank.byte_views import byte_view, differing
from conformance.rank.inputs import Inputs
from conformance.rank.programs import Sent
from conformance.rank.sequence_program import _changed, _Exchange, _look

_VALID = 3


def dispatched(*, copied: bool) -> _Exchange:
    """A dispatch that received three rows; its count is a copy of the library's counter, or that itself."""
    counter = torch.tensor([_VALID], dtype=torch.int32)
    received = Received(
        rows=torch.ones(5, 8),
        ids=torch.zeros(5, 2, dtype=torch.int32),
        weights=torch.ones(5, 2),
        count=counter.clone() if copied else counter,
        counter=counter if copied else None,
    )
    rows, ids, weights, count = (getattr(received, name).clone() for name in ("rows", "ids", "weights", "count"))
    sent = Sent(received, rows, ids, weights, count, scales=None, expert_count=None, source_map=None)
    nothing = cast("Inputs", None)
    return _Exchange(0, 0, 0, False, nothing, nothing, cast("Any", None), nothing, sent=sent)


@pytest.mark.parametrize("copied", [True, False], ids=["copy", "counter"])
def test_a_counter_that_changed_is_seen_behind_a_copy_of_it(copied: bool) -> None:
    one = dispatched(copied=copied)
    assert one.sent is not None
    received = one.sent.received
    assert _changed(_look(0, one), weightless=False) is None
    (received.count if received.counter is None else received.counter).fill_(4)
    found = _changed(_look(0, one), weightless=False)
    assert found is not None
    assert (found.check, found.got, found.wanted) == ("kept.received", "4", "3")
    assert found.message.startswith("1 of 1 elements of the count that step 0 returned changed since")


@pytest.mark.parametrize("name", ["rows", "ids", "weights"])
def test_valid_rows_have_to_stay_and_their_tail_has_not(name: str) -> None:
    one = dispatched(copied=True)
    assert one.sent is not None
    tensor = getattr(one.sent.received, name)
    tensor[_VALID] = 7
    assert _changed(_look(0, one), weightless=False) is None
    tensor[_VALID - 1, 1] = 7
    found = _changed(_look(0, one), weightless=False)
    assert found is not None
    assert f"elements of the {name} that step 0 returned changed since, the first at row 2" in found.message


def test_elements_differ_by_their_bytes() -> None:
    left = torch.tensor([[0.0, torch.nan], [1.0, 2.0]])
    right = torch.tensor([[-0.0, torch.nan], [1.0, 3.0]])
    assert differing(left, right).tolist() == [[True, False], [False, True]]
    assert differing(left.t(), right.t()).tolist() == [[True, False], [False, True]]
    assert not differing(left[:, 1:], left[:, 1:].clone()).any(), "a column is no contiguous memory"
    assert byte_view(torch.tensor([[1, 256]], dtype=torch.int32)).tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
