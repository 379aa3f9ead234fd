"""Linears that several decoder blocks share (Zamba): one packed layer, stored once, loaded, saved and dequantized."""

import json

import pytest
import torch

import quantkit
from quantkit.bench.coverage_case import RECIPES
from quantkit.bench.coverage_model import built, logits, tokenizer
from quantkit.pipeline.in_memory import quantize_in_memory

SHARED = "model.layers.{}.shared_transf.feed_forward.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a tiny Zamba whose blocks 2 and 4 share attention and MLP, what it becomes at 8 bits)."""
    folder = tmp_path_factory.mktemp("zamba")
    model, _ = built("zamba", "ZambaForCausalLM")
    model.save_pretrained(folder / "source")
    tokenizer().save_pretrained(folder / "source")
    quantkit.quantize(RECIPES["w8-rtn"], folder / "source", folder / "packed", evaluate=False, device="cpu")
    return folder / "source", folder / "packed"


def test_shared_linears_are_one_layer_after_a_load(folders, tmp_path):
    loaded = quantkit.load(folders[1], device="cpu")
    assert loaded.get_submodule(SHARED.format(4)) is loaded.get_submodule(SHARED.format(2))
    wanted = logits(loaded, {})
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(quantkit.load(tmp_path, device="cpu"), {}), wanted)
    loaded.dequantize()
    assert isinstance(loaded.get_submodule(SHARED.format(4)), torch.nn.Linear)
    assert torch.allclose(logits(loaded, {}), wanted, atol=1e-3)


def test_shared_linears_are_one_layer_in_memory(folders):
    packed = quantize_in_memory(RECIPES["w8-rtn"], folders[0], device="cpu")
    assert packed.get_submodule(SHARED.format(4)) is packed.get_submodule(SHARED.format(2))
    assert torch.allclose(logits(packed, {}), logits(quantkit.load(folders[1], device="cpu"), {}), atol=1e-4)


def test_no_shared_linear_is_on_the_ignore_list(folders):
    ignored = json.loads((folders[1] / "config.json").read_text())["quantization_config"]["ignore"]
    assert not [name for name in ignored if "shared_transf" in name]
