"""Double of ``aiter.ops``. A pass against it proves nothing about AITER's kernels."""
