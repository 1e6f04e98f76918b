"""Cells of dispatch/combine with a wire, a combine codec or another way of calling than the plain one.

Everything at once is far too much: kernel types, EP sizes, nodes, sizes, wires, codecs, element types, modes and
sequences make thousands of combinations. Here every *pair* of two choices that the backend runs occurs in some cell,
and each cell is chosen so that it brings the most new pairs with it; explore lets every pair occur in several cells.
The fast kernels of combine ask for more than two choices at once, so their cells are spelt out.
One choice that is unclaimed makes a whole cell unclaimed, whose failure does not gate; therefore pairs that are claimed
come first, in claimed cells, and the others after them.
What a pair that passes does not prove: that three choices together work, but for those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import Any

from accelerated.contract import Standing, Support, exchange
from accelerated.interface import Backend
from conformance.cases import Cell
from conformance.row_cases import Mode
from conformance.suite.cells import PlannedCell, Unsupported
from conformance.suite.coverage import combine_of
from reference.problem import COMBINE_CODECS, MODES, ProblemError

#: Wires that take turns: those of vLLM, and raw scales that leave what lies behind them unaligned.
WIRES = ("", "fp8_token", "fp8_group", "mxfp4", "fp8_tensor", "fp8_raw3x4", "fp8_raw5x1")
CODECS = ("", *COMBINE_CODECS)
#: What separates the modes of a way.
_AND = ", "
#: Each mode by itself, and a cap where combine stages nothing in memory that the cap makes too small.
WAYS = ("", *MODES, f"zero-copy{_AND}capped")
#: Element types of combine; of dispatch, too, without a wire.
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer per rank, and the blocks of the blockwise codecs."""

    hidden: int
    experts_per_rank: int
    top_k: int
    capacity: int
    scale_dim: int


#: Even blocks of 64; what the fast kernels of fp8_blockwise ask for (8 slots, a row of 512 in blocks of 128, and no
#: weights); nine slots and blocks of 39 elements, the last one short.
EVEN = Shape(256, 2, 2, 16, 4)
FAST = Shape(512, 4, 8, 8, 4)
ODD = Shape(192, 9, 9, 12, 5)
SHAPES = (EVEN, FAST, ODD)
#: One of each number of slots and each width of a block that has a fast kernel.
FAST_SHAPES = (FAST, replace(FAST, top_k=9), replace(FAST, scale_dim=2), replace(FAST, top_k=9, scale_dim=2))

SEQUENCES: tuple[tuple[str, Mode], ...] = (("round_trip", "drained"), ("rounds", "free-running"))
SOAK: tuple[str, Mode] = ("soak", "free-running")


@dataclass(frozen=True)
class Depth:
    """How much of this a tier has.

    Attributes:
        times: cells in which each pair occurs, if so many have it; 0: only each wire in turn.
        examples: EP size -> cases of a cell; a wider one has those of the widest.
        ep_sizes: EP sizes that take part.
        soaks: whether soaks take turns with the other sequences.
        codecs: that take part.
    """

    times: int
    examples: dict[int, int]
    ep_sizes: tuple[int, ...] = (2, 4, 8)
    soaks: bool = False
    codecs: tuple[str, ...] = CODECS

    def cases(self, world_size: int) -> int:
        """Cases of a cell."""
        return self.examples[max(size for size in self.examples if size <= world_size)]


#: A cell of few cases costs little more than its operator, so pairs are many and cases few.
GATE = Depth(1, {1: 2})
EXPLORE = Depth(3, {1: 6, 8: 4}, (1, 2, 4, 8, 16), soaks=True)
#: What the default architecture has no kernels for, so that a short run on another one meets it.
SMOKE = Depth(1, {1: 2}, (2,), codecs=("fp4_blockwise",))
COMPANION = Depth(0, {1: 2}, (2, 4))
DEPTHS = {"smoke": SMOKE, "gate": GATE, "explore": EXPLORE}


