"""Static input scales: found behind the quantized layers before, stored, and the ones that the loaded model uses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import quantkit
from quantkit import assets
from quantkit.calibration.text import token_windows
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe.recipe import parse_recipe

BACKEND = "reference"
pytestmark = pytest.mark.usefixtures("steady")
WEIGHTS = {"preset": "W8A16", "algorithm": "rtn"}
STATIC = {"number": "int8", "granularity": "tensor", "symmetric": False}


def quantized(arguments, output, **changes):
    given = arguments("rtn", output, **changes)
    quantkit.quantize(**given)
    layers = json.loads((output / "quantkit.json").read_text())["layers"]
    tensors = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    return given, {layer["name"]: layer for layer in layers}, tensors


@pytest.fixture(scope="module")
def made(arguments, tmp_path_factory):
    """(arguments, layers of the manifest, tensors, folder) of an asymmetric static scheme with GPTQ weights."""
    output = tmp_path_factory.mktemp("static") / "out"
    weights = {"preset": "W8A8_STATIC", "algorithm": "gptq"}
    return *quantized(arguments, output, weights=weights), output


def test_siblings_share_one_scale_in_the_type_of_the_model(made):
    _, layers, tensors, _ = made
    for block in range(4):
        for parent, members in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{block}.{parent}.{m}_proj" for m in members]
            scales = {float(tensors[f"{n}.input_scale"]) for n in names}
            zeros = {int(tensors[f"{n}.input_zero_point"]) for n in names}
            assert len(scales) == len(zeros) == 1
    one = tensors["model.layers.1.mlp.down_proj.input_scale"]
    assert one.dtype == torch.bfloat16
    assert one.shape == (1,)
    assert layers["model.layers.1.mlp.down_proj"]["input_scale"] == float(one)


def test_ranges_are_those_of_the_model_that_runs(made):
    """The inputs of every layer of the loaded model, on the calibration text, reach exactly as far as was recorded."""
    given, layers, _, output = made
    model = quantkit.load(output, dtype=torch.float32)
    found = {}

    def note(name):
        def hook(module, args):
            low, high = args[0].aminmax()
            seen = found.setdefault(name, [0.0, 0.0])
            seen[:] = min(seen[0], float(low)), max(seen[1], float(high))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(note(name))
    tokenizer = AutoTokenizer.from_pretrained(output)
    calibration = parse_recipe(given["recipe"]).calibration
    with torch.no_grad():
        model(token_windows(calibration, tokenizer, assets.calibration_text()).ids)
    assert found.keys() == layers.keys()
    for name, (low, high) in found.items():
        recorded = layers[name]["input_low"], layers[name]["input_high"]
        assert recorded == pytest.approx((low, high), rel=2e-3, abs=1e-3), name


def test_data_free_weights_need_text_for_their_input_scales(arguments, tmp_path):
    _, layers, tensors = quantized(
        arguments,
        tmp_path / "out",
        weights=WEIGHTS,
        inputs=STATIC | {"symmetric": True, "range": "mse"},
    )
    assert "model.layers.3.mlp.up_proj.input_scale" in tensors
    assert not any(name.endswith("input_zero_point") for name in tensors)
    assert all(0 <= layer["inputs_clipped"] < 0.01 for layer in layers.values())


def test_a_rule_takes_the_inputs_of_some_layers_away(arguments, tmp_path):
    rules = [{"match": "*.down_proj", "inputs": "none"}, {"match": "lm_head", "bits": 8}]
    _, layers, tensors = quantized(arguments, tmp_path / "out", weights=WEIGHTS, inputs=STATIC, rules=rules)
    assert "model.layers.0.mlp.up_proj.input_scale" in tensors
    assert "model.layers.0.mlp.down_proj.input_scale" not in tensors
    assert "input_low" not in layers["model.layers.0.mlp.down_proj"]
    assert float(tensors["lm_head.input_scale"]) > 0
