"""A whole layer from two backends: one dispatches and combines, the other has the experts between.

Scope: the driver's half: names, paths, and which halves fit together; :mod:`accelerated.layer_session` runs them. What
a pair that fits does not prove: that either half keeps its contract.

A path is ``<kernel type>/<experts operator>``: where these experts take quantised rows, the rows are quantised by the
experts' own quantiser and dispatched as codes and scales (vLLM 0.33.0 with MoRI). ``<path>@bf16`` dispatches rows in
the element type, and the experts quantise what they receive (vLLM's deferred quantisation, DeepEP's high-throughput
kernels). Neither stands in for the other: where a dispatch does not carry a format, the path that needs it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from accelerated.contract import ContractError, ReceiveLayout, Standing, Support, exchange
from accelerated.experts import SEPARATOR, UNQUANTISED, ExpertContract, LayerContract, LayerProblem
from accelerated.operators import Family, RowProblem, operators_of
from accelerated.routers import RouteContract
from reference.codecs import Codec, Granularity, ScaleFormat
from reference.expert_numerics import WeightStage
from reference.placement import STRATEGIES
from reference.problem import WIRES, Problem, ProblemError, Wire

if TYPE_CHECKING:
    from accelerated.contract import Contract
    from accelerated.interface import Backend, Finding, RankContext
    from accelerated.layer_session import LayerSession

#: Stands between the names of the two halves.
JOIN = "+"


class Path(NamedTuple):
    """A path taken apart."""

    kernel_type: str
    operator: str
    quantised: bool  # rows are dispatched in the experts' wire, if they have one


def split_path(path: str) -> Path:
    """Kernel type, experts operator and whether rows are quantised before the dispatch.

    Raises:
        ContractError: it is no path of a layer.
    """
    kernel_type, separator, operator = path.partition(SEPARATOR)
    named = operator.removesuffix(UNQUANTISED)
    if not (kernel_type and separator and named):
        raise ContractError(
            f"{path!r} is no path of a layer; write <kernel type>{SEPARATOR}<experts operator>, and {UNQUANTISED} "
            f"after it for rows dispatched in the element type"
        )
    return Path(kernel_type, named, named == operator)


def wire_of(codec: Codec) -> str | None:
    """Name of the wire that carries a codec's rows, a key of :data:`reference.problem.WIRES`; None: none does."""
    width = 1 if codec.scale_format is ScaleFormat.E8M0 else 4
    wanted = Wire("fp4" if codec.payload.bits == 4 else "fp8", codec.group, width)
    return next((name for name, wire in WIRES.items() if wire == wanted), None)


