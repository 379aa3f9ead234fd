"""A recipe applied in memory: the model that `quantize` and `load` give, and NF4, which has no file format."""

import pytest
import tiny_models
import torch
from quantkit_kernels.backends import ENVIRONMENT
from quantkit_kernels.cpu import library

import quantkit
from quantkit.checkpoint.plugin import packed_linears
from quantkit.errors import OutputError, RecipeError
from quantkit.runtime import NativeDecoder, native

IDS = tiny_models.ids(20)
RTN, GPTQ = {"name": "rtn"}, {"name": "gptq", "refine": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_models.FAMILIES["qwen2"]()
    tiny_models.save(model, folder / "model", dtype=torch.bfloat16)
    (folder / "text").write_text("In the beginning there was a number, and it was rounded. " * 60)
    return folder


def recipe(inputs, preset, algorithm, **more):
    text = {"data": [str(inputs / "text")], "samples": 4, "sequence_length": 32}
    return {"weights": {"preset": preset, "algorithm": algorithm}, "calibration": text} | more


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def off(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize(
    ("preset", "algorithm", "more"),
    [
        ("W4A16_ASYM", GPTQ, {"transforms": ["awq"], "kv_cache": {"preset": "INT8"}}),
        ("NVFP4A16", RTN, {}),
        ("FP8", RTN, {}),
    ],
    ids=["W4A16", "NVFP4A16", "FP8"],
)
def test_the_model_is_the_one_that_a_checkpoint_gives(inputs, tmp_path, preset, algorithm, more):
    group = {"group_size": 32} if preset == "W4A16_ASYM" else {}
    asked = recipe(inputs, preset, algorithm, **more)
    asked["weights"] |= group
    quantkit.quantize(asked, inputs / "model", tmp_path / "out", device="cpu", evaluate=False)
    made = quantkit.quantize_in_memory(asked, inputs / "model", device="cpu")
    assert torch.equal(logits(made), logits(quantkit.load(tmp_path / "out", device="cpu")))
    assert not made.training


@pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
def test_nf4_runs_on_the_native_kernels_and_gptq_is_nearer_than_rtn(inputs, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT)
    dense, apart = logits(quantkit.load(inputs / "model", device="cpu")), {}
    for name, algorithm in (("rtn", RTN), ("gptq", GPTQ)):
        model = quantkit.quantize_in_memory(recipe(inputs, "NF4", algorithm), inputs / "model", device="cpu")
        assert {module.spec.number for _, module in packed_linears(model)} == {"nf4"}
        assert {module.backend for _, module in packed_linears(model)} == {"cpu"}
        apart[name] = off(logits(model), dense)
        decoder = native(model)
        assert isinstance(decoder, NativeDecoder), decoder
        assert off(decoder(IDS[:1]).logits[0], logits(model)[0]) < 1e-5
    assert apart["gptq"] < apart["rtn"] < 0.5


def test_what_was_made_in_memory_is_not_written(inputs, tmp_path):
    model = quantkit.quantize_in_memory(recipe(inputs, "NF4", RTN), inputs / "model", device="cpu")
    with pytest.raises(OutputError, match=r"quantized in memory \(W4A16 nf4 g64\) is not written"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_recipe_for_memory_is_refused_where_files_are_written(inputs, tmp_path):
    asked = recipe(inputs, "NF4", RTN, output={"format": "memory"})
    with pytest.raises(RecipeError, match=r"output.format memory is not written to files; call quantkit"):
        quantkit.quantize(asked, inputs / "model", tmp_path / "out", evaluate=False)
    asked = recipe(inputs, "NF4", RTN)
    with pytest.raises(RecipeError, match=r"no format for W4A16 nf4 g64.*or use quantkit.quantize_in_memory"):
        quantkit.quantize(asked, inputs / "model", tmp_path / "out", evaluate=False)
    asked["weights"] = {"number": "fp8_e5m2", "algorithm": RTN}
    with pytest.raises(RecipeError, match="no kernel multiplies by weights in fp8_e5m2"):
        quantkit.quantize_in_memory(asked, inputs / "model")
    with pytest.raises(RecipeError, match="the format memory stores no scales of a KV cache"):
        quantkit.quantize_in_memory(recipe(inputs, "NF4", RTN, kv_cache={"preset": "FP8"}), inputs / "model")
