"""Tiny random multimodal models: a language model of two or three blocks, 64 wide, and towers of one or two.

`build(name)` gives one of `WRAPPERS` in fp32, the same weights every time, norm weights away from 1. `save` writes its
checkpoint with a tokenizer and files of a processor. `text_model` gives the language model alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tiny_models
import torch
import transformers
from torch import nn

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE = 127  # the token that stands for a patch of the picture
SIDE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def _gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 16},
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = TEXT | {"rope_parameters": rope, "use_sliding_window": False}
    text.pop("head_dim")
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _smolvlm() -> nn.Module:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT, tie_word_embeddings=False).to_dict(),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
}


def build(name: str) -> nn.Module:
    """A tiny wrapper; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WRAPPERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def save(name: str, folder: Path) -> nn.Module:
    """Write a wrapper as a published checkpoint has it; returns the model."""
    model = build(name)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    for number, file in enumerate(SIDE_FILES):
        (folder / file).write_text(json.dumps({"image_processor_type": "Own", "size": number}) + " \n")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return model