class LayerBackend:
    """Experts between a dispatch and a combine.

    Args:
        dispatch: offers kernel types.
        experts: offers operators of the family ``experts``; may be the same backend.
    """

    def __init__(self, dispatch: Backend, experts: Backend) -> None:
        self.dispatch, self.experts = dispatch, experts
        self.name = f"{dispatch.name}{JOIN}{experts.name}"
        self.standin = dispatch.standin or experts.standin
        both = {dispatch.judged_by, experts.judged_by}
        self.judged_by = "oracle" if both == {"oracle"} else "reference"
        self.kernel_types: Sequence[str] = tuple(self._paths(dispatch.kernel_types))
        self.aliases: Sequence[str] = tuple(self._paths(getattr(dispatch, "aliases", ())))
        #: Routers of the experts' half, which a layer's ids and weights may come from.
        self.routers: Sequence[str] = tuple(operators_of(experts).get(Family.ROUTE.value, ()))
        self.patience = max(float(getattr(half, "patience", 1.0)) for half in (dispatch, experts))

    def _paths(self, kernel_types: Sequence[str]) -> Iterator[str]:
        for kernel_type in kernel_types:
            for operator in operators_of(self.experts)[Family.EXPERTS.value]:
                yield f"{kernel_type}{SEPARATOR}{operator}"
                yield f"{kernel_type}{SEPARATOR}{operator}{UNQUANTISED}"

    @property
    def caveat(self) -> str:
        """What the halves say about their own results off their hardware."""
        said = (str(getattr(half, "caveat", "")) for half in (self.dispatch, self.experts))
        return "\n".join(dict.fromkeys(text for text in said if text))

    def support(self, problem: LayerProblem | RowProblem, path: str) -> Support:
        """Refused with the first rule that the pair breaks; claimed only if both halves claim it.

        Of a router's problem, ``path`` being its operator: as the experts' half says.
        """
        if isinstance(problem, RowProblem):
            unknown = self._no_router(path)
            return Support(Standing.REFUSED, unknown) if unknown else self.experts.support(problem, path)
        try:
            parts = self._known(path)
            reason = next(_misfits(problem), None)
            if reason is not None:
                return Support(Standing.REFUSED, reason)
            experts = self._of_experts(problem, parts)
            if experts.standing is Standing.REFUSED:
                return experts
            dispatch = self._of_dispatch(problem, parts)
        except (ContractError, ProblemError) as error:
            return Support(Standing.REFUSED, str(error))
        if dispatch.standing is Standing.REFUSED:
            return dispatch
        declared = self.contract(problem, path)
        reason = next(_clashes(problem, declared, declared.exchange, declared.experts), None)
        if reason is not None:
            return Support(Standing.REFUSED, reason)
        reasons = [half.reason for half in (dispatch, experts) if half.standing is Standing.UNCLAIMED]
        return Support(Standing.UNCLAIMED, "; ".join(reasons)) if reasons else Support(Standing.CLAIMED)

    def contract(self, problem: LayerProblem, path: str) -> LayerContract:
        """Both halves' contracts and what lies between them.

        Raises:
            ContractError: no such path, or no wire carries what the experts take.
        """
        parts = self._known(path)
        experts = self.expert_contract(problem, parts.operator)
        carrying = self.exchange_problem(problem, path)
        dispatched = exchange(self.dispatch.contract(carrying, parts.kernel_type))
        rows = None if dispatched.exact_rows else problem.world_size * problem.exchange.capacity
        return LayerContract(dispatched, experts, carrying.wire, rows)

    def route_contract(self, problem: RowProblem, operator: str) -> RouteContract:
        """The contract of a router of the experts' half.

        Raises:
            ContractError: it offers no such router.
        """
        reason = self._no_router(operator)
        if reason:
            raise ContractError(reason)
        declared = self.experts.contract(problem, operator)
        if not isinstance(declared, RouteContract):
            raise ContractError(f"{self.experts.name} declares {type(declared).__name__} for {operator}, no router")
        return declared

    def _no_router(self, operator: str) -> str:
        """Why a row operator is none of a layer; empty if it is."""
        if operator not in self.routers:
            offered = ", ".join(self.routers) or "none"
            return f"{self.experts.name} has no router {operator!r} for a layer; it has {offered}"
        return ""

    def expert_contract(self, problem: LayerProblem, operator: str) -> ExpertContract:
        """The contract of the experts' half.

        Raises:
            ContractError: it is another operator's.
        """
        declared = self.experts.contract(problem.experts, operator)
        if not isinstance(declared, ExpertContract):
            raise ContractError(f"{self.experts.name} declares {type(declared).__name__} for {operator}, not experts")
        return declared

    def exchange_problem(self, problem: LayerProblem, path: str) -> Problem:
        """The dispatch's half of a problem, with the wire that the path and the experts' contract ask for.

        Raises:
            ContractError: no wire carries what the experts take, or the problem names another one.
            ProblemError: the sizes do not suit the wire.
        """
        parts = self._known(path)
        codec = self.expert_contract(problem, parts.operator).wire
        if codec is None and not parts.quantised:
            raise ContractError(
                f"{parts.operator} takes rows in the element type only; the path without {UNQUANTISED} is the same"
            )
        wire = wire_of(codec) if codec is not None and parts.quantised else ""
        if wire is None:
            assert codec is not None
            raise ContractError(
                f"{parts.operator} takes {codec.payload.name} with {codec.scale_format.value} scales of "
                f"{codec.group or 'all'} elements, which no wire carries; choose a path with {UNQUANTISED}"
            )
        if problem.exchange.wire not in ("", wire):
            raise ContractError(
                f"the problem's wire is {problem.exchange.wire!r} and {path} has {wire!r}; leave the problem's empty"
            )
        return replace(problem.exchange, wire=wire)

    def preflight(self, device: str) -> list[Finding]:
        """What either half finds; once what both find."""
        found = [*self.dispatch.preflight(device), *self.experts.preflight(device)]
        return list(dict.fromkeys(found))

    def open(self, context: RankContext) -> LayerSession:
        """Initialise both libraries in a rank process, the dispatch's first.

        Raises:
            LayerError: one of them does not initialise; it is named.
        """
        from accelerated.layer_session import LayerSession

        return LayerSession(self, context)

    def _known(self, path: str) -> Path:
        parts = split_path(path)
        kernel_types = (*self.dispatch.kernel_types, *getattr(self.dispatch, "aliases", ()))
        operators = operators_of(self.experts)[Family.EXPERTS.value]
        for name, offered, half in (
            (parts.kernel_type, kernel_types, self.dispatch),
            (parts.operator, operators, self.experts),
        ):
            if name not in offered:
                raise ContractError(f"{path}: {half.name} has no {name!r}; choose one of {', '.join(offered)}")
        return parts

    def _of_experts(self, problem: LayerProblem, parts: Path) -> Support:
        found = self.experts.support(problem.experts, parts.operator)
        return replace(found, reason=f"{self.experts.name}, {parts.operator}: {found.reason}" if found.reason else "")

    def _of_dispatch(self, problem: LayerProblem, parts: Path) -> Support:
        path = f"{parts.kernel_type}{SEPARATOR}{parts.operator}{'' if parts.quantised else UNQUANTISED}"
        carrying = self.exchange_problem(problem, path)
        found = self.dispatch.support(carrying, parts.kernel_type)
        reason = f"{self.dispatch.name}, {parts.kernel_type}: {found.reason}" if found.reason else ""
        plain = replace(carrying, wire="")
        if carrying.wire and found.standing is Standing.REFUSED:
            runs = self.dispatch.support(plain, parts.kernel_type).standing is not Standing.REFUSED
            reason += f"; {path}{UNQUANTISED} dispatches {plain.dtype}" if runs else ""
        return replace(found, reason=reason)


