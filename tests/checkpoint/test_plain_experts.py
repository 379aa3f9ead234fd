"""Mixtures in plain transformers + compressed-tensors: what `inspect` says of a checkpoint is what happens."""

import pytest
import tiny_mixtures
import tiny_models
import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.quantizers import base

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.preflight.tables import STACKED, UNROLLED

FOUR = {"weights": {"bits": 4, "group_size": 16, "algorithm": "rtn"}}
EXPERTS = {"match": "*.1.*experts.*"}  # of layer 1
SKIPPED = FOUR | {"rules": [{"match": "*experts*", "skip": True}]}
TWO = FOUR | {"rules": [EXPERTS | {"bits": 8}]}
RULES = {
    "attention in 8 bits": FOUR | {"rules": [{"match": "*self_attn*", "bits": 8}]},
    "experts in 4 and 8 bits": TWO,
    "experts skipped": SKIPPED,
    "experts of one layer skipped": FOUR | {"rules": [EXPERTS | {"skip": True}]},
    "asymmetric": {"weights": FOUR["weights"] | {"symmetric": False}},
    "FP8": {"weights": {"preset": "W8A16_FP8", "algorithm": "rtn"}},
    "NVFP4": {"weights": {"preset": "NVFP4A16", "algorithm": "rtn"}},
    "W8A8": {"weights": {"preset": "W8A8", "algorithm": "rtn"}},
}
IDS = tiny_models.ids(24)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def quantized(name, recipe, tmp_path):
    """(the folder of a quantized tiny mixture, what `inspect` says of plain transformers)."""
    tiny_models.save(tiny_mixtures.build(name), tmp_path / "model")
    out = tmp_path / "out"
    quantkit.quantize(recipe, tmp_path / "model", out, evaluate=False, device="cpu")
    report = inspect_checkpoint(out)
    (loader,) = (each for each in report["loaders"] if each["name"].startswith("transformers"))
    said = [each["said"] for each in report["engines"] if each["said"].startswith("transformers")]
    assert len(said) == 1
    assert loader["loads"] == (said == ["transformers"])
    return out, loader


@torch.no_grad()
def off(folder, dtype=torch.float32):
    """Error of the logits of plain transformers against ours."""
    ours = quantkit.load(folder, device="cpu", dtype=dtype)(IDS).logits.float()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tiny_mixtures.eager(model)
    theirs = model(IDS).logits.float()
    return float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mixtral", FOUR),
        slow("qwen3_moe", RULES["attention in 8 bits"]),
        slow("qwen3_moe-dense-first", FOUR),
        slow("deepseek_v3", FOUR),
        slow("deepseek_v3", RULES["FP8"]),
        slow("llama4", TWO),
        slow("granitemoe", SKIPPED),
        slow("gpt_oss", SKIPPED),
    ],
)
def test_logits_are_ours(name, recipe, tmp_path):
    folder, loader = quantized(name, recipe, tmp_path)
    assert loader["loads"], loader
    assert off(folder) < 1e-5


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("granitemoe", "attention in 8 bits"),
        slow("gpt_oss", "attention in 8 bits"),
        slow("gpt_oss", "experts of one layer skipped"),
        slow("mixtral", "experts in 4 and 8 bits"),
        slow("qwen3_moe", "NVFP4"),
        slow("llama4", "experts skipped"),
    ],
)
def test_another_model_without_an_error_is_told(name, case, tmp_path):
    folder, loader = quantized(name, RULES[case], tmp_path)
    assert not loader["loads"]
    assert "experts" in loader["how"]
    assert "without an error; use quantkit.load, or serve it with vLLM" in loader["how"]
    assert off(folder, torch.bfloat16 if case == "NVFP4" else torch.float32) > 0.1


@pytest.mark.slow
def test_inputs_of_experts_are_not_rounded_there_and_that_is_told(tmp_path):
    folder, loader = quantized(
        "mixtral", {"weights": {"preset": "FP8_DYNAMIC", "algorithm": "rtn"}}, tmp_path
    )
    assert loader["loads"]
    assert loader["how"].endswith("it leaves the inputs of experts as they are")
    assert 1e-3 < off(folder) < 0.2


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("mixtral", "experts skipped"),
        slow("deepseek_v3", "asymmetric"),
        slow("qwen3_moe", "experts of one layer skipped"),
        slow("qwen3_moe", "W8A8"),
    ],
)
def test_what_does_not_load_is_told(name, case, tmp_path):
    folder, loader = quantized(name, RULES[case], tmp_path)
    assert not loader["loads"]
    assert "RuntimeError while it loads" in loader["how"]
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder)


def gathers(model_type):
    """Whether transformers knows tensors of single experts in the files of a type."""
    patterns = []
    for rule in get_checkpoint_conversion_mapping(model_type) or ():
        given = getattr(rule, "source_patterns", ())
        patterns += [given] if isinstance(given, str) else given
    return any("experts" in each.split(".*")[0] and ".*" in each for each in patterns)


def test_the_table_of_stacked_experts_is_that_of_transformers():
    """For types that it knows: earlier versions lack some."""
    assert not [name for name in sorted(STACKED | UNROLLED) if gathers(name)]
    apart = {model_type for model_type, _ in tiny_mixtures.MIXTURES.values()} - STACKED - UNROLLED
    assert {"mixtral", "qwen3_moe", "deepseek_v3"} <= apart
    assert all(gathers(name) for name in apart)
    assert list(base.MODULES_TO_PATCH_FOR_QUANTIZATION) == ["Llama4TextExperts"]
