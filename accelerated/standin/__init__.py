"""Doubles of vendor libraries, so that the suite's own machinery can be exercised where no AMD GPU is.

Scope: each sub-package doubles one Python API on any torch device. A pass against a double proves nothing about AMD
hardware, about fences or timing, or about the vendor's kernels; it proves that callers obey the documented contract.
"""
