"""Tests compare with the reference to the bit unless they name a backend."""

import os

import pytest

os.environ.setdefault("QUANTKIT_BACKEND", "reference")
os.environ["QUANTKIT_CACHE_GB"] = "0"  # nothing outside the tests' folders; tests of the cache give it one
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

BUILDS = (
    "emulated",
    "widest",
)  # fixtures that compile for half a minute: the tests of each run in one process


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that need one of BUILDS, by a fixture or by a parameter that asks for it, are a group of pytest-xdist."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        asked = [*item.fixturenames, *(str(value).partition("-")[0] for value in parameters)]
        for name in BUILDS:
            if name in asked:
                item.add_marker(pytest.mark.xdist_group(name))