def _misfits(problem: LayerProblem) -> Iterator[str]:
    """Sizes of the two halves that contradict each other."""
    sent, experts = problem.exchange, problem.experts
    for name, there, here in (
        ("dtype", sent.dtype, experts.dtype),
        ("hidden", sent.hidden, experts.hidden),
        ("ranks", sent.world_size, experts.shards),
        ("experts", sent.experts, experts.experts),
    ):
        if there != here:
            yield f"{name}: the exchange has {there}, the experts have {here}; a layer has one"
    if experts.shared:
        yield (
            f"{experts.shared} fused shared experts; every rank that gets a row would add them, and an exchange sends "
            f"a row to several: compute them apart and add them (vLLM 0.33.0 asserts this for MoRI)"
        )
    if sent.top_k != experts.top_k:
        yield f"top_k: the exchange has {sent.top_k}, the experts have {experts.top_k}; a layer has one"
    if experts.capacity < sent.world_size * sent.capacity:
        yield (
            f"the experts take {experts.capacity} rows and may get {sent.world_size * sent.capacity}, the capacity of "
            f"{sent.world_size} ranks; raise theirs"
        )
    if problem.placement not in STRATEGIES:
        yield f"placement is {problem.placement!r}; choose one of {', '.join(STRATEGIES)}"


def _sizes(problem: LayerProblem, layer: LayerContract) -> tuple[int, ...]:
    """Buffer sizes in rows that meet every path which the experts can take."""
    if layer.buffer_rows is not None:
        return (layer.buffer_rows,)
    most = problem.world_size * problem.exchange.capacity
    return (1, *(boundary + 1 for boundary in layer.experts.boundaries if boundary < most))


def _kind(codec: Codec) -> tuple[str, Granularity, int]:
    """What a wire carries of a codec."""
    return codec.payload.name, codec.granularity, codec.group


def _clashes(problem: LayerProblem, layer: LayerContract, sent: Contract, experts: ExpertContract) -> Iterator[str]:
    """Promises of one half that the other cannot live with."""
    ranks = problem.world_size
    if sent.receive_layout is not ReceiveLayout.EVERY_ROW and problem.placement != "linear" and ranks > 1:
        yield (
            f"placement {problem.placement} with a dispatch that finds the owner of an expert by division: rows would "
            f"go to ranks without their experts; translate ids to physical positions, which are linear"
        )
    if ranks > 1 and not experts.takes_remote:
        yield (
            f"the experts take ids of their own rank only; a received row ({sent.receive_layout.value}) names experts "
            f"of other ranks, too"
        )
    if layer.wire and layer.numerics(1).weight_stage is WeightStage.ON_INPUT:
        yield (
            f"the experts multiply rows by the routing weight before they quantise them, and the wire {layer.wire} has "
            f"quantised them by then (vLLM 0.33.0 asserts this for MoRI); choose the path with {UNQUANTISED}"
        )
    for rows in _sizes(problem, layer) if layer.wire else ():
        codec = layer.numerics(rows).input_codec
        if codec is None or experts.wire is None or _kind(codec) != _kind(experts.wire):
            takes = "the element type" if codec is None else f"{codec.payload.name} per {codec.granularity.value}"
            yield (
                f"the wire is {layer.wire}, and the experts multiply {takes} in a buffer of {rows} rows; choose the "
                f"path with {UNQUANTISED}"
            )
    if layer.buffer_rows is not None and not experts.takes_num_rows:
        yield (
            f"the experts take no row count; of the {layer.buffer_rows} rows that the dispatch gives them those beyond "
            f"the count are undefined"
        )


def halves_of(made: Backend) -> tuple[Backend, ...]:
    """Both halves of a composed backend; any other backend itself."""
    return (made.dispatch, made.experts) if isinstance(made, LayerBackend) else (made,)
