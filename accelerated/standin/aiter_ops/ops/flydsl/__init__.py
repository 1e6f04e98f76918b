"""Double of ``aiter.ops.flydsl``; it compiles nothing. A pass against it proves nothing about FlyDSL's kernels."""
