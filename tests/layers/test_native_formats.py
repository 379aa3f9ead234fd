"""Layers of FP4 and FP8 weights, as checkpoints hold them: `auto` runs them natively and gives the file back."""

import pytest
import torch
from quantkit_kernels.backends import ENVIRONMENT
from quantkit_kernels.cpu import layout, library

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear, huge_pages
from quantkit.scheme import PRESETS

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

X = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3))


def layer(name, k=256):
    g = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(48, k, generator=g), PRESETS[name].weights, torch.bfloat16)
    return QuantLinear.from_quantized(weight, torch.randn(48, generator=g))


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "W8A16_FP8"])
def test_auto_runs_them_natively_and_the_file_comes_back(name, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT)
    module = layer(name)
    stored = {leaf: tensor.clone() for leaf, tensor in module.on_disk().items()}
    truth = module(X)
    module.prepare("auto", torch.float32)
    assert module.backend == "cpu"
    torch.testing.assert_close(module(X), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    module.move_layout(huge_pages([module]).place)  # as `load` does
    torch.testing.assert_close(module(X), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    kept = module.on_disk()
    assert kept.keys() == stored.keys()
    for leaf in stored:
        assert kept[leaf].dtype == stored[leaf].dtype
        assert torch.equal(kept[leaf].view(torch.uint8), stored[leaf].view(torch.uint8))


@pytest.mark.parametrize("k", [32, 64, 96, 160])
@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_short_rows_have_room_in_the_arena(name, k):
    """Four groups to a unit: the last one may be mostly padding."""
    modules = [layer(name, k), layer(name, k)]
    truth = modules[0](X[..., :k])
    for module in modules:
        module.prepare("cpu", torch.float32)
    arena = huge_pages(modules)
    for module in modules:
        module.move_layout(arena.place)
        torch.testing.assert_close(module(X[..., :k]), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("name", ["NVFP4A16", "W8A16_FP8"])
def test_double_precision_runs_on_the_reference(name, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT)
    module = layer(name)
    module.prepare("auto", torch.float64)
    assert module.backend == "reference"
    assert module(X.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_fp4_keeps_its_scales_in_a_byte(name):
    module = layer(name)
    module.prepare("cpu", torch.float32)
    assert module.layout.facts["scale_type"] == layout.F8


@pytest.mark.parametrize("name", ["NVFP4A16", "FP8_DYNAMIC"])
def test_compiled_layers_give_the_same(name):
    module = layer(name)
    module.prepare("cpu", torch.float32)
    try:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), module(X))
    finally:
        torch.compiler.reset()  # one forward is compiled a few times only
