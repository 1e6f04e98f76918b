"""What a backend does wrong is the backend's failure, never the harness's.

Scope: results of row operators that no judge could read, in this process. A pass proves nothing about kernels that
fail later on a device.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.operators import NormResult, QuantResult
from conformance.rank.guard import BackendError, backend_code
from conformance.rank.row_programs import _digest
from conformance.rank.session import _GuardedNorm, _GuardedQuantiser

ROWS = torch.ones(2, 32)


class Returns:
    """An operator that returns what it is told to."""

    def __init__(self, result: object) -> None:
        self._result = result

    def quantise(self, rows: torch.Tensor, **given: object) -> object:
        return self._result

    def normalise(self, *given: object) -> object:
        return self._result

    def close(self) -> None:
        return None


ELSEWHERE = torch.empty(2, 32, device="meta")


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "NoneType"),
        ((ROWS, ROWS), "tuple"),
        (QuantResult(None, ROWS), "codes is NoneType"),  # type: ignore[arg-type]
        (QuantResult(ROWS, ELSEWHERE), "scales is on meta"),
    ],
)
def test_a_quantised_result_that_cannot_be_read(result: object, told: str) -> None:
    with pytest.raises(BackendError, match=told):
        _GuardedQuantiser(Returns(result)).quantise(ROWS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (ROWS, "Tensor"),
        (NormResult(ELSEWHERE, ROWS), "output is on meta"),
        (NormResult(ROWS, ELSEWHERE), "residual is on meta"),
        (NormResult(ROWS, ROWS, QuantResult(None, None)), "codes is NoneType"),  # type: ignore[arg-type]
        (NormResult(ROWS, ROWS, (ROWS, ROWS)), "tuple"),  # type: ignore[arg-type]
    ],
)
def test_a_norm_that_cannot_be_read(result: object, told: str) -> None:
    with pytest.raises(BackendError, match=told):
        _GuardedNorm(Returns(result)).normalise(ROWS, None, ROWS[0], 1e-6)  # type: ignore[arg-type]


def test_an_exception_keeps_its_cause() -> None:
    with pytest.raises(BackendError) as caught, backend_code(), backend_code():
        raise ZeroDivisionError("theirs")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_digests_of_changes_that_cancel_differ() -> None:
    left, right = (torch.tensor(row * 128).bfloat16() for row in ([1.0, 2, 2, 1], [2.0, 1, 1, 2]))
    assert _digest(left) != _digest(right)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(2, 250, (64,), dtype=torch.uint8, generator=generator)
    digests = {int(_digest(row))}
    for _ in range(2000):
        places = torch.randperm(64, generator=generator)[:4]
        changed = row.clone()
        changed[places] += torch.tensor([1, 255, 255, 1], dtype=torch.uint8)
        digests.add(int(_digest(changed)))
    assert len(digests) > 1990, "changes whose sum is zero keep the digest"
    assert _digest(torch.zeros(3, dtype=torch.uint8)) != _digest(torch.zeros(4, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_digests_tell_a_word_from_its_complement(dtype: torch.dtype) -> None:
    row = torch.randint(0, 256, (96,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for word in range(0, 96, 8):
        changed = row.clone()
        changed[word : word + 8] ^= 0xFF
        assert _digest(row.view(dtype)) != _digest(changed.view(dtype))
    assert _digest(torch.zeros(96, dtype=torch.uint8)) != _digest(torch.full((96,), 0xFF, dtype=torch.uint8))
