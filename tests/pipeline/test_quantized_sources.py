"""Checkpoints that are quantized already are decoded while they are read, and quantized anew."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme, integer

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECIPE = {"weights": {"algorithm": "rtn", "group_size": 32}, "calibration": {"sequence_length": 64}}
SAID = {
    "fp8-block": "W8A8 fp8_e4m3 b128, inputs fp8_e4m3 g128",
    "fp8-dynamic": "W8A8 fp8_e4m3 channel, inputs fp8_e4m3 token",
    "mixed-w4-w8": "W4A16 g32 sym; W8A16 channel sym",
    "mxfp4a16": "W4A16 fp4_e2m1 g32",
    "moe-w4a16": "W4A16 g32 sym",
    "mxfp8": "W8A8 fp8_e4m3 g32, inputs fp8_e4m3 g32",
    "nvfp4": "W4A4 fp4_e2m1 g16, inputs fp4_e2m1 g16",
    "w8a8-int8-static-asym": "W8A8 channel sym, inputs int8 tensor asym",
    "autoround-int4": "W4A16 g32 sym",
    "awq4-gemm": "W4A16 g32 asym",
    "bnb-nf4": "W4A16 nf4 g64",
    "gptq3-sym": "W3A16 g32 sym",
    "gptq4-desc-act": "W4A16 g32 sym",
    "gptq4-v2-asym": "W4A16 g32 asym",
    "modelopt-fp8-kv-fp8": "W8A8 fp8_e4m3 tensor, inputs fp8_e4m3 tensor",
}


@pytest.fixture
def source(tmp_path):
    """A function: name of a fixture -> a folder with that checkpoint and a tokenizer."""

    def copied(name):
        folder = tmp_path / name
        ignore = shutil.ignore_patterns("logits.safetensors", "made-by.md")
        shutil.copytree(FIXTURES / name, folder, ignore=ignore)
        tokenizer().save_pretrained(folder)
        return folder

    return copied


def recorded(name):
    """Weights as the tool that wrote a fixture decodes them, by tensor name."""
    tensors = load_file(FIXTURES / name / "logits.safetensors")
    return {key.removeprefix("dense."): t for key, t in tensors.items() if key.startswith("dense.")}


@pytest.mark.parametrize("name", SAID)
def test_weights_are_decoded_as_by_the_tool_that_wrote_them(name):
    checkpoint = Source(read_checkpoint(FIXTURES / name))
    wanted = recorded(name)
    assert wanted
    for tensor, dense in wanted.items():
        found = checkpoint.tensor(tensor, torch.float32)
        if name == "bnb-nf4":
            found = found.bfloat16().float()  # as its tool decodes it
        assert torch.equal(found, dense.float())
        assert checkpoint.tensor(tensor).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SAID)
def test_what_is_reported_is_the_error_against_the_decoded_weights(name, source, tmp_path):
    folder = source(name)
    result = quantkit.quantize(RECIPE, model=folder, output=tmp_path / "o", evaluate=False)
    assert any(SAID[name] in note and "decoded weights" in note for note in result.manifest.notes)
    config = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"].get("input_activations") is None
    errors = {layer.name: layer.weight_error for layer in result.manifest.layers}
    model = quantkit.load(tmp_path / "o", device="cpu")
    for tensor, dense in recorded(name).items():
        linear = tensor.removesuffix(".weight")
        module = model.get_submodule(linear)
        found = codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize()
        wanted = dense.to(torch.bfloat16).float()
        error = float((found - wanted).square().sum() / wanted.square().sum())
        assert error == pytest.approx(errors[linear], rel=1e-4)


def test_every_stored_tensor_is_accounted_for(source, tmp_path):
    folder = source("mixed-w4-w8")
    (folder / "recipe.yaml").write_text("of another tool")
    recipe = RECIPE | {
        "rules": [{"match": "*.up_proj", "skip": True}, {"match": "*.gate_proj", "skip": True}]
    }
    result = quantkit.quantize(recipe, model=folder, output=tmp_path / "o", evaluate=False)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {n for n, each in result.manifest.tensors.items() if each.how != "added"}
    up = "model.layers.0.mlp.up_proj"
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        entry = result.manifest.tensors[f"{up}.{leaf}"]
        assert (entry.how, entry.became) == ("decoded", [f"{up}.weight"])
    packed = result.manifest.tensors["model.layers.0.mlp.down_proj.weight_scale"]
    assert packed.how == "quantized"
    assert "model.layers.0.mlp.down_proj.weight_packed" in packed.became
    written = {row["name"]: row for row in inspect_checkpoint(tmp_path / "o")["layers"]}
    assert written[up]["scheme"] is None
    stored = load_file(Path(tmp_path / "o") / "model-00001-of-00003.safetensors")[f"{up}.weight"]
    assert torch.equal(stored, Source(read_checkpoint(folder)).tensor(f"{up}.weight"))
    assert not (tmp_path / "o/recipe.yaml").exists()


def test_sizes_count_what_is_stored(source, tmp_path):
    folder = source("mixed-w4-w8")
    result = quantkit.quantize(RECIPE, model=folder, output=tmp_path / "o", evaluate=False)
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
    assert result.manifest.size.original_bytes == sum(sizes)
    assert 4.5 < result.manifest.size.original_linear_bits_per_weight < 8.6


def test_scales_of_a_quantized_cache_are_left_out_with_a_reason(source, tmp_path):
    folder = source("kv-fp8-head")
    result = quantkit.quantize(RECIPE, model=folder, output=tmp_path / "o", evaluate=False)
    entry = result.manifest.tensors["model.layers.0.self_attn.k_scale"]
    assert entry.how == "dropped"
    assert "KV cache" in entry.reason
    assert any("only its KV cache is quantized" in note for note in result.manifest.notes)


def test_calibration_sees_the_decoded_model_and_the_evaluation_compares_with_the_source(source, tmp_path):
    recipe = {
        "weights": {"algorithm": "gptq", "group_size": 32},
        "calibration": {"sequence_length": 32, "samples": 4},
    }
    result = quantkit.quantize(recipe, model=source("fp8-dynamic"), output=tmp_path / "o", eval_tokens=128)
    assert result.failed is None
    assert result.report.evaluation.tokens


def test_a_scheme_that_is_missing_is_refused_by_the_linear(source):
    folder = source("mixed-w4-w8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*up_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"up_proj is stored quantized, but quantization_config gives it no scheme"
    ):
        read_checkpoint(folder)


def test_codes_without_scales_are_refused_by_the_linear(source):
    folder = source("mixed-w4-w8")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj lacks its codes or its scales"):
        read_checkpoint(folder)


def test_rows_that_are_no_whole_words_have_the_columns_of_their_weight_shape(tmp_path):
    """Of 100 codes with 4 bits the thirteenth word holds four; without weight_shape all of it would be taken."""
    scheme = Scheme(integer(4, None))
    codes = torch.randint(0, 16, (8, 100), generator=torch.Generator().manual_seed(0)).byte()
    weight = QuantizedWeight(codes, torch.full((8, 1), 0.25), None, scheme.weights)
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.{leaf}": t for leaf, t in codec().pack(weight).items()}
    config = {"model_type": "llama", "quantization_config": codec().config({name: scheme}, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = Source(read_checkpoint(tmp_path, model_free=True))
    assert checkpoint.raw(f"{name}.weight").shape == (8, 100)
    assert torch.equal(checkpoint.tensor(f"{name}.weight", torch.float32), weight.dequantize())
    for said in ([8, 106], [7, 100], [8, 100, 1], [8, -100]):
        tensors[f"{name}.weight_shape"] = torch.tensor(said)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            ModelError, match=rf"{name}\.weight_shape is .*, which does not fit \[8, 13\] words"
        ):
            read_checkpoint(tmp_path, model_free=True)


def test_fp8_in_blocks_of_transformers_is_decoded_by_its_configured_block(tmp_path):
    """weight_scale_inv multiplies; the 64 rows of k_proj are half a block. transformers decodes it to the same."""
    config = json.loads((FIXTURES / "fp8-block/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(FIXTURES / "fp8-block/model.safetensors")
    named = {
        name.replace("weight_scale", "weight_scale_inv"): tensor.float() if "weight_scale" in name else tensor
        for name, tensor in stored.items()
    }
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, wanted = Source(read_checkpoint(tmp_path)), recorded("fp8-block")
    assert wanted
    for tensor, dense in wanted.items():
        assert torch.equal(checkpoint.tensor(tensor, torch.float32), dense.float())
    model = quantkit.load(tmp_path, device="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    decoded = {name: t for name, t in theirs.state_dict().items() if checkpoint.raw(name).parts}
    assert len(decoded) == 7
    for tensor, dense in decoded.items():
        assert torch.equal(checkpoint.tensor(tensor, torch.float32), dense), tensor
    twin = quantkit.load(FIXTURES / "fp8-block", device="cpu", dtype=torch.float32)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
