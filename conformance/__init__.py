"""The suite: cases and their generation, the rank pool, checks, verdicts, records, and the tests themselves.

The driver half (everything but :mod:`conformance.rank`) never imports torch and never opens a GPU.
"""

#: Part of every gate seed: a new version may draw new cases.
__version__ = "0.1.0"
