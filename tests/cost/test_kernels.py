"""The kernels that a plan names are those that `quantkit_kernels` selects."""

import itertools

import pytest
import quantkit_kernels
import torch
from quantkit_kernels.cpu import library
from quantkit_kernels.triton import scaled_layout
from quantkit_kernels.triton.backend import refuses

from quantkit.cost.kernels import kernel_for
from quantkit.scheme import PRESETS, Scheme, integer

SHAPES = [(96, 256), (100, 384), (64, 96)]
GRIDS = [
    integer(bits, group, symmetric)
    for bits, group, symmetric in itertools.product(range(2, 9), (32, 64, 128, 48, None), (True, False))
]
SCHEMES = [Scheme(grid, None) for grid in GRIDS] + list(PRESETS.values())


def fitting():
    return [(s, shape) for s in SCHEMES for shape in SHAPES if s.weights.divides(shape[1])]


def spec_of(scheme, shape, inputs="float"):
    grid = scheme.weights
    return quantkit_kernels.Spec(
        grid.number.name, grid.bits, grid.group(shape[1]), grid.symmetric, *shape, inputs
    )


def known(scheme):
    return scheme.weights.number.name != "fp8_e5m2"


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)


@pytest.mark.parametrize("built", [True, False])
def test_on_the_cpu(built, monkeypatch, tmp_path):
    if not built:
        monkeypatch.setenv("QUANTKIT_CPU_LIBRARY", str(tmp_path / "none.so"))
        monkeypatch.setattr(library, "available", lambda: False)
    elif not library.available():
        pytest.skip("the native library is not built here")
    seen = set()
    for scheme, shape in filter(lambda each: known(each[0]), fitting()):
        found = kernel_for(scheme, shape)
        wanted = quantkit_kernels.select(spec_of(scheme, shape), "cpu", "auto", torch.float32)
        assert found.backend == wanted.name, (scheme, shape, found, wanted)
        assert bool(found.why) == (wanted.name != "cpu")
        seen.add(found.backend)
    assert seen == ({"cpu", "reference"} if built else {"torch", "reference"})


def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object())
    for scheme, shape in filter(lambda each: known(each[0]), fitting()):
        reason = refuses(spec_of(scheme, shape), torch.device("cuda"))
        assert (kernel_for(scheme, shape, "cuda").backend == "triton") == (reason is None), (scheme, shape)


def test_inputs_that_a_kernel_rounds_itself():
    found = {}
    for name, scheme in PRESETS.items():
        shape = (256, 256)
        if scheme.inputs is None or not scheme.weights.divides(256):
            continue
        cpu, cuda = (kernel_for(scheme, shape, device).inputs for device in ("cpu", "cuda"))
        if cuda is not None:
            assert cuda == cpu
            assert scaled_layout.refuses(spec_of(scheme, shape, cuda)) is None
        elif cpu is not None:
            assert scaled_layout.refuses(spec_of(scheme, shape, cpu)) is not None
        found[name] = cpu
    assert "int8-range" in found.values()
    assert "fp8-range" in found.values()


def test_the_path_is_the_one_of_this_processor(monkeypatch):
    if not library.available():
        pytest.skip("the native library is not built here")
    monkeypatch.delenv("QUANTKIT_ISA", raising=False)
    found = kernel_for(PRESETS["W4A16"], (64, 256)).path
    available = [
        "portable",
        *(n for i, n in enumerate(library.ISAS) if library.required().qk_isa_available(i) > 0),
    ]
    assert found in available
    monkeypatch.setenv("QUANTKIT_ISA", "portable")
    assert kernel_for(PRESETS["W4A16"], (64, 256)).path == "portable"


def test_a_grid_without_a_kernel_says_why(monkeypatch):
    monkeypatch.setattr("quantkit.cost.kernels._library", lambda: True)
    assert str(kernel_for(Scheme(integer(5, 32), None), (64, 64))).startswith(
        "reference: the native kernels take"
    )
