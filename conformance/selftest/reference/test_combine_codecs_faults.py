"""Wrong coded combines, each with one defect that a kernel may have, are rejected; the right one beside them is not.

Scope: what reference/combine_bounds.py sees of a defect, on rows like an expert's. A fault is the specification with
the codec, the rows or the sum changed, judged by the codec that was declared. Not seen, and judged on codes and scales
only (test_combine_codecs.py): a scale that is off by one unit in the last place, which BF16 hides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from reference.bounds import combine_acceptance
from reference.combine_codecs import add_product, code_rows, decode_rows, saturated
from reference.combine_numerics import BlockScale, CombineCodec, combine_codec
from reference.formats import E4M3FN, E4M3FNUZ, Ties
from reference.rounding import round_to_bfloat16, round_to_format

Result = Callable[[torch.Tensor, CombineCodec], torch.Tensor]
_RANKS, _HIDDEN = 4, 96


def _made(name: str, fp8: str = "float8_e4m3fn", blocks: int = 0, *, partials: bool = False) -> CombineCodec:
    codec = combine_codec(name, fp8=fp8, scale_dim=blocks, rounds_partials=partials)
    assert codec is not None
    return codec


DIRECT, FNUZ = _made("fp8_direct_cast"), _made("fp8_direct_cast", "float8_e4m3fnuz")
LEVELS = _made("fp8_direct_cast", partials=True)
EIGHT, FOUR = _made("fp8_blockwise", blocks=5), _made("fp4_blockwise", blocks=6)


def _rows() -> torch.Tensor:
    """``[W, n, H]``: small rows, rows beyond the payload, and rows with one large block."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(_RANKS, 12, _HIDDEN, generator=generator)
    rows[:, 4:8] *= 300
    rows[:, 8:, :40] *= 2000
    rows[:, ::3] *= 2.0**-5
    return rows.bfloat16().float()


def _total(values: torch.Tensor, scales: torch.Tensor | None, *, fused: bool = True) -> torch.Tensor:
    total = torch.zeros_like(values[0])
    for rank in range(len(values)):
        one = torch.ones_like(values[rank]) if scales is None else scales[rank]
        total = add_product(total, values[rank], one, fused=fused)
    return total


def _decoded(rows: torch.Tensor, codec: CombineCodec) -> tuple[torch.Tensor, torch.Tensor | None]:
    values, scales = decode_rows(code_rows(rows.flatten(0, 1).bfloat16(), codec), codec, _HIDDEN)
    return values.reshape(rows.shape), None if scales is None else scales.reshape(rows.shape)


