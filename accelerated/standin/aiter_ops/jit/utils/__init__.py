"""Double of ``aiter.jit.utils``. A pass against it proves nothing about AITER."""
