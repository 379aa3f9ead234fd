"""Native CPU kernels: C++ sources behind a plain C ABI (`quantkit_cpu.h`), bound by `library.py`, ops in `ops.py`.

The reference twin is `../reference/wna16_linear.py`; the packed layout is described in `layout.cpp`.
"""
