"""Attention that reads a quantized cache part by part, with a running softmax, for transformers' attention interface.

Milakov and Gimelshein, arXiv 1805.02867. A part of the cache is decoded, multiplied and forgotten, so memory does not
grow by a dense copy of the cache. `register` makes it known to transformers as NAME, together with its mask: without
that transformers would pass no mask at all, and padded batches would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantkit.errors import ModelError
from quantkit.layers.kv_entries import Entries
from quantkit.numerics.hadamard import hadamard

NAME = "quantkit_kv"
NOT_READ = ("position_bias", "head_mask", "alibi", "block_table")  # arguments that would change the result


class Carried:
    """Keys and values of a cache on the way from its `update` to an attention function, without a dense copy.

    An attention function that does not know it gets the dense tensor: torch functions and methods see that.
    """

    def __init__(self, entries: Entries, like: torch.Tensor, length: int) -> None:
        self.entries, self.length = entries, length
        self.shape = torch.Size((like.shape[0], like.shape[1], length, like.shape[3]))
        self.dtype, self.device = like.dtype, like.device

    def dense(self) -> torch.Tensor:
        """The whole tensor [B, H, T, d]."""
        return self.entries.read(0, self.length, self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, Carried):
                return value.dense()
            return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

        return func(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Carried,
    value: torch.Tensor | Carried,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, heads, T, d], key and value [B, kv_heads, S, d] -> [B, T, heads, d].

    attention_mask: bool, True where a token is seen, or an additive float; [B or 1, heads or 1, T, S]. softcap: c of
    c tanh(scores / c). s_aux: a score per head that takes part in the softmax only (attention sinks of GPT-OSS).
    """
    if any(kwargs.get(name) is not None for name in NOT_READ) or dropout:
        given = [name for name in NOT_READ if kwargs.get(name) is not None] or ["dropout"]
        raise ModelError(
            f"attention over a quantized KV cache does not do {', '.join(given)}; load with kv_cache='exact'"
        )
    if not isinstance(key, Carried) or not isinstance(value, Carried):
        if (
            softcap is None
            and s_aux is None
            and isinstance(key, torch.Tensor)
            and isinstance(value, torch.Tensor)
        ):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        parts = iter([(0, key.shape[2], False)])
    else:
        parts = key.entries.parts()
    b, heads, tokens, d = query.shape
    kv_heads = key.shape[1]
    factor = d**-0.5 if scaling is None else scaling
    rows = query.float().reshape(b, kv_heads, heads // kv_heads * tokens, d) * factor
    sums = _Sums(rows, value.shape[3], s_aux, heads, tokens)
    for start, end, k, v, turned in _read(parts, key, value):
        scores = (hadamard(rows) if turned else rows) @ k.transpose(2, 3)  # (B, H, group T, n)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        sums.add(_masked(scores, attention_mask, start, end, tokens, key.shape[2]), v)
    out = sums.result().view(b, heads, tokens, -1).transpose(1, 2)
    return out.to(query.dtype).contiguous(), None


def _read(
    parts: Iterator[tuple[int, int, bool]], key: torch.Tensor | Carried, value: torch.Tensor | Carried
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, bool]]:
    """(start, end, keys, values, whether keys are rotated), fp32, part by part."""
    for start, end, turned in parts:
        if isinstance(key, Carried) and isinstance(value, Carried):
            k = key.entries.read(start, end, torch.float32, turn_back=False)
            yield start, end, k, value.entries.read(start, end, torch.float32), turned
        else:
            yield start, end, key[:, :, start:end].float(), value[:, :, start:end].float(), turned


def _masked(
    scores: torch.Tensor, mask: torch.Tensor | None, start: int, end: int, tokens: int, length: int
) -> torch.Tensor:
    """Scores [B, H, group T, n] of places start..end - 1 under the mask of all `length` places; None: causal."""
    b, kv_heads, rows, n = scores.shape
    split = scores.view(b, kv_heads, rows // tokens, tokens, n)
    if mask is None:
        if tokens == 1:
            return scores
        place = torch.arange(start, end, device=scores.device)
        token = torch.arange(length - tokens, length, device=scores.device)
        mask = (place <= token[:, None])[None, None]
    else:
        mask = mask[..., start:end]
    if mask.shape[1] == 1:
        mask = mask[:, :, None]
    else:
        mask = mask.unflatten(1, (kv_heads, -1))
    if mask.dtype == torch.bool:
        split = split.masked_fill(~mask, torch.finfo(torch.float32).min)
    else:
        split = (split + mask.float()).clamp(min=torch.finfo(torch.float32).min)
    return split.reshape(scores.shape)


class _Sums:
    """The running softmax: largest score, sum of exponentials and weighted values of every row."""

    def __init__(
        self, rows: torch.Tensor, d: int, s_aux: torch.Tensor | None, heads: int, tokens: int
    ) -> None:
        shape = rows.shape[:3]
        self.top = rows.new_full(shape, -torch.inf)
        self.mass = rows.new_zeros(shape)
        self.out = rows.new_zeros(*shape, d)
        if s_aux is not None:
            self.top = s_aux.float().view(1, heads, 1).expand(shape[0], -1, tokens).reshape(shape)
            self.mass = torch.ones_like(self.top)

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Take in scores [B, H, rows, n] and values [B, H, n, d]."""
        top = torch.maximum(self.top, scores.amax(3))
        p = (scores - top[..., None]).exp_()
        shrink = (self.top - top).exp_()
        self.mass = self.mass * shrink + p.sum(3)
        self.out = self.out * shrink[..., None] + p @ values
        self.top = top

    def result(self) -> torch.Tensor:
        return self.out / self.mass[..., None]


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask, always made: `attention` takes none for granted."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


def register() -> None:
    """Make the function and its mask known to transformers; again is harmless."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
