"""GPTQ's loops over the columns of a block on a GPU: what the kernels of columns.py are launched with."""

from __future__ import annotations

from typing import Any

import torch
import triton

from quantkit_kernels.triton.columns import descend_kernel, spread_kernel
from quantkit_kernels.triton.launch import on

MOST_COLUMNS = 256
_ENTRIES = 2048  # of a program's tile: 64 registers per thread
_STRIP = 32


def spread(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """As `spread` of quantkit_kernels.cpu.columns, on a GPU; B at most MOST_COLUMNS."""
    if levels.stride() != weight.stride() or errors.stride() != weight.stride():
        raise ValueError("levels and errors must have the strides of weight")
    grid = (scale, low, high, groups)
    tensors = (weight, upper, *grid, levels, errors)
    _launch(spread_kernel, tensors, grid, (*weight.stride()[:2], *upper.stride()))


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """As `descend` of quantkit_kernels.cpu.columns, on a GPU; B at most MOST_COLUMNS."""
    grid = (scale, low, high, groups)
    strides = (*value.stride()[:2], *gradient.stride()[:2], *hessian.stride())
    _launch(descend_kernel, (value, gradient, hessian, *grid), grid, strides)


def config(b: int) -> dict[str, int]:
    """The tile of a program for blocks of `b` columns."""
    block = triton.next_power_of_2(b)
    return {"BLOCK": block, "STRIP": min(_ENTRIES // block, _STRIP)}


def _launch(
    kernel: Any, tensors: tuple[torch.Tensor, ...], grid: tuple[torch.Tensor, ...], strides: tuple[int, ...]
) -> None:
    """Run a kernel on its tensors [E, B, ...]. grid: scale, low, high, groups."""
    experts, b, n = tensors[0].shape
    if b > MOST_COLUMNS:
        raise ValueError(f"a block has at most {MOST_COLUMNS} columns, not {b}")
    if not all(each.is_contiguous() for each in grid):
        raise ValueError("scales, bounds and groups must be contiguous")
    tile = config(b)
    with on(tensors[0].device):
        programs = (triton.cdiv(n, tile["STRIP"]), experts)
        kernel[programs](*tensors, b, n, grid[0].shape[1], *strides, **tile, num_warps=1)
