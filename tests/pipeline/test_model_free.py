"""Runs without a model class: from tensors to tensors, by names and shapes, in pieces of rows."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.shards import Written
from quantkit.checkpoint.verify import Made, verify_streamed
from quantkit.cli.validate import command
from quantkit.errors import ModelError, RecipeError, VerificationError
from quantkit.formats.registry import codec
from quantkit.numerics import range_search
from quantkit.pipeline import model_free, pieces
from quantkit.pipeline.quantize import quantize
from quantkit.recipe.recipe import parse_recipe
from quantkit.scheme import PRESETS

pytestmark = pytest.mark.usefixtures("steady")
FP8 = {"preset": "FP8_DYNAMIC", "algorithm": "rtn"}
SCHEMES = {
    "fp8": FP8,
    "fp8 block": {"preset": "FP8_BLOCK", "algorithm": {"name": "rtn", "range": "minmax"}},
    "fp8 tensor": {"number": "fp8_e4m3", "granularity": "tensor", "algorithm": "rtn"},
    "nvfp4": {"preset": "NVFP4A16", "algorithm": "rtn"},
    "mxfp4": {"preset": "MXFP4A16", "algorithm": "rtn"},
    "int8": {"preset": "W8A8", "algorithm": "rtn"},
    "int3": {"bits": 3, "group_size": 32, "symmetric": False, "algorithm": {"name": "rtn", "refit": 2}},
}


def free(weights, model, output, **options):
    return quantize({"weights": weights, "model_free": True}, model, output, evaluate=False, **options)


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def ignored(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]


def write(folder, shapes, files=None, **config):
    """A checkpoint of random tensors; files: more of them, by name."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {n: (torch.randn(s, generator=generator) * 0.1).bfloat16() for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"} | config))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_models.FAMILIES["llama-gqa"](
        hidden_size=128, intermediate_size=384, head_dim=32, num_hidden_layers=2
    )
    return tiny_models.save(model, tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", SCHEMES)
def test_pieces_of_rows_give_the_bytes_of_an_ordinary_run(name, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 1)
    monkeypatch.setattr(range_search, "_CHUNK", 1 << 14)
    ordinary = quantize({"weights": SCHEMES[name]}, llama, tmp_path / "ordinary", evaluate=False)
    result = free(SCHEMES[name], llama, tmp_path / "free")
    assert shards(result.output) == shards(ordinary.output)
    assert ignored(result.output) == ignored(ordinary.output) == ["lm_head"]
    assert result.manifest.model_free
    assert result.manifest.recipe["model_free"]
    other = {layer.name: layer for layer in ordinary.manifest.layers}
    assert other.keys() == {layer.name for layer in result.manifest.layers}
    for layer in result.manifest.layers:
        assert layer.weight_error == pytest.approx(other[layer.name].weight_error, rel=1e-4)


def test_conv1d_gives_the_bytes_of_an_ordinary_run(tmp_path):
    model = tiny_models.save(
        tiny_models.FAMILIES["gpt2"](num_hidden_layers=1), tmp_path / "model", dtype=torch.bfloat16
    )
    weights = {"bits": 4, "group_size": 32, "algorithm": "rtn"}
    ordinary = quantize({"weights": weights}, model, tmp_path / "ordinary", evaluate=False)
    result = free(weights, model, tmp_path / "free")
    mine, other = (
        load_file(folder / "model-00001-of-00002.safetensors") for folder in (result.output, ordinary.output)
    )
    packed = [name for name in mine if name.endswith("weight_packed")]
    assert len(packed) == 4
    assert all(torch.equal(mine[name], other[name]) for name in packed)


REMOTE = {
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "architectures": ["StrangeForCausalLM"],
    "num_hidden_layers": 2,
}
DENSE = {
    "model.embed_tokens.weight": (64, 64),
    "model.norm.weight": (64,),
    **{f"model.layers.{i}.attn.qkv_proj.weight": (192, 64) for i in (0, 1)},
    **{f"model.layers.{i}.mlp.up.weight": (128, 64) for i in (0, 1)},
}


@pytest.fixture
def remote(tmp_path):
    """A model whose code must not run."""
    return write(tmp_path / "remote", DENSE, {"modeling.py": "raise SystemExit('it ran')"}, **REMOTE)


def test_a_model_of_remote_code_is_quantized_without_its_code(remote, tmp_path):
    result = quantize({"weights": FP8, "model_free": True}, remote, tmp_path / "out")
    config = json.loads((result.output / "config.json").read_text())
    assert config["auto_map"] == REMOTE["auto_map"]
    assert not (result.output / "modeling.py").exists()
    assert result.manifest.left_out == {
        "model.safetensors": "weights",
        "modeling.py": "code, which quantkit never runs",
    }
    notes = "\n".join(result.report.notes)
    assert "code stays behind, as quantkit never runs or copies it: modeling.py" in notes
    assert "not evaluated, as no model class was found: " in notes
    assert result.failed is None
    assert result.manifest.evaluation is None
    report = inspect_checkpoint(result.output)
    assert {layer["scheme"] for layer in report["layers"] if "layers" in layer["name"]} == {
        str(PRESETS["FP8_DYNAMIC"])
    }


def test_an_ordinary_run_offers_it_where_the_model_class_is_missing(remote, tmp_path):
    with pytest.raises(ModelError, match="add model_free: true to the recipe"):
        quantize({"weights": FP8}, remote, tmp_path / "out", evaluate=False)
    (remote / "config.json").write_text(json.dumps({"model_type": "unheard-of", "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"unheard-of.*add model_free: true to the recipe"):
        quantize({"weights": FP8}, remote, tmp_path / "out", evaluate=False)


def test_what_transformers_knows_is_evaluated(llama, tmp_path):
    result = quantize(
        {"weights": FP8, "model_free": True, "calibration": {"sequence_length": 32}},
        llama,
        tmp_path / "out",
        eval_tokens=64,
        eval_text=_text(tmp_path),
    )
    assert result.report.evaluation is not None


def _text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("all work and no play makes a model dull. " * 20)
    return file


EXPERTS = {
    "model.embed_tokens.weight": (64, 64),
    "model.layers.0.attn.o_proj.weight": (64, 64),
    "model.layers.0.block_sparse_moe.gate.weight": (4, 64),
    **{
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (64, 64)
        for e in range(4)
        for w in ("w1", "w2", "w3")
    },
    "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 128),
    "visual.blocks.0.attn.o_proj.weight": (64, 64),
    "mtp.layers.0.attn.o_proj.weight": (64, 64),
    "lm_head.weight": (64, 64),
}


def test_experts_are_quantized_and_routers_towers_and_mtp_layers_are_not(tmp_path):
    model = write(tmp_path / "model", EXPERTS)
    result = free({"preset": "NVFP4A16", "algorithm": "rtn"}, model, tmp_path / "out")
    assert len(result.manifest.layers) == 13
    wanted = ["lm_head", r"re:.*\.gate$", r"re:.*\.mlp\.experts(\..*)?$", "re:.*mtp.*", "re:.*visual.*"]
    assert ignored(result.output) == wanted
    source, tensors = load_file(model / "model.safetensors"), {}
    for file in result.output.glob("*.safetensors"):
        tensors |= load_file(file)
    at = "model.layers.0.block_sparse_moe.experts.0"
    one, other, alone = (tensors[f"{at}.{w}.weight_global_scale"] for w in ("w1", "w3", "w2"))
    assert torch.equal(one, other)
    assert not torch.equal(one, alone)
    for name in (n for n in source if "block_sparse_moe.experts" not in n and "layers.0.attn.o" not in n):
        assert torch.equal(tensors[name], source[name]), name
    report = inspect_checkpoint(result.output)
    assert report["totals"]["quantized_layers"] == 13


def test_a_rule_overrides_what_names_say(tmp_path):
    model = write(tmp_path / "model", EXPERTS)
    rules = [{"match": "*block_sparse_moe*", "skip": True}, {"match": "lm_head", "preset": "W8A16"}]
    recipe = {"weights": FP8, "model_free": True, "rules": rules}
    result = quantize(recipe, model, tmp_path / "out", evaluate=False)
    assert {layer.name for layer in result.manifest.layers} == {"model.layers.0.attn.o_proj", "lm_head"}
    recipe["rules"] = [{"match": "*embed_tokens", "bits": 8, "inputs": "none"}]
    with pytest.raises(RecipeError, match="a table of embeddings"):
        quantize(recipe, model, tmp_path / "refused", evaluate=False)


def test_a_quantized_source_is_decoded(llama, tmp_path):
    rules = [{"match": "*.o_proj", "skip": True}]
    source = quantize({"weights": FP8}, llama, tmp_path / "fp8", evaluate=False).output
    recipe = {"weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"}, "rules": rules}
    ordinary = quantize(recipe, source, tmp_path / "ordinary", evaluate=False)
    result = quantize(recipe | {"model_free": True}, source, tmp_path / "free", evaluate=False)
    assert shards(result.output) == shards(ordinary.output)
    scale = "model.layers.0.self_attn.o_proj.weight_scale"
    assert result.manifest.tensors[scale].how == "decoded"
    assert result.manifest.tensors.keys() == ordinary.manifest.tensors.keys()


def test_validate_lists_what_is_left_with_counts_shapes_and_reasons(tmp_path):
    model = write(tmp_path / "model", EXPERTS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_free: true\nweights: {preset: FP8_DYNAMIC, algorithm: rtn}\n")
    shown = CliRunner().invoke(command, [str(recipe), "--model", str(model)])
    assert shown.exit_code == 0, shown.output
    rows = [" ".join(line.replace("│", " ").split()) for line in shown.output.splitlines()]
    assert any(r.startswith("model.layers.*.block_sparse_moe.experts.*.w1 4 64 x 64 W8A8") for r in rows)
    assert any("experts.gate_up_proj 1 4 x 64 x 128 as it is stacked experts" in r for r in rows)
    assert any("block_sparse_moe.gate 1 4 x 64 as it is a router" in r for r in rows)


def test_an_interrupted_run_continues_to_the_same_bytes(llama, tmp_path, monkeypatch):
    whole = free(FP8, llama, tmp_path / "whole")
    verify = model_free.verify_streamed

    def failing(path, *rest):
        if "00002" in path.name:
            raise KeyboardInterrupt
        verify(path, *rest)

    monkeypatch.setattr(model_free, "verify_streamed", failing)
    with pytest.raises(KeyboardInterrupt):
        free(FP8, llama, tmp_path / "out")
    monkeypatch.setattr(model_free, "verify_streamed", verify)
    again = free(FP8, llama, tmp_path / "out")
    assert again.report.resumed_blocks == 1
    assert shards(again.output) == shards(whole.output)
    assert (again.output / "quantkit.json").read_bytes() == (whole.output / "quantkit.json").read_bytes()


def test_a_shard_that_is_not_what_was_made_is_found(llama, tmp_path):
    result = free(FP8, llama, tmp_path / "out")
    path = result.output / "model-00001-of-00003.safetensors"
    name, scheme = "model.layers.0.mlp.up_proj", PRESETS["FP8_DYNAMIC"]
    sums = result.manifest.files[path.name].tensors
    written = Written(path.name, 0, "", {}, sums)
    made = {name: Made((384, 128), scheme, torch.bfloat16, torch.ones(4, 384))}
    with pytest.raises(VerificationError, match="differs from the dequantized one"):
        verify_streamed(path, written, made, codec())
    written.crc32[f"{name}.weight"] = "00000000"
    with pytest.raises(VerificationError, match="not what was written"):
        verify_streamed(path, written, made, codec())


@pytest.mark.parametrize("key", ["model_free", "calibration"])
def test_what_needs_text_is_refused_with_its_line(key):
    weights = {"bits": 4, "algorithm": {"name": "rtn", "range": "weighted"}}
    weights |= {"calibration": "none"} if key == "calibration" else {}
    recipe = {
        "weights": weights,
        "inputs": {"granularity": "tensor"},
        "transforms": ["awq"],
        "rules": [{"match": "*", "algorithm": "gptq"}],
        "kv_cache": "FP8",
    } | ({"model_free": True} if key == "model_free" else {})
    with pytest.raises(RecipeError) as error:
        parse_recipe(recipe)
    lines = str(error.value).splitlines()
    for place in ("transforms.0", "weights.algorithm", "inputs", "rules.0.algorithm", "kv_cache"):
        assert any(f": {place}: " in line and "needs calibration text" in line for line in lines), place


def test_nothing_is_quantized_in_memory_without_a_model(llama):
    with pytest.raises(RecipeError, match="no model to quantize in memory"):
        quantkit.quantize_in_memory({"weights": FP8, "model_free": True}, llama)
