"""AITER's fused experts behind the operator interface: which entry is called, with which arguments.

Scope: ``aiter.fused_moe.fused_moe`` on the weights of one rank, and the quantiser whose codes a dispatch carries to it.
The adapter does not know whether it drives the library or its double. What a pass through it does not prove: that the
kernel of the contract's choice ran; AITER logs it (``AITER_LOG_LEVEL=INFO``).

Source of semantics: AITER e4048607, aiter/fused_moe.py:458-797; vLLM 0.33.0's ``AiterExperts`` for what callers pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from accelerated.aiter_ops import expert_layout
from accelerated.aiter_ops.expert_layout import Held
from accelerated.aiter_ops.experts_numerics import ENVIRONMENT, OPERATORS, fake_column, masked, padded_sizes
from accelerated.aiter_ops.library import AiterLibrary
from accelerated.experts import ExpertContract, ExpertProblem
from reference.expert_weights import ExpertWeights
from reference.formats import E2M1


def fix_environment() -> None:
    """Set what the declared choice of kernels takes for granted, before the first call reads it.

    Raises:
        RuntimeError: a variable is set to something else, so that other kernels would run than those declared.
    """
    for name, (wanted, default) in ENVIRONMENT.items():
        value = os.environ.get(name)
        if value is None and wanted != default:
            os.environ[name] = wanted
        elif value is not None and value != wanted:
            raise RuntimeError(
                f"{name} is {value}; the experts' contracts hold for {wanted}: unset it (other values choose kernels "
                "that round elsewhere)"
            )


class AiterExperts:
    """The experts of one rank.

    Args:
        library: AITER or its double.
        name: a key of :data:`accelerated.aiter_ops.experts_numerics.OPERATORS`.
        problem: sizes.
        contract: declared for it.

    Raises:
        LibraryError: the library's experts or shuffles are broken; the message names the part.
        RuntimeError: the environment chooses other kernels than those declared.
    """

    def __init__(self, library: AiterLibrary, name: str, problem: ExpertProblem, contract: ExpertContract) -> None:
        fix_environment()
        self._fused = library.part("fused_moe")
        self._library: AiterLibrary | None = library
        self._name, self._operator = name, OPERATORS[name]
        self._problem, self._contract = problem, contract
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._experts = problem.experts + problem.shared
        self._sizes = padded_sizes(problem, self._operator)
        self._held: Held | None = None

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """See :class:`accelerated.experts.ExpertOperation`.

        Raises:
            RuntimeError: the operation is closed.
            ValueError: weights that are not stored as the contract says, of another number than ``owned``, or in an
                order that AITER's mask cannot express.
        """
        library = self._open()
        if weights.codec != self._contract.weight_codec:
            raise ValueError(f"{self._name}: weights are stored as {weights.codec}; the contract says how")
        if weights.experts != len(owned):
            raise ValueError(f"{self._name}: weights of {weights.experts} experts for {len(owned)} ids")
        sizes = (self._problem.hidden, self._problem.intermediate)
        if tuple(weights.w2.shape[1:]) != sizes:
            raise ValueError(f"{self._name}: W2 is {list(weights.w2.shape[1:])}; the problem has {list(sizes)}")
        mask = expert_layout.expert_mask(owned, self._experts, weights.w1.device)
        if not masked(self._problem) and len(owned) != self._experts:
            raise ValueError(
                f"{self._name}: {len(owned)} of {self._experts} experts on the only rank; it has them all, or the "
                "problem has more shards"
            )
        self._held = expert_layout.lay_out(weights, library, mask if masked(self._problem) else None, self._sizes)

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`accelerated.experts.ExpertOperation`; what vLLM 0.33.0 does before a dispatch through MoRI.

        Codes ``[n, H]`` in the device's FP8, or ``[n, H / 2]`` packed FP4; scales float32 ``[n, 1]`` or
        ``[n, H / 128]``, or E8M0 ``[n, H / 32]``, not shuffled.
        """
        library, wire = self._open(), self._contract.wire
        if wire is None:
            return rows, None
        packed = wire.payload is E2M1
        dtype = library.dtypes.fp4x2 if packed else library.dtypes.fp8
        if not rows.shape[0]:
            # The quantisers launch an empty grid, which HIP calls an invalid configuration.
            scale_type = library.dtypes.fp8_e8m0 if packed else torch.float32
            codes = torch.empty(0, rows.shape[1] // (2 if packed else 1), dtype=torch.uint8, device=rows.device)
            return codes.view(dtype), torch.empty(0, wire.groups(rows.shape[1]), dtype=scale_type, device=rows.device)
        # Weights come in blocks, rows in groups of 128 (the library's quant_remap).
        kind = "per_1x128" if self._operator.quant_type == "per_128x128" else self._operator.quant_type
        quantiser = library.quant.get_hip_quant(getattr(library.enum.QuantType, kind))
        codes, scales = quantiser(rows.contiguous(), quant_dtype=dtype)
        return codes, scales

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`accelerated.experts.ExpertOperation`.

        Raises:
            RuntimeError: the operation is closed or has no weights, or what the library raises.
            ValueError: an argument that the contract does not offer, or of a type the library reads as another.
        """
        library, held = self._open(), self._loaded()
        self._check(rows, ids, weights, scales, num_rows)
        if not rows.shape[0]:
            # As vLLM 0.33.0 does: there is nothing to launch.
            return torch.empty(0, self._problem.hidden, dtype=self._dtype, device=rows.device)
        ids, weights = self._routes(ids, weights)
        limit = self._contract.numerics(rows.shape[0]).limit
        result: torch.Tensor = self._fused.fused_moe(
            self._rows(library, rows, scales),
            held.w1,
            held.w2,
            weights,
            ids,
            expert_mask=held.mask,
            activation=getattr(library.enum.ActivationType, self._operator.activation_type),
            quant_type=getattr(library.enum.QuantType, self._operator.quant_type),
            doweight_stage1=self._operator.stage1,
            w1_scale=held.w1_scale,
            w2_scale=held.w2_scale,
            a1_scale=self._row_scales(library, scales),
            num_local_tokens=num_rows,
            dtype=self._dtype,
            hidden_pad=held.hidden_pad,
            intermediate_pad=held.intermediate_pad,
            bias1=held.bias1,
            bias2=held.bias2,
            swiglu_limit=limit,
            gate_mode="separated",
        )
        # What combines the results takes rows without a gap.
        return result[:, : self._problem.hidden].contiguous()

    def close(self) -> None:
        """Release the weights; the library keeps none."""
        self._library, self._held = None, None

    def _open(self) -> AiterLibrary:
        if self._library is None:
            raise RuntimeError(f"{self._name} was called after close; build a new operation")
        return self._library

    def _loaded(self) -> Held:
        if self._held is None:
            raise RuntimeError(f"{self._name} has no weights; call load first")
        return self._held

    def _routes(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids that AITER may look up in its mask, and the column that it may ask for beside them."""
        if not masked(self._problem):
            return ids.contiguous(), weights.contiguous()
        ids = expert_layout.only_known(ids, self._experts)
        if fake_column(self._problem, self._operator):
            return expert_layout.with_fake_column(ids, weights, self._experts)
        return ids.contiguous(), weights.contiguous()

    def _rows(self, library: AiterLibrary, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            return expert_layout.padded_rows(rows, self._sizes[0]).contiguous()
        wire = self._contract.wire
        if wire is None or wire.payload is not E2M1:
            return rows.contiguous().view(library.dtypes.fp8)
        return expert_layout.padded_rows(rows.contiguous().view(library.dtypes.fp4x2), self._sizes[0] // 2)

    def _row_scales(self, library: AiterLibrary, scales: torch.Tensor | None) -> torch.Tensor | None:
        if scales is None or scales.dtype == torch.float32:
            return None if scales is None else scales.contiguous()
        return expert_layout.padded_rows(scales.contiguous().view(library.dtypes.fp8_e8m0), self._sizes[0] // 32)

    def _check(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        num_rows: torch.Tensor | None,
    ) -> None:
        """Refuse what the library would take for something else."""
        name, wire = self._name, self._contract.wire
        if scales is not None and wire is None:
            raise ValueError(f"{name} takes rows in {self._problem.dtype} only; its contract has no wire")
        if scales is None and rows.dtype != self._dtype:
            raise ValueError(f"{name}: rows are {rows.dtype} without scales; give {self._dtype}, or codes and scales")
        if scales is not None and wire is not None:
            shape = (rows.shape[0], wire.groups(self._problem.hidden))
            width = 1 if wire.payload is E2M1 else 4
            if tuple(scales.shape) != shape or scales.element_size() != width:
                raise ValueError(
                    f"{name}: scales are {list(scales.shape)} {scales.dtype}; the wire has {list(shape)} of {width} "
                    "bytes, and AITER tells float32 from E8M0 by the size alone"
                )
        if ids.dtype != torch.int32 or weights.dtype != torch.float32 or ids.shape != weights.shape:
            raise ValueError(
                f"{name}: ids are {list(ids.shape)} {ids.dtype}, weights {list(weights.shape)} {weights.dtype}; give "
                "int32 and float32 of one shape [M, k]"
            )
        if num_rows is not None and (not self._contract.takes_num_rows or num_rows.dtype != torch.int32):
            raise ValueError(
                f"{name}: num_rows is {num_rows.dtype}; give one int32, and only where the contract takes it"
            )
