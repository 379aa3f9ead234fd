"""Every family end to end: the walk gives the model's logits, and what `quantize` writes runs as it says."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import quantkit
from quantkit import assets
from quantkit.calibration import walk
from quantkit.formats.compressed_tensors import parse_config, unpack
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source

NAMES = list(tiny_models.CONFIGS)
RECIPES = {
    "rtn": {"weights": {"algorithm": "rtn", "bits": 4, "group_size": 16, "symmetric": True}},
    "gptq": {"weights": {"algorithm": "gptq", "bits": 4, "group_size": 32, "symmetric": False}},
    "awq": {
        "weights": {"algorithm": {"name": "rtn", "range": "minmax"}, "bits": 8, "group_size": 16},
        "transforms": [{"name": "awq", "grid": 4, "clip": False}],
    },
}


def two_layers(name, **overrides):
    """A tiny model of two blocks; of the mixed families one slides and one does not."""
    _, settings = tiny_models.CONFIGS[name]
    types = {"layer_types": ["sliding_attention", "full_attention"]} if "layer_types" in settings else {}
    return tiny_models.FAMILIES[name](num_hidden_layers=2, **types, **overrides)


def ids():
    """[2, 24]: longer than the sliding windows."""
    return tiny_models.ids(24, batch=2, vocabulary=100)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


@dataclass
class Case:
    """One family in a folder: the original, and what each recipe makes of it, computed once."""

    name: str
    folder: Path

    def __post_init__(self):
        tiny_models.save(two_layers(self.name), self.folder / "original")
        (self.folder / "text").write_text(assets.calibration_text().read_text()[:20000])
        self.output = cache(self._output)

    @property
    def original(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "original", dtype=torch.float32)

    def _output(self, recipe):
        calibration = {"data": [str(self.folder / "text")], "samples": 6, "sequence_length": 32}
        return quantkit.quantize(
            RECIPES[recipe] | {"calibration": calibration},
            model=self.folder / "original",
            output=self.folder / recipe,
            evaluate=False,
        ).output


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


def stored(folder):
    """All tensors of a checkpoint."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@torch.no_grad()
def dense(original, output, rescaled=False):
    """`original` with the weights that `output` holds, dequantized; rescaled: and its norms and biases.

    Without `rescaled`, what is not quantized must not have changed. Returns the model and the number of
    quantized linears.
    """
    tensors = stored(output)
    scheme_of = parse_config(json.loads((output / "config.json").read_text())["quantization_config"])
    count = 0
    for name, module in original.named_modules():
        parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        packed = {p: tensors.pop(f"{name}.{p}") for p in parts if f"{name}.{p}" in tensors}
        if packed:
            weight = unpack(packed, scheme_of(name)).dequantize()
            module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)
            count += 1
    parameters = dict(original.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if rescaled:
            parameters[name].copy_(tensor)
        else:
            assert torch.equal(parameters[name], tensor), name
    return original, count


def linears_of_blocks(model):
    return sum(isinstance(m, nn.Linear | Conv1D) for m in tiny_models.blocks(model).modules())


def relative(x, y):
    """RMS(x - y) / RMS(y)."""
    return float((x - y).square().mean().sqrt() / y.square().mean().sqrt())


# the walk ------------------------------


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_the_streamed_walk_gives_the_models_logits(tmp_path, name, tie):
    tiny_models.save(two_layers(name, tie_word_embeddings=tie), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    source = Source(read_checkpoint(tmp_path))
    model = skeleton.build(source)
    prefix, blocks = skeleton.find_blocks(model)
    skeleton.load_outside(model, source, prefix)
    hidden, calls = walk.embed(model, blocks, ids())
    for index, call in enumerate(calls):
        block = skeleton.load_block(model, source, index, blocks_prefix=prefix)
        with torch.no_grad():
            out = block(hidden, *call.args, **call.kwargs)
        as_tuple = isinstance(out, tuple)
        hidden = out[0] if as_tuple else out
        skeleton.free_block(model, index, prefix)
    assert torch.equal(walk.finish(model, blocks, hidden, ids(), as_tuple), logits(reference))


# quantize, save, load ------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_loaded_logits_equal_the_dequantized_model(case, name, recipe):
    output = case(name).output(recipe)
    original = case(name).original
    before = logits(original)
    wanted = linears_of_blocks(original)
    reference, count = dense(original, output, rescaled=recipe == "awq")
    assert count == wanted
    after, loaded = logits(reference), logits(quantkit.load(output))
    if name in ("falcon-new", "falcon-alibi"):  # FalconLinear adds its bias after rounding the product
        torch.testing.assert_close(loaded, after, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(loaded, after)
    assert 0 < relative(after, before) < (0.03 if recipe == "awq" else 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_awq_stores_the_norms_it_rescaled_and_no_others(case, name):
    output = case(name).output("awq")
    manifest = json.loads((output / "quantkit.json").read_text())
    scaled = [s for s in manifest["scaling"] if s["exponent"] is not None]
    assert scaled
    assert all(s["loss"] < s["identity_loss"] for s in scaled)
    norms = {s["producer"] for s in scaled if "norm" in s["producer"] or s["producer"].startswith("ln_")}
    before, after = stored(case(name).folder / "original"), stored(output)
    moved = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved if n.endswith("weight")} == norms
