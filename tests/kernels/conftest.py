"""The paths of the native CPU kernels, one after the other."""

import pytest
from cpu_paths import PATHS, build_emulated
from quantkit_kernels.cpu import library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library with AVX-512 and AMX emulated."""
    return build_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every path in turn is the one in use."""
    if request.param.startswith("emulated"):
        build = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "load", lambda: build)
    before = library.isa()
    library.set_isa(request.param.removeprefix("emulated-"))
    yield request.param
    library.set_isa(before)
