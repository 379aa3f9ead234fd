"""Native CPU kernels (C++ behind a C ABI) live here; none is built yet, the reference runs."""
