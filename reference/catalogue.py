"""The catalogue of model shapes and gfx architectures kept as JSON under ``fixtures/``.

Scope: read, validate and serve plain data; standard library only, so that collecting tests stays cheap. What a valid
catalogue does not prove: that a number is the one its ``source`` names, or that a kernel runs with the launch
parameters listed for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

#: Data directory of the checkout. The project is always run from one (editable install).
FIXTURES: Path = Path(__file__).resolve().parent.parent / "fixtures"

#: MoRI's kernel types (MoRI 624002c8, include/mori/ops/dispatch_combine/dispatch_combine.hpp:56).
KERNEL_TYPES: tuple[str, ...] = ("IntraNode", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL", "IntraNodeLL")

#: vLLM all-to-all backends that are MoRI (vLLM 0.33.0, ``--all2all-backend``).
VLLM_BACKENDS: tuple[str, ...] = ("mori_high_throughput", "mori_low_latency")

T = TypeVar("T")


class CatalogueError(ValueError):
    """An unknown name, or a fixture that is missing or malformed. The message says which, and what would do."""


# Field metadata read by the decoder: "minimum" of an integer (1 unless given) and "choices" of a string or of a key.
_FROM_ZERO = {"minimum": 0}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model's MoE layers.

    Attributes:
        name: key in the catalogue, the file's stem.
        covers: Hugging Face repositories that have this shape.
        hidden: H, elements of one token's activation.
        experts: E, routed experts of a layer.
        top_k: k, routed experts per token.
        intermediate: I, intermediate size of one routed expert.
        expert_groups: groups the router divides the experts into, or None if it has no groups.
        groups_per_token: groups a token may be routed to, or None if the router has no groups.
        shared_experts: experts every token visits besides the routed ones.
        first_dense_layers: leading layers that are not MoE, or None if dense layers lie elsewhere.
        source: where the numbers come from.
        note: what is peculiar about the shape; may be empty.
    """

    name: str
    covers: tuple[str, ...]
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    expert_groups: int | None
    groups_per_token: int | None
    shared_experts: int = field(metadata=_FROM_ZERO)
    first_dense_layers: int | None = field(metadata=_FROM_ZERO)
    source: str
    note: str = ""

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise CatalogueError(f"top_k is {self.top_k}; it cannot exceed experts = {self.experts}")
        groups, chosen = self.expert_groups, self.groups_per_token
        if groups is None or chosen is None:
            if groups is not chosen:
                raise CatalogueError(f"groups_per_token is {chosen} but expert_groups is {groups}; give both or null")
        elif self.experts % groups:
            raise CatalogueError(f"expert_groups is {groups}; it must divide experts = {self.experts}")
        elif chosen > groups:
            raise CatalogueError(f"groups_per_token is {chosen}; it cannot exceed expert_groups = {groups}")
        elif self.top_k > chosen * (self.experts // groups):
            raise CatalogueError(
                f"top_k is {self.top_k}; {chosen} groups of {self.experts // groups} experts have fewer"
            )


@dataclass(frozen=True)
class LaunchParameters:
    """Launch geometry of a MoRI operator: the fields of the same name in ``EpDispatchCombineConfig``."""

    block_num: int
    warp_num_per_block: int
    rdma_block_num: int = field(metadata=_FROM_ZERO)


@dataclass(frozen=True)
class KernelLaunch:
    """Launch parameters of one kernel type on one node and on more (None: it does not run there), and their source."""

    single_node: LaunchParameters | None
    multi_node: LaunchParameters | None
    source: str


@dataclass(frozen=True)
class VllmChoice(LaunchParameters):
    """Kernel type and launch parameters that vLLM picks."""

    kernel_type: str = field(metadata={"choices": KERNEL_TYPES})


@dataclass(frozen=True)
class VllmBackend:
    """vLLM's choice for one of its MoRI backends on one node and on more."""

    single_node: VllmChoice
    multi_node: VllmChoice


@dataclass(frozen=True)
class Fp8Format:
    """The 8-bit float of an architecture.

    Attributes:
        dtype: name of the torch dtype.
        max: largest representable value.
        vllm_quant_max: the maximum that vLLM's quantisers scale to.
        source: where the maxima come from.
    """

    dtype: str = field(metadata={"choices": ("float8_e4m3fn", "float8_e4m3fnuz")})
    max: float
    vllm_quant_max: float
    source: str

    def __post_init__(self) -> None:
        if self.vllm_quant_max > self.max:
            raise CatalogueError(f"vllm_quant_max is {self.vllm_quant_max}; it cannot exceed max = {self.max}")


@dataclass(frozen=True)
class Architecture:
    """What the suite needs to know about one gfx architecture.

    Attributes:
        name: key in the catalogue, e.g. ``"gfx942"``.
        products: marketing names, for people.
        wave_size: lanes of a wavefront as MoRI launches it.
        fp8: its 8-bit float.
        kernel_types: MoRI kernel types available with the default symmetric backend.
        kernel_types_source: where that list comes from.
        symmetric_backend: MoRI's default for symmetric buffers, ``"shmem"`` or ``"cco"``.
        vllm: vLLM's choice per backend name, or None if vLLM has no branch for the architecture.
        vllm_note: why ``vllm`` is None; empty otherwise.
        launch: launch parameters per kernel type, one entry for each of ``kernel_types``.
    """

    name: str
    products: tuple[str, ...]
    wave_size: int
    fp8: Fp8Format
    kernel_types: tuple[str, ...] = field(metadata={"choices": KERNEL_TYPES})
    kernel_types_source: str
    symmetric_backend: str = field(metadata={"choices": ("shmem", "cco")})
    launch: Mapping[str, KernelLaunch] = field(metadata={"choices": KERNEL_TYPES})
    vllm: Mapping[str, VllmBackend] | None = field(metadata={"choices": VLLM_BACKENDS})
    vllm_note: str = ""

    def __post_init__(self) -> None:
        if set(self.launch) != set(self.kernel_types):
            raise CatalogueError(f"launch has {_names(self.launch)}; it needs exactly {_names(self.kernel_types)}")
        if self.vllm is None:
            if not self.vllm_note:
                raise CatalogueError("vllm is null; say why in vllm_note")
            return
        if set(self.vllm) != set(VLLM_BACKENDS):
            raise CatalogueError(f"vllm has {_names(self.vllm)}; it needs exactly {_names(VLLM_BACKENDS)}")
        for backend in self.vllm.values():
            for choice in (backend.single_node, backend.multi_node):
                if choice.kernel_type not in self.kernel_types:
                    raise CatalogueError(f"vllm names kernel type {choice.kernel_type}, which kernel_types lacks")

    def launch_parameters(self, kernel_type: str, nodes: int) -> LaunchParameters:
        """Launch parameters the adapter uses for a kernel type on ``nodes`` nodes.

        Raises:
            CatalogueError: the architecture lacks the kernel type, or the kernel type does not span nodes.
        """
        _check_nodes(nodes)
        if kernel_type not in self.launch:
            raise CatalogueError(
                f"kernel type {kernel_type!r} is not available on {self.name}; choose {_names(self.kernel_types)}"
            )
        entry = self.launch[kernel_type]
        parameters = entry.single_node if nodes == 1 else entry.multi_node
        if parameters is None:
            raise CatalogueError(
                f"kernel type {kernel_type} runs on one node only, not on {nodes}; use an InterNode type"
            )
        return parameters


def model_shapes() -> dict[str, ModelShape]:
    """Every model shape by name, in alphabetical order.

    Raises:
        CatalogueError: the fixtures are missing, or one is malformed.
    """
    return dict(_read(FIXTURES / "models", ModelShape))


def model_shape(name: str) -> ModelShape:
    """The model shape of that name.

    Raises:
        CatalogueError: no such model, or a malformed fixture.
    """
    return _pick("model", name, model_shapes())


def architectures() -> dict[str, Architecture]:
    """Every gfx architecture by name, in alphabetical order.

    Raises:
        CatalogueError: the fixtures are missing, or one is malformed.
    """
    return dict(_read(FIXTURES / "architectures", Architecture))


def architecture(name: str) -> Architecture:
    """The gfx architecture of that name. Feature suffixes as in ``gfx942:sramecc+:xnack-`` are the caller's to strip.

    Raises:
        CatalogueError: no such architecture, or a malformed fixture.
    """
    return _pick("architecture", name, architectures())


def vllm_kernel_type(backend_name: str, nodes: int, arch: Architecture) -> tuple[str, LaunchParameters]:
    """MoRI kernel type and launch parameters that vLLM uses for one of its MoRI backends.

    Source: vLLM 0.33.0, the all-to-all manager of the MoRI backends: one node takes IntraNode whatever the backend.

    Args:
        backend_name: ``"mori_high_throughput"`` or ``"mori_low_latency"``.
        nodes: nodes the ranks are spread over.
        arch: the architecture.

    Raises:
        CatalogueError: not a MoRI backend of vLLM, no node, or an architecture that vLLM has no branch for.
    """
    if backend_name not in VLLM_BACKENDS:
        raise CatalogueError(f"{backend_name!r} is no MoRI backend of vLLM; choose one of {_names(VLLM_BACKENDS)}")
    _check_nodes(nodes)
    if arch.vllm is None:
        raise CatalogueError(
            f"vLLM does not run {backend_name} on {arch.name}: {arch.vllm_note}; name a kernel type instead "
            f"({_names(arch.kernel_types)})"
        )
    backend = arch.vllm[backend_name]
    choice = backend.single_node if nodes == 1 else backend.multi_node
    return choice.kernel_type, LaunchParameters(choice.block_num, choice.warp_num_per_block, choice.rdma_block_num)


def _check_nodes(nodes: int) -> None:
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise CatalogueError(f"nodes is {nodes!r}; it must be an integer of at least 1")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _pick(kind: str, name: str, entries: dict[str, T]) -> T:
    if name not in entries:
        raise CatalogueError(f"unknown {kind} {name!r}; choose one of {_names(entries)}")
    return entries[name]


@cache
def _read(directory: Path, kind: type[T]) -> Mapping[str, T]:
    files = sorted(directory.glob("*.json"))
    if not files:
        raise CatalogueError(
            f"no fixtures in {directory}; run from a checkout (pip install -e .), which holds fixtures/"
        )
    entries: dict[str, T] = {}
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        except (OSError, ValueError) as error:
            raise CatalogueError(f"{file}: not readable as JSON: {error}") from error
        entry = _decode(kind, document, str(file), {})
        if entry.name != file.stem:
            raise CatalogueError(f"{file}: name is {entry.name!r}; it must be the file's stem {file.stem!r}")
        entries[file.stem] = entry
    return MappingProxyType(entries)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # json keeps the last of two equal keys without a word; a fixture with both is a slip of the editor.
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} appears twice")
    return dict(pairs)


