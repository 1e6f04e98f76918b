"""Drawing a cell's cases: how many, from which seed, and what is drawn in the place of what waivers take out.

Hypothesis draws and does not shrink. What drawing does not decide: what becomes of a case.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

from conformance import __version__
from conformance.cases import AnyCase, AnyCell
from conformance.suite.cells import PlannedCell
from conformance.suite.draws import isolate_draws
from conformance.suite.kinds import Part
from conformance.suite.options import Options
from conformance.suite.waived import SAMPLES, Watch

#: Draws in the place of one that waivers took out, and how often they are topped up.
TOP_UP, TOP_UPS = 8, 4
#: Draws that look for a case of a waiver where the budget had none.
SOUGHT = 100


class Drawing:
    """Draws cases as the options of a run say."""

    def __init__(self, options: Options) -> None:
        self._explore = options.tier == "explore"
        self._seed = options.seed
        self._examples = options.output / "hypothesis" / "examples"
        isolate_draws()

    def draw(self, planned: PlannedCell, part: Part, watch: Watch, examine: Callable[[AnyCase], None]) -> int:
        """Draw a part of the cell's budget; how many cases are lacking because waivers took out too many or all.

        What waivers take out is drawn like anything else, so the rest is what is drawn without them; further batches
        make up for it. In explore, batches with fresh seeds go on until the cell's share of the time is spent.
        """
        name, whole_budget, strategy = part
        deadline = time.monotonic() + planned.seconds
        budget = min(whole_budget, SAMPLES) if watch.whole else whole_budget
        lacking, waived, batch = budget, False, 0

        def one(case: AnyCase) -> None:
            nonlocal lacking, waived
            if watch.avoids(case):
                waived = True
            elif lacking > 0 or self._explore:
                lacking -= 1
                examine(case)

        while True:
            asked = budget if batch == 0 or self._explore else TOP_UP * lacking
            offset = self._seed + batch if self._explore else batch
            self._batch(strategy, asked, seed_of(planned.cell, name, offset), one)
            if watch.whole:
                return whole_budget
            if self._explore and time.monotonic() > deadline:
                return max(0, lacking) if waived else 0
            if not self._explore and (not waived or lacking <= 0 or batch == TOP_UPS):
                return max(0, lacking) if waived else 0
            batch += 1

    def seek(self, planned: PlannedCell, parts: Sequence[Part], watch: Watch) -> None:
        """Draw on, running nothing, for cases of the waivers that the budget had none of."""
        for name, _, strategy in parts:
            self._batch(strategy, SOUGHT, seed_of(planned.cell, f"{name} waived", 0), watch.avoids)

    def _batch(
        self, strategy: SearchStrategy[Any], examples: int, seeded: int, body: Callable[[AnyCase], object]
    ) -> None:
        """Have Hypothesis draw so many cases once, and do something with each."""
        explore = self._explore
        raised: list[Exception] = []
        run_settings = settings(
            max_examples=examples,
            deadline=None,
            derandomize=False,  # Hypothesis sets it where CI is set; the seed below is what counts everywhere
            database=DirectoryBasedExampleDatabase(self._examples) if explore else None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate) if explore else (Phase.explicit, Phase.generate),
            report_multiple_bugs=False,
            suppress_health_check=(HealthCheck.too_slow,),
            verbosity=Verbosity.quiet,
        )

        @seed(seeded)
        @run_settings
        @given(case=strategy)
        def one(case: AnyCase) -> None:
            # Hypothesis asks for a failing case again, and takes one that does not come back for a flake.
            if raised:
                raise raised[0]
            try:
                body(case)
            except Exception as error:
                raised.append(error)
                raise

        one()


def seed_of(cell: AnyCell, part: str, offset: int) -> int:
    """Seed of a cell's draws: a hash of (suite version, cell), so a gate draws the same cases everywhere."""
    text = f"{__version__} {cell.label} {cell.check} {part} {offset}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
