"""Triton kernels live here; none is built yet, the reference runs."""
