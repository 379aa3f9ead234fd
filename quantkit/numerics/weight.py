"""`QuantizedWeight`, the narrow waist: algorithms make it, formats pack it, the reference dequantizes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from quantkit_kernels.cpu import library, rounding

from quantkit.errors import ModelError
from quantkit.numerics.number import byte_values, decode
from quantkit.scheme import Grid

_CHUNK = 1 << 20  # elements


def row_chunks(n: int, k: int) -> list[slice]:
    """Slices over the rows of an [N, K] matrix, so that fp32 temporaries of a slice stay at a few MB."""
    step = max(1, _CHUNK // k)
    return [slice(a, min(a + step, n)) for a in range(0, n, step)]


@dataclass(frozen=True)
class QuantizedWeight:
    """The codes of one linear weight [N, K] with K/G groups per row.

    codes: uint8 [N, K], 0..2^bits-1.
    scale: [N, K/G] in its stored dtype: the checkpoint's float dtype, or float8_e4m3fn or float8_e8m0fnu where
    `grid.scale` says so. Rows that share a scale (tensor, block) each have it. The codes were computed from it.
    zero:  uint8 [N, K/G] for asymmetric integers, None for the others (the zero point is `grid.midpoint`).
    grid:  the number format and the grouping.
    global_scale: float32 [1] of a two-level grid (NVFP4), by which its scales are divided; else None.
    order: int64 [K]; column i of the codes is column order[i] of the weight (GPTQ's desc_act). None: the same.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid
    global_scale: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some output channels."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same with all tensors on a device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
            global_scale=None if self.global_scale is None else self.global_scale.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    @classmethod
    def stacked(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One weight of several that have its output channels one after the other, the rest in common."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero=torch.cat(zeros) if zeros else None,
        )

    def scales(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What a level is multiplied by, [N, K/G]; computed in `dtype`."""
        scale = self.scale.to(dtype)
        return scale if self.global_scale is None else scale / self.global_scale.to(dtype)

    @property
    def is_zero(self) -> bool:
        """Whether every code stands for zero."""
        if self.zero is None:
            low, high = self.codes.aminmax()  # a comparison would make a matrix
            return int(low) == int(high) == self.grid.midpoint
        n, groups = self.scale.shape
        return bool((self.codes.view(n, groups, -1) == self.zero[:, :, None]).all())

    def row_errors(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error and squared norm of every row [N] of `weight`."""
        error, norm = [], []
        for rows in row_chunks(*self.shape):
            part = weight[rows]
            error.append((self.rows(rows).dequantize(part.dtype) - part).square().sum(1))
            norm.append(part.square().sum(1))
        return torch.cat(error), torch.cat(norm)

    def relative_error(self, weight: torch.Tensor) -> float:
        """Squared error over squared weight (0 for a zero weight), a few rows at a time."""
        error = norm = 0.0
        for rows in row_chunks(*self.shape):
            part = weight[rows]
            error += float((self.rows(rows).dequantize(part.dtype) - part).square().sum())
            norm += float(part.square().sum())
        return error / norm if norm else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """level * s as [N, K]; computed in fp32 (fp64 if asked), then cast."""
        n, k = self.codes.shape
        work = torch.float64 if dtype == torch.float64 else torch.float32
        groups, number, scales = self.scale.shape[1], self.grid.number, self.scales(work)
        if work == torch.float32 and self._natively:
            weight = rounding.decode(self.codes.contiguous(), scales.contiguous(), byte_values(number))
        else:
            zero = None if self.zero is None else self.zero.to(work)[:, :, None]
            weight = decode(self.codes.view(n, groups, k // groups), number, zero, work)  # (N, K/G, G)
            weight = weight.mul_(scales[:, :, None]).view(n, k)
        weight = weight.to(dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def compared(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dequantized [N, K], squared error and squared norm of every row [N]) for `weight`; all are fp32."""
        if self._natively and self.order is None and weight.is_cpu and weight.is_contiguous():
            scales = self.scales().contiguous()
            return rounding.compare(self.codes.contiguous(), scales, byte_values(self.grid.number), weight)
        decoded = self.dequantize()
        off = decoded - weight
        return decoded, torch.linalg.vecdot(off, off), torch.linalg.vecdot(weight, weight)

    @property
    def _natively(self) -> bool:
        """Whether native code looks its codes up in a table."""
        return self.grid.number.kind != "int" and self.codes.is_cpu and library.available()


def sorted_by_group(weight: QuantizedWeight, group_of: torch.Tensor) -> QuantizedWeight:
    """A weight whose columns are sorted by their group, from codes in the order of the inputs.

    group_of: the group [K] of every column, each as often as a group has columns; ModelError if not.
    """
    order = column_order(group_of.to(torch.int64), weight.scale.shape[1])
    return (
        weight if order is None else replace(weight, codes=weight.codes[:, order].contiguous(), order=order)
    )


def column_order(group_of: torch.Tensor, groups: int) -> torch.Tensor | None:
    """The columns sorted by their group, as indices [K]; None if they are sorted already."""
    counts = torch.bincount(group_of, minlength=groups) if bool((group_of >= 0).all()) else group_of[:0]
    if counts.numel() != groups or not bool((counts == group_of.numel() // groups).all()):
        raise ModelError(
            f"the order of its columns does not give each of {groups} groups as many columns; the file is corrupt"
        )
    order = group_of.argsort(stable=True)
    return None if bool((order[1:] > order[:-1]).all()) else order
