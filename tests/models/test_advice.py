"""What an error tells the user to do works."""

import json

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from quantkit.errors import ModelError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def accepted(folder):
    """The tensors of a folder that quantkit can quantize, by their names on disk."""
    headers = read_checkpoint(folder)
    source = Source(headers)
    places = skeleton.places(skeleton.build(source))
    build_plan(parse_recipe({"weights": {"algorithm": "rtn", "group_size": 32}}), headers, places)
    return {name: source.tensor(name) for name in source.names()}


def refused(folder):
    with pytest.raises(ModelError) as error:
        accepted(folder)
    return str(error.value)


def edit(file, **changes):
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_pickled_weights_are_converted_as_told(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    folder = tiny_models.save(model, tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)" in refused(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "converted")
    assert torch.equal(accepted(tmp_path / "converted")["lm_head.weight"], model.lm_head.weight)


def test_a_head_that_differs_is_accepted_when_untied_as_told(tmp_path):
    folder = tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "m")
    edit(folder / "config.json", tie_word_embeddings=True)
    assert "set tie_word_embeddings: false there" in refused(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in accepted(folder)


def test_a_known_type_with_code_beside_it_is_accepted_without_auto_map_as_told(tmp_path):
    config = transformers.AutoConfig.for_model("stablelm", **TEXT)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    edit(tmp_path / "m/config.json", auto_map={"AutoConfig": "x.Y"})
    assert "remove auto_map from config.json" in refused(tmp_path / "m")
    edit(tmp_path / "m/config.json", auto_map=None)
    assert accepted(tmp_path / "m")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name
def test_an_adapter_is_merged_as_told(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    told = refused(tmp_path / "adapter")
    assert f"adapter of {base}" in told
    assert "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)" in told
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(accepted(tmp_path / "merged")[name], accepted(base)[name])
