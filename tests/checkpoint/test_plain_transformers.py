"""Checkpoints with rounded inputs, FP8 and FP4 weights and FP8 caches run in plain transformers + compressed-tensors as
they do here.

The loader computes inputs, codes and products with the operations of this repository in another order, and a code that
differs by one moves the logits of a random network by up to a tenth: so errors are compared with what the rounding of
inputs changes at all.
"""

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.scheme import PRESETS

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
SIXTEEN = ("NVFP4A16", "MXFP4A16")  # compressed-tensors decodes FP4 to bf16 only
RUN = [name for name in PRESETS if name not in ("NF4", *SIXTEEN)]
IDS = tiny_models.ids(24)


def quantized(recipe, tmp_path):
    """The folder of a quantized tiny model."""
    tiny_models.save(tiny_models.FAMILIES["llama-gqa"](**WIDE), tmp_path / "model")
    texts = tmp_path / "text.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog " * 200)
    calibration = {"data": [str(texts)], "samples": 4, "sequence_length": 32}
    output = tmp_path / "out"
    quantkit.quantize(recipe | {"calibration": calibration}, tmp_path / "model", output, evaluate=False)
    return output


def both(folder, dtype):
    """(logits here, logits of plain transformers)."""
    models = (
        quantkit.load(folder, device="cpu", dtype=dtype),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
    )
    found = []
    for model in models:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found.append(model(IDS).logits.float())
    return found


def off(one, other):
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


@pytest.mark.parametrize("name", [n for n in RUN if PRESETS[n].weights.symmetric])
def test_logits_are_ours(name, tmp_path):
    weights = {"preset": name, "algorithm": "rtn"}
    if PRESETS[name].weights.granularity == "group":
        weights["group_size"] = 32
    ours, theirs = both(quantized({"weights": weights}, tmp_path), torch.float32)
    assert off(theirs, ours) < (1e-5 if PRESETS[name].inputs is None else 0.02)


@pytest.mark.parametrize("name", SIXTEEN)
def test_fp4_runs_there_in_bf16(name, tmp_path):
    ours, theirs = both(
        quantized({"weights": {"preset": name, "algorithm": "rtn"}}, tmp_path), torch.bfloat16
    )
    assert off(theirs, ours) < 0.05


@pytest.mark.parametrize("cache", ["FP8", "FP8_TENSOR"])
def test_caches_are_read_there(cache, tmp_path):
    ours, theirs = both(quantized({"weights": "none", "kv_cache": cache}, tmp_path), torch.float32)
    assert off(theirs, ours) < 0.02
