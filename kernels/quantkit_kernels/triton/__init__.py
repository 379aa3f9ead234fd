"""Triton kernels for CUDA and ROCm, one file per op; the reference twin is in `../reference/`.

None is built yet; the reference runs. A kernel that comes is an entry in `../backends.py`, as for `../cpu/`.
"""
