"""Tests compare with the reference to the bit unless they name a backend."""

import os

os.environ.setdefault("QUANTKIT_BACKEND", "reference")
os.environ["QUANTKIT_CACHE_GB"] = "0"  # nothing outside the tests' folders; tests of the cache give it one
