"""Backends under test, behind one interface with a declared contract.

What importing this package does not do: import torch, MoRI or AITER. Libraries are loaded only inside a rank process.
"""
