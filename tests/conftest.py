"""Tests compare with the reference to the bit unless they name a backend."""

import os

os.environ.setdefault("QUANTKIT_BACKEND", "reference")
os.environ["QUANTKIT_CACHE_GB"] = "0"  # nothing outside the tests' folders; tests of the cache give it one
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