@dataclass(frozen=True)
class Choice:
    """One of everything. The defaults are plain; which kernel type and place there are, the run says."""

    kernel_type: str
    place: tuple[int, int]
    sequence: tuple[str, Mode] = SEQUENCES[0]
    shape: Shape = EVEN
    wire: str = ""
    codec: str = ""
    dtype: str = "bfloat16"
    way: str = ""

    def cell(self, backend: str) -> Cell:
        """The cell of these choices."""
        world_size, nodes = self.place
        return Cell(
            check=self.sequence[0],
            backend=backend,
            kernel_type=self.kernel_type,
            world_size=world_size,
            nodes=nodes,
            hidden=self.shape.hidden,
            experts=self.shape.experts_per_rank * world_size,
            top_k=self.shape.top_k,
            capacity=self.shape.capacity,
            dtype=self.dtype,
            mode=self.sequence[1],
            wire=self.wire,
            codec=self.codec,
            scale_dim=self.shape.scale_dim if self.codec.endswith("blockwise") else 0,
            modes=self.modes,
        )

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of the way."""
        return tuple(self.way.split(_AND)) if self.way else ()

    @property
    def special(self) -> bool:
        """Whether there is anything that is not plain; plain cells are planned elsewhere."""
        return bool(self.wire or self.codec or self.way)


Place = tuple[int, int]  # EP size, nodes
Value = tuple[str, Any]  # a field of a choice and what it is
Pair = tuple[Value, Value]


def call_cells(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    kernel_types: Sequence[str],
    topologies: Sequence[tuple[int, int]],
) -> Iterator[PlannedCell | Unsupported]:
    """Cells and refusals of one backend.

    Args:
        name: to ask the registry for.
        backend: that offers the kernel types.
        companion: it is the yardstick of the run.
        tier: smoke, gate or explore.
        kernel_types: to plan.
        topologies: (EP size, nodes).
    """
    depth = COMPANION if companion and tier != "smoke" else DEPTHS[tier]
    places = [(size, nodes) for size, nodes in topologies if size in depth.ep_sizes]
    if not places:
        return
    for kernel_type, place in product(kernel_types, places):
        yield from refusals(name, backend, kernel_type, place)

    @cache
    def standing(choice: Choice) -> Standing:
        support = _support(backend, choice.cell(name))
        return support.standing if support is not None else Standing.REFUSED

    def runs(choice: Choice) -> bool:
        return standing(choice) is not Standing.REFUSED

    def claimed(choice: Choice) -> bool:
        return standing(choice) is Standing.CLAIMED

    @cache
    def ignored(choice: Choice) -> bool:
        if not choice.codec or not runs(choice):
            return False
        return exchange(backend.contract(choice.cell(name).problem(), choice.kernel_type)).ignored_codec is not None

    values: dict[str, Sequence[Any]] = {
        "wire": WIRES,
        "way": WAYS,
        "codec": depth.codecs,
        "kernel_type": kernel_types,
        "place": places,
        "shape": SHAPES,
        "dtype": DTYPES,
        "sequence": (*SEQUENCES, SOAK) if depth.soaks else SEQUENCES,
    }
    if depth.times:
        first = list(fast_choices(kernel_types, places, depth.codecs, runs))
        chosen = covering(values, (claimed, runs), depth.times, ignored, first)
    else:
        plain = [Choice(kernel_type, places[0]) for kernel_type in kernel_types]
        turns = [replace(plain[number % len(plain)], wire=wire) for number, wire in enumerate(WIRES[1:])]
        chosen = [choice for choice in turns if runs(choice)]
    for choice in chosen:
        cell = choice.cell(name)
        support = _support(backend, cell)
        assert support is not None
        yield PlannedCell(cell, depth.cases(cell.world_size), support.standing is Standing.CLAIMED, companion)


def fast_choices(
    kernel_types: Sequence[str], places: Sequence[Place], codecs: Sequence[str], runs: Callable[[Choice], bool]
) -> Iterator[Choice]:
    """A choice for each kernel type, codec and shape that combine adds up fast somewhere: on the fewest ranks there."""
    turn = 0
    for kernel_type, codec, shape in product(kernel_types, codecs, FAST_SHAPES):
        for place, way in product(sorted(places), ("", "weightless")):
            choice = Choice(kernel_type, place, SEQUENCES[turn % 2], shape, codec=codec, way=way)
            if runs(choice) and combine_of(choice.cell(""), shape.hidden) == "fast":
                turn += 1
                yield choice
                break


def pairs_of(choice: Choice, values: Mapping[str, Sequence[Any]], ignored: Callable[[Choice], bool]) -> set[Pair]:
    """Every pair of two fields of a choice, in the order of ``values``.

    A codec that is ignored says nothing about what it is combined with.
    """
    idle = ignored(choice)
    return {
        pair
        for pair in combinations(((field, getattr(choice, field)) for field in values), 2)
        if not idle or "codec" not in (pair[0][0], pair[1][0])
    }


def covering(
    values: Mapping[str, Sequence[Any]],
    allowed: Sequence[Callable[[Choice], bool]],
    times: int,
    ignored: Callable[[Choice], bool] = lambda _: False,
    first: Sequence[Choice] = (),
) -> list[Choice]:
    """Choices in which every pair of values that runs with all else plain, in some shape, occurs ``times`` times.

    One begins with a pair that is still wanted and takes, field by field, the value that brings the most wanted pairs
    with it and still runs, of several the one used least.

    Args:
        values: of every field of a choice.
        allowed: which choices may be taken: strict first, for pairs that are left over less strict.
        times: how often.
        ignored: whether the codec of a choice is left out without a word.
        first: choices that are taken in any case; what is to be seen of their codecs, others show once more.
    """
    found = dict.fromkeys(first)
    used: Counter[Value] = Counter((field, getattr(choice, field)) for choice in first for field in values)
    for turn in range(times):
        left = {
            pair: None
            for first, second in combinations(values, 2)
            for pair in product(((first, v) for v in values[first]), ((second, v) for v in values[second]))
        }
        for one in filter(allowed[0], first if turn == 0 else ()):
            for brought in pairs_of(one, {field: values[field] for field in values if field != "codec"}, ignored):
                left.pop(brought, None)
        for runs in allowed:
            wanted = dict(left)
            while wanted:
                pair = next(iter(wanted))
                choice = _begun(dict(pair), values, runs, used, ignored)
                if choice is None:
                    del wanted[pair]
                    continue
                given = {field for field, _ in pair} | {"kernel_type"}
                choice = _extended(choice, given, values, runs, wanted, used, ignored, found)
                if not choice.special:
                    choice = _made_special(choice, given, values, runs, used, found)
                for brought in pairs_of(choice, values, ignored) | {pair}:
                    wanted.pop(brought, None)
                    left.pop(brought, None)
                if choice.special and choice.codec in values["codec"] and choice not in found:
                    found[choice] = None
                    used.update((field, getattr(choice, field)) for field in values)
    return list(found)


def _begun(
    known: dict[str, Any],
    values: Mapping[str, Sequence[Any]],
    runs: Callable[[Choice], bool],
    used: Counter[Value],
    ignored: Callable[[Choice], bool],
) -> Choice | None:
    """A choice with these values that runs, else plain, if possible one whose codec is carried out; None for none.

    A place that needs more slots than the plain shape has, because it has as many nodes, gets another shape.
    """
    kernel_types = [known["kernel_type"]] if "kernel_type" in known else values["kernel_type"]
    places = [known["place"]] if "place" in known else values["place"]

    def at(kernel_type: str, place: Place) -> Choice:
        plain = (Choice(kernel_type, place, shape=shape) for shape in (EVEN, *values.get("shape", ())))
        return next(filter(runs, plain), Choice(kernel_type, place))

    choices = [
        replace(at(kernel_type, place), **known)
        for kernel_type in sorted(kernel_types, key=lambda one: used["kernel_type", one])
        for place in places
    ]
    found = list(filter(runs, choices))
    return next((choice for choice in found if not ignored(choice)), found[0] if found else None)


def _extended(
    choice: Choice,
    fixed: set[str],
    values: Mapping[str, Sequence[Any]],
    runs: Callable[[Choice], bool],
    wanted: Container[Pair],
    used: Counter[Value],
    ignored: Callable[[Choice], bool],
    found: Container[Choice],
) -> Choice:
    """The choice with the other fields filled in."""
    for field in values:
        if field in fixed:
            continue
        fixed = fixed | {field}
        others = [replace(choice, **{field: value}) for value in values[field]]

        def worth(other: Choice, field: str = field, fixed: set[str] = fixed) -> tuple[bool, int, int]:
            known = {name: values[name] for name in values if name in fixed}
            brought = pairs_of(other, known, ignored)
            new = sum(pair in wanted for pair in brought if field in (pair[0][0], pair[1][0]))
            return other in found, -new, used[field, getattr(other, field)]

        choice = next((other for other in sorted(others, key=worth) if runs(other)), choice)
    return choice


def _made_special(
    choice: Choice,
    fixed: Container[str],
    values: Mapping[str, Sequence[Any]],
    runs: Callable[[Choice], bool],
    used: Counter[Value],
    found: Container[Choice],
) -> Choice:
    """A plain choice with the wire, the way or the codec that was used least and is not fixed."""
    others = [
        replace(choice, **{field: value})
        for field in ("wire", "way", "codec")
        if field not in fixed
        for value in sorted(values[field], key=lambda one: used[field, one])
    ]
    return next((other for other in others if other.special and other not in found and runs(other)), choice)


def _support(backend: Backend, cell: Cell) -> Support | None:
    """Standing of a cell; None where the sizes do not suit the choices."""
    try:
        problem = cell.problem()
    except ProblemError:
        return None
    return backend.support(problem, cell.kernel_type)


def refusals(name: str, backend: Backend, kernel_type: str, place: tuple[int, int]) -> Iterator[Unsupported]:
    """What a kernel type refuses of one choice alone, and of a codec in a mode, where either alone is not."""
    shapes = [Choice(kernel_type, place, shape=shape) for shape in SHAPES]
    plain = next((choice for choice in shapes if not _refused(backend, choice.cell(name))), None)
    if plain is None:
        return  # whatever way it is called
    refused: set[Choice] = set()
    for choice in (*singles(plain), *(replace(plain, codec=c, way=w) for c, w in product(CODECS[1:], WAYS[1:]))):
        reason = _refused(backend, choice.cell(name))
        if not reason:
            continue
        alone = refused & {replace(choice, codec=""), *(replace(choice, way=way) for way in ("", *choice.modes))}
        refused.add(choice)
        if not alone:
            manner = " ".join(part for part in (choice.wire, choice.codec, *choice.modes) if part)
            yield Unsupported(name, kernel_type, *place, reason, manner)


def singles(plain: Choice) -> list[Choice]:
    """Every wire, codec and way by itself, everything else as it is."""
    found = [replace(plain, wire=wire) for wire in WIRES[1:]]
    found += [replace(plain, codec=codec) for codec in CODECS[1:]]
    return found + [replace(plain, way=way) for way in WAYS[1:]]


def _refused(backend: Backend, cell: Cell) -> str:
    support = _support(backend, cell)
    return support.reason if support is not None and support.standing is Standing.REFUSED else ""
