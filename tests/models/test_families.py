"""The tables agree with the transformers that is installed."""

import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from quantkit.models import families


def architecture(model_type):
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(model_type))]


@pytest.mark.parametrize("model_type", [*families.FAMILIES, *families.OTHERS])
def test_base_prefix_and_tying_are_those_of_transformers(model_type):
    family = families.family(model_type)
    assert family.base_prefix == architecture(model_type).base_model_prefix
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
            assert families.dropped(model_type, name) is None
    assert families.dropped("gpt_neox", "gpt_neox.layers.0.attention.masked_bias")
    assert families.dropped("unlisted", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert families.dropped("llama", "h.0.attn.bias") is None


def test_module_names_with_and_without_the_base_prefix():
    full = ["transformer.h.0.attn.c_attn.weight", "lm_head.weight"]
    assert families.module_names("gpt2", full) == dict(zip(full, full, strict=True))
    assert families.module_names("gpt2", ["h.0.ln_1.bias", "lm_head.weight"]) == {
        "h.0.ln_1.bias": "transformer.h.0.ln_1.bias",
        "lm_head.weight": "lm_head.weight",
    }
    assert families.module_names("opt", ["decoder.embed_tokens.weight"]) == {
        "decoder.embed_tokens.weight": "model.decoder.embed_tokens.weight"
    }
    assert families.module_names("unlisted", ["blocks.0.weight"]) == {"blocks.0.weight": "blocks.0.weight"}


def test_renamed_head():
    names = families.module_names("gpt_neox", ["gpt_neox.layers.0.mlp.bias", "embed_out.weight"])
    assert names["embed_out.weight"] == "lm_head.weight"


def test_every_pattern_compiles():
    for family in [*families.FAMILIES.values(), *families.OTHERS.values()]:
        for pattern, reason in families.DROPPED + family.dropped:
            re.compile(pattern)
            assert reason
