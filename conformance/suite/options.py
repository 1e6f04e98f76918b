"""Command-line options of the suite and their validation; every error names the value, the limit and the fix.

What is not decided here: which cells follow from the options (the plan) and whether the machine can run them
(preflight).
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from accelerated.interface import Backend
from accelerated.layer import JOIN, halves_of, split_path
from accelerated.mori_ep import transports
from accelerated.operators import operators_of
from accelerated.registry import BackendError, backend
from conformance.engine.world_protocol import read_token, split_address
from conformance.hazards.catalogue import chosen
from conformance.suite import preflight
from conformance.suite.layer_plan import is_layer
from conformance.suite.plan import DEFAULT_EP_SIZES
from conformance.suite.seats import Seat
from conformance.suite.waivers import Waiver, WaiverError, read_waivers
from reference.catalogue import CatalogueError, ModelShape, architectures, model_shape, model_shapes

TIERS = ("smoke", "gate", "explore", "replay")
AUTO = "auto"
COMPANIONS = ("reference", "allgather", f"reference{JOIN}reference")
#: Dispatches that every build of torch has, beside the experts under test: all-to-all, none at all, and the
#: specification's, for experts that take no others (:func:`conformance.suite.routed_plan.lends_its_dispatch`).
NAIVE_DISPATCH = ("allgather", "replicated", "reference")
MAX_EP_SIZE = 64


@dataclass(frozen=True)
class Launched:
    """Sizes of a launched world."""

    ranks: int
    nodes: int  # that torchrun was given
    hosts: tuple[str, ...]
    seats: tuple[Seat, ...] = ()  # what the agents say of their hosts, by rank

    def holds(self, world_size: int, nodes: int) -> bool:
        """Whether a cell runs there: on all ranks, and no node of its spans two of the world's."""
        return world_size == self.ranks and nodes % self.nodes == 0

    @property
    def text(self) -> str:
        """Sizes in words."""
        return f"{self.ranks} ranks on {self.nodes} node{'s' if self.nodes > 1 else ''}"


@dataclass(frozen=True)
class Options:
    """Validated options of a run; identical in the controller and in every worker."""

    backends: tuple[str, ...]
    companions: tuple[str, ...]
    kernel_types: tuple[str, ...]
    ep_sizes: tuple[int, ...]
    device: str
    arch: str
    tier: str
    models: tuple[ModelShape, ...]
    only_models: bool
    require_hardware: bool
    output: Path
    seed: int
    time_budget_s: float
    reduce_budget_s: float
    replay: tuple[Path, ...]
    ep_sizes_given: bool = False  # what was not given follows the machine
    arch_given: bool = False
    operators: tuple[str, ...] = ()
    workers: int = 1  # processes that run cells at a time
    waivers: tuple[Waiver, ...] = ()
    expect_arch: str = ""
    transport: str = transports.DEFAULT  # of MoRI's puts within a host
    world: str = ""  # address on which the agents of a launched world are awaited
    launched: Launched | None = None  # what came together there
    hazards: tuple[str, ...] = ()  # to probe in the place of a run
    gate_hazards: bool = False

    @property
    def records(self) -> Path:
        """Where this run's record files go."""
        return self.output / "records"

    @property
    def failures(self) -> Path:
        """Where failures are kept, a directory each."""
        return self.output / "failures"


