"""Triton kernels for CUDA and ROCm: weight-only linears for small M, a dequantizer for large M.

`layout.py` is the storage, `unpack.py` the inline assembly, `linear.py` the kernels, `configs.py` which tile sizes
run, `op.py` the op, `backend.py` what `../backends.py` registers, `selfcheck.py` whether "auto" may take it,
`tune.py` the command that times tile sizes. Importing this package, `op` or `backend` does not import triton.
"""
