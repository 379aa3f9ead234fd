"""Where the tensors of two checkpoints differ: byte by byte, and for packed linears code by code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open

from quantkit.checkpoint.check import pieces
from quantkit.errors import ModelError
from quantkit.formats.registry import Codec
from quantkit.models.headers import quantized_linears
from quantkit.models.tensors import TensorInfo
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

Tensors = Mapping[str, TensorInfo]
SchemeOf = Callable[[str], Scheme | None]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in two checkpoints.

    why: "only in the first", "only in the second", "another type or shape", or "codes" or "values", of which
    `differing` of `total` are not the same.
    """

    tensor: str
    why: str
    differing: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        """In words."""
        if self.differing is None:
            return f"{self.tensor}: {self.why}"
        return f"{self.tensor}: {self.differing:,} of {self.total:,} {self.why} differ"


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors have the same type, shape and bytes; they are read a few MB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(pieces(one), pieces(other), strict=True))


def differences(
    one: Tensors, other: Tensors, codec: Codec | None = None, scheme_of: SchemeOf = lambda name: None
) -> Iterator[Difference]:
    """Every tensor, by name, that is in one checkpoint only or not the same in both.

    codec, scheme_of: how packed linears are stored in both, so that their codes can be counted; None: not alike.
    """
    linears = [quantized_linears(codec.leaves, each, codec.joint) for each in (one, other)] if codec else []
    codes = {_largest(infos): linear for linear, infos in linears[0].items()} if linears else {}
    for name in sorted(one.keys() | other.keys()):
        if name not in other or name not in one:
            yield Difference(name, f"only in the {'second' if name in other else 'first'}")
        elif same_bytes(one[name], other[name]):
            continue
        elif (one[name].dtype, one[name].shape) != (other[name].dtype, other[name].shape):
            yield Difference(name, "another type or shape")
        else:
            scheme = scheme_of(codes[name]) if name in codes else None
            pair = None if codec is None or scheme is None else _codes(codec, codes[name], linears, scheme)
            yield _counted_codes(name, *pair) if pair else _counted_values(name, one[name], other[name])


def _largest(infos: Tensors) -> str:
    """The name of the largest stored tensor of a packed linear: the one with its codes."""
    return max(infos.values(), key=lambda info: info.nbytes).name


def _codes(
    codec: Codec, linear: str, both: list[dict[str, dict[str, TensorInfo]]], scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The codes of a linear in two checkpoints; None if they are not packed alike."""
    try:
        one, other = (unpacked(codec, each[linear], scheme).codes for each in both)
    except (KeyError, ModelError):
        return None
    return (one, other) if one.shape == other.shape else None


def _counted_codes(name: str, one: torch.Tensor, other: torch.Tensor) -> Difference:
    return Difference(name, "codes", int((one != other).sum()), one.numel())


def _counted_values(name: str, one: TensorInfo, other: TensorInfo) -> Difference:
    """How many elements have other bytes, whatever they stand for."""
    a, b = (read(each).flatten().view(torch.uint8).view(-1, _width(each)) for each in (one, other))
    return Difference(name, "values", int((a != b).any(-1).sum()), len(a))


def _width(info: TensorInfo) -> int:
    """Bytes of an element."""
    return max(1, info.nbytes // max(1, torch.Size(info.shape).numel()))


def unpacked(codec: Codec, infos: Tensors, scheme: Scheme) -> QuantizedWeight:
    """A stored linear; infos: its tensors by leaf."""
    return codec.unpack({leaf: read(info) for leaf, info in infos.items()}, scheme)


def read(info: TensorInfo) -> torch.Tensor:
    """A stored tensor, in memory of its own."""
    with safe_open(info.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(info.name)
    return tensor.clone()  # mapped pages are not aligned, which may change the last bit of a product
