"""Native CPU kernels, one file per op: C++ source here, its reference twin in `../reference/`.

None is built yet; the reference runs. A kernel that comes is an entry in `../backends.py` (when it can run,
its layout in `../layouts.py`, how to run it) and nothing else changes.
"""
