"""The streamed skeleton is the model that transformers loads, block by block."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from quantkit.errors import ModelError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 64}
FAMILIES = {
    "llama": LLAMA_LIKE | {"rope_parameters": LLAMA3_ROPE},
    "mistral": LLAMA_LIKE | {"sliding_window": 8},
    "qwen2": LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA_LIKE
    | {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": LLAMA_LIKE,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 24,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    },
    "gpt2": GPT2,
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k not in ("head_dim", "num_key_value_heads")},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "stablelm": LLAMA_LIKE,  # in no table
}


def save(folder, model_type, dtype=torch.float32, **changes):
    """A random checkpoint with norm weights moved away from 1; returns the model as transformers loads it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def opened(folder):
    return Source(read_checkpoint(folder))


def streamed(folder, dtype=torch.float32):
    source = opened(folder)
    model = skeleton.build(source, dtype)
    prefix, blocks = skeleton.find_blocks(model)
    skeleton.load_outside(model, source, prefix)
    for index in range(len(blocks)):
        skeleton.load_block(model, source, index)
    return model


def logits(model):
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(ids).logits


def edit(folder, change):
    """Rewrite the weights of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_model_equals_transformers(tmp_path, model_type, tie):
    reference = save(tmp_path, model_type, tie_word_embeddings=tie)
    model = streamed(tmp_path)
    assert torch.equal(logits(model), logits(reference))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_in_fp32(tmp_path, dtype):
    reference = save(tmp_path, "llama", dtype)
    assert torch.equal(logits(streamed(tmp_path)), logits(reference))


def test_sharded_checkpoint(tmp_path):
    reference = save(tmp_path / "one", "llama")
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(opened(tmp_path / "many").headers.files) > 3
    assert torch.equal(logits(streamed(tmp_path / "many")), logits(reference))


def test_checkpoint_of_the_base_model(tmp_path):
    """GPT-2 on the hub: names without `transformer.`, and causal masks among the weights."""
    reference = save(tmp_path, "gpt2")
    edit(
        tmp_path,
        lambda t: (
            {n.removeprefix("transformer."): w for n, w in t.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
        ),
    )
    assert torch.equal(logits(streamed(tmp_path)), logits(reference))
    source = opened(tmp_path)
    skeleton.build(source)
    assert source.dropped == {"h.0.attn.bias": "causal mask, built by the attention"}


def test_renamed_head_of_gpt_neox(tmp_path):
    reference = save(tmp_path, "gpt_neox")
    edit(tmp_path, lambda t: {n.replace("lm_head.", "embed_out."): w for n, w in t.items()})
    assert "embed_out.weight" in opened(tmp_path).headers.tensors
    assert torch.equal(logits(streamed(tmp_path)), logits(reference))


# tied heads ------------------------------


def test_tied_head_is_one_parameter(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=True)
    model = streamed(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert skeleton.head_tensors(model) == set()


def test_head_tensors_of_an_untied_head(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=False)
    source = opened(tmp_path)
    model = skeleton.build(source)
    assert skeleton.head_tensors(model) == {"lm_head.weight"}
    skeleton.load_outside(model, source, "model.layers", skip=skeleton.head_tensors(model))
    assert model.lm_head.weight.is_meta
    assert not model.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path, keep_embedding):
    reference = save(tmp_path, "llama", tie_word_embeddings=True)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not keep_embedding:
            del tensors["model.embed_tokens.weight"]

    edit(tmp_path, change)
    assert torch.equal(logits(streamed(tmp_path)), logits(reference))
    source = opened(tmp_path)
    skeleton.build(source)
    assert source.dropped == (
        {"lm_head.weight": "tied to model.embed_tokens.weight"} if keep_embedding else {}
    )


def test_a_tied_pair_that_differs_is_refused(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=False)
    set_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from .*tie_word_embeddings: false"):
        skeleton.build(opened(tmp_path))


# loading and freeing ------------------------------


def test_one_block_at_a_time(tmp_path):
    save(tmp_path, "llama")
    source = opened(tmp_path)
    model = skeleton.build(source)
    names = [n for n, _ in model.named_parameters()]
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    _, blocks = skeleton.find_blocks(model)
    skeleton.load_block(model, source, 1)
    assert [any(not p.is_meta for p in block.parameters()) for block in blocks] == [False, True, False]
    blocks[1].mlp = torch.nn.Linear(2, 2)  # whatever was swapped inside goes with the block
    skeleton.free_block(model, 1)
    assert all(p.is_meta for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == names
    block = skeleton.load_block(model, source, 1)
    assert block is blocks[1]
    assert block.self_attn.config is model.config
    assert torch.equal(block.mlp.up_proj.weight, source.tensor("model.layers.1.mlp.up_proj.weight"))


def test_free_outside(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=False)
    source = opened(tmp_path)
    model = skeleton.build(source)
    skeleton.load_outside(model, source, "model.layers")
    assert not model.lm_head.weight.is_meta
    skeleton.free_outside(model, "model.layers")
    assert all(p.is_meta for p in model.parameters())


def test_chosen_tensors_keep_their_stored_dtype(tmp_path):
    save(tmp_path, "llama", torch.bfloat16)
    source = opened(tmp_path)
    model = skeleton.build(source)
    stored = {"model.layers.0.mlp.up_proj.weight"}
    block = skeleton.load_block(model, source, 0, stored=stored)
    assert block.mlp.up_proj.weight.dtype == torch.bfloat16
    assert block.mlp.down_proj.weight.dtype == torch.float32
    assert skeleton.load_block(model, source, 1, torch.float16).mlp.up_proj.weight.dtype == torch.float16


def test_the_users_random_state_stays(tmp_path, monkeypatch):
    save(tmp_path, "llama")
    build = LlamaForCausalLM._from_config

    def drawing(*args, **keywords):  # as a model does that fills a buffer with random numbers
        torch.rand(3)
        return build(*args, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "_from_config", drawing)
    before = torch.get_rng_state()
    streamed(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [("llama", "model.layers"), ("opt", "model.decoder.layers"), ("gpt2", "transformer.h")],
)
def test_find_blocks(tmp_path, model_type, prefix):
    save(tmp_path, model_type)
    model = skeleton.build(opened(tmp_path))
    assert skeleton.find_blocks(model)[0] == prefix
    assert len(skeleton.find_blocks(model, prefix)[1]) == 3
    with pytest.raises(ModelError, match=f"no list of blocks 'nowhere'; it has {prefix}"):
        skeleton.find_blocks(model, "nowhere")


def test_find_blocks_without_any():
    with pytest.raises(ModelError, match="no list of equal decoder blocks"):
        skeleton.find_blocks(torch.nn.Linear(2, 2))


# checkpoints that do not fit their config ------------------------------


def test_every_misfit_is_told_at_once(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=False)

    def change(tensors):
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.extra.weight"] = torch.ones(2)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 31)

    edit(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        skeleton.build(opened(tmp_path))
    for text in (
        "has no place for: model.layers.0.extra.weight",
        "missing: lm_head.weight, model.norm.weight",
        "model.layers.1.mlp.up_proj.weight has the shape [48, 31], config.json asks for [48, 32]",
    ):
        assert text in str(caught.value)


def test_more_layers_on_disk_than_in_the_config(tmp_path):
    save(tmp_path, "llama")
    set_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"no place for: model\.layers\.2\..* and 1 more"):
        skeleton.build(opened(tmp_path))


def test_a_config_that_builds_no_causal_lm(tmp_path):
    save(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="cannot build a model"):
        skeleton.build(opened(tmp_path))
