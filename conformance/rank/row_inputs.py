"""What one rank hands to one call of a row operator.

Scope: plain tensors. They prove nothing by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class RowInputs:
    """What one rank hands to one call; tensors in the element type, but a router's bias in its own.

    ``weight`` is of a norm, or a router's bias, which is empty where it takes none.
    """

    rows: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    scale: torch.Tensor | None
    num_rows: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        return {name: t for name, t in vars(self).items() if t is not None}

    def clone(self) -> RowInputs:
        held = (self.residual, self.scale, self.num_rows)
        residual, scale, num_rows = (None if t is None else t.clone() for t in held)
        return RowInputs(self.rows.clone(), residual, self.weight.clone(), scale, num_rows)
