"""The tensors of a checkpoint, read one at a time into memory of their own.

`pread` instead of a memory map: mapped pages count as resident for as long as any tensor lives, and a process
that streams a model should show no more memory than it holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.errors import ModelError
from quantkit.models.config import MODEL_FREE, open_config
from quantkit.models.digests import digests
from quantkit.models.headers import Headers
from quantkit.models.tensors import OfExpert, TensorInfo, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHUNK_BYTES = 16 << 20
# What decides, beside the weights, how text becomes logits.
HASHED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


class Source:
    """Weights of one checkpoint by their names on disk; no tensor is kept.

    dropped: disk name -> reason, for tensors that the quantized checkpoint leaves out; `skeleton.build` adds to it.
    """

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.dropped = dict(headers.dropped)
        self._digest: str | None = None
        self._stacks: dict[str, tuple[bool, bool]] = {}

    @property
    def path(self) -> Path:
        return self.headers.path

    @cached_property
    def config(self) -> PreTrainedConfig:
        """transformers' config object; remote code never runs."""
        return open_config(self.path, MODEL_FREE)

    def names(self) -> list[str]:
        """Names of all tensors, those dropped left out."""
        return [name for name in self.headers.tensors if name not in self.headers.dropped]

    def __contains__(self, name: str) -> bool:
        return name in self.headers.tensors and name not in self.headers.dropped

    def raw(self, name: str) -> TensorInfo:
        """Where the tensor lies, for byte copies."""
        if name not in self.headers.tensors:
            raise ModelError(f"{self.path} has no tensor {name}")
        return self.headers.tensors[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in `dtype` (None: as stored), on the CPU; ModelError if a value is not finite.

        A cast is done by chunks, so that no second whole copy exists. A weight that is stored quantized is decoded.
        """
        return self.values(self.raw(name), dtype)

    def part(self, name: str, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Element `index` of the first axis of a tensor, as of `tensor`, such as one expert of a stack.

        Nothing else of it is read, whether it is stored quantized or not.
        """
        return self.values(_one(self.raw(name), index), dtype)[0]

    def values(self, info: TensorInfo, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`tensor`, of one that is none of the checkpoint by itself, such as a stack of experts."""
        if info.expert is not None:
            return self._of_expert(info, info.expert, dtype or torch_dtype(info.dtype))
        if info.parts:
            return self._decoded(info, dtype or torch_dtype(info.dtype))
        stored = torch_dtype(info.dtype)
        out = torch.empty(info.shape, dtype=dtype or stored)
        flat = out.view(-1)
        step = max(1, CHUNK_BYTES // stored.itemsize)
        with self._open(info) as file:
            for start in range(0, flat.numel(), step):
                part = flat[start : start + step]
                raw = part if part.dtype == stored else torch.empty(part.numel(), dtype=stored)
                self._read(file.fileno(), raw, info, start * stored.itemsize)
                if raw is not part:
                    part.copy_(raw)
                if not _finite(part):
                    self._refuse(info, raw, out.dtype)
        return out

    def _decoded(self, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
        """A weight from the tensors it is stored in."""
        encoding = self.headers.encoding
        assert encoding is not None
        linear = info.name.removesuffix(encoding.dense)
        leaves = {part.name.removeprefix(linear + encoding.joint): self._whole(part) for part in info.parts}
        try:
            weight = encoding.decode(linear, leaves, dtype)
        except ModelError as error:
            raise ModelError(f"{self.path}: {linear}: {error}") from None
        if not _finite(weight):
            self._refuse(info, weight, dtype)
        return weight

    def _of_expert(self, info: TensorInfo, which: OfExpert, dtype: torch.dtype) -> torch.Tensor:
        """A weight or bias of one expert, read from its stack; see `lay_stack`."""
        (stack,) = info.parts
        transposed, interleaved = self._stacks[stack.name]
        each = replace(stack, shape=(which.of, stack.shape[0] // which.of, *stack.shape[1:]))
        raw = self.values(_one(stack if stack.shape[0] == which.of else each, which.expert))[0]
        part = raw.T if transposed and raw.dim() == 2 else raw
        if which.halved:
            first = 0 if which.role == "gate" else 1
            part = part[first::2] if interleaved else part.chunk(2)[first]
        out = torch.empty(part.shape, dtype=dtype).copy_(part)
        if not _finite(out):
            self._refuse(stack, raw, dtype)
        return out

    def lay_stack(self, name: str, transposed: bool, interleaved: bool) -> None:
        """Say how a stack of experts [E, ...] lies on disk, before any is read.

        transposed: its weights are [in, out]. interleaved: outputs of gate and up alternate.
        """
        self._stacks[name] = transposed, interleaved

    def _whole(self, info: TensorInfo) -> torch.Tensor:
        """A stored tensor as it is, whatever its values."""
        out = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        with self._open(info) as file:
            self._read(file.fileno(), out.view(-1), info, 0)
        return out

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows from `first` to before `last` of a 2-D tensor, fp32, on the CPU; ModelError if a value is not finite."""
        info = self.raw(name)
        stored, columns = torch_dtype(info.dtype), info.shape[1]
        raw = torch.empty((last - first, columns), dtype=stored)
        start = first * columns * stored.itemsize
        with self._open(info) as file:
            self._read(file.fileno(), raw.view(-1), info, start)
            if hasattr(os, "posix_fadvise"):  # what follows is wanted next, and is read meanwhile
                after = info.offset + start + raw.nbytes
                os.posix_fadvise(file.fileno(), after, raw.nbytes, os.POSIX_FADV_WILLNEED)
        out = raw.float()
        if not _finite(out):
            self._refuse(info, raw, out.dtype)
        return out

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors have equal dtype, shape and bytes."""
        x, y = self.raw(a), self.raw(b)
        if x.parts or y.parts:
            return x.shape == y.shape and torch.equal(self.tensor(a), self.tensor(b))
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        one = torch.empty(min(CHUNK_BYTES, x.nbytes), dtype=torch.uint8)
        other = torch.empty_like(one)
        with self._open(x) as first, self._open(y) as second:
            for start in range(0, x.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, x.nbytes - start)
                self._read(first.fileno(), one[:size], x, start)
                self._read(second.fileno(), other[:size], y, start)
                if not torch.equal(one[:size], other[:size]):
                    return False
        return True

    def digest(self, told: Callable[[float], None] = lambda share: None) -> str:
        """sha256 (hex) over config.json, the tokenizer's files and the weight files: names and contents.

        Every byte is read once per `Source`. told: called with the share that is read, 0 to 1, about once per second
        of reading.
        """
        if self._digest is None:
            self._digest = self._hashed(told)
        return self._digest

    def _hashed(self, told: Callable[[float], None]) -> str:
        total = hashlib.sha256()
        present = [self.path / name for name in HASHED if (self.path / name).is_file()]
        paths = present + self.headers.files
        try:
            for path, content in zip(paths, digests(paths, told), strict=True):
                total.update(f"{path.name} {content}\n".encode())
        except OSError as error:
            raise ModelError(f"{error.filename or self.path} cannot be read: {error.strerror}") from error
        return total.hexdigest()

    def _open(self, info: TensorInfo) -> FileIO:
        try:
            return info.file.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{info.file} cannot be read: {error.strerror or error}") from error

    def _read(self, fd: int, into: torch.Tensor, info: TensorInfo, start: int) -> None:
        """Fill the flat tensor `into` with the bytes of `info` from byte `start` of the tensor on."""
        view = into.view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(fd, [view[done:]], info.offset + start + done)
            except OSError as error:
                raise ModelError(
                    f"{info.file}: tensor {info.name} cannot be read: {error.strerror or error}"
                ) from error
            if not got:
                raise ModelError(f"{info.file} ends inside tensor {info.name}; it changed while it was read")
            done += got

    def _refuse(self, info: TensorInfo, raw: torch.Tensor, dtype: torch.dtype) -> None:
        if _finite(raw):
            raise ModelError(f"tensor {info.name} overflows in {dtype}; use float32 or bfloat16")
        bad = int((~torch.isfinite(raw)).sum())
        raise ModelError(
            f"{info.file.name}: tensor {info.name} holds NaN or infinite values ({bad} in one chunk); "
            "the checkpoint is damaged, fetch it again"
        )


def _one(info: TensorInfo, index: int) -> TensorInfo:
    """Element `index` of the first axis of a tensor, as a tensor with one element there."""
    size, parts = info.nbytes // info.shape[0], tuple(_one(each, index) for each in info.parts)
    offset = info.offset if parts else info.offset + index * size
    return replace(info, shape=(1, *info.shape[1:]), offset=offset, nbytes=size, parts=parts)


def _finite(x: torch.Tensor) -> bool:
    """Whether every value is finite; NaN and infinities show in the extremes, without a mask."""
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))
