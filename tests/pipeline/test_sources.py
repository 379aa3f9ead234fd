"""Sources with more than the model uses, or under other names: quantized, and read again by the evaluation."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.records import TensorRecord
from quantkit.models import families
from quantkit.models.headers import read_checkpoint

RTN = {"weights": {"algorithm": "rtn", "group_size": 32}, "calibration": {"sequence_length": 64}}
EXTRA = {
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "gpt-neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.2.attention.masked_bias"],
    "llama": [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.position_ids",
    ],
}


def edit(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("family", EXTRA)
def test_tensors_that_are_left_out_do_not_stop_the_evaluation(tmp_path, family):
    """The source is read twice, to quantize it and to compare with it: by one set of rules."""
    source = save(FAMILIES[family](), tmp_path / "m", dtype=torch.bfloat16)
    edit(source, lambda tensors: tensors | {name: torch.ones(4) for name in EXTRA[family]})
    result = quantkit.quantize(RTN, model=source, output=tmp_path / "o", eval_tokens=256)
    assert result.report.evaluation.tokens
    for name in EXTRA[family]:
        assert result.manifest.tensors[name].how == "dropped"


def test_the_evaluation_s_examples_cover_every_pattern():
    names = [name for extra in EXTRA.values() for name in extra]
    for pattern, _ in families.DROPPED:
        assert any(re.search(pattern, name) for name in names), pattern


def test_a_tensor_without_a_place_is_carried_and_no_obstacle_to_either_reader(tmp_path):
    source = save(FAMILIES["llama"](), tmp_path / "m", dtype=torch.bfloat16)
    edit(source, lambda tensors: tensors | {"model.own": torch.ones(4)})
    result = quantkit.quantize(RTN, model=source, output=tmp_path / "o", evaluate=False)
    assert result.manifest.tensors["model.own"] == TensorRecord("carried", ["model.own"])
    index = json.loads((tmp_path / "o/model.safetensors.index.json").read_text())["weight_map"]
    written = load_file(tmp_path / "o" / index["model.own"])["model.own"]
    assert torch.equal(written, torch.ones(4))
    for folder in (source, tmp_path / "o"):
        quantkit.load(folder)


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_left_out(tmp_path):
    source = save(FAMILIES["llama"](tie_word_embeddings=True), tmp_path / "m", dtype=torch.bfloat16)
    edit(source, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    result = quantkit.quantize(RTN, model=source, output=tmp_path / "o", evaluate=False)
    told = result.manifest.tensors["lm_head.weight"]
    assert told == TensorRecord("dropped", reason="tied to model.embed_tokens.weight")
    assert "lm_head.weight" not in read_checkpoint_names(tmp_path / "o")
    ids = torch.arange(4, 20)[None]
    edit(source, lambda t: {name: w for name, w in t.items() if name != "lm_head.weight"})
    again = quantkit.quantize(RTN, model=source, output=tmp_path / "p", evaluate=False)
    assert torch.equal(quantkit.load(result.output)(ids).logits, quantkit.load(again.output)(ids).logits)


def read_checkpoint_names(folder):
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def test_a_model_of_the_hub_names_output_and_manifest_after_its_repository(tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--acme--tiny"
    save(FAMILIES["llama"](), repository / "snapshots" / revision, dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint(repository / "snapshots" / revision).name == "acme/tiny"
    result = quantkit.quantize(RTN, model=repository / "snapshots" / revision, evaluate=False)
    assert result.output.as_posix() == "out/tiny-recipe"
    assert result.manifest.model.name == "acme/tiny"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("tokenizer.json", "{"),
        ("adapter_config.json", "{}"),
    ],
)
def test_what_a_side_file_has_wrong_is_told_before_anything_is_written(tmp_path, file, content):
    source = save(FAMILIES["llama"](), tmp_path / "m", dtype=torch.bfloat16)
    (source / file).write_text(content)
    with pytest.raises(quantkit.errors.ModelError) as error:
        quantkit.quantize(RTN, model=source, output=tmp_path / "o", eval_tokens=256)
    assert file in str(error.value) or str(source) in str(error.value)
    assert not (tmp_path / "o").exists()


def test_a_dense_nemotron_h_is_no_mixture(tmp_path):
    """Its config counts 8 experts, none of its blocks has one, and its tensors are called `backbone.*`."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 16}
    state = {"ssm_state_size": 16, "n_groups": 1, "hybrid_override_pattern": "M*-"}
    config = AutoConfig.for_model("nemotron_h", **sizes, **heads, **state)
    source = save(AutoModelForCausalLM.from_config(config), tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((source / "config.json").read_text())["n_routed_experts"] > 1
    result = quantkit.quantize(RTN, model=source, output=tmp_path / "o", evaluate=False)
    names = {layer.name for layer in result.manifest.layers}
    assert {
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.1.mixer.q_proj",
        "backbone.layers.2.mixer.up_proj",
    } <= names
    assert quantkit.load(result.output)(torch.arange(4, 20)[None]).logits.isfinite().all()
