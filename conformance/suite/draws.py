"""What a draw depends on: the pinned Hypothesis, the suite version and the cell, and nothing else.

What this does not pin: explore, whose seeds are fresh by intent.
"""

from __future__ import annotations

from hypothesis import __version__ as hypothesis_version
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

_NO_CONSTANTS = Constants()


def isolate_draws() -> None:
    """Have Hypothesis draw no constants from the source of loaded modules.

    With probability 1/20 Hypothesis draws an integer from the literals of every loaded module that it takes for local,
    i.e. that lies outside site-packages. Which modules are loaded depends on the tests that ran before and on plugins,
    and whether ours are local depends on how they were installed, so the same cell would draw other cases on another
    worker, in another order or from another install. Importing our own modules first would cover only the first of
    these. There is no setting for it; Hypothesis is pinned, so its function can be replaced.

    Raises:
        RuntimeError: this Hypothesis is built differently.
    """
    if not callable(getattr(providers, "_get_local_constants", None)):
        raise RuntimeError(f"Hypothesis {hypothesis_version} harvests constants in another way; install the pinned one")
    providers._get_local_constants = _no_constants
    # What was drawn before in this process may have left harvested constants there.
    providers.CONSTANTS_CACHE.cache.clear()


def _no_constants() -> Constants:
    return _NO_CONSTANTS
