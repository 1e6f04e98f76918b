"""Case types: frozen, JSON-serialisable descriptions of one input. They never hold tensors.

A *cell* fixes what is compiled or allocated (property, backend, kernel type, ranks, geometry, mode); a *case* is a cell
plus the rounds that Hypothesis draws. The case id is a hash of the case's JSON, so a case file names itself.
What a case does not hold: anything about the machine; the records do.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import msgspec

from accelerated.experts import SEPARATOR, ExpertProblem, LayerProblem
from accelerated.operators import Family, RowProblem
from conformance.recipes import explicit_rows
from conformance.row_cases import Mode, RowCase, RowCell
from conformance.sequence_cases import Dispatch, Sequence
from reference.problem import Problem, most_tokens, wire_format

#: Elements of a round: small integers, normal ones, those over 40 binades, random bit patterns, or what a combine codec
#: treats differently: saturation, ties, subnormals, blocks of zeros and blocks at both sides of the largest code.
Values = Literal["integers", "normal", "wide", "bits", "edges"]
Placement = Literal["linear", "round_robin"]
#: Routing weights of a round: all one, from 1/16 to 1, of both signs, of both signs with zeros among them, or all zero
#: but one of each token, so that one expert is judged by itself.
Weighting = Literal["ones", "positive", "signed", "zeros", "single"]
#: What other calls of the experts must give: see :mod:`conformance.rank.relations` and :mod:`conformance.rank.parts`.
Relation = Literal[
    "",
    "repeat",
    "token order",
    "slot order",
    "expert order",
    "larger buffer",
    "scaled weights",
    "zero routes",
    "masked routes",
    "slots apart",
    "shards added",
]

Rows = tuple[tuple[tuple[int, ...], ...], ...]


#: A row begins with its tag of four elements, or of four bytes where it is dispatched as codes.
MIN_HIDDEN = 8
#: Most rounds of a case: tags count them, and so do seeds.
MAX_ROUNDS = 128
#: Most rounds of a cell with routing handles: each of them is replayed, and stamps have to tell all of them apart.
MAX_REPLAYED = 8


class CaseError(ValueError):
    """A case file or a case does not describe an input. The message names the value, the limit and the fix."""


class Cell(msgspec.Struct, frozen=True, order=True, tag="exchange"):
    """One test item: what stays fixed while Hypothesis varies routing, values and sequence."""

    check: str  # the property, i.e. the test module's subject
    backend: str
    kernel_type: str
    world_size: int
    nodes: int
    hidden: int
    experts: int
    top_k: int
    capacity: int
    dtype: str
    mode: Mode
    placement: Placement = "linear"
    model: str = ""  # name of the model shape the geometry comes from, "" for a synthetic one
    wire: str = ""  # format in which dispatch carries rows, "" for ``dtype``, which combine returns in any case
    codec: str = ""  # format in which combine carries rows between ranks
    scale_dim: int = 0  # blocks of a row of that format
    modes: tuple[str, ...] = ()  # how calls are made, of :data:`reference.problem.MODES`

    def problem(self) -> Problem:
        """Sizes as the reference and the backends take them."""
        return Problem(
            world_size=self.world_size,
            hidden=self.hidden,
            experts=self.experts,
            top_k=self.top_k,
            capacity=self.capacity,
            dtype=self.dtype,
            nodes=self.nodes,
            wire=self.wire,
            codec=self.codec,
            scale_dim=self.scale_dim,
            modes=self.modes,
        )

    @property
    def most_tokens(self) -> int:
        """Tokens that a rank may dispatch in one round: the capacity, or what a cap leaves of it."""
        return most_tokens(self.capacity, self.modes)

    @property
    def special(self) -> bool:
        """Whether rows or calls are other than plain, so that cases have more to vary."""
        return bool(self.wire or self.codec or self.modes)

    @property
    def label(self) -> str:
        """Readable name, unique among all cells of a run: the pytest id, and the key of the records."""
        shape = self.model or f"h{self.hidden}"
        nodes = f"-{self.nodes}nodes" if self.nodes > 1 else ""
        placement = f"-{self.placement}" if self.placement != "linear" else ""
        return (
            f"{self.check}-{self.backend}-{self.kernel_type}-ep{self.world_size}{nodes}-{shape}-e{self.experts}"
            f"k{self.top_k}"
            f"m{self.capacity}-{self.dtype}-{self.mode}{placement}{self._manner}"
        )

    @property
    def _manner(self) -> str:
        blocks = f"x{self.scale_dim}" if self.scale_dim else ""
        parts = (self.wire, self.codec + blocks, *(mode.replace(" ", "_") for mode in self.modes))
        return "".join(f"-{part}" for part in parts if part)


class Explicit(msgspec.Struct, frozen=True, tag="explicit"):
    """Routing spelt out: ``rows[rank][token][slot]`` is a global expert id, or -1 for a masked slot."""

    rows: Rows


class Recipe(msgspec.Struct, frozen=True, tag="recipe"):
    """Routing of a large round: expanded by :func:`conformance.recipes.explicit_rows` from few numbers."""

    archetype: str
    counts: tuple[int, ...]
    parameter: int  # the hot expert, rank or node of the archetype
    seed: int


class Round(msgspec.Struct, frozen=True):
    """One dispatch and combine."""

    routing: Explicit | Recipe
    values: Values = "integers"
    seed: int = 0
    delays_ms: tuple[int, ...] = ()  # per rank, slept before the dispatch; () is no delay
    hidden: int = 0  # elements of this round's rows, fewer than the operator was built for; 0 is as many


class Case(msgspec.Struct, frozen=True, tag="exchange"):
    """A cell and the rounds that run on one operator, in order."""

    cell: Cell
    rounds: tuple[Round, ...]

    @property
    def id(self) -> str:
        """First 12 hex digits of a hash of the case's JSON."""
        return hashlib.blake2b(encode(self), digest_size=6).hexdigest()

    @property
    def steps(self) -> int:
        """Rounds of the operator."""
        return len(self.rounds)

    def token_counts(self) -> list[tuple[int, ...]]:
        """Tokens per rank of each round."""
        return [routing_counts(r.routing) for r in self.rounds]

    def room(self, index: int) -> int:
        """Tokens that a rank may have in a round."""
        del index
        return self.cell.most_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all rounds and ranks."""
        return sum(map(sum, self.token_counts()))


class LayerCell(Cell, frozen=True, order=True, tag="layer"):
    """A test item of the experts alone (``kernel_type`` is their operator) or of a layer (``kernel type/operator``).

    ``experts`` counts physical experts, of which ``redundant`` are replicas. Experts alone run in one process
    (``world_size`` 1), one after another for each of ``shards`` expert-parallel ranks; their tokens are rank 0's.
    Their buffers hold up to ``buffer`` rows where that is more than the capacity. With ``translated`` a round-robin
    placement reaches the exchange as physical positions, without as global ids. With a ``router``, an operator of the
    experts' half, a layer's ids and weights are what it makes of logits that favour the drawn experts. With
    ``against``, another composed backend with the same experts, each case runs on that one's kernel type
    ``against_type``, too, and the outputs are compared: see :mod:`conformance.layer_pairs`.
    """

    intermediate: int = 128
    shards: int = 1
    shared: int = 0
    buffer: int = 0
    redundant: int = 0
    translated: bool = True
    router: str = ""
    against: str = ""
    against_type: str = ""

    @property
    def other(self) -> LayerCell:
        """The same cell on the backend and the kernel type of ``against``."""
        _, separator, operator = self.kernel_type.partition(SEPARATOR)
        path = f"{self.against_type}{separator}{operator}"
        return msgspec.structs.replace(self, backend=self.against, kernel_type=path, against="", against_type="")

    @property
    def whole(self) -> bool:
        """Whether the experts lie between a dispatch and a combine."""
        return SEPARATOR in self.kernel_type

    @property
    def logical(self) -> int:
        """L, logical experts: what routers name."""
        return self.experts - self.redundant

    @property
    def rows(self) -> int:
        """Rows of the experts' largest buffer."""
        return max(self.capacity * self.world_size, 0 if self.whole else self.buffer)

    def expert_problem(self) -> ExpertProblem:
        """Sizes of the experts; a layer's buffer holds what every rank may send."""
        shards = self.world_size if self.whole else self.shards
        return ExpertProblem(
            shards=shards,
            hidden=self.hidden,
            intermediate=self.intermediate,
            experts=self.experts,
            top_k=self.top_k,
            capacity=self.rows,
            dtype=self.dtype,
            shared=self.shared,
        )

    def route_problem(self) -> RowProblem:
        """Sizes of the router: a row has a logit for every logical expert."""
        return RowProblem(Family.ROUTE, 1, self.logical, self.capacity, self.dtype)

    def problem(self) -> LayerProblem | ExpertProblem:  # type: ignore[override]
        """Sizes as the reference and the backends take them."""
        experts = self.expert_problem()
        placement = "linear" if self.translated else self.placement
        return LayerProblem(Cell.problem(self), experts, placement) if self.whole else experts

    @property
    def label(self) -> str:
        """Readable name, unique among all cells of a run."""
        parts = [f"{self.shards}shards"] if self.shards > 1 else []
        parts += [f"{self.shared}shared"] if self.shared else []
        parts += [f"{self.redundant}replicas"] if self.redundant else []
        parts += [] if self.translated else ["global-ids"]
        parts += [self.router] if self.router else []
        parts += [f"against-{self.against}-{self.against_type}"] if self.against else []
        return "-".join((super().label, f"i{self.intermediate}", *parts))


