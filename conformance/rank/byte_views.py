"""Tensors as bytes, so that -0 is not 0 and a NaN is itself.

What equal bytes do not prove: equal shapes, strides or element types.
"""

from __future__ import annotations

import torch


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, ``[n]`` uint8, in the order of its elements."""
    return tensor.contiguous().flatten().view(torch.uint8)


def differing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Elements whose bytes differ, bool of the shape that both tensors have; their element types are of one size."""
    pair = (byte_view(t).view(*t.shape, t.element_size()) for t in (left, right))
    return torch.ne(*pair).any(-1)
