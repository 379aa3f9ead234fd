"""Checkpoints of llm-compressor 0.14 load with the logits that transformers 5.17 with compressed-tensors gave for them.

logits.safetensors: input_ids [1, 24]; logits: fp32, eager attention, activations rounded as the config says;
dense.NAME: some decoded weights. The networks are random, so one flipped code moves logits by up to 0.25: inputs are
compared layer by layer in tests/numerics/test_inputs.py, and ends with a tolerance.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.formats.registry import codec
from quantkit.layers.kv_attention import NAME
from quantkit.layers.kv_cache import cache_of
from quantkit.layers.quant_linear import QuantLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXACT = [
    "w8a8-int8-dynamic",
    "w8a8-int8-static-asym",
    "w4a8-int8",
    "fp8-dynamic",
    "fp8-block",
    "model-free-fp8-dynamic",
]
SHOWN = {
    "w8a8-int8-dynamic": "W8A8 channel sym, inputs int8 token",
    "w8a8-int8-static-asym": "W8A8 channel sym, inputs int8 tensor asym",
    "w4a8-int8": "W4A8 g32 sym, inputs int8 token",
    "fp8-dynamic": "W8A8 fp8_e4m3 channel, inputs fp8_e4m3 token",
    "model-free-fp8-dynamic": "W8A8 fp8_e4m3 channel, inputs fp8_e4m3 token",
    "fp8-block": "W8A8 fp8_e4m3 b128, inputs fp8_e4m3 g128",
}


def opened(name, **how):
    """(model in fp32 with eager attention, what was recorded)."""
    model = quantkit.load(FIXTURES / name, device="cpu", dtype=torch.float32, **how)
    model.set_attn_implementation("eager")
    return model, load_file(FIXTURES / name / "logits.safetensors")


@pytest.mark.parametrize("name", EXACT)
def test_logits_are_those_of_its_own_loader(name):
    model, recorded = opened(name)
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    assert schemes == {SHOWN[name]}
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    size = recorded["logits"].square().mean().sqrt()
    off = (logits - recorded["logits"]).square().mean().sqrt()
    assert float(off) < 1e-2 * float(size), f"{float(off / size):.3g}"


@pytest.mark.parametrize("name", ["kv-fp8-tensor", "kv-fp8-head", "kv-int8-tensor"])
@pytest.mark.parametrize("attention", ["eager", NAME])
def test_caches_give_the_logits_of_their_own_loader(name, attention):
    model, recorded = opened(name)
    model.set_attn_implementation(attention)
    ids = recorded["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = cache_of(model)()
        steps = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1, 1], 1)]
    for logits in (whole, torch.cat(steps, 1)):
        off = (logits - recorded["logits"]).square().mean().sqrt() / recorded["logits"].square().mean().sqrt()
        assert float(off) < 1e-2, f"{float(off):.3g}"


@pytest.mark.parametrize("name", [*EXACT, "mxfp4a16"])
def test_weights_are_decoded_exactly(name):
    model, recorded = opened(name)
    dense = {key.removeprefix("dense."): t for key, t in recorded.items() if key.startswith("dense.")}
    assert dense
    for tensor, wanted in dense.items():
        module = model.get_submodule(tensor.removesuffix(".weight"))
        found = codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize()
        assert torch.equal(found, wanted.float()), tensor