class LayerRound(Round, frozen=True):
    """One forward pass.

    Attributes:
        weighting: of the slots.
        tail: experts alone: rows of the buffer beyond the valid ones, which hold poison.
        counted: experts alone: the number of valid rows is given on the device, even without a tail.
        quantised: experts alone: rows come as codes and scales, as a dispatch would deliver them.
        relation: experts alone: a second call.
        physical: logical expert of every physical one from this round on; () is the one before, or the initial one.
    """

    weighting: Weighting = "positive"
    tail: int = 0
    counted: bool = False
    quantised: bool = False
    relation: Relation = ""
    physical: tuple[int, ...] = ()


class LayerCase(Case, frozen=True, tag="layer"):
    """A cell and the forward passes that run on one operator, in order."""

    cell: LayerCell
    rounds: tuple[LayerRound, ...]  # type: ignore[assignment]


class SequenceCell(Cell, frozen=True, order=True, tag="sequence"):
    """A test item of one or two operators alike; ``second`` is the capacity of operator 1, 0 for none."""

    second: int = 0

    @property
    def operators(self) -> int:
        """Operators that live at the same time."""
        return 2 if self.second else 1

    def capacity_of(self, op: int) -> int:
        """Tokens per rank of an operator."""
        return self.second if op and self.second > 0 else self.capacity

    def room_of(self, op: int) -> int:
        """Tokens per rank that an operator may be given: fewer than its capacity with a cap."""
        return most_tokens(self.capacity_of(op), self.modes)

    def problem_of(self, op: int) -> Problem:
        """Sizes of one operator."""
        return msgspec.structs.replace(self, capacity=self.capacity_of(op)).problem()

    @property
    def label(self) -> str:
        """Readable name, unique among all cells of a run."""
        return super().label + (f"-second-m{self.second}" if self.second else "")


