"""Tensors that the model has no parameter for: carried bit for bit, listed, and never quantized by an engine."""

import json
import re

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import ModelError
from quantkit.models.tensors import read_tensors
from quantkit.validation import validate

RECIPE = {
    "weights": {"preset": "W4A16", "algorithm": "gptq", "group_size": 32},
    "transforms": [{"name": "awq", "grid": 4}],
    "calibration": {"samples": 4, "sequence_length": 32},
}
BLOCK = {
    "input_layernorm.weight": (64,),
    "mlp.up_proj.weight": (128, 64),
    "self_attn.q_proj.weight": (64, 64),
}


def mtp_names(count):
    """(names as of Qwen, names as of DeepSeek: one block behind the last of `count`)."""
    block = f"model.layers.{count}"
    qwen = {f"mtp.layers.0.{name}": shape for name, shape in BLOCK.items()}
    qwen |= {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,)}
    deepseek = {f"{block}.{name}": shape for name, shape in BLOCK.items()}
    deepseek |= {
        f"{block}.enorm.weight": (64,),
        f"{block}.eh_proj.weight": (64, 128),
        f"{block}.embed_tokens.weight": (128, 64),
        f"{block}.shared_head.head.weight": (128, 64),
    }
    return {"qwen": qwen, "deepseek": deepseek}


def add(folder, extra):
    """Add random tensors to a checkpoint; returns them."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in extra.items()}
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    return made


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_models.ids(20, 1, 100)).logits


def quantized(source, output):
    return quantkit.quantize(RECIPE, source, output, evaluate=False, device="cpu")


@pytest.mark.parametrize("layout", ["qwen", "deepseek"])
def test_layers_that_predict_further_tokens_are_carried_and_ignored(tmp_path, layout):
    source, plain = tmp_path / "source", tmp_path / "plain"
    for folder in (source, plain):
        tiny_models.save(tiny_models.FAMILIES["qwen3"](), folder)
    extra = add(source, mtp_names(3)[layout])
    edit(source, num_nextn_predict_layers=1)
    result = quantized(source, tmp_path / "out")
    quantized(plain, tmp_path / "without")
    records = result.manifest.tensors
    assert {name for name, each in records.items() if each.how == "carried"} == extra.keys()
    written = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    for name, tensor in extra.items():
        assert torch.equal(written[name], tensor), name
    headers, _ = read_tensors(source), read_tensors(tmp_path / "out")
    assert records.keys() == headers[1].keys()
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    patterns = [each[3:] for each in ignore if each.startswith("re:")]
    for name in extra:
        assert any(re.match(pattern, name) for pattern in patterns), name
    for name, each in records.items():
        assert each.how != "quantized" or not any(re.match(pattern, name) for pattern in patterns), name
    one, other = (quantkit.load(tmp_path / folder, device="cpu") for folder in ("out", "without"))
    assert torch.equal(logits(one), logits(other))


def test_validate_counts_no_block_that_predicts_further_tokens(tmp_path):
    tiny_models.save(tiny_models.FAMILIES["qwen3"](), tmp_path)
    add(tmp_path, mtp_names(3)["deepseek"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    plan = validate(str(tmp_path / "recipe.yaml"), str(tmp_path)).plan
    assert plan.n_blocks == 3
    assert {layer.block for layer in plan.layers} == {0, 1, 2}
    assert not any(".layers.3." in layer.name for layer in plan.layers)


def test_a_head_of_another_task_and_what_sharing_blocks_leave_are_carried(tmp_path):
    model = tiny_models.build("gemma4-shared")
    tiny_models.save(model, tmp_path / "source")
    held = load_file(tmp_path / "source/model.safetensors")
    shared = {
        "model.layers.3.self_attn.k_proj.weight": (32, 64),
        "model.layers.3.self_attn.v_proj.weight": (32, 64),
    }
    extra = add(
        tmp_path / "source", {n: s for n, s in shared.items() if n not in held} | {"score.weight": (2, 64)}
    )
    assert len(extra) == 3
    recipe = {"weights": {"algorithm": "rtn", "group_size": 16}}
    result = quantkit.quantize(recipe, tmp_path / "source", tmp_path / "out", evaluate=False, device="cpu")
    assert {n for n, each in result.manifest.tensors.items() if each.how == "carried"} == extra.keys()
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in extra} <= set(config["ignore"])
    quantkit.load(tmp_path / "out", device="cpu")


def test_tensors_of_another_model_are_refused_and_not_carried(tmp_path):
    tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "bias")
    add(tmp_path / "bias", {"model.layers.0.self_attn.q_proj.bias": (64,)})
    with pytest.raises(ModelError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        quantized(tmp_path / "bias", tmp_path / "out")
    tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "renamed")
    tensors = load_file(tmp_path / "renamed/model.safetensors")
    renamed = {name.replace(".mlp.", ".feed."): t for name, t in tensors.items()}
    save_file(renamed, tmp_path / "renamed/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: .*mlp.*no place for: .*feed"):
        quantized(tmp_path / "renamed", tmp_path / "out")


def test_gpt2_without_prefix_is_written_without_prefix(tmp_path):
    model = tiny_models.FAMILIES["gpt2"]()
    source = tiny_models.save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.0.attn.c_attn.weight" in bare
    result = quantized(source, tmp_path / "full")
    wanted = quantkit.load(tmp_path / "full", device="cpu")
    assert "transformer.h.0.attn.c_attn" in {layer.name for layer in result.manifest.layers}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    result = quantized(source, tmp_path / "bare")
    assert "h.0.attn.c_attn" in {layer.name for layer in result.manifest.layers}
    assert "h.0.attn.c_attn.weight_packed" in read_tensors(tmp_path / "bare")[1]
    assert torch.equal(logits(quantkit.load(tmp_path / "bare", device="cpu")), logits(wanted))
