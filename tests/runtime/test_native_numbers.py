"""The native decoder on models whose linears hold FP4 and FP8, or round their inputs, against the eager model."""

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import library
from torch import nn

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.inputs import input_scale
from quantkit.runtime import NativeDecoder, native
from quantkit.scheme import PRESETS, Scheme

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

ROUNDED = ("W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8")


def quantized(schemes: dict[str, Scheme], backend: str | None = "cpu") -> nn.Module:
    """llama-gqa with its linears packed, each in the scheme of the last name that its own ends with."""
    model = tiny_models.FAMILIES["llama-gqa"]()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        scheme = [scheme for end, scheme in schemes.items() if name.endswith(end)][-1]
        weight, inputs, found = rtn(module.weight.data, scheme.weights, torch.bfloat16), scheme.inputs, None
        if inputs is not None and not inputs.dynamic:
            found = input_scale(torch.tensor([-2.0]), torch.tensor([3.0]), inputs, torch.bfloat16)
        packed = QuantLinear.from_quantized(weight, None, inputs=inputs, input_range=found)
        if backend:
            packed.prepare(backend, torch.float32)
        model.set_submodule(name, packed)
    return model.requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(native, eager) [length, vocabulary]"""
    found = native(model)
    assert isinstance(found, NativeDecoder), found
    sequence = found.start()
    parts = [sequence.append(ids[:30], 30), *(sequence.append(t) for t in ids[30:].split(1))]
    return torch.cat(parts), model(input_ids=ids[None]).logits[0]


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("backend", ["cpu", None])
@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "W8A16_FP8"])
def test_weights_of_a_table(name, backend):
    """Prepared by the layers, or by the decoder from the stored tensors."""
    got, truth = logits(quantized({"": PRESETS[name]}, backend), tiny_models.ids(40)[0])
    assert off(got, truth) < 1e-5


@pytest.mark.parametrize("name", ROUNDED)
def test_inputs_are_rounded_as_the_layers_do(name):
    ids, scheme = tiny_models.ids(40)[0], PRESETS[name]
    got, truth = logits(quantized({"": scheme}), ids)
    exact, _ = logits(quantized({"": Scheme(scheme.weights)}), ids)
    assert off(got, truth) < 0.3 * off(exact, truth)  # a code may flip, but they are not rounded another way


def test_linears_of_one_model_may_round_differently():
    """q, k and v, gate and up read the same activations, each in its own way."""
    schemes = {
        "": "W4A16",
        "q_proj": "FP8_DYNAMIC",
        "k_proj": "W8A8_STATIC",
        "up_proj": "FP8",
        "gate_proj": "W8A8",
    }
    small = {"W4A16": Scheme(PRESETS["MXFP4A16"].weights)}
    ids, chosen = (
        tiny_models.ids(40)[0],
        {end: small.get(name, PRESETS[name]) for end, name in schemes.items()},
    )
    got, truth = logits(quantized(chosen), ids)
    exact, _ = logits(quantized({end: Scheme(scheme.weights) for end, scheme in chosen.items()}), ids)
    assert off(got, truth) < 0.3 * off(exact, truth)


def test_a_caller_may_still_ask_for_int8_where_there_are_integers():
    ids = tiny_models.ids(20)[0]
    static, plain = quantized({"": PRESETS["W8A8_STATIC"]}), quantized({"": Scheme(PRESETS["W8A8"].weights)})
    same = [native(model, "int8").start().append(ids, 20) for model in (static, plain)]
    assert torch.equal(*same)
    assert "codes of fp8_e4m3" in native(quantized({"": PRESETS["FP8"]}), "int8")


def test_inputs_that_kernels_do_not_round_are_named():
    assert "which its kernels do not do" in native(quantized({"": PRESETS["FP8_DYNAMIC"]}, backend=None))