class SequenceCase(Case, frozen=True, tag="sequence"):
    """Steps on the operators of a cell: each round is dispatched by one of them, in the order of the rounds."""

    cell: SequenceCell
    sequence: Sequence = ()

    @property
    def steps(self) -> int:
        """Steps of the sequence."""
        return len(self.sequence)

    def room(self, index: int) -> int:
        """Tokens that a rank may have in a round: those of the operator that dispatches it."""
        ops = (step.op for step in self.sequence if isinstance(step, Dispatch) and step.round == index)
        return self.cell.room_of(next(ops, 0))


class GraphCell(Cell, frozen=True, order=True, tag="graph"):
    """A test item of captured calls: see :mod:`conformance.graph_cases`.

    A graph holds ``length`` rounds, or one whose dispatch and combine are graphs of their own (``halves``). Without
    ``warm`` the operator's first call of all is captured.
    """

    length: int = 1
    halves: bool = False
    warm: bool = True

    @property
    def label(self) -> str:
        """Readable name, unique among all cells of a run."""
        form = "halves" if self.halves else f"{self.length}rounds"
        return "-".join((super().label, form, *(() if self.warm else ("cold",))))


class GraphRound(Round, frozen=True):
    """One dispatch and combine: replayed by the graph of this number, or eager (-1)."""

    graph: int = -1


class GraphCase(Case, frozen=True, tag="graph"):
    """Replays and eager rounds on a new operator; before round ``rebuilt`` (0: never) all is dropped and made anew."""

    cell: GraphCell
    rounds: tuple[GraphRound, ...]  # type: ignore[assignment]
    rebuilt: int = 0


def routing_counts(routing: Explicit | Recipe) -> tuple[int, ...]:
    """Tokens per rank of one round."""
    return routing.counts if isinstance(routing, Recipe) else tuple(map(len, routing.rows))


def expand(cell: Cell, routing: Explicit | Recipe, only: int | None = None) -> Rows:
    """Routing of one round as explicit rows; ``only`` may leave the rows of all other ranks out."""
    if isinstance(routing, Explicit):
        return routing.rows
    return explicit_rows(
        routing.archetype,
        routing.counts,
        routing.parameter,
        routing.seed,
        experts=cell.experts,
        top_k=cell.top_k,
        nodes=cell.nodes,
        only=only,
    )


AnyCell = Cell | RowCell | LayerCell | SequenceCell | GraphCell
AnyCase = Case | RowCase | LayerCase | SequenceCase | GraphCase

_encoder = msgspec.json.Encoder()


def encode(case: AnyCase) -> bytes:
    """Canonical JSON of a case."""
    return _encoder.encode(case)


def row_step(cell: Cell) -> int:
    """Rows of so many elements, or of a multiple, are divided evenly by the cell's wire and codec."""
    step = max(wire_format(cell.wire).group, 2) if cell.wire else 1
    return math.lcm(step, 2 * cell.scale_dim) if cell.scale_dim else step


def narrow_sizes(cell: Cell) -> tuple[int, ...]:
    """Row sizes below the cell's that its wire and codec can carry: the least, about half, and one step less."""
    step = row_step(cell)
    least = -(-MIN_HIDDEN // step) * step
    sizes = {least, cell.hidden // 2 // step * step, (cell.hidden - 1) // step * step}
    return tuple(sorted(size for size in sizes if least <= size < cell.hidden))
