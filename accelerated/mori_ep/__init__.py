"""MoRI's expert-parallel dispatch/combine as a backend.

Scope: loading the library, launch parameters, declared contract, and the adapter. Importing this package, its contract
or its launch parameters imports neither torch nor MoRI; the adapter and the library are loaded in a rank process only.
"""
