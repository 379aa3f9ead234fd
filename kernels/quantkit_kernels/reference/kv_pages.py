"""The plain-torch twin of attention over pages of a quantized KV cache, with a running softmax.

Milakov and Gimelshein, arXiv 1805.02867. A page holds codes [B, H, P, D] of P tokens: int8, FP8 E4M3, or uint8
[B, H, P, D / 2] with two signed 4-bit codes a byte, the first one in the low half. Scales are fp32: one per token and
head, [B, H, P, 1] of each page, or stored ones [H]. An entry is code * scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Sums(NamedTuple):
    """The running softmax of R rows: largest score and sum of exponentials [B, H, R], weighted values [B, H, R, D].

    The result of attention is `out / mass`. A row that has seen no token has a largest score of -inf and zeros.
    """

    top: torch.Tensor
    mass: torch.Tensor
    out: torch.Tensor


def take_in(sums: Sums, scores: torch.Tensor, values: torch.Tensor) -> Sums:
    """The sums with n more tokens: scores [B, H, R, n], -inf where a token is not seen, and values [B, H, n, D]."""
    top = torch.maximum(sums.top, scores.amax(3))
    base = top.masked_fill(top == -torch.inf, 0.0)
    p = (scores - base[..., None]).exp()
    shrink = (sums.top - base).exp()
    return Sums(top, sums.mass * shrink + p.sum(3), sums.out * shrink[..., None] + p @ values)


def hidden(scores: torch.Tensor, mask: torch.Tensor | None, position: int, tokens: int) -> torch.Tensor:
    """Scores [B, H, R, n] of n tokens under a mask; row r is the query of token r modulo `tokens`.

    mask: [B or 1, 1 or heads, tokens, n], bool (True: seen) or a float that is added. None: token t sees the first
    position + t + 1.
    """
    b, kv_heads, rows, n = scores.shape
    split = scores.view(b, kv_heads, rows // tokens, tokens, n)
    if mask is None:
        if position >= n - 1:
            return scores
        place = torch.arange(n, device=scores.device)
        mask = (place <= position + torch.arange(tokens, device=scores.device)[:, None])[None, None]
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
    if mask.dtype == torch.bool:
        split = split.masked_fill(~mask, -torch.inf)
    else:
        split = split + mask.to(scores.dtype)
    return split.reshape(scores.shape)


def entries(codes: torch.Tensor, scale: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `count` tokens [B, H, count, D] of a page as `dtype`."""
    levels = codes[:, :, :count]
    if levels.dtype == torch.uint8:
        both = torch.stack((levels & 15, levels >> 4), -1).flatten(-2)
        levels = (both ^ 8).to(torch.int8) - 8
    scale = scale.view(-1, 1, 1) if scale.dim() == 1 else scale[:, :, :count]
    return levels.to(dtype) * scale.to(dtype)


def kv_pages(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    k_scale: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    v_scale: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    length: int,
    position: int,
    tokens: int,
    softcap: float,
    top: torch.Tensor,
    mass: torch.Tensor,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Sums` (top, mass, out) with the first `length` tokens of pages k, v taken in, computed in q's dtype.

    q: [B, H, R, D], scaled (and rotated, if keys are); mask, position, tokens: as in `hidden`, over these tokens.
    k_scale, v_scale: one per page, or one tensor [H]. softcap: 0, or c of c tanh(scores / c).
    """
    sums, size = Sums(top, mass, out), k[0].shape[2] if k else 1
    for number, (keys, values) in enumerate(zip(k, v, strict=True)):
        first = number * size
        n = min(size, length - first)
        of_keys, of_values = (each[number if len(each) > 1 else 0] for each in (k_scale, v_scale))
        scores = q @ entries(keys, of_keys, n, q.dtype).transpose(2, 3)  # (B, H, R, n)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        part = None if mask is None else mask[..., first : first + n]
        scores = hidden(scores, part, position - first, tokens)
        sums = take_in(sums, scores, entries(values, of_values, n, q.dtype))
    return sums
