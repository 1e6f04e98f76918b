"""AITER's quantisers, norms and fused AllReduce + RMSNorm as backends.

Scope: loading the library, declared contracts, and the adapters. Importing this package, its contracts or its backends
imports neither torch nor AITER; the adapters and the library are loaded in a rank process only.
"""
