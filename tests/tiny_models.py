"""Tiny random models of every supported family: hidden 64, 4 heads of 16, 3 layers, 128 tokens of vocabulary.

`FAMILIES[name](**overrides)` builds one: fp32, eval mode, the same weights every time, norm weights away from
1 and biases away from 0. Overrides are config keys. `save` writes a checkpoint folder with a tokenizer of
single characters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.bench.coverage_model import tokenizer
from quantkit.structure.fold import ScalingGroup

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GATED = {"intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
_GROUPED = _GATED | {"num_key_value_heads": 2}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = _GROUPED | {"query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _MIXED}
_NEOX = {"intermediate_size": 128, "rotary_pct": 0.25}

# name -> (model_type, what its config says beyond _COMMON)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "llama-gqa": ("llama", _GROUPED),
    "llama-bias": ("llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", _GROUPED | {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("qwen2", _GROUPED | {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}),
    "qwen2-mha": ("qwen2", _GATED),
    "qwen3": ("qwen3", _GROUPED),
    "qwen3-mha": ("qwen3", _GATED),
    "gemma2": ("gemma2", _GEMMA),
    "gemma2-mha": ("gemma2", _GEMMA | {"num_key_value_heads": 4}),
    "gemma3": ("gemma3_text", _GEMMA),
    "gemma3-mha": ("gemma3_text", _GEMMA | {"num_key_value_heads": 4}),
    "phi3": ("phi3", _GATED),
    "phi3-gqa": ("phi3", _GROUPED),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "opt-post-norm": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", _NEOX | {"use_parallel_residual": True}),
    "gpt-neox-sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "falcon": ("falcon", {}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-alibi": ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
}

# Families without a promise whose blocks are called with what depends on the tokens: per-layer inputs, and a dictionary
# of keys and values that later blocks reuse (as if all blocks of the second half were shared).
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "global_head_dim": 32}
_GEMMA4 = _GROUPED | _PER_LAYER | {"sliding_window": 8, "num_hidden_layers": 4}
_GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
BY_TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("gemma4_text", _GEMMA4 | {"num_kv_shared_layers": 0}),
    "gemma4-shared": ("gemma4_text", _GEMMA4 | {"num_kv_shared_layers": 2}),
}


def build(name: str, **overrides: Any) -> nn.Module:
    """A tiny model of `CONFIGS[name]` or `BY_TOKENS[name]`; overrides: config keys. The random state is left alone."""
    model_type, settings = (CONFIGS | BY_TOKENS)[name]
    config = AutoConfig.for_model(model_type, **(_COMMON | settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    return model.eval().requires_grad_(False)


FAMILIES: dict[str, Callable[..., nn.Module]] = {name: partial(build, name) for name in CONFIGS}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices N(0, 1/64); norm weights in their default +- 0.5; biases N(0, 0.01)."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(0, 0.125, generator=generator)
        elif name.endswith("bias"):
            p.normal_(0, 0.1, generator=generator)
        else:
            p.add_(torch.rand(p.shape, generator=generator) - 0.5)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder blocks."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


@torch.no_grad()
def captured_calls(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, tuple, dict[str, Any]]]:
    """(hidden, args, kwargs) of every block's call for `ids` [1, length]."""
    calls = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args[0], args[1:], kwargs))

    handles = [b.register_forward_pre_hook(hook, with_kwargs=True) for b in blocks(model)]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def block_and_call(
    name: str, length: int = 12, index: int = 0, **overrides: Any
) -> tuple[nn.Module, tuple[torch.Tensor, tuple, dict[str, Any]]]:
    """One block of `FAMILIES[name]` and its call for `length` tokens."""
    model = build(name, **overrides)
    return blocks(model)[index], captured_calls(model, ids(length))[index]


def random_scales(
    block: nn.Module, group: ScalingGroup, seed: int = 7, low: float = 0.2, high: float = 5.0
) -> torch.Tensor:
    """One scale for every channel of a scaling group: float64 [channels]."""
    channels = block.get_submodule(group.producer).weight.numel() if group.rows is None else len(group.rows)
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(channels, generator=generator, dtype=torch.float64)


def ids(length: int, batch: int = 1, vocabulary: int = 128, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    return torch.randint(4, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def save(
    model: nn.Module, folder: Path, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
) -> Path:
    """Write the model (cast in place if `dtype` is given) and a tokenizer; returns `folder`."""
    if dtype is not None:
        model.to(dtype)
        model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder
