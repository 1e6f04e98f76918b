"""Configuration and enumerations of the double of ``mori.ops``, and the sizes derived from them.

Scope: field names, defaults, member values and derived capacities as recorded in fixtures/signatures/mori.json.
A valid configuration does not prove that the real kernels accept it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class _Member:
    """A value of a pybind-like enumeration: comparable with its own kind only, hashable, convertible to int."""

    owner = "enum"

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, _Member) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


class _KernelType(_Member):
    owner = "EpDispatchCombineKernelType"


class _QuantType(_Member):
    owner = "EpDispatchCombineQuantType"


class EpDispatchCombineKernelType(_KernelType):
    """Kernel types. Members are instances of a base class: ``isinstance(member, this class)`` is False, as upstream."""

    IntraNode = _KernelType("IntraNode", 0)
    InterNode = _KernelType("InterNode", 1)
    InterNodeV1 = _KernelType("InterNodeV1", 2)
    InterNodeV1LL = _KernelType("InterNodeV1LL", 3)
    AsyncLL = _KernelType("AsyncLL", 4)
    IntraNodeLL = _KernelType("IntraNodeLL", 5)

    def __str__(self) -> str:
        return self.name


class EpDispatchCombineQuantType(_QuantType):
    """Quantisation modes of combine. The configuration wants the string names; members are refused, as upstream."""

    None_ = _QuantType("None_", 0)
    Fp8DirectCast = _QuantType("Fp8DirectCast", 1)
    Fp8BlockwiseQuant = _QuantType("Fp8BlockwiseQuant", 2)
    Fp4BlockwiseQuant = _QuantType("Fp4BlockwiseQuant", 3)

    def __str__(self) -> str:
        return self.name


QUANT_TYPES: dict[str, _QuantType] = {
    "none": EpDispatchCombineQuantType.None_,
    "fp8_direct_cast": EpDispatchCombineQuantType.Fp8DirectCast,
    "fp8_blockwise": EpDispatchCombineQuantType.Fp8BlockwiseQuant,
    "fp4_blockwise": EpDispatchCombineQuantType.Fp4BlockwiseQuant,
}


def normalize_quant_type(quant_type: object, members: bool = False) -> _QuantType:
    """Return the mode for its name (case and outer blanks ignored).

    Args:
        quant_type: a name, or with ``members`` a member of the enumeration.
        members: take members, which upstream refuses.

    Raises:
        ValueError: anything that is not one of the four names, members of the enumeration included.

    Source of semantics: python/mori/ops/dispatch_combine.py.
    """
    if isinstance(quant_type, _QuantType if members else EpDispatchCombineQuantType):
        return quant_type
    if isinstance(quant_type, str) and quant_type.strip().lower() in QUANT_TYPES:
        return QUANT_TYPES[quant_type.strip().lower()]
    raise ValueError(f"quant_type {quant_type!r} is not valid; choose one of {list(QUANT_TYPES)}")


@dataclass
class EpDispatchCombineConfig:
    """Geometry of one operator; see the project's MoRI contract for the meaning of every field.

    Source of semantics: python/mori/ops/dispatch_combine.py.
    """

    data_type: torch.dtype
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    max_total_recv_tokens: int = 0
    use_external_inp_buf: bool = True
    kernel_type: _KernelType = EpDispatchCombineKernelType.IntraNode
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1
    quant_type: str = "none"


def recv_capacity_per_rank(config: EpDispatchCombineConfig) -> int:
    """Rows that one source may send to one destination (include/mori/ops/dispatch_combine/dispatch_combine.hpp)."""
    capacity = config.max_num_inp_token_per_rank
    if config.max_total_recv_tokens > 0:
        wanted = min(config.max_total_recv_tokens, config.world_size * capacity)
        capacity = min(-(-wanted // config.world_size), capacity)
    return capacity


def recv_capacity(config: EpDispatchCombineConfig) -> int:
    """R, rows of every dispatch output."""
    return config.world_size * recv_capacity_per_rank(config)
