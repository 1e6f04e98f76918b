"""Seeded faults of experts and of whole layers: what each is, which property and check catch it, its minimum.

Scope: plain data without torch; the defects are in :mod:`conformance.faults.layers`. The minima are written down from
the definition of each fault, not read off a run. They do not say how likely a fault is to be met.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conformance.cases import Rows

_STANDIN = "aiter-standin"
_WHOLE = "mori-standin+aiter-standin"


@dataclass(frozen=True)
class LayerFault:
    """A seeded fault.

    Attributes:
        name: what :mod:`conformance.faults` calls it.
        description: what goes wrong.
        source: the real defect that it repeats; "" where it stands for a kind of defect.
        path: operator of the experts, or path of the layer, whose cells catch it.
        rounds: routing of the minimum, ``[round][rank][token][slot]``.
        cell: sizes of the minimum's cell that say something about the fault.
        settings: of every round of the minimum, away from the plainest.
        check: what the failing check is called.
        subject: the property that catches it.
        base: the backend that has it.
        arch: architecture on which it is one.
        routed: cells with a router catch it, and no others.
    """

    name: str
    description: str
    source: str
    path: str
    rounds: tuple[Rows, ...]
    cell: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    check: str = "experts.output"
    subject: str = "experts"
    base: str = _STANDIN
    arch: str = "gfx942"
    routed: bool = False

    @property
    def backend(self) -> str:
        """What ``--backend`` takes."""
        return f"conformance.faults:{self.name}"


def _alone(*tokens: tuple[int, ...]) -> tuple[Rows, ...]:
    """One round of experts alone."""
    return ((tokens,),)


def _on_two(*tokens: tuple[int, ...], rounds: int = 1) -> tuple[Rows, ...]:
    """Rounds on two ranks, all tokens on the first."""
    return ((tokens, ()),) * rounds


_BF16 = "fused_moe.bf16"
_LAYER = "IntraNode/fused_moe.bf16"
#: What a router of eight experts is asked for at the least.
_EIGHT = tuple(range(8))

_FAULTS = (
    LayerFault(
        "mask_as_map",
        "the 0/1 mask is taken for a map to slots: every local route gets the second local expert",
        "vllm#29773, ATOM#887",
        _BF16,
        _alone((0,)),
        {"experts": 2},
    ),
    LayerFault(
        "map_as_mask",
        "local routes count on from the first local expert in their order of arrival",
        "vllm#49758",
        _BF16,
        _alone((1,)),
        {"experts": 2},
    ),
    LayerFault(
        "histogram_as_count",
        "the row count is that of the first local expert",
        "vllm#53261",
        _BF16,
        _alone((0,)),
        {"shards": 2},
        settings={"counted": True},
    ),
    LayerFault(
        "long_buffer_zeros",
        "valid rows are zero where the buffer is 32 times as long",
        "vllm#53108",
        _BF16,
        _alone((0,)),
        settings={"tail": 31},
    ),
    LayerFault(
        "tail_leaks",
        "rows beyond the count are multiplied by zero and added",
        "aiter#3677",
        _BF16,
        _alone((0,)),
        settings={"tail": 2},
    ),
    LayerFault("gate_up_swapped", "the up half is taken for the gate", "", _BF16, _alone((0,))),
    LayerFault(
        "weights_ignored", "every routing weight is one", "", _BF16, _alone((0,)), settings={"weighting": "positive"}
    ),
    LayerFault(
        "negative_weights_lost",
        "negative routing weights count as zero",
        "",
        _BF16,
        _alone((0,)),
        settings={"weighting": "signed"},
    ),
    LayerFault(
        "duplicate_once",
        "an expert named twice counts once",
        "",
        "experts.bf16",
        _alone((0, 0)),
        {"top_k": 2},
        base="reference",
    ),
    LayerFault(
        "masked_computed", "a masked slot goes to the first local expert", "", _BF16, _alone((-1,)), {"shards": 2}
    ),
    LayerFault("rows_behind_a_tile", "rows from the 33rd on are zero", "", _BF16, _alone(*((0,),) * 33)),
    LayerFault(
        "scale_of_next_row",
        "weight scales are those of the next output channel",
        "",
        "fused_moe.fp8_token",
        _alone((0,)),
    ),
    LayerFault(
        "second_quantisation",
        "rows are quantised, dequantised and quantised again with other scales",
        "vllm#37418",
        "fused_moe.fp8_block",
        _alone((0,)),
    ),
    LayerFault(
        "bias_by_global_id",
        "biases are looked up by global id",
        "aiter#3208",
        "experts.swiglu_mxfp4",
        _alone((2,)),
        {"shards": 2, "experts": 4},
        base="reference",
    ),
    LayerFault(
        "cached_by_rows",
        "a call with the rows of the call before returns its output",
        "",
        _BF16,
        _alone((0,)),
        settings={"relation": "scaled weights"},
        check="experts.relation",
    ),
    LayerFault(
        "unsteady",
        "the second of two equal calls is off by a last bit",
        "",
        "experts.bf16",
        _alone((0,)),
        settings={"relation": "repeat"},
        check="experts.bits",
        base="reference",
    ),
    LayerFault(
        "alone_without_the_last",
        "a rank that holds every expert leaves the last one out",
        "",
        _BF16,
        _alone((1,)),
        {"experts": 2, "shards": 2},
        settings={"relation": "shards added"},
        check="experts.shards",
    ),
    LayerFault(
        "padding_names_row_zero",
        "entries that fill up a block name row 0, slot 0",
        "ATOM's padding tiles, aiter#2478",
        "moe_sorting",
        _alone((0,)),
        check="sort.entries",
        subject="sort",
    ),
    LayerFault(
        "sort_in_int64",
        "entries are twice as wide as the kernels read them",
        "",
        "moe_sorting",
        _alone((0,)),
        check="sort.layout",
        subject="sort",
    ),
    LayerFault(
        "sort_weights_by_slot",
        "weights of the second slot are those of the first",
        "",
        "moe_sorting",
        _alone((0, 1)),
        {"top_k": 2},
        settings={"weighting": "positive"},
        check="sort.weights",
        subject="sort",
    ),
    LayerFault(
        "sort_ignores_count",
        "rows beyond the count are sorted too",
        "aiter#4375",
        "moe_sorting",
        _alone(),
        settings={"tail": 1},
        check="sort.totals",
        subject="sort",
    ),
    LayerFault(
        "sort_names_global_experts",
        "blocks name the global id of their expert",
        "",
        "moe_sorting",
        _alone((1,)),
        {"shards": 2},
        check="sort.experts",
        subject="sort",
    ),
    LayerFault(
        "buffer_not_cleared",
        "the row that the first token's experts add to is not zero",
        "",
        "moe_sorting",
        _alone((0,)),
        check="sort.cleared",
        subject="sort",
    ),
    LayerFault(
        "local_experts_only",
        "slots of other ranks' experts are left out",
        "vllm#37529",
        _LAYER,
        _on_two((1,)),
        check="layer.output",
        subject="layer",
        base=_WHOLE,
    ),
    LayerFault(
        "last_slot_lost",
        "the last of several slots is left out",
        "",
        _LAYER,
        _alone((0, 1)),
        {"top_k": 2},
        check="layer.output",
        subject="layer",
        base=_WHOLE,
    ),
    LayerFault(
        "tokens_swapped",
        "the first two tokens of a rank get each other's output",
        "",
        _LAYER,
        (((((0,), (0,)),)),),
        check="layer.output",
        subject="layer",
        base=_WHOLE,
    ),
    LayerFault(
        "stale_replica",
        "weights of a rank's last expert are not moved",
        "EPLB#22, sglang#25882",
        _LAYER,
        (),
        check="layer.output",
        subject="eplb",
        base=_WHOLE,
    ),
    LayerFault(
        "replica_bit_flipped",
        "the first gate row of the last expert of rank 0 has its last bits flipped",
        "",
        "IntraNode/fused_moe.fp8_token",
        _on_two((1,)),
        {"top_k": 1},
        check="eplb.replicas",
        subject="eplb",
        base=_WHOLE,
    ),
    LayerFault(
        "row_bit_flipped",
        "rows arrive with the last bit of their first element flipped",
        "",
        "IntraNode/fused_moe.fp8_token",
        _on_two((0,)),
        # With half of it two ranks have 16 rows, and a path that says how it rounds: the acceptance sees the bit.
        {"capacity": 16},
        check="layer.equal",
        subject="layer",
        base=_WHOLE,
    ),
    LayerFault(
        "load_of_own_tokens",
        "a rank counts the load of its own tokens only",
        "",
        _LAYER,
        _on_two((3,)),
        {"top_k": 1},
        check="eplb.load",
        subject="eplb",
        base=_WHOLE,
    ),
    LayerFault(
        "weights_read_early",
        "the layer does not wait for the router's stream and reads the weights of the round before",
        "",
        _LAYER,
        _alone(_EIGHT) * 2,
        {"experts": 8, "mode": "drained"},
        {"weighting": "positive"},
        check="route.weights",
        subject="layer",
        base=_WHOLE,
        routed=True,
    ),
    LayerFault(
        "weights_of_padded_rows",
        "the router's weights are rows of a wider buffer, which the layer reads one after another",
        "",
        _LAYER,
        _alone(_EIGHT, _EIGHT),
        {"experts": 8},
        check="layer.output",
        subject="layer",
        base=_WHOLE,
        routed=True,
    ),
    LayerFault(
        "ids_untranslated",
        "the router's logical ids are dispatched as physical ones",
        "vllm#30559",
        "one-level/fused_moe.fp8_token_stage1",
        # Dealt out in turn to two ranks, expert 0 stays in its place and 1 does not.
        _on_two((1,)),
        {"experts": 32, "top_k": 1},
        check="layer.output",
        subject="layer",
        base="reference+aiter-standin",
        routed=True,
    ),
)

#: Faults of experts and layers by name.
LAYER_FAULTS = {fault.name: fault for fault in _FAULTS}
