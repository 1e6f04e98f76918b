"""Cells of row operators: sizes on both sides of what kernels treat differently, and their budgets.

Every cell begins with its ladder; the budgets here are of drawn cases beyond it. The long ladders of an AllReduce +
norm, over every limit of its paths, and its free-running cells are at one number of ranks per operator; explore and
``--operator`` run them at all.
What the plan does not contain: more than one node, and rows of real models beyond the hidden sizes below (production
sizes run on a GPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerated.contract import Standing
from accelerated.interface import Backend
from accelerated.operators import Family, QuantContract, RowProblem, operators_of
from conformance.row_cases import Mode, RowCell
from conformance.suite.cells import PlannedCell, Unsupported
from reference.problem import ProblemError


@dataclass(frozen=True)
class RowSlot:
    """One line of the plan: a property at a size, with its number of drawn cases per number of ranks."""

    check: str
    family: Family
    hidden: int
    capacity: int
    examples: dict[int, int]  # ranks -> cases
    dtype: str = "bfloat16"
    mode: Mode = "drained"
    short: bool = False  # see PlannedCell
    in_turn: bool = False  # one number of ranks of an operator gets this line, the next operator another one


_Q, _N, _A, _R = Family.QUANTISE, Family.NORM, Family.ALLREDUCE_NORM, Family.ROUTE

#: Rows on the far side of 212 per compute unit, on the largest architecture of the catalogue (aiter/ops/topk.py:190).
ABOVE_TOKEN_SWITCH = 64_452
#: Numbers of experts of models, powers of two and others; as many as a wave, fewer and more. A form takes some of them.
_ROUTES = (
    RowSlot("route", _R, 256, 9, {1: 4}),
    RowSlot("route", _R, 72, 17, {1: 2}, short=True),
    RowSlot("route", _R, 128, 17, {1: 1}, "float16", short=True),
    RowSlot("route", _R, 32, 33, {1: 1}, "float32", short=True),
    RowSlot("route", _R, 384, 17, {1: 1}, short=True),
    RowSlot("route", _R, 256, 66, {1: 1}, "float32", mode="free-running", short=True),
)
#: Two groups of 128 and eight of 32; one group, where some kernels change; ragged groups; more rows than a wave.
GATE = (
    RowSlot("codecs", _Q, 256, 256, {1: 0}),
    RowSlot("quantise", _Q, 256, 33, {1: 8}),
    RowSlot("quantise", _Q, 128, 17, {1: 4}, short=True),
    RowSlot("quantise", _Q, 200, 9, {1: 4}),
    RowSlot("quantise", _Q, 160, 9, {1: 4}, short=True),
    RowSlot("quantise", _Q, 512, 9, {1: 6}, "float16", short=True),
    RowSlot("quantise", _Q, 256, 130, {1: 6}, mode="free-running", short=True),
    RowSlot("norm", _N, 256, 33, {1: 6}),
    RowSlot("norm", _N, 384, 9, {1: 4}, "float16", short=True),
    RowSlot("norm", _N, 8200, 3, {1: 4}, short=True),
    RowSlot("norm", _N, 512, 130, {1: 4}, mode="free-running", short=True),
    RowSlot("allreduce_norm", _A, 512, 1024, {2: 3, 4: 2, 8: 1}, in_turn=True),
    RowSlot("allreduce_norm", _A, 384, 64, {2: 3, 4: 1, 8: 1}, short=True),
    RowSlot("allreduce_norm", _A, 4096, 40, {2: 3, 4: 2, 8: 1}, short=True, in_turn=True),
    RowSlot("allreduce_norm", _A, 512, 128, {2: 4, 4: 3, 8: 3}, mode="free-running", short=True, in_turn=True),
    RowSlot("compiled", _N, 256, 9, {1: 2}, short=True),
    RowSlot("compiled", _A, 512, 9, {2: 2}, short=True),
    *_ROUTES,
)
SMOKE = (
    RowSlot("quantise", _Q, 256, 17, {1: 2}),
    RowSlot("norm", _N, 256, 9, {1: 2}),
    RowSlot("allreduce_norm", _A, 512, 33, {2: 2, 4: 1}),
    RowSlot("route", _R, 256, 5, {1: 2}, short=True),
    RowSlot("route", _R, 72, 5, {1: 2}, short=True),
)
#: What a backend that is not the subject of the run gets.
COMPANION = (
    RowSlot("codecs", _Q, 256, 256, {1: 0}),
    RowSlot("quantise", _Q, 200, 9, {1: 3}),
    RowSlot("norm", _N, 256, 9, {1: 3}),
    RowSlot("allreduce_norm", _A, 512, 33, {2: 3, 4: 2, 8: 1}, in_turn=True),
    # Its AllReduce is compiled in the selftests: a compile costs as much as a hundred cases.
    RowSlot("compiled", _N, 256, 9, {1: 2}, short=True),
    RowSlot("route", _R, 256, 5, {1: 1}),
    RowSlot("route", _R, 72, 17, {1: 1}, short=True),
)
#: What a GPU gets on top: production sizes, hidden sizes that fusions have missed, many rows.
HARDWARE = (
    RowSlot("quantise", _Q, 7168, 4096, {1: 8}),
    RowSlot("quantise", _Q, 7168, 512, {1: 8}, mode="free-running"),
    RowSlot("norm", _N, 2880, 1024, {1: 6}),
    RowSlot("norm", _N, 7168, 1024, {1: 6}),
    RowSlot("norm", _N, 8192, 512, {1: 6}),
    *(RowSlot("allreduce_norm", _A, n, 4096, {2: 6}) for n in (2880, 3584, 6144, 7168, 8192)),
    RowSlot("allreduce_norm", _A, 7168, 512, {2: 12}, mode="free-running"),
    RowSlot("route", _R, 256, 4096, {1: 8}),
    RowSlot("route", _R, 384, 4096, {1: 8}, "float32"),
    RowSlot("route", _R, 256, 512, {1: 8}, mode="free-running"),
    RowSlot("route", _R, 256, ABOVE_TOKEN_SWITCH, {1: 2}, "float32", short=True),
)
#: Explore on any device: AITER changes its biased grouped kernel with the number of tokens.
EXPLORE = (RowSlot("route", _R, 256, ABOVE_TOKEN_SWITCH, {1: 1}, "float32", short=True),)
#: Explore on a GPU: more than 2**31 bytes, and more than 2**31 elements.
EXPLORE_HARDWARE = (
    RowSlot("quantise", _Q, 8192, 131_080, {1: 1}),
    RowSlot("quantise", _Q, 8192, 262_150, {1: 1}),
    RowSlot("norm", _N, 8192, 131_080, {1: 1}),
)


def row_cells(
    name: str,
    backend: Backend,
    *,
    companion: bool,
    tier: str,
    ep_sizes: Sequence[int],
    operators: Sequence[str],
    device: str,
) -> Iterator[PlannedCell | Unsupported]:
    """Cells of every operator that a backend offers; a refusal where it takes none of the sizes.

    Args:
        name: what the registry is asked for.
        backend: the backend.
        companion: whether it is not the subject of the run.
        tier: smoke, gate or explore.
        ep_sizes: numbers of ranks to plan; local operators run on one whatever they are.
        operators: names to keep, all if empty.
        device: ``"cuda"`` adds the slots that only a GPU is fast enough for.
    """
    slots: tuple[RowSlot, ...] = {"smoke": SMOKE}.get(tier, COMPANION if companion else GATE)
    if device == "cuda" and tier != "smoke" and backend.judged_by != "oracle":
        slots += HARDWARE
        slots += EXPLORE_HARDWARE if tier == "explore" else ()
    elif tier == "explore" and not companion and backend.judged_by != "oracle":
        slots += EXPLORE
    offered = {Family(family): names for family, names in operators_of(backend).items()}
    for family, names in offered.items():
        sizes = [size for size in ep_sizes if size > 1] if family is Family.ALLREDUCE_NORM else [1]
        for number, operator in enumerate(names):
            if operators and not companion and operator not in operators:
                continue
            if operators and not companion and not sizes:
                yield Unsupported(name, operator, max(ep_sizes), 1, "it reduces over ranks; give --ep-sizes 2 or more")
            for world_size in sizes:
                turns = [slot for slot in slots if slot.in_turn]
                here = [
                    slot
                    for slot in slots
                    if slot not in turns
                    or operators
                    or tier == "explore"
                    # Each line of an operator has another number of ranks.
                    or world_size == sizes[(number + turns.index(slot)) % len(sizes)]
                ]
                yield from _operator(name, backend, companion, family, operator, world_size, here)


def _operator(
    name: str,
    backend: Backend,
    companion: bool,
    family: Family,
    operator: str,
    world_size: int,
    slots: Sequence[RowSlot],
) -> Iterator[PlannedCell | Unsupported]:
    planned, refused, full = 0, {}, False
    for slot in slots:
        if slot.family is not family:
            continue
        try:
            problem = RowProblem(family, world_size, slot.hidden, slot.capacity, slot.dtype)
        except ProblemError as error:
            refused[f"rows of {slot.hidden} {slot.dtype}"] = str(error)
            continue
        support = backend.support(problem, operator)
        if support.standing is Standing.REFUSED:
            refused[f"rows of {slot.hidden} {slot.dtype}"] = support.reason
            continue
        if slot.check == "codecs" and not _is_static(backend.contract(problem, operator)):
            continue
        if slot.check == "compiled" and (operator not in _compiled(backend) or world_size not in slot.examples):
            continue
        planned += 1
        cell = RowCell(
            slot.check, name, operator, family, world_size, slot.hidden, slot.capacity, slot.dtype, slot.mode
        )
        examples = slot.examples.get(world_size, min(slot.examples.values()))
        # Every operator has one cell with every kind of row, where its own line is another number of ranks' turn, too.
        # Eight addends show what four do; two have one sum only.
        short = world_size > 4 or (slot.short and (full or slot.check == "compiled"))
        full |= not short
        yield PlannedCell(cell, examples, support.standing is Standing.CLAIMED, companion, short)
    if refused and not planned:
        yield Unsupported(name, operator, world_size, 1, next(iter(refused.values())))
    elif refused:
        sizes = ", ".join(refused)
        yield Unsupported(name, operator, world_size, 1, f"{sizes}: {next(iter(refused.values()))}")


def _compiled(backend: Backend) -> Sequence[str]:
    """Operators that users run under ``torch.compile``: those in split form."""
    found: Sequence[str] = getattr(backend, "compiled_operators", ())
    return found


def _is_static(contract: object) -> bool:
    return isinstance(contract, QuantContract) and contract.codec.static
