"""The plain-torch twin of attention over a quantized KV cache: one new token per sequence reads codes and scales.

Layout: codes [B, H, S, D], int8 or FP8 E4M3 (float8_e4m3fn), of S places per sequence and kv head; scales fp32
[B, H, S], one per token and head, or [1, H, 1] stored ones. An entry is code * scale.
"""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_SCALE = 1e-6


def quantize_entries(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, H, T, D] and scales of x; scale: stored ones [1, H, 1], None: max|x| / LARGEST of each token and head.

    int8 rounds halves away from zero (vLLM's int8_per_token_head), FP8 to the even code.
    """
    v = x.float()
    if scale is None:
        scale = (v.abs().amax(-1) / LARGEST[dtype]).clamp_(min=LEAST_SCALE)  # (B, H, T)
        levels = v * (1.0 / scale)[..., None]
    else:
        levels = v / scale[..., None]
    if dtype == torch.int8:
        return (levels + levels.sign() * 0.5).clamp_(-128, 127).trunc().to(torch.int8), scale
    return levels.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def kv_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """softmax(q k^T scale) v [B, heads, D] in q's dtype, of the places first..end-1 of each sequence; fp64 inside.

    q: [B, heads, D], heads a multiple of H. first, end: int32 [B]. softcap: 0, or c of c tanh(scores / c).
    """
    b, heads, d = q.shape
    kv_heads, places = k.shape[1], k.shape[2]
    grouped = q.double().view(b, kv_heads, heads // kv_heads, d)
    scores = grouped @ (k.double() * k_scale.double()[..., None]).transpose(2, 3) * scale  # (B, H, group, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(places, device=q.device)
    seen = (place >= first[:, None]) & (place < end[:, None])  # (B, S)
    p = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1)
    held = torch.where(seen[:, None, :, None], v.double() * v_scale.double()[..., None], 0.0)
    return (p @ held).view(b, heads, d).to(q.dtype)
