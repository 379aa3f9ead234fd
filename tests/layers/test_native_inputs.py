"""Layers whose scheme rounds inputs to int8 or FP8: the native kernels do it themselves, as the reference does."""

import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear, huge_pages
from quantkit.numerics.inputs import input_scale
from quantkit.scheme import FP8_TOKEN, INT8_TOKEN, NUMBERS, PRESETS, Grid, Scheme, integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

X = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)) + 0.3
STATIC = {
    True: Scheme(integer(8, None), Grid(NUMBERS["int8"], "tensor")),
    False: PRESETS["W8A8_STATIC"],
}
SCHEMES = {
    "W8A8": PRESETS["W8A8"],
    "W4A8": PRESETS["W4A8"],
    "W8A8 static": STATIC[True],
    "W8A8 static asym": STATIC[False],
    "FP8 dynamic": PRESETS["FP8_DYNAMIC"],
    "FP8 static": PRESETS["FP8"],
    "FP8 block": PRESETS["FP8_BLOCK"],
    "W8 in FP8": Scheme(integer(8, None), FP8_TOKEN),
}
COMPUTES = {
    "FP8 dynamic": "fp8-range",
    "FP8 static": "fp8-range",
    "FP8 block": "fp8-group",
    "W8 in FP8": "fp8-range",
}


def layer(scheme, bias=True):
    g = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(48, 128, generator=g), scheme.weights, torch.bfloat16)
    inputs, found = scheme.inputs, None
    if inputs is not None and not inputs.dynamic:
        found = input_scale(X.amin().view(1), X.amax().view(1), inputs, torch.bfloat16)
    shift = torch.randn(48, generator=g) if bias else None
    return QuantLinear.from_quantized(weight, shift, inputs=inputs, input_range=found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_native_product_is_the_references(name, bias):
    module = layer(SCHEMES[name], bias)
    stored = {name: t.clone() for name, t in module.on_disk().items()}
    truth = module(X)
    module.prepare("cpu", torch.float32)
    assert module.compute == COMPUTES.get(name, "int8-range")
    torch.testing.assert_close(module(X), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    module.move_layout(huge_pages([module]).place)  # as `load` does
    torch.testing.assert_close(module(X), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    kept = module.on_disk()
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Grid(NUMBERS["fp8_e4m3"], "channel"), INT8_TOKEN),
        Scheme(Grid(NUMBERS["fp8_e4m3"], "channel"), Grid(NUMBERS["fp8_e4m3"], "group", 32, dynamic=True)),
        Scheme(integer(8, None), Grid(NUMBERS["int8"], "token", symmetric=False, dynamic=True)),
    ],
    ids=str,
)
def test_other_inputs_are_rounded_before_the_kernel(scheme):
    module = layer(scheme)
    truth = module(X)
    module.prepare("cpu", torch.float32)
    assert module.compute == "float"
    torch.testing.assert_close(module(X), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_a_named_compute_overrides_the_scheme():
    module = layer(PRESETS["W8A8"])
    module.prepare("cpu", torch.float32, "int8")
    assert module.compute == "int8"
    plain = layer(Scheme(integer(8, None)))
    plain.prepare("cpu", torch.float32, "int8")
    assert torch.equal(module(X), plain(X))


def test_weights_alone_stay_exact():
    module = layer(Scheme(integer(8, None)))
    module.prepare("cpu", torch.float32)
    assert module.compute == "float"
