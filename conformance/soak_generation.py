"""Hypothesis strategy of soaks: a hundred rounds whose token counts swing between full and nearly empty.

So many rounds are too many choices for Hypothesis, so a case is one drawn seed and what follows from it: stretches of
large and of small rounds in turn, each with recipes for its rows and a delay for every rank, all of it data of the
case. What is never drawn: a soak short enough to be read; the reducer makes one of it where a fault shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import strategies as st

from accelerated.contract import Contract
from conformance.cases import MAX_REPLAYED, Cell, Recipe, Round, Values

#: Rounds of a case; with routing handles as many as can be told apart.
ROUNDS = 100
#: Most rounds of a stretch.
STRETCH = 4
#: How late a rank may be; most are on time.
DELAYS_MS = (0, 0, 0, 0, 1, 2)
SMALL = (0, 0, 1, 2)


def length_of(cell: Cell) -> int:
    """Rounds of a case of a cell."""
    return MAX_REPLAYED if "handle" in cell.modes else ROUNDS


@st.composite
def soak_rounds(
    draw: st.DrawFn,
    cell: Cell,
    names: Sequence[str],
    contract: Contract,
    values: Sequence[Values],
    sizes: Sequence[int],
) -> tuple[Round, ...]:
    """Rounds of one case, of archetypes, kinds of values and row lengths among those that are named."""
    random = Random(draw(st.integers(0, 2**32 - 1)))
    least = 0 if contract.idle_ranks else 1
    large = (cell.most_tokens, cell.most_tokens, max(cell.most_tokens - 1, least), max(cell.most_tokens // 2, least))
    found: list[Round] = []
    full = True
    while len(found) < length_of(cell):
        for _ in range(random.randint(1, STRETCH)):
            counts = tuple(max(least, random.choice(large if full else SMALL)) for _ in range(cell.world_size))
            counts = tuple(min(count, cell.most_tokens) for count in counts)
            found.append(
                Round(
                    routing=Recipe(
                        random.choice(names), counts, random.randrange(cell.experts), random.randrange(2**20)
                    ),
                    values=random.choice(values),
                    seed=random.randrange(2**20),
                    delays_ms=tuple(random.choice(DELAYS_MS) for _ in range(cell.world_size)),
                    hidden=random.choice(sizes),
                )
            )
        full = not full
    return tuple(found[: length_of(cell)])
