"""Kernels and rounding points of AITER's fused experts, by operator and number of rows.

Scope: plain data without torch, restated from AITER e4048607 (FM is aiter/fused_moe.py). The choice of kernels is the
one without a tuned row, which the session fixes (:data:`ENVIRONMENT`): tuned rows differ by build and by number of
compute units. Which problems run at all is in :mod:`accelerated.aiter_ops.experts_contract`. What a declaration does
not prove: that the hardware keeps it; no kernel was run to write it. Two kinds of kernel come as binaries or from
sources that AITER does not include, and are declared by a hull:

- the one-stage assembly kernels (``fmoe_g1u1``, ``fmoe_g1u1_tkw1``, ``fmoe_fp8_blockscale_g1u1``). Their launch grid is
  (I / tile, blocks) (csrc/py_itfs_cu/asm_fmoe.cu:211), so a work group sees one tile of the intermediate only: it can
  requantise over no more than that, and adds its share of ``W2 h`` to the output, which is of the element type. Tiles,
  groups of the scales and the rounding of the stores are left open (``inner_parts``, ``intermediate_any_group``,
  ``store_ulps``).
- CK-Tile (``moe_cktile2stages``), which cuts bfloat16 off unless told otherwise (ck_tile/core/config.hpp): either
  neighbour is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from accelerated.aiter_ops import numerics as quantisers
from accelerated.experts import ExpertProblem
from reference.codecs import STANDARD, Codec, Granularity
from reference.expert_numerics import SWIGLU_LIMIT, Activation, ExpertNumerics, SlotSum, WeightStage
from reference.formats import FLOAT16, FORMATS, Format

#: What the declared numerics take for granted, by variable: the value, and AITER's default where it is not set. The
#: bounds of Swiglu and A8W4 are read when aiter.fused_moe is imported, the others at the first call of each shape.
ENVIRONMENT: Mapping[str, tuple[str, str]] = {
    "AITER_BYPASS_TUNE_CONFIG": ("1", "0"),  # FM:2369
    "AITER_KSPLIT": ("0", "0"),  # FM:1253
    "AITER_XBFLOAT16": ("0", "0"),  # FM:2405
    "AITER_FLYDSL_FORCE": ("1", "1"),  # FM:2694
    "AITER_FLYDSL_STAGE2_FP8": ("0", "0"),  # aiter/ops/flydsl/moe_kernels.py:2162
    "AITER_MOE_A8W4_BYPASS_QUANT": ("0", "0"),  # FM:77
    "AITER_ENABLE_VSKIP": ("1", "1"),  # csrc/py_itfs_cu/asm_fmoe.cu:257
    "GPTOSS_SWIGLU_MXFP4_BF16_BOUND": ("256", "256"),  # FM:76
    "AITER_ONLINE_TUNE": ("0", "0"),  # FM:2319
}

#: Rows of the padded count up to which a quantiser's two-stage kernels run (FM:2394-2402).
_TWO_STAGE_ROWS = {"fp8_token": 16, "fp8_block": 32}
#: Tiles of the intermediate that the assembly kernels come in, block of 32 rows (hsa/<arch>/fmoe/silu/*.csv).
_TILES = {
    ("gfx942", "fp8_token"): (128, 192, 256, 320, 384, 448, 512),
    ("gfx950", "fp8_token"): (128, 192, 256, 320, 384, 448, 512),
    ("gfx942", "fp8_block"): (128, 256),
    ("gfx950", "fp8_block"): (128, 256, 384),
}
#: Assembly kernels with the routing weight before the activation are in gfx950's table only (FM:1281-1307).
_STAGE1_TILES = {"gfx950": _TILES["gfx950", "fp8_token"]}
#: Padded row counts from which on one stands for all up to the next (FM:1337).
_TIERS = (32768, 131072)
#: From this many rows on gpt-oss' activations are FP4 (FM:790); the actual count, not the padded one.
SWIGLU_BOUND = 256
#: Row counts at which FlyDSL's tiles change (FM:2744-2752), as the largest count before each.
_FLYDSL_ROWS = (1024, 2048, 8192)
#: Multiples of H and of I to which weights and rows are padded with zeros, as serving does for gpt-oss' 2880 (vLLM
#: 0.33.0, AITER's ``hidden_pad`` and ``intermediate_pad``): 256 of H in FlyDSL's first stage and CK-Tile's, 128 of I in
#: FlyDSL's second. The other schemes' kernels know no padding (FM:2900-2930).
MULTIPLES: Mapping[str, tuple[int, int]] = {"mxfp4": (256, 128)}
#: CK-Tile, which has gpt-oss below 256 rows, steps through a second stage's scales in tiles of 256 of I
#: (csrc/ck_tile_gemm_moe_2stages/moe_cktile2stages_common.py:190): half a tile takes the next row's for its own.
SWIGLU_INNER = 256
#: Compute units that the tile heuristic of CK's two-stage kernels is worked out for (aiter/jit/utils/build_targets.py).
COMPUTE_UNITS = {"gfx942": 304, "gfx950": 256}


@dataclass(frozen=True)
class Operator:
    """One way to call ``fused_moe``.

    Attributes:
        scheme: ``bf16``, ``fp8_token``, ``fp8_block`` or ``mxfp4``.
        activation: between the GEMMs.
        stage1: the routing weight goes before the activation (``doweight_stage1``).
        wired: rows may come quantised.
        biased: with biases.
        quant_type: name of the member of ``QuantType``.
        activation_type: name of the member of ``ActivationType``.
    """

    scheme: str
    quant_type: str
    activation: Activation = Activation.SILU
    activation_type: str = "Silu"
    stage1: bool = False
    wired: bool = False
    biased: bool = False


OPERATORS: Mapping[str, Operator] = {
    "fused_moe.bf16": Operator("bf16", "No"),
    "fused_moe.bf16_gelu": Operator("bf16", "No", Activation.GELU, "Gelu"),
    "fused_moe.fp8_token": Operator("fp8_token", "per_Token", wired=True),
    # fmoe_g1u1_tkw1 quantises whatever it is given and knows no row count (FM:1107-1114).
    "fused_moe.fp8_token_stage1": Operator("fp8_token", "per_Token", stage1=True),
    "fused_moe.fp8_block": Operator("fp8_block", "per_128x128", wired=True),
    "fused_moe.mxfp4": Operator("mxfp4", "per_1x32", wired=True),
    "fused_moe.mxfp4_swiglu": Operator("mxfp4", "per_1x32", Activation.SWIGLU, "Swiglu", biased=True),
}


def padded_rows(rows: int) -> int:
    """What the choice of kernels takes for the number of rows (``get_padded_M``, FM:1340)."""
    if rows < _TIERS[0]:
        return 1 << max(rows - 1, 0).bit_length()
    return max(tier for tier in _TIERS if rows >= tier)


def padded_sizes(problem: ExpertProblem, operator: Operator) -> tuple[int, int]:
    """H and I of the weights that the library gets: the least multiples of :data:`MULTIPLES`, or the problem's own."""
    hidden, inner = MULTIPLES.get(operator.scheme, (1, 1))
    if operator.activation is Activation.SWIGLU:
        inner = SWIGLU_INNER
    return -(-problem.hidden // hidden) * hidden, -(-problem.intermediate // inner) * inner


def masked(problem: ExpertProblem) -> bool:
    """Whether the library gets a mask: not where one rank holds every expert (vLLM 0.33.0)."""
    return problem.shards > 1 or problem.shared > 0


@dataclass(frozen=True)
class Choice:
    """What the library does with a call, and so how it rounds. ``choice(rows)`` are the numerics of so many rows."""

    problem: ExpertProblem
    operator: Operator
    arch: str
    fp8: Format

    @property
    def padded(self) -> tuple[int, int]:
        """See :func:`padded_sizes`."""
        return padded_sizes(self.problem, self.operator)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of the one-stage kernels that I is a multiple of; none where there are no such kernels."""
        if self.problem.dtype != "bfloat16":
            return ()  # the table has bfloat16 only (FM:1281-1307)
        found = _STAGE1_TILES.get(self.arch, ()) if self.operator.stage1 else _TILES.get(self._key, ())
        return tuple(tile for tile in found if self.problem.intermediate % tile == 0)

    @property
    def fuses(self) -> bool:
        """Whether the table of one-stage kernels has the operator."""
        return self.problem.dtype == "bfloat16" and (
            self.arch in _STAGE1_TILES if self.operator.stage1 else self._key in _TILES
        )

    @property
    def _key(self) -> tuple[str, str]:
        return (self.arch, self.operator.scheme)

    def one_stage(self, rows: int) -> bool:
        """Whether a call with so many rows takes a one-stage kernel (FM:2394-2402)."""
        if not self.fuses:
            return False
        many = padded_rows(rows) > _TWO_STAGE_ROWS[self.operator.scheme]
        if self.operator.scheme == "fp8_block":
            return many and self.problem.intermediate % 128 == 0
        return many or self.problem.intermediate % 128 != 0

    def __call__(self, rows: int) -> ExpertNumerics:
        """Rounding points of a call with a buffer of ``rows`` rows."""
        element = FORMATS[self.problem.dtype]
        base = ExpertNumerics(
            activation=self.operator.activation,
            limit=SWIGLU_LIMIT if self.operator.activation is Activation.SWIGLU else None,
            weight_codec=self._weights(),
            weight_stage=WeightStage.BEFORE_ACTIVATION if self.operator.stage1 else WeightStage.AFTER_W2,
            # The second stage adds to a zeroed buffer of the element type: CK, FlyDSL's "atomic", the assembly.
            slot_sum=SlotSum.ATOMIC,
            # CK rounds to nearest (type_convert<bhalf_t, float>), gfx950 in hardware.
            intermediate_store=element,
        )
        if self.operator.scheme == "bf16":
            return base
        if self.operator.activation is Activation.SWIGLU and rows < SWIGLU_BOUND:
            return self._split_bf16(base, rows)
        coded = replace(base, input_codec=self._rows(self.problem.hidden))
        if self.one_stage(rows):
            return self._fused(coded)
        coded = replace(coded, intermediate_codec=self._rows(self.problem.intermediate))
        if self.operator.scheme == "fp8_block" and self._may_split(rows):
            # Partial sums go through FP16 (gemm_moe_ck2stages.h, MulABScaleExpertWeightA8W8blkscaleSplitk), then meet
            # in float32; how many there are depends on the compute units (FM:1252-1275).
            return replace(coded, gemm1_partial=FLOAT16, gemm1_parts=self.problem.hidden // 128)
        return coded

    def _fused(self, numerics: ExpertNumerics) -> ExpertNumerics:
        """The hull of a one-stage assembly kernel. Nothing says that the intermediate is rounded before it is
        quantised: a store that may give either neighbour covers that it is not.
        """
        codec = self._rows(self.problem.intermediate)
        whole = replace(codec, granularity=Granularity.TOKEN, group=0)
        return replace(
            numerics,
            intermediate_codec=whole,
            intermediate_any_group=True,
            inner_parts=self.problem.intermediate // min(self.tiles),
            store_ulps=1.0,
        )

    def _split_bf16(self, numerics: ExpertNumerics, rows: int) -> ExpertNumerics:
        """gpt-oss with few rows: CK-Tile in two or more parts of H (FM:2645, 2799), which are added by atomics in the
        element type; the bias comes after them (csrc/kernels/activation_kernels.cu:374).
        """
        element = FORMATS[self.problem.dtype]
        parts = max(2, self.padded[0] // 256) if self._may_split(rows) else 2
        return replace(
            numerics,
            gemm1_store=element,
            gemm1_partial=element,
            gemm1_parts=parts,
            late_bias=True,
            store_ulps=1.0,
        )

    def _may_split(self, rows: int) -> bool:
        """Whether ``get_ksplit`` may divide H (FM:1252-1275), on some number of compute units."""
        sizes = self.problem
        columns = key_columns(sizes, self.operator)
        few = padded_rows(rows) * columns <= local_experts(sizes)
        return few and self.padded[0] >= 512 and self.padded[0] % 256 == 0

    def _rows(self, columns: int) -> Codec:
        """The HIP quantiser of rows of so many columns; sorted and fused forms have the same numerics
        (csrc/kernels/quant_kernels.cu:1818-1860).
        """
        name = {"fp8_token": "hip.per_token", "fp8_block": "hip.per_1x128", "mxfp4": "hip.per_1x32_fp4"}
        return quantisers.QUANTISERS[name[self.operator.scheme]].codec(self.fp8, columns)

    def _weights(self) -> Codec | None:
        """How checkpoints of the scheme are quantised."""
        kind = "fnuz" if self.fp8.name.endswith("fnuz") else "fn"
        name = {"fp8_token": f"token_{kind}", "fp8_block": f"block128_{kind}", "mxfp4": "mxfp4_up"}
        return STANDARD[name[self.operator.scheme]] if self.operator.scheme in name else None

    def boundaries(self) -> tuple[int, ...]:
        """Row counts below the capacity at which the kernels change."""
        sizes, scheme = self.problem, self.operator.scheme
        found: set[int] = set()
        if self.fuses and self.one_stage(_TIERS[0]) != self.one_stage(1):
            found.add(_TWO_STAGE_ROWS[scheme])
        if self.operator.activation is Activation.SWIGLU:
            found.add(SWIGLU_BOUND - 1)
        if scheme == "mxfp4":
            found |= set(_FLYDSL_ROWS)
        powers = [1 << power for power in range(16)]
        for rows in powers:
            changes = self._may_split(rows) != self._may_split(rows + 1)
            if changes and (scheme == "fp8_block" or self.operator.activation is Activation.SWIGLU):
                found.add(rows)
            if (
                scheme in ("bf16", "fp8_token")
                and not self.one_stage(rows + 1)
                and self._tile(rows) != self._tile(rows + 1)
            ):
                found.add(rows)
        return tuple(sorted(count for count in found if count < sizes.capacity))

    def _tile(self, rows: int) -> int:
        """Rows of a block of CK's two-stage kernels (``get_block_size_M``, FM:1227)."""
        units = COMPUTE_UNITS.get(self.arch, 256)
        columns, experts = key_columns(self.problem, self.operator), local_experts(self.problem)
        wide = -(-self.problem.intermediate // 128)
        found = []
        for tile in (32, 64, 128):
            tokens = padded_rows(rows) * columns + experts * tile - columns
            groups = wide * (tokens + tile - 1) // tile
            found.append((-(-groups // units), units - groups % units, tile))
        return min(found, key=lambda each: each[:2])[2]


def fake_column(problem: ExpertProblem, operator: Operator) -> bool:
    """Whether the adapter appends a column of masked ids.

    AITER takes one column off for its key as soon as it sees a mask (FM:2230): callers that fuse shared experts append
    such a column, vLLM 0.33.0 with MoRI and AITER's own test of it do not, and the key only picks tiles then. With one
    column, though, ``get_ksplit`` divides by zero (FM:1252-1270). ``fmoe_g1u1_tkw1`` is for one column alone.
    """
    return masked(problem) and not operator.stage1 and (problem.top_k == 1 or problem.shared > 0)


def key_columns(problem: ExpertProblem, operator: Operator) -> int:
    """Columns of ids that the choice of kernels sees."""
    columns = problem.top_k + problem.shared
    return columns - masked(problem) + fake_column(problem, operator)


def local_experts(problem: ExpertProblem) -> int:
    """Experts of the fullest rank, shared ones included."""
    return -(-problem.experts // problem.shards) + problem.shared
