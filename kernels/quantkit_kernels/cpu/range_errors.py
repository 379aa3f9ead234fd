"""How well each of several grids would round a group of weights, approximately: see `qk_range_errors`."""

from __future__ import annotations

import torch

from quantkit_kernels.cpu import library

MOST = 255  # levels that are rounded are at most this far from 0


def range_errors(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    qmax: int,
    column: torch.Tensor | None = None,
) -> torch.Tensor:
    """Errors [C, M] of rounding groups w [M, G] to integers 0..qmax with each of C scales and zero points [C, M].

    The sum of |error|^2.5; with `column` [R, G] that of squares times the row `group mod R` of it. Where cutting the
    group's largest weight alone costs more than an earlier candidate, that cost instead, which is less than the sum.
    All fp32, contiguous, on the CPU.
    """
    tensors = {"w": w, "scale": scale, "zero": zero} | ({} if column is None else {"column": column})
    for name, tensor in tensors.items():
        if (
            tensor.dtype != torch.float32
            or not tensor.is_cpu
            or not tensor.is_contiguous()
            or tensor.dim() != 2
        ):
            raise ValueError(
                f"{name} must be a contiguous fp32 matrix on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    groups, group = w.shape
    if not groups or not group or not len(scale) or scale.shape != zero.shape or scale.shape[1] != groups:
        raise ValueError(
            f"for w {list(w.shape)} scale and zero must be [candidates, {groups}], got {list(scale.shape)} and "
            f"{list(zero.shape)}"
        )
    if column is not None and (not len(column) or column.shape[1] != group or groups % len(column)):
        raise ValueError(
            f"for w {list(w.shape)} column must be [rows that divide {groups}, {group}], got {list(column.shape)}"
        )
    if not 0 < qmax <= MOST:
        raise ValueError(f"qmax must be 1 to {MOST}, not {qmax}")
    error = torch.empty_like(scale)
    rows = 0 if column is None else len(column)
    at = (None if column is None else column.data_ptr(), error.data_ptr())
    facts = library.Range(
        w.data_ptr(), scale.data_ptr(), zero.data_ptr(), *at, groups, group, len(scale), rows, qmax
    )
    library.required().qk_range_errors(facts, torch.get_num_threads())
    return error
