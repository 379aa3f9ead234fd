"""Is a checkpoint that is about to be used whole? What `load`, `inspect` and `eval` look at before they start.

Always: whether a weight file lies there that does not belong to the checkpoint, whether every weight file that
`quantkit.json` lists has its size, and whether scales, norms and biases are finite. On request (`verify`): whether
every listed file has its sha256; of a file that has not, the tensors whose bytes changed are named.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.manifest import MANIFEST, read_manifest
from quantkit.checkpoint.records import FileRecord
from quantkit.errors import ModelError
from quantkit.formats.registry import Codec, codec_of
from quantkit.models import families
from quantkit.models.digests import digests
from quantkit.models.tensors import (
    FLOATS,
    INDEX,
    SINGLE,
    TensorInfo,
    named,
    read_tensors,
    torch_dtype,
    weight_map,
)
from quantkit.scheme import Scheme

SchemeOf = Callable[[str], Scheme | None]  # a linear's name -> its scheme
REMOVE = f"fetch the checkpoint again, or remove {MANIFEST} to use it without what it guarantees"
_PIECE = 4 << 20
_LARGE = 1 << 28  # bytes of a one-dimensional tensor; a norm or a bias is far smaller
_SHORT = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.float8_e8m0fnu}  # scales of NVFP4 and of MXFP4


@dataclass(frozen=True)
class Checked:
    """What was looked at. sizes: the weight files against quantkit.json. digests: all files against its sha256s.

    tensors: how many scales, norms and biases were found finite. changed: files beside the weights whose size is not
    the listed one, as after an edit by hand.
    """

    sizes: bool
    digests: bool
    tensors: int
    changed: tuple[str, ...] = ()


def packing_of(path: Path, stored: Any) -> tuple[Codec | None, SchemeOf | None]:
    """The format that a checkpoint's `quantization_config` names and the scheme it gives each linear; None without one.

    ModelError with the folder's name for a format that is not read and for a damaged config.
    """
    if stored is None:
        return None, None
    try:
        codec = codec_of(stored)
        codec.kv_scheme(stored)
        return codec, codec.parse(stored)
    except ModelError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error


def check_files(path: Path, verify: bool = False) -> Checked:
    """Look at the files of a folder; ModelError naming what is missing, foreign or damaged."""
    if not (path / MANIFEST).exists():
        both = (path / SINGLE).exists() and (path / INDEX).exists()
        if both and set(weight_map(path).values()) != {SINGLE}:  # some tools write an index of one file
            raise ModelError(
                f"{path} holds both {SINGLE} and {INDEX}, so which weights are meant is unclear; remove the one "
                "that does not belong to the model"
            )
        if verify:
            raise ModelError(
                f"{path} has no {MANIFEST}, so there are no digests to verify; load it without verify"
            )
        return Checked(False, False, 0)
    files = read_manifest(path, ModelError, REMOVE).files
    present = {each.name for each in path.iterdir() if each.suffix == ".safetensors"}
    if stray := present - files.keys():
        raise ModelError(
            f"{path} holds weight files that do not belong to its checkpoint ({MANIFEST} does not list them): "
            f"{named(stray)}; remove them"
        )
    changed = []
    for name, entry in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size == entry.bytes:
            continue
        if size is None and not _is_weights(name):
            changed.append(name)
        elif _is_weights(name):
            found = "is missing" if size is None else f"has {size} bytes instead of {entry.bytes}"
            raise ModelError(f"{path}: {name} {found}; {REMOVE}")
        else:
            changed.append(name)
    if verify:
        check_digests(path, files)
    return Checked(True, verify, 0, tuple(changed))


def check_digests(path: Path, files: Mapping[str, FileRecord]) -> None:
    """ModelError unless every listed file has its sha256; names the damaged tensors of a weight file."""
    for name in files:
        if not (path / name).is_file():
            raise ModelError(f"{path}: {name} is missing; {REMOVE}")
    found = digests([path / name for name in files])
    for (name, entry), digest in zip(files.items(), found, strict=True):
        if digest != entry.sha256:
            raise ModelError(
                f"{path}: {name} is damaged or was changed{damage(path / name, entry)}; {REMOVE}"
            )


def check_values(tensors: Mapping[str, TensorInfo], codec: Codec | None, model_type: str) -> int:
    """How many scales, norms and biases are finite; ModelError names those that are not.

    Tensors that transformers leaves out, such as masks of older checkpoints, may hold anything; so may the bounds of
    a tower.
    """
    left = families.dropped(model_type, (info.name for info in tensors.values()))
    used = (info for info in tensors.values() if info.name not in left)
    chosen = [info for info in used if _is_small(info, codec) and not families.may_be_infinite(info.name)]
    seen = [(info, *_finite_and_positive(info)) for info in chosen]
    needed = frozenset() if codec is None else codec.positive
    if bad := [info.name for info, finite, _ in seen if not finite]:
        raise ModelError(
            f"NaN or infinity in {named(bad)}; the checkpoint is damaged, fetch it again or quantize again"
        )
    if bad := [info.name for info, _, above in seen if not above and _leaf(info) in needed]:
        raise ModelError(
            f"a scale of 0 or below in {named(bad)}: it was never calibrated, or the checkpoint is damaged; quantize "
            "again"
        )
    return len(chosen)


def digest_file(path: Path) -> str:
    """sha256 of a file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(file: Path, entry: FileRecord) -> str:
    """Which tensors of a weight file changed, in words; empty if that cannot be told."""
    if entry.tensors is None:
        return ""
    try:
        infos = read_tensors(file.parent)[1].values()
    except ModelError:
        return " (its header)"
    found = {info.name: info for info in infos if info.file.name == file.name}
    bad = [name for name, crc in entry.tensors.items() if name not in found or crc32(found[name]) != crc]
    return f" in {named(bad)}" if bad else " (its header)"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or name == INDEX


def _leaf(info: TensorInfo) -> str:
    return info.name.rpartition(".")[2]


def _is_small(info: TensorInfo, codec: Codec | None) -> bool:
    if codec is not None and (_leaf(info) == codec.scale or _leaf(info) in codec.positive):
        return info.dtype in FLOATS or info.dtype in _SHORT
    return info.dtype in FLOATS and len(info.shape) <= 1 and info.nbytes <= _LARGE


def _finite_and_positive(info: TensorInfo) -> tuple[bool, bool]:
    """Whether all values of a tensor are finite, and whether all are above 0; it is read once, in pieces."""
    dtype = _SHORT.get(info.dtype) or torch_dtype(info.dtype)
    finite = positive = True
    for piece in pieces(info):
        values = torch.frombuffer(piece, dtype=dtype)
        values = values.float() if values.element_size() == 1 else values
        finite &= bool(values.isfinite().all())
        positive &= bool((values > 0).all())
    return finite, positive


def crc32(info: TensorInfo) -> str:
    """The CRC-32 (hex) of a stored tensor."""
    crc = 0
    for piece in pieces(info):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def pieces(info: TensorInfo) -> Iterable[bytearray]:
    """The bytes of a stored tensor, a few MB at a time."""
    with open(info.file, "rb", buffering=0) as file:
        left, at = info.nbytes, info.offset
        while left:
            piece = bytearray(os.pread(file.fileno(), min(_PIECE, left), at))
            if not piece:
                raise ModelError(f"{info.file} ended inside tensor {info.name}; it changed while it was read")
            left, at = left - len(piece), at + len(piece)
            yield piece
