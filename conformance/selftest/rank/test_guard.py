"""What a backend does wrong is the backend's failure, never the harness's.

Scope: results of row operators and of an exchange that no judge could read, in this process. A pass proves nothing
about kernels that fail later on a device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from accelerated.interface import Combined, Received
from accelerated.operators import NormResult, QuantResult
from conformance.rank.guard import BackendError, backend_code
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.row_programs import _digest
from conformance.rank.session import _GuardedNorm, _GuardedQuantiser
from reference.problem import Problem

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


PROBLEM = Problem(1, 64, 4, 2, 8)


class Exchanges:
    """An exchange that returns what it is told to, of three tokens in a buffer of eight rows."""

    def __init__(self, buffer: object = None, combined: object = None, counter: object = None) -> None:
        self._buffer, self._combined, self._counter = buffer, combined, counter

    def prepare(self, rows: torch.Tensor, *given: object) -> Received:
        slots = torch.zeros(8, 2, dtype=torch.int32)
        received = Received(rows.new_zeros(8, rows.shape[1]), slots, slots.float(), torch.ones(1, dtype=torch.int32))
        received = replace(received, counter=self._counter)  # type: ignore[arg-type]
        return replace(received, buffer=self._buffer, replay=self.replay)  # type: ignore[arg-type]

    def replay(self, rows: torch.Tensor, *given: object) -> Received:
        return replace(self.prepare(rows), buffer=None)

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> object:
        return self._combined

    def close(self) -> None:
        return None


def exchange(problem: Problem, columns: int = 64, **returns: object) -> tuple[GuardedExchange, Received]:
    """A guarded exchange whose three rows of so many columns were dispatched."""
    guarded = GuardedExchange(Exchanges(**returns), problem)  # type: ignore[arg-type]
    rows = torch.zeros(3, columns, dtype=torch.uint8 if problem.wire else torch.bfloat16)
    slots = torch.zeros(3, 2, dtype=torch.int32)
    return guarded, guarded.prepare(rows, slots, slots.float())


@pytest.mark.parametrize(
    ("wire", "columns", "buffer", "told"),
    [
        ("", 64, None, "buffer is NoneType"),
        ("", 64, (8, 63), r"buffer is \[8, 63\] torch.bfloat16; the interface asks for \[8, 64\]"),
        ("", 64, (7, 64), r"buffer is \[7, 64\]"),
        ("", 32, (8, 64), r"buffer is \[8, 64\] torch.bfloat16; the interface asks for \[8, 32\]"),
        ("", 32, (8, 32), ""),
        ("fp8_tensor", 64, (8, 64), ""),
        ("fp8_tensor", 64, (8, 32), r"asks for \[8, 64\] torch.bfloat16"),
    ],
)
def test_a_buffer_that_cannot_hold_the_experts_rows(wire: str, columns: int, buffer: Any, told: str) -> None:
    problem = replace(PROBLEM, wire=wire, modes=("zero-copy",))
    given = None if buffer is None else torch.empty(buffer, dtype=torch.bfloat16)
    if not told:
        assert exchange(problem, columns, buffer=given)[1].buffer is given
        return
    with pytest.raises(BackendError, match=told):
        exchange(problem, columns, buffer=given)


@pytest.mark.parametrize(
    ("counter", "told"),
    [(torch.ones(1), r"\[1\] torch.float32"), (torch.ones(2, dtype=torch.int32), r"\[2\]"), (3, "int;")],
)
def test_a_librarys_counter_is_one_int32(counter: object, told: str) -> None:
    right = torch.ones(1, dtype=torch.int32)
    assert exchange(PROBLEM, counter=right)[1].counter is right
    with pytest.raises(BackendError, match=f"counter is {told}"):
        exchange(PROBLEM, counter=counter)


def test_the_buffer_of_packed_codes_and_of_a_replay() -> None:
    problem = replace(PROBLEM, wire="mxfp4", modes=("zero-copy", "handle"))
    buffer = torch.empty(8, 64, dtype=torch.bfloat16)
    _, received = exchange(problem, 32, buffer=buffer)
    assert received.replay is not None
    with pytest.raises(BackendError, match="buffer is NoneType"):
        received.replay(torch.zeros(3, 32, dtype=torch.uint8), None, None)
    with pytest.raises(BackendError, match="float32; the interface asks for"):
        exchange(problem, 32, buffer=buffer.float())


@pytest.mark.parametrize(
    ("output", "weights", "told"),
    [
        (torch.zeros(3, 64).bfloat16(), torch.zeros(3, 2), ""),
        (torch.zeros(3, 64).bfloat16(), None, ""),
        (torch.zeros(8, 64).bfloat16(), None, r"output is \[8, 64\] torch.bfloat16; the interface asks for \[3, 64\]"),
        (torch.zeros(3, 63).bfloat16(), None, r"output is \[3, 63\]"),
        (torch.zeros(3, 64), None, "output is .* torch.float32"),
        (None, None, "output is NoneType"),
        (torch.zeros(3, 64).bfloat16(), torch.zeros(3, 1), r"combined weights is \[3, 1\]"),
        (torch.zeros(3, 64).bfloat16(), torch.zeros(8, 2), r"combined weights is \[8, 2\]"),
        (torch.zeros(3, 64).bfloat16(), torch.zeros(3, 2).double(), "combined weights is .* torch.float64"),
        (torch.zeros(3, 64).bfloat16(), (1.0, 2.0), "combined weights is tuple"),
    ],
)
def test_a_combine_that_cannot_be_read(output: Any, weights: Any, told: str) -> None:
    guarded, received = exchange(PROBLEM, combined=Combined(output, weights))
    answers = torch.zeros(8, 64).bfloat16()
    if not told:
        assert guarded.finalize(answers, received).output is output
        return
    with pytest.raises(BackendError, match=told):
        guarded.finalize(answers, received)


def test_a_combine_that_returns_something_else() -> None:
    guarded, received = exchange(PROBLEM, combined=torch.zeros(3, 64))
    with pytest.raises(BackendError, match="output"):
        guarded.finalize(torch.zeros(8, 64).bfloat16(), received)
