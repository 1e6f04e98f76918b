"""AITER's quantisers behind the operator interface: which entry each name calls, with which arguments.

Scope: tensors in, the library's own bytes and layout out; nothing is converted, and what the library raises is raised.
The adapter does not know whether it drives the library or its double. What a pass through it does not prove: that
callers pass what the library wants; it checks only what the contract offers.

Source of semantics: AITER e4048607, aiter/ops/quant.py (get_hip_quant 368, get_torch_quant 350, raw entries 755-790).
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.aiter_ops.library import AiterLibrary
from accelerated.operators import QuantContract, QuantResult


class AiterQuantiser:
    """One quantiser.

    Args:
        library: AITER or its double.
        operator: a name of :data:`accelerated.aiter_ops.contract.QUANTISERS`.
        contract: declared for it.
    """

    def __init__(self, library: AiterLibrary, operator: str, contract: QuantContract) -> None:
        self._library: AiterLibrary | None = library
        self._operator = operator
        self._contract = contract
        self._entry, _, self._form = operator.partition(".")

    def quantise(
        self,
        rows: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        out: QuantResult | None = None,
    ) -> QuantResult:
        """See :class:`accelerated.operators.QuantOperation`.

        Raises:
            RuntimeError: the operation is closed, or what the library raises.
            ValueError: an argument that the contract does not offer, or a static codec without its scale.
        """
        library = self._open()
        self._check(scale, num_rows, out)
        if self._entry == "torch":
            return _viewed(self._torch(library, rows))
        if out is not None:
            return self._into(library, rows, scale, num_rows, out)
        return _viewed(self._hip(library, rows, scale, num_rows))

    def close(self) -> None:
        """Release the operator; the library keeps nothing between calls."""
        self._library = None

    def _open(self) -> AiterLibrary:
        if self._library is None:
            raise RuntimeError(f"{self._operator} was called after close; build a new operation")
        return self._library

    def _check(self, scale: torch.Tensor | None, num_rows: torch.Tensor | None, out: QuantResult | None) -> None:
        if self._contract.codec.static != (scale is not None):
            raise ValueError(f"{self._operator}: scale is {scale}; give it to a static quantiser, and only there")
        for name, value, offered in (
            ("num_rows", num_rows, self._contract.takes_num_rows),
            ("out", out, self._contract.takes_out),
        ):
            if value is not None and not offered:
                raise ValueError(f"{self._operator} takes no {name}; its contract says so")

    def _torch(self, library: AiterLibrary, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kinds, dtypes = library.enum.QuantType, library.dtypes
        kind, dtype = {
            "per_tensor": (kinds.per_Tensor, dtypes.fp8),
            "per_token": (kinds.per_Token, dtypes.fp8),
            "per_1x128": (kinds.per_1x128, dtypes.fp8),
            "per_1x32_fp4": (kinds.per_1x32, dtypes.fp4x2),
        }[self._form]
        codes, scales = library.quant.get_torch_quant(kind)(rows, quant_dtype=dtype)
        return codes, scales

    def _hip(
        self, library: AiterLibrary, rows: torch.Tensor, scale: torch.Tensor | None, num_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kinds, dtypes = library.enum.QuantType, library.dtypes
        options: dict[str, Any] = {"quant_dtype": dtypes.fp4x2 if "fp4" in self._form else dtypes.fp8}
        if self._form.startswith("per_tensor"):
            kind = kinds.per_Tensor
            options["scale"] = scale
        elif self._form.startswith("per_token"):
            kind = kinds.per_Token
            options["num_rows"] = num_rows
        elif self._form.startswith("per_1x128"):
            kind = kinds.per_1x128
            scale_type = dtypes.fp8_e8m0 if "e8m0" in self._form else dtypes.fp32
            options |= {"num_rows": num_rows, "transpose_scale": "transposed" in self._form, "scale_type": scale_type}
        else:
            kind = kinds.per_1x32
            scale_type = dtypes.fp32 if self._form == "per_1x32_fp8" else dtypes.fp8_e8m0
            options |= {"num_rows": num_rows, "shuffle": "shuffled" in self._form, "scale_type": scale_type}
        codes, scales = library.quant.get_hip_quant(kind)(rows, **options)
        return codes, scales

    def _into(
        self,
        library: AiterLibrary,
        rows: torch.Tensor,
        scale: torch.Tensor | None,
        num_rows: torch.Tensor | None,
        out: QuantResult,
    ) -> QuantResult:
        """Call the raw entry behind the wrapper, on the caller's buffers."""
        quant, dtypes = library.quant, library.dtypes
        codes = out.codes.view(dtypes.fp4x2 if "fp4" in self._form else dtypes.fp8)
        scales = out.scales if out.scales.dtype == torch.float32 else out.scales.view(dtypes.fp8_e8m0)
        if scale is not None:
            quant.static_per_tensor_quant(codes, rows, scale)
            return QuantResult(out.codes, scale)
        if self._form == "per_tensor":
            quant.dynamic_per_tensor_quant(codes, rows, scales)
        elif self._form.startswith("per_token"):
            quant.dynamic_per_token_scaled_quant(codes, rows, scales, num_rows=num_rows)
        elif self._form in ("per_1x128", "per_1x128_transposed"):
            quant.dynamic_per_token_scaled_quant(
                codes,
                rows.view(-1, 128),
                scales,
                shuffle_scale=self._form.endswith("transposed"),
                num_rows=num_rows,
            )
        else:
            quant.dynamic_per_group_scaled_quant(
                codes,
                rows,
                scales,
                self._contract.codec.group,
                shuffle_scale=self._form.endswith("shuffled"),
                num_rows=num_rows,
            )
        return out


def _viewed(result: tuple[torch.Tensor, torch.Tensor]) -> QuantResult:
    """The library's tensors, codes and E8M0 scales as bytes."""
    codes, scales = result
    return QuantResult(codes.view(torch.uint8), scales if scales.dtype == torch.float32 else scales.view(torch.uint8))
