"""`Entries`: the keys or the values of one layer's cache, each rounded once and held as packed codes.

Three parts, in the order of the tokens: the first ones, exact (`sinks`); pages of PAGE tokens with codes and scales;
the newest ones, exact (`residual`). A page is allocated when it is needed, so that memory is that of the codes and at
most one page more, and nothing is copied when the cache grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantkit.numerics.hadamard import hadamard
from quantkit.numerics.kv import KVCodes, decode, encode
from quantkit.scheme import Grid

PAGE = 256  # tokens; a multiple of every group of tokens


@dataclass
class _Page:
    """codes: [B, H, PAGE, bytes of a token]; scale, low: as in `KVCodes`, over PAGE tokens, or the stored scale."""

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor | None


class Part(NamedTuple):
    """Tokens start..end - 1 of a cache, which attention takes at once.

    rotated: whether keys are multiplied by a Hadamard matrix. coded: whether they are all pages, for `Entries.codes`.
    """

    start: int
    end: int
    rotated: bool = False
    coded: bool = False


class Entries:
    """Keys or values [B, H, T, d] of one layer.

    grid: how they are rounded. sinks, residual: first and last tokens that stay exact. rotate: multiplied by a Hadamard
    matrix before they are rounded. stored: the scale of a grid that is not dynamic.
    """

    def __init__(
        self,
        grid: Grid,
        sinks: int = 0,
        residual: int = 0,
        rotate: bool = False,
        stored: torch.Tensor | None = None,
    ) -> None:
        self.grid, self.sinks, self.residual, self.rotate, self.stored = grid, sinks, residual, rotate, stored
        self.first: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.pages: list[_Page] = []
        self.paged = 0  # tokens in pages
        if PAGE % self._tokens_per_scale:
            raise ValueError(f"groups of {grid.group_size} tokens do not divide a page of {PAGE}")

    def __len__(self) -> int:
        return _length(self.first) + self.paged + _length(self.recent)

    def append(self, x: torch.Tensor) -> None:
        """Take in the next tokens x [B, H, T, d]. What has left the residual window since then is rounded first."""
        self._settle()
        room = max(0, self.sinks - _length(self.first))
        if room or self.first is None:
            self.first = _joined(self.first, x[:, :, :room])
            x = x[:, :, room:]
        if self.residual:
            self.recent = _joined(self.recent, x)
        else:
            self._write(x)

    def parts(self, values: Entries) -> Iterator[Part]:
        """What attention goes over, in order, in these keys and the values beside them."""
        first, length = _length(self.first), len(self)
        last = first + self.paged
        coded = self.has_codes and values.has_codes
        step = max(self.paged, 1) if coded else PAGE
        paged = [Part(s, min(s + step, last), self.rotate, coded) for s in range(first, last, step)]
        return (part for part in (Part(0, first), *paged, Part(last, length)) if part.start < part.end)

    @property
    def has_codes(self) -> bool:
        """Whether attention can read the pages: symmetric codes, a scale per token and head or stored ones."""
        grid = self.grid
        per_token = grid.granularity == "token" and grid.group_size is None
        return grid.symmetric and grid.bits in (4, 8) and (per_token or self.stored is not None)

    def codes(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Codes and scales of all pages, as `quantkit_kernels.reference.kv_pages` has them."""
        pages = [page.codes for page in self.pages]
        if self.stored is None:
            return pages, [page.scale for page in self.pages]
        heads = pages[0].shape[1]
        return pages, [self.pages[0].scale.reshape(-1).expand(heads).contiguous()]

    def read(self, start: int, end: int, dtype: torch.dtype, turn_back: bool = True) -> torch.Tensor:
        """Tokens start..end - 1 as `dtype`, [B, H, end - start, d]; rotated ones rotated back, if asked."""
        first, found = _length(self.first), []
        if start < first and self.first is not None:
            found.append(self.first[:, :, start : min(end, first)].to(dtype))
        for number, page in enumerate(self.pages):
            begin = first + number * PAGE
            low, high = max(start, begin), min(end, begin + PAGE, first + self.paged)
            if low < high:
                x = self._decoded(page, high - begin, dtype)[:, :, low - begin :]
                found.append(hadamard(x) if self.rotate and turn_back else x)
        begin = first + self.paged
        if end > begin and self.recent is not None:
            found.append(self.recent[:, :, max(0, start - begin) : end - begin].to(dtype))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`. ValueError where that would cut a group of tokens."""
        first = _length(self.first)
        kept = min(max(0, length - first), self.paged)
        size = self.grid.group_size if self.grid.granularity == "channel" else 1
        if size and kept % size:
            raise ValueError(f"a cache {self.grid} can only be cut at multiples of {size} tokens, got {kept}")
        if self.first is not None:
            self.first = self.first[:, :, :length]
        if self.recent is not None:
            self.recent = self.recent[:, :, : max(0, length - first - self.paged)]
        self.paged = kept
        del self.pages[-(-kept // PAGE) :]

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor that has a batch dimension by change(tensor)."""
        self.first = None if self.first is None else change(self.first)
        self.recent = None if self.recent is None else change(self.recent)
        for page in self.pages:
            page.codes = change(page.codes)
            if self.stored is None:
                page.scale = change(page.scale)
                page.low = None if page.low is None else change(page.low)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.first, self.recent]
        tensors += [tensor for page in self.pages for tensor in (page.codes, page.low)]
        tensors += [page.scale for page in self.pages if self.stored is None] + [self.stored]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _settle(self) -> None:
        """Round what is older than the residual window: keys of channels a whole window at once, others one by one."""
        length = _length(self.recent)
        if not self.residual or length <= self.residual - (self.grid.granularity == "channel"):
            return
        assert self.recent is not None
        ready = length - self.residual
        if self.grid.granularity == "channel":
            ready = length // self.residual * self.residual
        self._write(self.recent[:, :, :ready])
        self.recent = self.recent[:, :, ready:].clone()

    def _write(self, x: torch.Tensor) -> None:
        """Round tokens x and put them behind those in pages."""
        if not x.shape[2]:
            return
        made = encode(hadamard(x.float()) if self.rotate else x, self.grid, self.stored)
        codes, done = _packed(made.codes, self.grid.bits), 0
        while done < x.shape[2]:
            at = self.paged % PAGE
            if not at:
                self.pages.append(self._new(codes, made))
            count = min(PAGE - at, x.shape[2] - done)
            page = self.pages[-1]
            _bytes(page.codes)[:, :, at : at + count] = _bytes(codes)[:, :, done : done + count]
            if self.stored is None:
                size = self._tokens_per_scale
                into, of = (
                    slice(at // size, -(-(at + count) // size)),
                    slice(done // size, -(-(done + count) // size)),
                )
                page.scale[:, :, into] = made.scale[:, :, of]
                if page.low is not None and made.low is not None:
                    page.low[:, :, into] = made.low[:, :, of]
            self.paged += count
            done += count

    @property
    def _tokens_per_scale(self) -> int:
        return self.grid.group_size or 1 if self.grid.granularity == "channel" else 1

    def _new(self, codes: torch.Tensor, made: KVCodes) -> _Page:
        b, h, _, width = codes.shape
        empty = codes.new_empty(b, h, PAGE, width)
        if self.stored is not None:
            return _Page(empty, made.scale, None)
        shape = (b, h, PAGE // self._tokens_per_scale, made.scale.shape[3])
        low = None if made.low is None else made.low.new_zeros(shape)
        return _Page(empty, made.scale.new_zeros(shape), low)

    def _decoded(self, page: _Page, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `count` tokens of a page."""
        scale, low, size = page.scale, page.low, self._tokens_per_scale
        count = -(-count // size) * size
        if self.stored is None:
            scale = scale[:, :, : count // size]
            low = None if low is None else low[:, :, : count // size]
        codes = _unpacked(page.codes[:, :, :count], self.grid)
        return decode(KVCodes(codes, scale, low), self.grid, dtype)


def _length(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.shape[2]


def _joined(before: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x.clone() if before is None else torch.cat([before, x], 2)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: not every operation takes it."""
    return codes.view(torch.uint8) if codes.is_floating_point() else codes


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 4 or 2 bits, several to a byte along the last axis, the first one lowest."""
    if bits == 8:
        return codes
    if codes.shape[-1] % (8 // bits):
        raise ValueError(
            f"a head of {codes.shape[-1]} channels does not fill bytes with codes of {bits} bits"
        )
    several = codes.view(torch.uint8).unflatten(-1, (-1, 8 // bits)) & (1 << bits) - 1
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return torch.as_tensor((several << shifts).sum(-1, dtype=torch.uint8))


def _unpacked(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The inverse of `_packed`: int8 with a sign on a symmetric grid, else uint8."""
    if grid.bits == 8:
        return codes
    shifts = torch.arange(0, 8, grid.bits, dtype=torch.uint8, device=codes.device)
    several = ((codes[..., None] >> shifts) & (1 << grid.bits) - 1).flatten(-2)
    if not grid.symmetric:
        return several
    half = 1 << grid.bits - 1
    return ((several ^ half).to(torch.int8) - half).to(torch.int8)
