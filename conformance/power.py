"""Which combine errors an acceptance rule catches, and whether it accepts correct results: a table.

Scope: ``python -m conformance.power [--tokens 256 --hidden 7168 --top-k 8 --seed 0]``. One combine, ``sum_k w_k y_k``
in float32 stored as BF16, is computed by correct implementations that differ in order and fusing, and by others with
one seeded fault each; rows travel as BF16, or as FP8 with a scale per 128 elements. Columns are this project's bound
and the tolerances other projects publish, those for FP8 where there are any. Where a project's reference quantises as
the wire does (this one's and that of vLLM's combination tests), it does so here; the others compare with unquantised
rows.

Sources of the tolerances: torch 2.13 torch.testing.assert_close; MoRI 624002c8
tests/python/ops/dispatch_combine_test_utils.py check_combine_result; AITER e4048607 aiter/test_common.py checkAllclose
(it logs and returns: scored as if its log line raised); vLLM 0.33.0 tests/kernels/moe (modular kernel combinations;
test_mori_moe); DeepEP tests/test_low_latency.py calc_diff.
What the table does not prove: data and faults are synthetic, nothing ran on AMD hardware, and the ranking of the other
columns depends on the faults chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from conformance.power_faults import CORRECT, FAULTS, FP8_FAULTS, WIRES, Implementation, Round, chunks, draw, store
from reference.formats import BFLOAT16
from reference.intervals import Interval
from reference.sums import matmul


def bound(data: Round) -> Interval:
    """Acceptance of the combine, ``[T, H]``: any order, fused or not, one store."""
    parts = []
    for weights, rows in zip(chunks(data.weights), chunks(data.read), strict=True):
        total = matmul(Interval.exact(weights.unsqueeze(1)), Interval.exact(rows))
        parts.append(total.store(BFLOAT16).apply(lambda end: end[:, 0]))
    return Interval(*(torch.cat([getattr(part, end) for part in parts]) for end in ("value", "lower", "upper")))


# Acceptance rules of others: (wire, output, expected), both in BF16

Accepts = Callable[[str, torch.Tensor, torch.Tensor], bool]


@dataclass(frozen=True)
class Rule:
    """An acceptance rule, and whether its project's reference quantises as the wire does."""

    accepts: Accepts
    models_wire: bool = False


