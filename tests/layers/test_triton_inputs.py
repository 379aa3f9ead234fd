"""Layers whose scheme rounds inputs, on the storage of the Triton kernels, whose twins run on the CPU: 8-bit products
where weights and inputs have the same number, else weight-only products of inputs that were rounded before."""

import copy

import pytest
import quantkit_kernels
import torch
from quantkit_kernels import Spec
from quantkit_kernels.backend import Verdict
from quantkit_kernels.triton import backend, scaled_layout

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.inputs import input_scale
from quantkit.scheme import FP8_TOKEN, NUMBERS, PRESETS, Grid, Scheme, integer

pytest.importorskip("triton")
X = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3)).add(0.3).bfloat16()
CUDA = torch.device("cuda")
FP8_WEIGHTS = Grid(NUMBERS["fp8_e4m3"], "channel")
PRODUCTS = {  # scheme, how its inputs are multiplied, tensors of the layout
    "W8A8": (PRESETS["W8A8"], "int8-range", ()),
    "W8A8 static": (Scheme(integer(8, None), Grid(NUMBERS["int8"], "tensor")), "int8-range", ("x_scale",)),
    "W8A8 static asym": (PRESETS["W8A8_STATIC"], "int8-range", ("x_scale", "x_zero", "sums")),
    "FP8": (PRESETS["FP8_DYNAMIC"], "fp8-range", ()),
    "FP8 static": (PRESETS["FP8"], "fp8-range", ("x_scale",)),
    "FP8 block": (PRESETS["FP8_BLOCK"], "fp8-group", ()),
}
OTHERS = {
    "W4A8": PRESETS["W4A8"],
    "W8 g128, int8 per token": Scheme(integer(8, 128), PRESETS["W8A8"].inputs),
    "W8, FP8 per token": Scheme(integer(8, None), FP8_TOKEN),
    "FP8 channel, FP8 g128": Scheme(FP8_WEIGHTS, PRESETS["FP8_BLOCK"].inputs),
    "FP8, int8 per token": Scheme(FP8_WEIGHTS, PRESETS["W8A8"].inputs),
}


@pytest.fixture
def here(monkeypatch):
    """The backend takes the CPU, where its twins run, for the weights that it takes on a GPU."""

    def refuses(spec, device):
        return None if spec.inputs == "float" else scaled_layout.refuses(spec)

    monkeypatch.setattr(backend, "refuses", refuses)
    return monkeypatch


def layer(scheme, bias=True):
    g = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(200, 256, generator=g), scheme.weights, torch.bfloat16)
    inputs, found = scheme.inputs, None
    if inputs is not None and not inputs.dynamic:
        low, high = X.float().amin().view(1), X.float().amax().view(1)
        found = input_scale(low, high, inputs, torch.bfloat16)
    shift = torch.randn(200, generator=g) if bias else None
    return QuantLinear.from_quantized(weight, shift, inputs=inputs, input_range=found)


def close(found, truth):
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), truth, rtol=2**-8, atol=1e-3 * float(truth.abs().max()))


def prepared(scheme, name="triton", bias=True):
    module = layer(scheme, bias)
    stored = {leaf: tensor.clone() for leaf, tensor in module.on_disk().items()}
    truth = module(X.float())  # rounded in fp32, as the kernels do
    module.prepare(name, torch.bfloat16)
    return module, stored, truth


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_8_bit_products_are_the_references(name, bias):
    scheme, inputs, more = PRODUCTS[name]
    module, stored, truth = prepared(scheme, bias=bias)
    assert (module.backend, module.compute) == ("triton", inputs)
    assert module.prepared == ("codes", "scales", *more)
    close(module(X), truth)
    close(copy.deepcopy(module)(X), truth)
    kept = module.on_disk()
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[leaf], stored[leaf]) for leaf in stored)


@pytest.mark.usefixtures("here")
def test_a_block_has_one_scale():
    module, _, _ = prepared(PRESETS["FP8_BLOCK"])
    assert module.scales.shape == (2, 2)
    again = layer(PRESETS["FP8_BLOCK"])
    again.weight_scale[1] *= 2
    again.prepare("triton", torch.bfloat16)
    assert again.scales.shape == (2, 2)
    stored = again.stored()
    stored.scale[130] *= 2  # no longer one of a block
    assert scaled_layout.build(stored).tensors["scales"].shape == (200, 2)
    assert torch.equal(scaled_layout.restore(scaled_layout.build(stored)).scale, stored.scale)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", OTHERS)
def test_other_inputs_are_rounded_before_a_weight_only_product(name):
    module = layer(OTHERS[name])
    truth = module(X)
    module.prepare("triton", torch.bfloat16)
    assert (module.backend, module.compute) == ("triton", "float")
    assert module(X).dtype == torch.bfloat16
    torch.testing.assert_close(module(X), truth, rtol=2**-7, atol=1e-2 * float(truth.abs().max()))


def test_auto_takes_products_that_passed_their_test(here):
    """What is not trusted runs weight-only, with the inputs rounded before."""
    here.delenv("QUANTKIT_BACKEND", raising=False)
    passed = {"int8-range"}

    def verdict(spec, device, dtype):
        return Verdict(spec.inputs in {"float", *passed}, "made up")

    here.setattr(backend, "verdict", verdict)
    here.setattr(quantkit_kernels.backend("cpu"), "_refuses", lambda *_: "not here")
    for name, (scheme, inputs, _) in PRODUCTS.items():
        module, _, _ = prepared(scheme, None)
        assert module.backend == "triton", name
        assert module.compute == (inputs if inputs in passed else "float")


def spec(number, inputs, group=256, symmetric=True):
    return Spec(number, 4 if number == "int4" else 8, group, symmetric, 64, 256, inputs)


def test_what_is_refused_is_named(monkeypatch):
    def says(*what):
        return quantkit_kernels.backend("triton").refuses(spec(*what), CUDA)

    assert "symmetric weights in int8, not by int4" in says("int4", "int8-range")
    assert "not by asymmetric int8" in says("int8", "int8-range", 256, False)
    assert "symmetric weights in fp8_e4m3, not by int8" in says("int8", "fp8-range")
    assert "one scale per row, not with groups of 128" in says("int8", "int8-range", 128)
    assert "groups of 128 columns, not with groups of 256" in says("fp8_e4m3", "fp8-group")
    assert "no compute 'int8'" in says("int8", "int8")
    assert (
        says("fp8_e4m3", "fp8-group", 128) is says("int8", "int8-range") is says("fp8_e4m3", "float") is None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fits in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert (says("fp8_e4m3", "fp8-range") is None) == fits
        assert says("fp8_e4m3", "float") is says("int8", "int8-range") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "8.9 or later, this device has 8.0" in says("fp8_e4m3", "fp8-range")