def add_options(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("ep-conformance", "expert-parallel conformance")
    group.addoption(
        "--backend",
        action="append",
        default=None,
        metavar="NAME",
        help="backend under test: auto, a registered name, package.module:factory, or a+b for whole layers with a's "
        "dispatch and combine and b's experts; may be repeated (default: auto, which is mori, aiter and mori+aiter on "
        "a ROCm machine, and their stand-ins elsewhere)",
    )
    group.addoption(
        "--kernel-type",
        action="append",
        default=None,
        metavar="TYPE",
        help="kernel type to keep, MoRI's or vLLM's name; may be repeated (default: all). Row operators are left out "
        "unless --operator names some",
    )
    group.addoption(
        "--operator",
        action="append",
        default=None,
        metavar="NAME",
        help="quantiser, norm, AllReduce + norm, router, sort or experts to keep; may be repeated (default: all). "
        "Kernel types are left out unless --kernel-type names some; of layers, those with these experts stay",
    )
    group.addoption("--ep-sizes", default=None, metavar="LIST", help="expert-parallel sizes (default: 1,2,4,8)")
    group.addoption(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where the ranks run (default: auto, which is cuda for mori and cpu otherwise)",
    )
    group.addoption(
        "--arch",
        default=None,
        metavar="GFX",
        help="gfx architecture whose contract applies (default: the device's, or gfx942)",
    )
    group.addoption("--tier", default="gate", choices=TIERS, help="how much to run (default: gate)")
    group.addoption(
        "--model", action="append", default=None, metavar="NAME", help="run only this real model shape; may be repeated"
    )
    group.addoption("--require-hardware", action="store_true", help="refuse stand-ins and the CPU")
    group.addoption(
        "--output-dir",
        default=".conformance",
        metavar="DIR",
        help="directory for everything that is written (default: .conformance)",
    )
    group.addoption("--explore-seed", type=int, default=None, metavar="N", help="seed of the explore tier")
    group.addoption("--time-budget", type=float, default=600.0, metavar="S", help="seconds the explore tier may take")
    group.addoption(
        "--reduce-budget",
        type=float,
        default=90.0,
        metavar="S",
        help="seconds one failure's reduction may take (default: 90)",
    )
    group.addoption(
        "--waivers",
        default=None,
        metavar="FILE",
        help="TOML file of known failures with their issues: they are not drawn, a few are run and must fail as said",
    )
    group.addoption(
        "--expect-arch",
        default=None,
        metavar="GFX",
        help="end the run with exit 3 unless every visible GPU is of this architecture",
    )
    group.addoption(
        "--transport",
        default=None,
        choices=tuple(transports.TRANSPORTS),
        help="what MoRI's puts between ranks of one host go through (default: what MORI_ENABLE_SDMA and "
        "MORI_DISABLE_P2P choose, else p2p)",
    )
    group.addoption(
        "--world",
        default=None,
        metavar="HOST:PORT",
        help="run on ranks that torchrun started on one or more nodes (torchrun ... -m conformance.agent HOST:PORT); "
        "this process listens there for their agents",
    )
    group.addoption(
        "--capabilities",
        action="store_true",
        help="run no cell: build and call every kernel type and operator once, plainly and with each wire, codec and "
        "mode, in processes of its own; print and record what this build can do on this machine",
    )
    group.addoption(
        "--hazards",
        default=None,
        metavar="NAME[,NAME...]|all",
        help="run no cell: look for known hazards of MoRI, each in a pool of its own, and say PRESENT, ABSENT or "
        "UNTESTED of each. Never done unless asked for: on hardware some probes write out of bounds, kill ranks or "
        "hang, so run it where nothing else runs",
    )
    group.addoption(
        "--gate-hazards",
        action="store_true",
        help="end with exit 1 if a hazard is PRESENT, 2 if one cannot be looked for",
    )
    group.addoption("--replay", action="append", default=None, metavar="PATH", help="run exactly these recorded cases")


def read_options(config: pytest.Config) -> Options:
    """Validate the options of a run.

    Raises:
        pytest.UsageError: a value is wrong; the message says which, and what to give instead.
    """
    if config.getoption("reruns", None):
        raise pytest.UsageError(
            "--reruns hides failure rates and is refused; every failure is repeated and rated already"
        )
    tier = "replay" if config.getoption("--replay") else config.getoption("--tier")
    names = tuple(config.getoption("--backend") or (AUTO,))
    rocm = preflight.is_rocm_machine()
    companions: tuple[str, ...] = ()
    if AUTO in names:
        real = rocm or config.getoption("--require-hardware")
        mori, aiter = ("mori", "aiter") if real else ("mori-standin", "aiter-standin")
        every = (mori, aiter, f"{mori}{JOIN}{aiter}")
        names = tuple(dict.fromkeys(made for n in names for made in (every if n == AUTO else (n,))))
        beside = (*COMPANIONS, *(f"{dispatch}{JOIN}{aiter}" for dispatch in NAIVE_DISPATCH))
        companions = tuple(c for c in beside if c not in names)
    arch = config.getoption("--arch") or "gfx942"
    if arch not in architectures():
        raise pytest.UsageError(f"--arch is {arch!r}; choose one of {', '.join(sorted(architectures()))}")
    device = config.getoption("--device")
    if device == "auto":
        halves = {half for name in names for half in name.split(JOIN)}
        device = "cuda" if {"mori", "aiter"} & halves else "cpu"
    _check_backends((*names, *companions), arch, bool(config.getoption("--require-hardware")), device)
    kernel_types = tuple(config.getoption("--kernel-type") or ())
    operators = tuple(config.getoption("--operator") or ())
    _check_kernel_types(kernel_types, operators, names, arch)
    output = Path(config.getoption("--output-dir")).absolute()
    explore_seed = config.getoption("--explore-seed")
    return Options(
        backends=names,
        companions=companions,
        kernel_types=kernel_types,
        operators=operators,
        ep_sizes=_ep_sizes(config.getoption("--ep-sizes"), tier),
        ep_sizes_given=config.getoption("--ep-sizes") is not None,
        device=device,
        arch=arch,
        arch_given=config.getoption("--arch") is not None,
        tier=tier,
        models=_models(config.getoption("--model")),
        only_models=bool(config.getoption("--model")),
        require_hardware=bool(config.getoption("--require-hardware")),
        output=output,
        seed=time.time_ns() % 2**31 if explore_seed is None else explore_seed,
        time_budget_s=config.getoption("--time-budget"),
        reduce_budget_s=config.getoption("--reduce-budget"),
        replay=tuple(Path(p).absolute() for p in config.getoption("--replay") or ()),
        workers=config.getoption("numprocesses", None) or 1,
        waivers=_waivers(config.getoption("--waivers")),
        expect_arch=_expected_arch(config.getoption("--expect-arch")),
        transport=_transport(config.getoption("--transport"), names, arch),
        world=_world(config.getoption("--world"), config.getoption("numprocesses", None)),
        hazards=hazards_of(config),
        gate_hazards=bool(config.getoption("--gate-hazards")),
    )


def _transport(given: str | None, names: tuple[str, ...], arch: str) -> str:
    halves = {half.name for name in names for half in halves_of(backend(name, arch))}
    if given is not None and not any(takes_transport(half) for half in halves):
        raise pytest.UsageError(
            f"--transport {given} is MoRI's, and none of {', '.join(names)} dispatches through MoRI; leave it out"
        )
    return given or transports.in_force(os.environ)


def takes_transport(name: str) -> bool:
    """Whether a backend, or a half of one, is MoRI or its double."""
    return name in ("mori", "mori-standin")


def transport_of(made: Backend, options: Options) -> str:
    """The transport as it is told about a backend's results: empty for the default one, and where none is used."""
    told = options.transport != transports.DEFAULT and any(takes_transport(half.name) for half in halves_of(made))
    return options.transport if told else ""


def _world(address: str | None, workers: int | None) -> str:
    if address is None:
        return ""
    if workers:
        raise pytest.UsageError(f"-n {workers} with --world: a launched world has one driver; leave -n out")
    try:
        split_address(address)
        read_token(os.environ)
    except ValueError as error:
        raise pytest.UsageError(f"--world: {error}") from error
    return address


def hazards_of(config: pytest.Config) -> tuple[str, ...]:
    """The hazards that the options name.

    Raises:
        pytest.UsageError: a name is unknown, or the options contradict each other.
    """
    text = config.getoption("--hazards")
    if text is None:
        if config.getoption("--gate-hazards"):
            raise pytest.UsageError("--gate-hazards without --hazards: nothing is probed; name hazards, or 'all'")
        return ()
    if config.getoption("capabilities"):
        raise pytest.UsageError("--hazards is given with --capabilities, and either takes the place of a run")
    try:
        return chosen(text)
    except ValueError as error:
        raise pytest.UsageError(f"--hazards: {error}") from error


def _waivers(path: str | None) -> tuple[Waiver, ...]:
    try:
        return read_waivers(Path(path).absolute()) if path is not None else ()
    except WaiverError as error:
        raise pytest.UsageError(f"--waivers: {error}") from error


def _expected_arch(name: str | None) -> str:
    if name is not None and not re.fullmatch(r"gfx[0-9a-f]{3,}", name):
        raise pytest.UsageError(f"--expect-arch is {name!r}; give a gfx architecture, such as gfx950")
    return name or ""


def _check_backends(names: tuple[str, ...], arch: str, require_hardware: bool, device: str) -> None:
    for name in names:
        try:
            made = backend(name, arch)
        except BackendError as error:
            raise pytest.UsageError(f"--backend: {error}") from error
        if require_hardware and made.standin:
            raise pytest.UsageError(f"--require-hardware refuses the stand-in {name!r}; name a real backend")
    if require_hardware and device != "cuda":
        raise pytest.UsageError(f"--require-hardware needs --device cuda, not {device}")


def _check_kernel_types(
    kernel_types: tuple[str, ...], operators: tuple[str, ...], names: tuple[str, ...], arch: str
) -> None:
    known: set[str] = set()
    offered: set[str] = set()
    for name in names:
        made = backend(name, arch)
        kernels = {*made.kernel_types, *getattr(made, "aliases", ())}
        if is_layer(made):
            known |= {split_path(path).kernel_type for path in kernels}
            offered |= {split_path(path).operator for path in kernels}
            continue
        known |= kernels
        offered |= {operator for family in operators_of(made).values() for operator in family}
    for operator in operators:
        if operator not in offered:
            raise pytest.UsageError(f"--operator is {operator!r}; choose one of {', '.join(sorted(offered)) or 'none'}")
    for kernel_type in kernel_types:
        if kernel_type not in known:
            raise pytest.UsageError(f"--kernel-type is {kernel_type!r}; choose one of {', '.join(sorted(known))}")


def _ep_sizes(text: str | None, tier: str) -> tuple[int, ...]:
    if text is None:
        return DEFAULT_EP_SIZES.get(tier, DEFAULT_EP_SIZES["gate"])
    sizes = []
    for part in text.split(","):
        if not part.strip().isdigit() or not 1 <= int(part) <= MAX_EP_SIZE:
            raise pytest.UsageError(
                f"--ep-sizes has {part.strip()!r}; give sizes from 1 to {MAX_EP_SIZE}, such as 2,4,8"
            )
        sizes.append(int(part))
    return tuple(dict.fromkeys(sizes))


def _models(names: list[str] | None) -> tuple[ModelShape, ...]:
    try:
        return tuple(model_shape(n) for n in names) if names else tuple(model_shapes().values())
    except CatalogueError as error:
        raise pytest.UsageError(f"--model: {error}") from error


def prepare_output(options: Options) -> None:
    """Create the output directories.

    Raises:
        pytest.UsageError: nothing can be written there.
    """
    try:
        for directory in (options.records, options.failures, options.output / "hypothesis"):
            directory.mkdir(parents=True, exist_ok=True)
        mark = options.output / ".writable"
        mark.write_text("")
        mark.unlink()
    except OSError as error:
        raise pytest.UsageError(
            f"--output-dir {options.output} cannot be written ({error.strerror}); give a writable directory"
        ) from error
