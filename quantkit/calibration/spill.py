"""Tensors of calibration that lie in a file instead of in memory, for a run with a memory budget.

They are read and written by `pread` and `pwrite`, not mapped: mapped pages count as memory of the process while they
are resident, read ones do not. What is read has the same bytes, in memory of its own, so results are the same to the
bit. The file has no name in its folder, so nothing of it stays behind if the process dies.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.files import output_error

_PIECE = 16 << 20  # bytes that are moved at once
_OWN_PAGES = 256 << 10  # bytes from which on rows are read into pages of their own


class Spill:
    """A file that tensors are put into; the space of those that are gone is used again.

    folder: where the file lies; OutputError if it cannot be made, or has no room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this object)
        except OSError as error:
            raise output_error(folder, error) from error
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Spilled:
        """A tensor of any values."""
        size = dtype.itemsize * math.prod(shape)
        if places := self._free.get(size):
            return Spilled(self, places.pop(), shape, dtype)
        self._end += size
        return Spilled(self, self._end - size, shape, dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Spilled:
        """A tensor of zeros."""
        found = self.empty(*shape, dtype=dtype)
        for rows in found.pieces():
            found[rows] = torch.zeros(rows.stop - rows.start, *shape[1:], dtype=dtype)
        return found

    def copy(self, tensor: torch.Tensor) -> Spilled:
        """A tensor with the values of another."""
        found = self.empty(*tensor.shape, dtype=tensor.dtype)
        found[:] = tensor
        return found

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def release(self, start: int, size: int) -> None:
        """The bytes from `start` on may be used again."""
        self._free.setdefault(size, []).append(start)

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into`; what was never written is zero."""
        done = 0
        while done < len(into):
            count = os.preadv(self._file.fileno(), [into[done:]], start + done)
            if not count:
                into[done:] = bytes(len(into) - done)
                return
            done += count

    def write(self, start: int, data: memoryview) -> None:
        """Write `data`; OutputError if there is no room for it."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done : done + _PIECE], start + done)
        except OSError as error:
            raise output_error(self.folder, error) from error


class Spilled:
    """A contiguous tensor in a file. Rows are read as `spilled[rows]`, copies, and written as `spilled[rows] = x`.

    rows: a slice without step, an int64 tensor of numbers, or a tuple that begins with a slice (only to read).
    """

    device = torch.device("cpu")

    def __init__(self, spill: Spill, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._spill, self._start = spill, start
        self.shape, self.dtype = torch.Size(shape), dtype
        self._row = dtype.itemsize * math.prod(shape[1:])

    def __del__(self) -> None:
        self._spill.release(self._start, self.nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return len(self) * self._row

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def __getitem__(self, rows: Any) -> torch.Tensor:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        if isinstance(rows, torch.Tensor):
            found = self._fresh(len(rows))
            if found.numel():
                view = _bytes(found)
                for number, row in enumerate(rows.tolist()):
                    at = number * self._row
                    self._spill.read(self._start + row * self._row, view[at : at + self._row])
            return found
        start, stop, _ = rows.indices(len(self))
        found = self._fresh(max(0, stop - start))
        if found.numel():
            self._spill.read(self._start + start * self._row, _bytes(found))
        return found

    def _fresh(self, rows: int) -> torch.Tensor:
        """A tensor for some rows, in pages of its own: in the heap it would lie between what outlives it."""
        size = rows * self._row
        if size < _OWN_PAGES:
            return torch.empty(rows, *self.shape[1:], dtype=self.dtype)
        return torch.frombuffer(mmap.mmap(-1, size), dtype=self.dtype).view(rows, *self.shape[1:])

    def __setitem__(self, rows: slice | torch.Tensor, values: torch.Tensor) -> None:
        if isinstance(rows, torch.Tensor):
            for row, value in zip(rows.tolist(), values, strict=True):
                self[row : row + 1] = value[None]
            return
        start, stop, _ = rows.indices(len(self))
        if values.shape != (stop - start, *self.shape[1:]) or values.dtype != self.dtype:
            raise ValueError(f"{values.dtype} {tuple(values.shape)} is not {stop - start} rows of {self}")
        if values.numel():
            self._spill.write(self._start + start * self._row, _bytes(values.cpu().contiguous()))

    def __repr__(self) -> str:
        return f"Spilled({self.dtype}, {list(self.shape)})"

    def pieces(self) -> Iterator[slice]:
        """All rows, a few at a time."""
        step = max(1, _PIECE // max(1, self._row))
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))


@dataclass(frozen=True)
class Thrift:
    """How calibration saves memory: never by other sums, so results stay the same to the bit.

    spill: where hidden states and what is recorded of experts lie; None: in memory. kept: bytes of inputs that a block
    keeps so that finished parts need not run again; None: as many as usual (`replay.py`).
    """

    spill: Spill | None = None
    kept: int | None = None

    def first(self, rows: torch.Tensor | Spilled, count: int) -> torch.Tensor | Spilled:
        """A copy of the first `count` rows."""
        if self.spill is None:
            return rows[:count].clone()
        found = self.spill.empty(count, *rows.shape[1:], dtype=rows.dtype)
        for piece in found.pieces():
            found[piece] = rows[piece]
        return found


GENEROUS = Thrift()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return view
