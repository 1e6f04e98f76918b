"""Double of AITER's Python API for quantisers, norms, the fused MoE and the fused AllReduce + RMSNorm.

Scope: signatures, numerics and traps of AITER e4048607 on any torch device; sub-modules have AITER's paths. FP8,
MXFP4 and MXFP8 quantisers, RMSNorm entries, and the experts that :mod:`.fused_moe` names; no int8 payloads or smooth
quantisers. It imports nothing of the project's reference. A pass against it proves nothing about AMD hardware or
AITER's kernels.
"""
