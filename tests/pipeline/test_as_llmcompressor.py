"""A run writes the tensors and the config that llm-compressor 0.14 writes for the same model and scheme.

The model is random, of the shape of the fixture's source: names, dtypes, shapes and keys are compared, not values.
"""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit

pytestmark = pytest.mark.usefixtures("steady")

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECIPES = {
    "w8a8-int8-dynamic": {"weights": {"preset": "W8A8"}},
    "w8a8-int8-static-asym": {"weights": {"preset": "W8A8_STATIC"}},
    "w4a8-int8": {"weights": {"preset": "W4A8", "group_size": 32}},
    "fp8-dynamic": {"weights": {"preset": "FP8_DYNAMIC"}},
    "fp8-block": {"weights": {"preset": "FP8_BLOCK"}},
    "nvfp4": {"weights": {"preset": "NVFP4A16"}},
    "mxfp4a16": {"weights": {"preset": "MXFP4A16"}},
    "mxfp8": {"weights": {"number": "fp8_e4m3", "granularity": "group", "group_size": 32, "scale": "e8m0"}},
    "kv-fp8-tensor": {"weights": "none", "kv_cache": "FP8_TENSOR"},
    "kv-fp8-head": {"weights": "none", "kv_cache": "FP8"},
    "mixed-w4-w8": {
        "weights": {"preset": "W4A16", "group_size": 32},
        "rules": [{"match": "*.down_proj", "bits": 8, "group_size": None}],
    },
}


def stored(folder):
    """{name: (dtype, shape)} of every tensor of a model's folder."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a dict
                part = opened.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def theirs(name):
    """(tensors, quantization_config) of a fixture; of NVFP4's and MXFP8's without what their inputs have."""
    tensors = stored(FIXTURES / name)
    config = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    if name in ("nvfp4", "mxfp8"):
        config["config_groups"]["group_0"]["input_activations"] = None
        tensors = {each: t for each, t in tensors.items() if not each.endswith(".input_global_scale")}
    return tensors, config


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """sources(fixture) -> a folder with a random model of the fixture's shape and a text; one per shape."""
    made = {}

    def make(name):
        config = json.loads((FIXTURES / name / "config.json").read_text())
        del config["quantization_config"]
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            tiny_models.save(model, made[key] / "model", torch.bfloat16)
            (made[key] / "text").write_text("the quick brown fox jumps over the lazy dog " * 100)
        return made[key]

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_names_dtypes_shapes_and_config_are_llmcompressors(name, sources, tmp_path):
    source = sources(name)
    calibration = {"data": [str(source / "text")], "samples": 4, "sequence_length": 32}
    recipe = RECIPES[name] | {"calibration": calibration}
    if recipe["weights"] != "none":
        recipe["weights"] = recipe["weights"] | {"algorithm": "rtn"}
    quantkit.quantize(recipe, source / "model", tmp_path / "out", evaluate=False)
    tensors, config = theirs(name)
    assert stored(tmp_path / "out") == tensors
    ours = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if (
        name == "mixed-w4-w8"
    ):  # weights alone have the shorter form, and modules by name instead of by pattern
        assert ours["format"] == config["format"]
        keys = ("num_bits", "type", "symmetric", "strategy")
        pairs = zip(ours["config_groups"].values(), config["config_groups"].values(), strict=True)
        assert all(one["weights"][k] == other["weights"][k] for one, other in pairs for k in keys)
    else:
        assert ours == config