def _decode(kind: Any, value: object, where: str, metadata: Mapping[str, Any]) -> Any:
    """``value`` as the annotated type ``kind``; ``where`` is the file and the path of the field, for the message."""
    if isinstance(kind, UnionType):
        return None if value is None else _decode(get_args(kind)[0], value, where, metadata)
    choices: tuple[str, ...] = metadata.get("choices", ())
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise CatalogueError(f"{where}: is {value!r}; it must be an object")
        if is_dataclass(kind):
            return _decode_object(kind, value, where)
        return MappingProxyType(
            {_choice(k, choices, where): _decode(get_args(kind)[1], v, _at(where, k), {}) for k, v in value.items()}
        )
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not value or len(value) != len({repr(item) for item in value}):
            raise CatalogueError(f"{where}: is {value!r}; it must be a list of at least one string, none of them twice")
        return tuple(_decode(str, item, where, metadata) for item in value)
    if kind is str:
        if not isinstance(value, str) or not value.strip():
            raise CatalogueError(f"{where}: is {value!r}; it must be a string that says something")
        return _choice(value, choices, where)
    if kind is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CatalogueError(f"{where}: is {value!r}; it must be a positive finite number")
        return float(value)
    minimum: int = metadata.get("minimum", 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CatalogueError(f"{where}: is {value!r}; it must be an integer of at least {minimum}")
    return value


def _decode_object(kind: Any, value: dict[str, object], where: str) -> Any:
    hints = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise CatalogueError(f"{where}: unknown key {unknown[0]!r}; the keys are {_names(known)}")
    missing = [name for name, entry in known.items() if entry.default is MISSING and name not in value]
    if missing:
        raise CatalogueError(f"{where}: key {missing[0]!r} is missing")
    arguments = {
        name: _decode(hints[name], item, _at(where, name), known[name].metadata) for name, item in value.items()
    }
    try:
        return kind(**arguments)
    except CatalogueError as error:
        raise CatalogueError(f"{where}: {error}") from None


def _at(where: str, key: str) -> str:
    return f"{where}: {key}" if where.endswith(".json") else f"{where}.{key}"


def _choice(value: str, choices: tuple[str, ...], where: str) -> str:
    if choices and value not in choices:
        raise CatalogueError(f"{where}: is {value!r}; choose one of {_names(choices)}")
    return value
