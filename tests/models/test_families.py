"""The tables agree with the transformers that is installed."""

import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.models import families


@pytest.mark.parametrize("model_type", [*families.FAMILIES, *families.OTHERS])
def test_tying_is_that_of_transformers(model_type):
    family = families.family(model_type)
    assert family.tied == bool(AutoConfig.for_model(model_type).tie_word_embeddings)


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_conv1d_names_are_the_conv1d_modules(model_type):
    small = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small))
    names = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    assert len(names) == 4
    assert all(families.is_conv1d(model_type, n) for n in names)
    assert not families.is_conv1d("llama", names[0])


def test_dropped_patterns_never_hit_a_parameter():
    for model_type in families.FAMILIES:
        for name in (
            "model.layers.0.self_attn.q_proj.bias",
            "transformer.h.0.attn.c_attn.bias",
            "x.attention.dense.bias",
        ):
            assert families.dropped(model_type, [name]) == {}
    assert families.dropped("gpt_neox", ["gpt_neox.layers.0.attention.masked_bias"])
    assert families.dropped("unlisted", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
    assert families.dropped("llama", ["h.0.attn.bias"]) == {}


def test_towers_are_told_by_a_whole_part_of_a_name():
    assert families.tower("model.vision_tower.encoder.layers.0.q_proj") == "vision_tower"
    assert families.tower("visual.blocks.0.attn.qkv") == "visual"
    assert families.tower("model.layers.0.visualise.weight") is None


def test_every_pattern_compiles():
    for family in [*families.FAMILIES.values(), *families.OTHERS.values()]:
        for pattern, reason in families.DROPPED + family.dropped:
            re.compile(pattern)
            assert reason
