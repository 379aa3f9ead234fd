"""GPTQ's two loops over a block of columns, natively: see `qk_spread` and `qk_descend`."""

from __future__ import annotations

import torch

from quantkit_kernels.cpu import library

MOST_COLUMNS = 128  # QK_MOST_COLUMNS of quantkit_cpu.h


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
    """Round the columns of a block one after the other, each with the errors of those before it spread over it.

    weight [E, B, N] of E weights, transposed; levels and errors, of the same strides, are written. upper [E, B, B]: row
    j spreads the error of column j. scale, low, high [E, G, N]; groups [E, B]: which of the G a column uses.
    All fp32 on the CPU with contiguous rows, groups int32; B at most MOST_COLUMNS.
    """
    facts = _facts(weight, upper, scale, low, high, groups)
    for name, tensor in (("levels", levels), ("errors", errors)):
        if tensor.shape != weight.shape or tensor.stride() != weight.stride():
            raise ValueError(f"{name} must have the shape and strides of weight, {list(weight.shape)}")
    facts.first_out, facts.second_out = levels.data_ptr(), errors.data_ptr()
    matrix = upper.mT.contiguous()
    facts.matrix = matrix.data_ptr()
    library.required().qk_spread(facts, torch.get_num_threads())


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """Move the columns of a block one after the other to their best values on the grid, all others fixed.

    value [E, B, N], changed in place; gradient [E, B, N] as it is before the first moves; hessian [E, B, B]. The rest
    as in `spread`.
    """
    facts = _facts(value, hessian, scale, low, high, groups)
    _rows("gradient", gradient, tuple(value.shape))
    facts.gradient, facts.first_out = gradient.data_ptr(), value.data_ptr()
    facts.gradient_each, facts.gradient_row = gradient.stride(0), gradient.stride(1)
    matrix = hessian.mT.contiguous()
    facts.matrix = matrix.data_ptr()
    library.required().qk_descend(facts, torch.get_num_threads())


def _facts(
    value: torch.Tensor,
    matrix: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
) -> library.Columns:
    """What both loops are told; ValueError if the tensors do not fit."""
    if value.dim() != 3 or scale.dim() != 3 or not value.numel() or not scale.numel():
        raise ValueError(
            f"weights are [E, B, N], scales [E, G, N], got {list(value.shape)} and {list(scale.shape)}"
        )
    e, b, n = value.shape
    if b > MOST_COLUMNS:
        raise ValueError(f"a block has at most {MOST_COLUMNS} columns, not {b}")
    _rows("weight", value, (e, b, n))
    g = scale.shape[1]
    for name, tensor in (("scale", scale), ("low", low), ("high", high)):
        _rows(name, tensor, (e, g, n))
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if matrix.shape != (e, b, b) or matrix.dtype != torch.float32 or not matrix.is_cpu:
        raise ValueError(f"the matrix must be fp32 {[e, b, b]} on the CPU, got {list(matrix.shape)}")
    if groups.shape != (e, b) or groups.dtype != torch.int32 or not groups.is_contiguous():
        raise ValueError(f"groups must be contiguous int32 {[e, b]}, got {groups.dtype} {list(groups.shape)}")
    if int(groups.min()) < 0 or int(groups.max()) >= g:
        raise ValueError(f"groups must be 0 to {g - 1}")
    return library.Columns(
        value=value.data_ptr(),
        scale=scale.data_ptr(),
        low=low.data_ptr(),
        high=high.data_ptr(),
        group_of=groups.data_ptr(),
        weights=e,
        columns=b,
        rows=n,
        groups=g,
        each=value.stride(0),
        row=value.stride(1),
    )


def _rows(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor is fp32 of this shape on the CPU, with contiguous rows."""
    if (
        tensor.dtype != torch.float32
        or not tensor.is_cpu
        or tuple(tensor.shape) != shape
        or (shape[-1] > 1 and tensor.stride(-1) != 1)
    ):
        raise ValueError(
            f"{name} must be fp32 {list(shape)} on the CPU with contiguous rows, got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