def _right(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    if not codec.rounds_partials:
        return round_to_bfloat16(_total(values, scales))
    return round_to_bfloat16(
        saturated(_total(values[:2], None), codec.payload) + saturated(_total(values[2:], None), codec.payload)
    )


def _coded_as(**changes: object) -> Result:
    return lambda rows, codec: _right(rows, replace(codec, **changes))  # type: ignore[arg-type]


def _uncoded(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    return round_to_bfloat16(_total(rows, None))


def _scales_left_out(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    return round_to_bfloat16(_total(_decoded(rows, codec)[0], None))


def _first_sign_kept(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    assert scales is not None
    width = -(-_HIDDEN // codec.blocks)
    scaled = (scales != 1).any(2, keepdim=True)
    signed = torch.cat([torch.where(scaled, -scales[..., :width], scales[..., :width]), scales[..., width:]], dim=2)
    return round_to_bfloat16(_total(values, signed))


def _width_rounded_down(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    assert scales is not None
    of_blocks = scales[..., :: -(-_HIDDEN // codec.blocks)]
    wrong = of_blocks.repeat_interleave(_HIDDEN // codec.blocks, 2)
    wrong = torch.cat([wrong, wrong[..., -1:].expand(*wrong.shape[:2], _HIDDEN - wrong.shape[2])], dim=2)
    return round_to_bfloat16(_total(values, wrong))


def _nibbles_swapped(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    return round_to_bfloat16(_total(values.reshape(*values.shape[:2], -1, 2).flip(3).flatten(2), scales))


def _ties(ties: Ties) -> Result:
    def wrong(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
        limit = codec.payload.max
        return round_to_bfloat16(
            _total(round_to_format(rows.clamp(-limit, limit), codec.payload, ties=ties).float(), None)
        )

    return wrong


def _not_saturated(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    return round_to_bfloat16(_total(round_to_format(rows, codec.payload).float(), None))


def _products_in_bfloat16(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    assert scales is not None
    return round_to_bfloat16(_total(round_to_bfloat16(values * scales), None))


def _additions_in_bfloat16(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, scales = _decoded(rows, codec)
    total = torch.zeros_like(values[0])
    for rank in range(len(values)):
        total = round_to_bfloat16(total + values[rank] * (1.0 if scales is None else scales[rank]))
    return total


def _one_missing(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    return _right(torch.cat([rows[:-1], torch.zeros_like(rows[:1])]), codec)


def _partials_not_saturated(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    values, _ = _decoded(rows, codec)
    halves = [round_to_bfloat16(_total(part, None)) for part in (values[:2], values[2:])]
    return round_to_bfloat16(halves[0] + halves[1])


FAULTS: list[tuple[str, Result, tuple[CombineCodec, ...]]] = [
    ("falls back to rows as they are", _uncoded, (DIRECT, FNUZ, LEVELS, EIGHT, FOUR)),
    ("loses a contribution", _one_missing, (DIRECT, FNUZ, LEVELS, EIGHT, FOUR)),
    ("adds in bfloat16", _additions_in_bfloat16, (DIRECT, FNUZ, EIGHT, FOUR)),
    ("rounds ties away", _ties(Ties.AWAY), (DIRECT, FNUZ)),
    ("truncates", _ties(Ties.TRUNCATE), (DIRECT, FNUZ)),
    ("overflows", _not_saturated, (DIRECT, FNUZ)),
    ("takes the other flavour", _coded_as(payload=E4M3FNUZ), (DIRECT, LEVELS, EIGHT)),
    ("takes the other flavour, too", _coded_as(payload=E4M3FN), (FNUZ,)),
    ("sums nodes in one level", _coded_as(rounds_partials=False), (LEVELS,)),
    ("rounds partial sums to bfloat16", _partials_not_saturated, (LEVELS,)),
    ("scales every block", _coded_as(scale=BlockScale.ALWAYS), (EIGHT,)),
    ("scales where it must only", _coded_as(scale=BlockScale.WHERE_BEYOND), (FOUR,)),
    ("scales rows, not blocks", _coded_as(blocks=1), (EIGHT, FOUR)),
    ("reads no scales", _scales_left_out, (EIGHT, FOUR)),
    ("keeps the sign of the first scale", _first_sign_kept, (EIGHT, FOUR)),
    ("reads scales at floor(H / S)", _width_rounded_down, (EIGHT,)),
    ("swaps the two of a byte", _nibbles_swapped, (FOUR,)),
    ("rounds products to bfloat16", _products_in_bfloat16, (EIGHT, FOUR)),
]


def _error(result: torch.Tensor, rows: torch.Tensor, codec: CombineCodec) -> float:
    nodes = 2 if codec.rounds_partials else 1
    reached = torch.ones(rows.shape[1], _RANKS) > 0
    bound = combine_acceptance(rows, reached, torch.bfloat16, nodes=nodes, codec=codec)
    return float(bound.error_over_bound(result).max())


@pytest.mark.parametrize(("wrong", "codecs"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_defects_are_rejected(wrong: Result, codecs: tuple[CombineCodec, ...]) -> None:
    rows = _rows()
    for codec in codecs:
        assert _error(_right(rows, codec), rows, codec) <= 1, codec.name
        assert _error(wrong(rows, codec), rows, codec) > 1, codec.name
