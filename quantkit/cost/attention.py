"""The attention of each decoder block by config.json, and the bytes that its cache takes; without torch.

A cached token has a key and a value per KV head. Multi-head latent attention (MLA, DeepSeek-V2) instead caches one
vector of `latent` channels and a rotary part, shared by all heads: while tokens are decoded, queries are brought into
that space and keys are never expanded; a prompt is computed with expanded keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.models.blocks import hidden_size, text_config
from quantkit.scheme import Grid, KVScheme

EXACT = 16  # bits of an entry that is not quantized
_SCALE = 32  # bits of a scale: fp32, or fp16 and the fp16 lowest value
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_LAYER_TYPES = ("layer_types", "layers_block_type")


@dataclass(frozen=True)
class Attention:
    """One block's attention. key, value: channels per head. window: keys that a query sees at most, None: all.

    latent, rotary: channels of the one cached vector of MLA and of its rotary part; 0 elsewhere.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None
    latent: int = 0
    rotary: int = 0

    def seen(self, queries: int, context: int) -> int:
        """Keys that `queries` tokens at the end of `context` tokens see together."""
        return context if self.window is None else min(context, self.window + queries - 1)

    def pairs(self, queries: int, context: int) -> int:
        """Pairs of a query and a key at or before it, for the last `queries` tokens of `context`."""

        def first(n: int) -> int:
            inside = n if self.window is None else min(n, self.window)
            return inside * (inside + 1) // 2 + (n - inside) * inside

        return first(context) - first(context - queries)

    def absorbed(self) -> Attention:
        """The attention that computes one token of MLA: all heads share the cached vector as key and as value."""
        if not self.latent:
            return self
        return replace(self, kv_heads=1, key=self.latent + self.rotary, value=self.latent)

    def cache_bytes(self, kv: KVScheme | None, context: int, batch: int = 1) -> float:
        """Bytes of this block's cache for `batch` sequences of `context` tokens each."""
        tokens = self.seen(1, context)
        if self.latent:
            return batch * tokens * (self.latent + self.rotary) * EXACT / 8
        exact = tokens if kv is None else min(tokens, kv.residual + kv.sinks)
        kept = batch * self.kv_heads * exact * (self.key + self.value) * EXACT / 8
        rounded = batch * self.kv_heads * (tokens - exact)
        keys, values = (None, None) if kv is None else (kv.keys, kv.values)
        bits = self.key * entry_bits(keys, self.key) + self.value * entry_bits(values, self.value)
        return kept + rounded * bits / 8


def entry_bits(grid: Grid | None, channels: int) -> float:
    """Bits of one channel of a cached key or value, with its share of scales that are not stored once for all."""
    if grid is None:
        return EXACT
    if not grid.dynamic:
        return grid.bits
    return grid.bits + _SCALE / (grid.group_size or channels)


def find_attention(config: Mapping[str, Any], blocks: int) -> tuple[Attention | None, ...]:
    """The attention of each block; None for one without (recurrent, or linear attention), or if the config is silent.

    Where keys of config.json say nothing of windows, every block sees the whole context.
    """
    text = text_config(config)
    heads = _first(text, _HEADS)
    hidden = hidden_size(config)
    size = text.get("head_dim") or (hidden // heads if heads and hidden else None)
    if not heads or not size:
        return (None,) * blocks
    one = Attention(heads, _kv_heads(text, heads), size, size)
    if latent := text.get("kv_lora_rank"):
        rotary, plain = text.get("qk_rope_head_dim", 0), text.get("qk_nope_head_dim", size)
        one = Attention(heads, heads, plain + rotary, text.get("v_head_dim", size), None, latent, rotary)
    return tuple(_of_block(one, text, number, blocks) for number in range(blocks))


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)


def _kv_heads(text: Mapping[str, Any], heads: int) -> int:
    found = _first(text, _KV_HEADS)
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return heads if found is None else found


def _of_block(one: Attention, text: Mapping[str, Any], number: int, blocks: int) -> Attention | None:
    """`one` with the window of this block; None if the block has another kind of layer."""
    window = text.get("sliding_window")
    if type(window) is not int or window <= 0 or text.get("use_sliding_window") is False:
        window = None
    kinds = next((text[key] for key in _LAYER_TYPES if isinstance(text.get(key), list)), None)
    if kinds is not None and len(kinds) >= blocks:
        kind = str(kinds[number])
        if "attention" not in kind or kind.startswith("linear"):
            return None
        if kind == "chunked_attention":
            return replace(one, window=text.get("attention_chunk_size"))
        return replace(one, window=window if kind == "sliding_attention" else None)
    pattern, below = text.get("sliding_window_pattern"), text.get("max_window_layers")
    if type(pattern) is int and pattern > 0:
        return replace(one, window=None if (number + 1) % pattern == 0 else window)
    if type(below) is int and number < below:
        return one
    return replace(one, window=window)


__all__ = ["Attention", "entry_bits", "find_attention"]
