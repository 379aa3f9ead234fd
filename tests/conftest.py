"""Tests compare with the reference to the bit unless they name a backend."""

import os

os.environ.setdefault("QUANTKIT_BACKEND", "reference")
