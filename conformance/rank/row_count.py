"""A row's codes do not depend on how many rows there are.

Scope: quantisers whose scales are of a row or less. The largest magnitude of a group has no order, unlike a sum, so
nothing that a launch chooses by the number of rows may show. What a pass does not prove: anything about norms, whose
sums may be split otherwise.
"""

from __future__ import annotations

import torch

from accelerated.operators import (
    NormContract,
    NormOperation,
    NormResult,
    QuantContract,
    QuantOperation,
    QuantResult,
)
from conformance.engine.protocol import Mismatch
from conformance.rank.judge_rows import read_quantised
from conformance.rank.row_inputs import RowInputs
from reference.codecs import Codec, Granularity
from reference.quantisation import undefined
from reference.scales import expand


def mismatch(
    index: int,
    operation: QuantOperation | NormOperation,
    contract: QuantContract | NormContract,
    given: RowInputs,
    found: QuantResult | NormResult,
) -> Mismatch | None:
    """Quantise the first half of the rows alone and compare the codes."""
    rows, columns = given.rows.shape
    if not isinstance(contract, QuantContract) or not isinstance(found, QuantResult):
        return None
    if not contract.rows_alone or not _stands_alone(contract.codec) or rows < 2 or given.num_rows is not None:
        return None
    quantiser: QuantOperation = operation  # type: ignore[assignment]
    codec, half = contract.codec, (rows + 1) // 2
    few = read_quantised(
        index, quantiser.quantise(given.rows[:half].clone(), scale=_cloned(given.scale)), codec, half, columns
    )
    many = read_quantised(index, found, codec, rows, columns)
    if isinstance(few, Mismatch) or isinstance(many, Mismatch):
        return few if isinstance(few, Mismatch) else None  # a malformed result is judged by itself
    promised = ~undefined(given.rows[:half], codec)
    if not codec.zero_codes_defined:
        promised &= expand(few.scales, codec, half, columns) != 0
    wrong = (promised & (few.codes != many.codes[:half])).nonzero()
    if not wrong.numel():
        return None
    row, element = wrong[0].tolist()
    return Mismatch(
        "quantise.row_count",
        index,
        f"a row has other codes among {rows} than among {half}",
        token=row,
        element=element,
        got=hex(int(many.codes[row, element])),
        wanted=hex(int(few.codes[row, element])),
    )


def _cloned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def _stands_alone(codec: Codec) -> bool:
    return codec.static or codec.granularity in (Granularity.TOKEN, Granularity.GROUP)
