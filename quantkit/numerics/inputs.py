"""Rounding of a linear's inputs: x [..., K] becomes the nearest value its grid has.

As compressed-tensors computes it, in the type of x, with rne = round half to even:

    int8 token           s = max|x| / 127.5                         x_hat = clamp(rne(x / s), -128, 127) s
    int8 token, asym     lo = min(x, 0), hi = max(x, 0), s = (hi - lo) / 255, z = rne(clamp(-128 - lo / s, -128, 127))
                                                                    x_hat = (clamp(rne(x / s + z), -128, 127) - z) s
    int8 tensor          the same with a stored s and z
    fp8 token or group   s = max|x| / 448                           x_hat = e4m3(clamp(x / s, -448, 448)) s
    fp8 tensor           the same with a stored s
    MXFP8, MXFP4         s = 2^e by 32 columns, as of weights       x_hat = nearest(x / s) s
    NVFP4                b = e4m3(min(g max|x| / 6, 448)) by 16 columns, 1/8 if that is 0; s = b / g with a stored g
                                                                    x_hat = nearest(x / s) s

The last two are computed in fp32. A token is a row of x whatever the rank of x, so results do not depend on how tokens
are batched. A row of zeros stays zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.numerics.grid import round_to_grid, scale_and_zero
from quantkit.scheme import Grid

FP8_LARGEST = 448.0
_FP4_LARGEST = 6.0
_NO_SCALE = 0.125  # instead of an FP8 scale that is rounded to 0


@dataclass(frozen=True)
class InputScale:
    """Stored range of a linear's inputs. scale: [1] in its stored dtype. zero: int8 [1], None on a symmetric grid.

    value = (code - zero) * scale with codes -128..127. Of NVFP4 the scale is the global one, by which those of the
    groups are divided.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None


def input_scale(
    low: torch.Tensor, high: torch.Tensor, grid: Grid, dtype: torch.dtype = torch.float32
) -> InputScale:
    """The stored form of inputs from `low` to `high`, fp32 [1] each. dtype: of the scale, which is rounded first."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        steps = 127.5 if grid.number.kind == "int" else FP8_LARGEST
        return InputScale(_positive((torch.maximum(-low, high) / steps).to(dtype)))
    scale = _positive(((high - low) / 255).to(dtype))
    return InputScale(scale, (-128 - low / scale.float()).clamp_(-128, 127).round_().to(torch.int8))


def round_inputs(x: torch.Tensor, grid: Grid, static: InputScale | None = None) -> torch.Tensor:
    """`x` [..., K] on the grid, in its own dtype. static: the stored range of NVFP4 or a grid that is not dynamic."""
    if static is None and (grid.two_level or not grid.dynamic):
        raise ValueError(f"inputs {grid} need their stored scale")
    if grid.scale is not None:
        return _by_short_scales(x, grid, static)
    if not grid.dynamic:
        assert static is not None
        scale = static.scale.to(x)
        return _rounded(x, scale, None if static.zero is None else static.zero.to(x), grid)
    rows = x if grid.group_size is None else x.unflatten(-1, (-1, grid.group_size))  # (..., K/G, G)
    return _rounded(rows, *_range(rows, grid), grid).view(x.shape)


def _by_short_scales(x: torch.Tensor, grid: Grid, static: InputScale | None) -> torch.Tensor:
    """`round_inputs` on a grid whose scales have one byte each."""
    rows = x.float().unflatten(-1, (-1, grid.group_size or x.shape[-1]))  # (..., K/G, G)
    largest = rows.abs().amax(-1, keepdim=True)
    if static is None:
        scale, zero = scale_and_zero(-largest, largest, grid, x.dtype)
    else:
        whole = static.scale.to(largest)
        short = (largest / _FP4_LARGEST * whole).clamp_(max=FP8_LARGEST).to(torch.float8_e4m3fn).float()
        scale, zero = torch.where(short == 0, _NO_SCALE, short) / whole, torch.zeros_like(largest)
    return round_to_grid(rows, scale, zero, grid).view(x.shape).to(x.dtype)


def _range(rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point [..., 1] of every row."""
    if grid.symmetric:
        largest = rows.abs().amax(-1, keepdim=True)
        return _positive(largest / (127.5 if grid.number.kind == "int" else FP8_LARGEST)), None
    lo, hi = rows.amin(-1, keepdim=True).clamp_(max=0), rows.amax(-1, keepdim=True).clamp_(min=0)
    scale = _positive((hi - lo) / 255)
    return scale, (-128 - lo / scale).clamp_(-128, 127).round_()


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """The scale of a row of zeros is any number that divides."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _rounded(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    levels = x / scale
    if grid.number.kind == "float":
        return levels.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)
    if zero is None:
        return levels.round_().clamp_(-128, 127).mul_(scale)
    return levels.add_(zero).round_().clamp_(-128, 127).sub_(zero).mul_(scale)
