"""Double of ``aiter.jit``; it compiles nothing. A pass against it proves nothing about AITER's build."""
