"""What an error tells the user to do works."""

import json
import re
from pathlib import Path

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
from quantkit.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
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
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def accepted(folder):
    """The tensors of a folder that quantkit can quantize, by their names in the causal LM."""
    headers = read_checkpoint(folder)
    source = Source(headers)
    skeleton.build(source)
    build_plan(parse_recipe({"weights": {"algorithm": "rtn", "group_size": 32}}), headers)
    return {name: source.tensor(name) for name in source.names()}


def refused(folder):
    with pytest.raises(ModelError) as error:
        accepted(folder)
    return str(error.value)


def edit(file, **changes):
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def gemma3():
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    text = transformers.LlamaConfig(**TEXT)
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    )


@pytest.mark.parametrize("make", [gemma3, llava])
def test_the_text_part_of_a_multimodal_model_is_saved_with_its_weights(tmp_path, make):
    whole = make()
    source, output = tmp_path / "whole", tmp_path / "text"
    whole.save_pretrained(source)
    tiny_models.tokenizer().save_pretrained(source)
    assert "docs/architectures.md" in refused(source)
    page = (ROOT / "docs/architectures.md").read_text()
    lines = re.search(r"```python\n(.*?)```", page, re.S)[1]
    exec(lines, {"source": source, "output": output})
    kept = accepted(output)
    wanted = whole.model.language_model.state_dict()
    assert len(kept) >= len(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(kept[f"model.{name}"], tensor), name


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
