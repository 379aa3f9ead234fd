"""Attention that reads a quantized cache part by part, with a running softmax, for transformers' attention interface.

Milakov and Gimelshein, arXiv 1805.02867. A part of the cache is decoded, multiplied and forgotten, so memory does not
grow by a dense copy of the cache. `register` makes it known to transformers as NAME, together with its mask: without
that transformers would pass no mask at all, and padded batches would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from quantkit_kernels.cpu.kv_pages import Given, attend
from quantkit_kernels.reference.kv_pages import Sums, hidden, take_in
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantkit.errors import ModelError
from quantkit.layers.kv_buffer import KVBuffer
from quantkit.layers.kv_entries import Entries, Part
from quantkit.numerics.hadamard import hadamard

NAME = "quantkit_kv"
_LEAST = torch.finfo(torch.float32).tiny
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
    key: torch.Tensor | Carried | KVBuffer,
    value: torch.Tensor | Carried | KVBuffer,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, heads, T, d], key and value [B, kv_heads, S, d] -> [B, T, heads, d].

    attention_mask: bool, True where a token is seen, or an additive float; [B or 1, heads or 1, T, S]. softcap: c of
    c tanh(scores / c). s_aux: a score per head that takes part in the softmax only (attention sinks of GPT-OSS). A
    `KVBuffer` holds both keys and values, for one new token of a captured step.
    """
    if any(kwargs.get(name) is not None for name in NOT_READ) or dropout:
        given = [name for name in NOT_READ if kwargs.get(name) is not None] or ["dropout"]
        raise ModelError(
            f"attention over a quantized KV cache does not do {', '.join(given)}; load with kv_cache='exact'"
        )
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, KVBuffer):
        if s_aux is not None:
            raise ModelError("a captured step over a quantized KV cache does not do s_aux")
        return key.attend(query, attention_mask, factor, softcap or 0.0), None
    assert not isinstance(value, KVBuffer)
    if not isinstance(key, Carried) or not isinstance(value, Carried):
        plain = softcap is None and s_aux is None
        if plain and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        parts = iter([Part(0, key.shape[2])])
    else:
        parts = key.entries.parts(value.entries)
    b, heads, tokens, d = query.shape
    kv_heads = key.shape[1]
    rows = query.float().reshape(b, kv_heads, heads // kv_heads * tokens, d) * factor
    sums = _nothing_yet(rows, value.shape[3], s_aux, heads, tokens)
    for part in parts:
        seen = None if attention_mask is None else attention_mask[..., part.start : part.end]
        sums = _taken_in(
            sums, hadamard(rows) if part.rotated else rows, key, value, part, seen, softcap, tokens
        )
    out = (sums.out / sums.mass.clamp(min=_LEAST)[..., None]).view(b, heads, tokens, -1).transpose(1, 2)
    return out.to(query.dtype).contiguous(), None


def _nothing_yet(rows: torch.Tensor, d: int, s_aux: torch.Tensor | None, heads: int, tokens: int) -> Sums:
    """The sums of rows [B, H, R, D] before the first token."""
    shape = rows.shape[:3]
    top, mass, out = rows.new_full(shape, -torch.inf), rows.new_zeros(shape), rows.new_zeros(*shape, d)
    if s_aux is not None:
        top = s_aux.float().view(1, heads, 1).expand(shape[0], -1, tokens).reshape(shape).contiguous()
        mass = torch.ones_like(top)
    return Sums(top, mass, out)


def _taken_in(
    sums: Sums,
    rows: torch.Tensor,
    key: torch.Tensor | Carried,
    value: torch.Tensor | Carried,
    part: Part,
    seen: torch.Tensor | None,
    softcap: float | None,
    tokens: int,
) -> Sums:
    """The sums with one part more: pages of codes by the kernel that reads them, anything else as dense tensors.

    rows: scaled queries [B, H, group T, d]. seen: the mask of the part.
    """
    position = key.shape[2] - tokens - part.start
    if isinstance(key, Carried) and isinstance(value, Carried):
        if part.coded:
            codes = (*key.entries.codes(), *value.entries.codes())
            count = part.end - part.start
            return attend(Given(rows, *codes, seen, count, position, tokens, softcap or 0.0, *sums))
        k = key.entries.read(part.start, part.end, torch.float32, turn_back=False)
        v = value.entries.read(part.start, part.end, torch.float32)
    else:
        k, v = (x[:, :, part.start : part.end].float() for x in (key, value))
    scores = rows @ k.transpose(2, 3)  # (B, H, group T, n)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return take_in(sums, hidden(scores, seen, position, tokens), v)


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask, always made: `attention` takes none for granted."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


def register() -> None:
    """Make the function and its mask known to transformers; again is harmless."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