def _torch_default(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(output, expected)
    except AssertionError:
        return False
    return True


def _mori(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-2 if wire == "BF16" else 7e-2
    return torch.allclose(output.float(), expected.float(), atol=tolerance, rtol=tolerance)


def _aiter(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    close = torch.isclose(output, expected, rtol=1e-2, atol=1e-2)
    return float((~close).double().mean()) <= 0.05


def _vllm_combinations(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(output, expected, atol=3e-2, rtol=3e-2)


def _vllm_mori(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    got, wanted = output.float(), expected.float()
    tolerance, share = (0.06, 1.0) if wire == "BF16" else (0.2, 0.99)
    close = torch.isclose(got, wanted, atol=tolerance, rtol=tolerance).double().mean()
    enough = float(close) == 1 if wire == "BF16" else float(close) > share
    return float((got - wanted).norm() / wanted.norm()) < tolerance and enough


def _deepep(wire: str, output: torch.Tensor, expected: torch.Tensor) -> bool:
    x, y = output.double() + 1, expected.double() + 1
    return 1 - float(2 * (x * y).sum() / (x * x + y * y).sum()) < (1e-5 if wire == "BF16" else 9e-4)


OURS = "this project"
RULES = {
    "torch": Rule(_torch_default),
    "MoRI": Rule(_mori),
    "AITER": Rule(_aiter),
    "vLLM 3e-2": Rule(_vllm_combinations, models_wire=True),
    "vLLM MoRI": Rule(_vllm_mori),
    "DeepEP": Rule(_deepep),
}


@dataclass(frozen=True)
class Table:
    """Verdicts of every rule on one wire.

    Attributes:
        wire: key of :data:`WIRES`.
        correct: implementation -> rule -> accepted.
        caught: fault -> rule -> rejected.
        largest: of error over bound on correct results.
    """

    wire: str
    correct: dict[str, dict[str, bool]]
    caught: dict[str, dict[str, bool]]
    largest: float

    def count(self, rule: str) -> int:
        """Faults caught."""
        return sum(row[rule] for row in self.caught.values())

    def accepts_correct(self, rule: str) -> bool:
        """Every correct implementation is accepted."""
        return all(row[rule] for row in self.correct.values())


def _expected(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The float64 combine, in BF16."""
    pairs = zip(chunks(weights.double().unsqueeze(1)), chunks(rows), strict=True)
    return store(torch.cat([(w @ part.double())[:, 0] for w, part in pairs]).float())


def measure(wire: str, tokens: int = 256, hidden: int = 7168, top_k: int = 8, seed: int = 0) -> Table:
    """Judge every implementation by every rule. Raises :class:`ValueError` as :func:`draw` does."""
    data = draw(wire, tokens, hidden, top_k, seed)
    wanted = {
        models_wire: _expected(data.weights, rows) for models_wire, rows in ((False, data.sent), (True, data.read))
    }
    ratios: dict[str, float] = {}
    acceptance = bound(data)

    def accepted(name: str, implementation: Implementation) -> dict[str, bool]:
        output = implementation(data)
        ratios[name] = float(acceptance.error_over_bound(output).max())
        others = {key: rule.accepts(wire, output, wanted[rule.models_wire]) for key, rule in RULES.items()}
        return {OURS: ratios[name] <= 1, **others}

    correct = {name: accepted(name, implementation) for name, implementation in CORRECT.items()}
    faults = FAULTS if wire == "BF16" else {**FAULTS, **FP8_FAULTS}
    caught = {
        name: {rule: not verdict for rule, verdict in accepted(name, implementation).items()}
        for name, implementation in faults.items()
    }
    return Table(wire, correct, caught, max(ratios[name] for name in correct))


def lines(table: Table) -> Iterator[str]:
    """The table as Markdown."""
    rules = [OURS, *RULES]
    yield "| " + " | ".join([f"{table.wire} wire", *rules]) + " |"
    yield "|---" * (len(rules) + 1) + "|"
    for name, row in table.correct.items():
        cells = ("ok" if row[rule] else "REJECTED" for rule in rules)
        yield "| " + " | ".join([f"correct, {name}", *cells]) + " |"
    for name, row in table.caught.items():
        cells = ("caught" if row[rule] else "-" for rule in rules)
        yield "| " + " | ".join([name, *cells]) + " |"
    totals = (str(table.count(rule)) if table.accepts_correct(rule) else "rejects correct data" for rule in rules)
    yield "| " + " | ".join([f"caught of {len(table.caught)}", *totals]) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Print both tables. Returns 1 if this project's bound misses a fault or rejects correct data, else 0."""
    parser = argparse.ArgumentParser(prog="python -m conformance.power", description=__doc__.split("\n\n")[0])
    for name, default in (("tokens", 256), ("hidden", 7168), ("top-k", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    sizes = {"tokens": options.tokens, "hidden": options.hidden, "top_k": options.top_k, "seed": options.seed}
    print("Data and faults are synthetic; no AMD hardware was tested.")
    print(f"{options.tokens} tokens x {options.hidden}, top-{options.top_k}, seed {options.seed}")
    perfect = True
    for wire in WIRES:
        try:
            table = measure(wire, **sizes)
        except ValueError as error:
            parser.error(str(error))
        print("", *lines(table), f"largest error/bound on correct data: {table.largest:.3f}", sep="\n")
        perfect &= table.accepts_correct(OURS) and table.count(OURS) == len(table.caught)
    return 0 if perfect else 1


if __name__ == "__main__":
    sys.exit(main())
