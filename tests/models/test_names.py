"""What is a linear, by names and shapes alone."""

import re
from pathlib import Path

import pytest

from quantkit.models.headers import Headers
from quantkit.models.names import find_linears, ignore_patterns
from quantkit.models.tensors import TensorInfo

LAYER = "model.layers.0"


def headers(shapes, **config):
    infos = {
        name: TensorInfo(name, dtype, shape, Path("model.safetensors"), 0, 2)
        for name, (*shape, dtype) in ((n, (*s, "BF16")) for n, s in shapes.items())
        for shape in [tuple(shape)]
    }
    return Headers(Path("model"), {"model_type": "unheard-of"} | config, infos, [], True)


def found(shapes, **config):
    """(name -> why it is left, None for a linear that is quantized; name -> why it is refused)."""
    result = find_linears(headers(shapes, **config))
    return {each.name: each.left for each in result.linears}, result.refused


BLOCK = {
    f"{LAYER}.self_attn.q_proj.weight": (64, 64),
    f"{LAYER}.mlp.down_proj.weight": (64, 128),
    f"{LAYER}.input_layernorm.weight": (64,),
}


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("mlp.gate", (8, 64), "router"),
        ("mlp.router.layer", (8, 64), "router"),
        ("mlp.gate.wg", (8, 64), "router"),
        ("mlp.router.classifier", (8, 64), "router"),
        ("mlp.shared_expert_gate", (1, 64), "router or gate"),
        ("mamba.dt_proj", (64, 16), "time-step"),
        ("mamba.x_proj", (48, 64), "time-step"),
        ("linear_attn.in_proj_a", (32, 64), "decay or gate"),
        ("self_attn.indexer.weights_proj", (32, 64), "indexer"),
        ("self_attn.q_proj.lora_A", (16, 64), "low rank"),
        ("mlp.tiny_proj", (8, 64), "only 8 rows"),
    ],
)
def test_what_is_left_in_a_block_with_a_reason(name, shape, why):
    linears, refused = found(BLOCK | {f"{LAYER}.{name}.weight": shape})
    assert why in linears[f"{LAYER}.{name}"]
    assert linears[f"{LAYER}.self_attn.q_proj"] is None
    assert not refused


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("model.embed_tokens.weight", (128, 64), "embeddings"),
        ("model.embed_tokens_per_layer.weight", (128, 64), "embeddings"),
        (f"{LAYER}.attn.relative_attention_bias.weight", (32, 16), "positions"),
        (f"{LAYER}.self_attn.q_norm.weight", (16, 64), "norm"),
        (f"{LAYER}.mixer.conv1d.weight", (64, 1, 4), "convolution"),
        (f"{LAYER}.mixer.A_log", (64, 16), "parameter of its own"),
        (f"{LAYER}.mlp.experts.gate_up_proj", (8, 64, 128), "stacked experts"),
        (f"{LAYER}.lru.gates.weight", (4, 16, 16), "3 axes"),
    ],
)
def test_what_is_no_linear_whatever_a_rule_says(name, shape, why):
    _, refused = found(BLOCK | {name: shape})
    assert why in refused[name.removesuffix(".weight")]


def test_experts_are_linears_and_what_has_a_row_for_each_is_their_router():
    experts = {f"{LAYER}.moe.experts.{e}.w{i}.weight": (64, 64) for e in range(16) for i in (1, 2, 3)}
    linears, _ = found(BLOCK | experts | {f"{LAYER}.moe.assign.weight": (16, 64)})
    assert all(linears[name.removesuffix(".weight")] is None for name in experts)
    assert "one row for each of 16 experts" in linears[f"{LAYER}.moe.assign"]


def test_heads_towers_and_mtp_layers_are_left():
    extra = {
        "lm_head.weight": (128, 64),
        "visual.blocks.0.attn.qkv.weight": (192, 64),
        "visual.blocks.1.attn.qkv.weight": (192, 64),
        "multi_modal_projector.linear_1.weight": (64, 64),
        "mtp.layers.0.mlp.down_proj.weight": (64, 128),
        "model.layers.1.eh_proj.weight": (64, 128),
        "model.layers.1.self_attn.q_proj.weight": (64, 64),
    }
    linears, _ = found(BLOCK | extra, num_hidden_layers=1, num_nextn_predict_layers=1)
    left = {name for name, why in linears.items() if why}
    assert left == {name.removesuffix(".weight") for name in extra}
    assert "MTP" in linears["model.layers.1.self_attn.q_proj"]


def test_a_tied_head_stored_beside_the_embedding_cannot_be_quantized():
    shapes = BLOCK | {"model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64)}
    assert found(shapes, tie_word_embeddings=True)[1]["lm_head"] == "tied to the embedding"
    assert "head" in found(shapes, tie_word_embeddings=False)[0]["lm_head"]


def test_a_bias_shows_that_a_linear_is_stored_transposed():
    shapes = {
        "h.0.attn.c_attn.weight": (64, 192),
        "h.0.attn.c_attn.bias": (192,),
        "h.0.attn.c_proj.weight": (64, 64),
        "h.0.attn.c_proj.bias": (64,),
    }
    result = {each.name: each for each in find_linears(headers(shapes)).linears}
    assert result["h.0.attn.c_attn"].shape == (192, 64)
    assert result["h.0.attn.c_attn"].transposed
    assert result["h.0.attn.c_proj"].transposed  # square: as the others


def test_both_stacks_of_an_encoder_decoder_are_quantized():
    shapes = {
        f"{side}.block.{i}.layer.0.SelfAttention.q.weight": (64, 64)
        for side in ("encoder", "decoder")
        for i in (0, 1)
    }
    assert set(found(shapes, is_encoder_decoder=True)[0].values()) == {None}
    assert set(found(shapes)[0].values()) == {None, "outside the decoder blocks"}


def test_ignore_patterns_fit_what_is_left_and_nothing_quantized():
    quantized = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.gate_proj", "self_attn.q_proj")]
    left = [
        *(f"model.layers.{i}.mlp.gate" for i in (0, 1)),
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.special",
        "visual.blocks.0.attn.q_proj",
        "mtp.layers.0.mlp.gate_proj",
        "model.layers.2.mlp.gate_proj",
        "lm_head",
    ]
    patterns = ignore_patterns(left, quantized, "model.layers", 2)
    assert patterns == [
        "lm_head",
        r"re:.*\.experts(\..*)?$",
        r"re:.*\.gate$",
        r"re:.*\.special$",
        r"re:.*layers\.2\..*",
        "re:.*mtp.*",
        "re:.*visual.*",
    ]
    for name in left:
        assert name in patterns or any(re.match(p[3:], name) for p in patterns if p.startswith("re:")), name


def test_one_block_of_many_that_a_rule_skips_is_named_by_its_number():
    quantized = [f"language_model.model.layers.{i}.mlp.up_proj" for i in (0, 2)]
    patterns = ignore_patterns(["language_model.model.layers.1.mlp.up_proj"], quantized, "layers", 3)
    assert patterns == ["lm_head", r"re:.*\.1\.mlp\.up_proj$"]
