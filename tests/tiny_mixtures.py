"""Tiny random mixtures of experts: hidden 64, 2 blocks, 4 experts of 96, two per token, 128 tokens of vocabulary.

`build(name)` gives one of `MIXTURES` or `PARALLEL` in fp32 with the eager experts, the same weights every time, norm
weights away from 1, biases and the buffers that correct a router away from 0. `tiny_models.save` writes its checkpoint
as transformers does: one tensor per expert, or stacked ones where the family has them on disk. `stacked` turns the
first kind into the second. `experts(model)` finds the modules that hold fused experts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS, TOP, INTERMEDIATE = 4, 2, 96  # twice 96 is not the hidden size, so no stacked tensor is square
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": TOP,
}
_MIXTRAL = {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 128}
_DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 128,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4}
_GPT_OSS = _MIXTRAL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_GPT_OSS |= {"rope_parameters": _YARN}
_LLAMA4 = _MIXTRAL | {"intermediate_size_mlp": 128, "moe_layers": [1], "no_rope_layers": [1, 1]}
_GLM4 = _DEEPSEEK | {"partial_rotary_factor": 0.5, "num_key_value_heads": 2}
_DBRX_FFN = {"hidden_size": 64, "ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": TOP}
_DBRX = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 128,
    "vocab_size": 128,
    "pad_token_id": 0,
    "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
    "ffn_config": _DBRX_FFN,
    "num_experts_per_tok": TOP,
}
_NO_HEADS = {key: value for key, value in _COMMON.items() if key != "head_dim"}

# name -> (model_type, the whole of its config)
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _COMMON | _MIXTRAL),
    "qwen2_moe": ("qwen2_moe", _NO_HEADS | _QWEN | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", _COMMON | _QWEN | {"norm_topk_prob": True}),
    "qwen3_moe-dense-first": ("qwen3_moe", _COMMON | _QWEN | {"mlp_only_layers": [0]}),
    "olmoe": ("olmoe", _NO_HEADS | {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE}),
    "deepseek_v3": ("deepseek_v3", _NO_HEADS | _DEEPSEEK | _MLA),
    "glm4_moe": ("glm4_moe", _COMMON | _GLM4),
    "granitemoe": ("granitemoe", _NO_HEADS | _MIXTRAL),
    "gpt_oss": ("gpt_oss", _COMMON | _GPT_OSS),
    "dbrx": ("dbrx", _DBRX),
    "llama4": ("llama4_text", _COMMON | _LLAMA4 | {"num_experts_per_tok": 1}),
}

# Those without a module of experts: their linears lie side by side in modules of their own
PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "jetmoe": ("jetmoe", _NO_HEADS | _MIXTRAL | {"kv_channels": 16, "num_attention_heads": 4})
}


def build(name: str, **overrides: Any) -> nn.Module:
    """A tiny mixture; overrides: config keys. The random state is left alone."""
    model_type, settings = (MIXTURES | PARALLEL)[name]
    config = AutoConfig.for_model(model_type, **(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny_models.randomise(model)
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()).view_as(buffer))
    eager(model)
    return model.eval().requires_grad_(False)


def eager(model: nn.Module) -> None:
    """Run the experts one by one; some classes know no other way and do not let it be chosen."""
    with contextlib.suppress(ValueError):
        model.set_experts_implementation("eager")


def experts(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module whose `down_proj` (or `mlp.w2`) is a parameter over all experts."""
    return {
        name: module
        for name, module in model.named_modules()
        for down in (getattr(module, "down_proj", None), getattr(getattr(module, "mlp", None), "w2", None))
        if isinstance(down, nn.Parameter)
        and (down.dim() == 3 or down is not getattr(module, "down_proj", None))
    }


def stacked(folder: Path) -> Path:
    """Rewrite a checkpoint of one file: experts of one tensor each become `gate_up_proj` [E, 2I, H] and `down_proj`."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    pattern = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
    found = {name: match for name in tensors if (match := pattern.fullmatch(name))}
    parts = {match.groups(): tensors.pop(name) for name, match in found.items()}

    def over(prefix: str, leaf: str) -> torch.Tensor:
        return torch.stack([parts[prefix, str(e), leaf] for e in range(_count(parts, prefix))])

    for prefix in sorted({prefix for prefix, _, _ in parts}):
        tensors[f"{prefix}.gate_up_proj"] = torch.cat(
            [over(prefix, "gate_proj"), over(prefix, "up_proj")], dim=1
        )
        tensors[f"{prefix}.down_proj"] = over(prefix, "down_proj")
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _count(parts: Iterable[tuple[str, str, str]], prefix: str) -> int:
    return 1 + max(int(number) for where, number, _ in parts if where == prefix)
