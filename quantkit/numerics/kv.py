"""Rounding of the entries of a KV cache: keys after rotary embedding and values as projected, each [B, H, T, d].

Computed in fp32, whatever the dtype of the entries:

    FP8, stored scale (tensor, head)   code = e4m3(clamp(x / s, -448, 448)), x_hat = code s; calibrated s = max|x| / 448
    int8, stored scale                 code = clamp(rne(x / s), -128, 127); read from files of other tools only
    integer per token and head         s = max(max|x| / (2^(b-1) - 1), 1e-6), halves away from zero: what vLLM's
                                       int8_per_token_head does; 8 and 4 bits
    integer, asymmetric (KIVI)         per token and `group_size` channels, or per channel and `group_size` tokens:
                                       s = (max - min) / (2^b - 1), code = rne((x - min) / s), with s and min kept
                                       in fp16 (Liu et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.numerics.hadamard import hadamard
from quantkit.scheme import Grid, KVScheme

FP8_LARGEST = 448.0
LEAST_SCALE = 1e-6


@dataclass(frozen=True)
class KVScales:
    """Stored scales of one layer's cache, [1] or [kv_heads, 1, 1], in the dtype they are stored in."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class KVCodes:
    """Entries as a cache holds them. codes [B, H, T, d]: int8, float8_e4m3fn, or uint8 of an asymmetric grid.

    scale: fp32 (fp16 of an asymmetric grid), [1] or [H, 1, 1] stored ones, else one per group: [B, H, T, d / G] of
    tokens, [B, H, T / G, d] of channels. low: the value of code 0 on an asymmetric grid, in scale's shape and dtype.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor | None = None


def encode(x: torch.Tensor, grid: Grid, scale: torch.Tensor | None = None) -> KVCodes:
    """The codes of entries x [B, H, T, d], any float dtype. scale: of a grid that is not dynamic.

    ValueError where the scale is missing, or T or d are not whole groups.
    """
    if not grid.dynamic:
        if scale is None:
            raise ValueError(f"a cache {grid} needs stored scales")
        levels = x.float() / scale.float()
        if grid.number.name == "int8" and grid.symmetric:
            return KVCodes(levels.round_().clamp_(-128, 127).to(torch.int8), scale.float())
        if grid.number.name != "fp8_e4m3":
            raise ValueError(f"a cache with stored scales is FP8 or symmetric int8, got {grid}")
        return KVCodes(levels.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), scale.float())
    if grid.number.kind != "int":
        raise ValueError(f"a cache with scales of its own is of integers, got {grid}")
    axis = _axis(grid)
    groups = _grouped(x.float(), grid)
    if grid.symmetric:
        half = 2 ** (grid.bits - 1)
        found = (groups.abs().amax(axis) / (half - 1)).clamp_(min=LEAST_SCALE)
        levels = groups * (1 / found).unsqueeze(axis)
        levels = (levels + levels.sign() * 0.5).clamp_(-half, half - 1).trunc_()
        return KVCodes(_ungrouped(levels, grid).to(torch.int8), found)
    low = groups.amin(axis).half()
    found = ((groups.amax(axis) - low.float()) / grid.qmax).half()
    step = torch.where(found == 0, 1.0, found.float())
    levels = ((groups - low.float().unsqueeze(axis)) / step.unsqueeze(axis)).round_().clamp_(0, grid.qmax)
    return KVCodes(_ungrouped(levels, grid).to(torch.uint8), found, low)


def decode(entries: KVCodes, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """What the codes stand for, [B, H, T, d] as `dtype`."""
    levels = entries.codes.float()
    if not grid.dynamic:
        return levels.mul_(entries.scale).to(dtype)
    axis = _axis(grid)
    groups = _grouped(levels, grid) * entries.scale.float().unsqueeze(axis)
    if entries.low is not None:
        groups += entries.low.float().unsqueeze(axis)
    return _ungrouped(groups, grid).to(dtype)


def rounded(
    keys: torch.Tensor, values: torch.Tensor, scheme: KVScheme, scales: KVScales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, values), [B, H, T, d] from the first token on, as they are read from a cache that rounds each once.

    Rotated keys are rotated back, which gives the same products with queries that are not rotated. ValueError for a
    scheme with a residual window: which of its entries are rounded depends on who reads them.
    """
    if scheme.residual:
        raise ValueError(f"a cache {scheme} rounds entries later, not as they come")

    def read(x: torch.Tensor, grid: Grid, scale: torch.Tensor | None, rotate: bool) -> torch.Tensor:
        turned = hadamard(x) if rotate else x
        turned = decode(encode(turned, grid, scale), grid, x.dtype)
        out = hadamard(turned) if rotate else turned
        out[:, :, : scheme.sinks] = x[:, :, : scheme.sinks]
        return out

    return (
        read(keys, scheme.keys, None if scales is None else scales.keys, scheme.rotate),
        read(values, scheme.values, None if scales is None else scales.values, False),
    )


def _axis(grid: Grid) -> int:
    """The axis of a group's members in `_grouped`."""
    return -1 if grid.granularity == "token" else -2


def _grouped(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[B, H, T, d / G, G] of tokens, [B, H, T / G, G, d] of channels."""
    dim = -1 if grid.granularity == "token" else -2
    size = grid.group_size or x.shape[dim]
    if x.shape[dim] % size:
        what = "channels" if dim == -1 else "tokens"
        raise ValueError(f"{x.shape[dim]} {what} are not whole groups of {size}")
    groups: torch.Tensor = x.unflatten(dim, (-1, size))
    return groups


def _ungrouped(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return x.flatten(-2) if grid.granularity == "token" else x.flatten(-3, -2)
