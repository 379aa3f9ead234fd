"""How a quantized checkpoint stores its linears, as far as config.json and the headers tell; without torch.

An `Encoding` finds which stored tensors are one weight, and the shape of that weight, and decodes them once they are
read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.errors import ModelError
from quantkit.formats import compressed_tensors_config as ct
from quantkit.formats import mxfp4
from quantkit.formats.foreign import METHODS
from quantkit.formats.registry import codec_of
from quantkit.scheme import Scheme

if TYPE_CHECKING:
    import torch

_CACHE_SCALE = re.compile(r"\.((k|v|q)_scale|(k_proj|v_proj|q_proj)\.output_scale)$")


class Peeked(Protocol):
    """A stored tensor before it is read. tolist: the values of a small tensor of integers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def tolist(self) -> list[int]: ...


@dataclass(frozen=True)
class Encoding:
    """The quantization of a checkpoint.

    config: its `quantization_config`. leaves: what the name of a stored tensor of a linear P may have behind P and
    `joint`. shape: (name of a linear, its stored tensors by leaf) -> shape of the decoded weight, called P and `dense`.
    scheme: a linear's scheme. decode: (name of a linear, its tensors, dtype) -> the weight.
    """

    config: Mapping[str, Any]
    leaves: frozenset[str]
    shape: Callable[[str, Mapping[str, Peeked]], tuple[int, ...]]
    scheme: Callable[[str], Scheme | None]
    decode: Callable[[str, Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]
    joint: str = "."
    dense: str = ".weight"

    def rounds_inputs(self, linears: Iterable[str]) -> bool:
        """Whether one of these linears has quantized inputs, too."""
        return any(scheme.inputs is not None for scheme in map(self.scheme, linears) if scheme is not None)

    def of_cache(self, name: str) -> bool:
        """Whether a tensor is a scale of the quantized KV cache."""
        return bool(_CACHE_SCALE.search(name))


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of config.json, at its top or in the part of the language model; None without one."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        found = part.get("quantization_config")
        if found is not None:
            return found if isinstance(found, Mapping) else {"quant_method": found}
    return None


def encoding_of(config: Mapping[str, Any]) -> Encoding:
    """The encoding that a `quantization_config` names; ModelError for one whose weights quantkit does not decode."""
    method = config.get("quant_method")
    make = _ENCODINGS.get(method) if isinstance(method, str) else None
    if make is None:
        tool = METHODS.get(method) if isinstance(method, str) else None
        raise ModelError(
            f"it is already quantized by the method {ct.short(method)}{f' ({tool})' if tool else ''}, whose weights "
            f"quantkit does not decode; it decodes {', '.join(sorted(_ENCODINGS))}; give the original checkpoint"
        )
    return make(config)


def _compressed_tensors(config: Mapping[str, Any]) -> Encoding:
    scheme_of = ct.parsed_config(config)

    def shape(name: str, stored: Mapping[str, Peeked]) -> tuple[int, int]:
        scheme = _scheme(scheme_of, name)
        codes = next((stored[leaf].shape for leaf in ("weight", "weight_packed") if leaf in stored), ())
        scales = stored["weight_scale"].shape if "weight_scale" in stored else ()
        if len(codes) != 2 or len(scales) not in (1, 2):
            raise ModelError(f"{name} lacks its codes or its scales; {ct.CORRUPT}")
        n, columns = codes
        if "weight" in stored:
            return n, columns
        if ct.format_of(scheme) != ct.PACKED:
            return n, 2 * columns
        size, bits = scheme.weights.group_size, scheme.weights.bits
        if size is not None:
            return n, scales[-1] * size
        return n, _columns(name, stored["weight_shape"], n, columns, bits) if "weight_shape" in stored else (
            columns * 32 // bits
        )

    own = ("weight", "packed", "scale", "shape", "zero_point", "global_scale", "g_idx")
    leaves = {each if each == "weight" else f"weight_{each}" for each in own}
    inputs = {"input_scale", "input_zero_point", "input_global_scale"}
    decode = partial(_decoded, config, scheme_of)
    return Encoding(config, frozenset(leaves | inputs), shape, scheme_of, decode)


def _columns(name: str, stored: Peeked, n: int, words: int, bits: int) -> int:
    """The columns of rows of so many words of packed codes, by `weight_shape`: the last word may be filled up."""
    said = stored.tolist()
    per_word = 32 // bits  # of older files, whose words hold whole codes
    fits = len(said) == 2 and said[0] == n and words in (-(-said[1] * bits // 32), -(-said[1] // per_word))
    if not fits:
        raise ModelError(
            f"{name}.weight_shape is {said[:4]}, which does not fit [{n}, {words}] words of {bits}-bit codes; "
            f"{ct.CORRUPT}"
        )
    return said[1]


def _scheme(scheme_of: Callable[[str], Scheme | None], name: str) -> Scheme:
    scheme = scheme_of(name)
    if scheme is None:
        raise ModelError(f"{name} is stored quantized, but quantization_config gives it no scheme")
    return scheme


def _decoded(
    config: Mapping[str, Any],
    scheme_of: Callable[[str], Scheme | None],
    name: str,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """A weight [N, K] by the codec of the checkpoint's method, computed in fp32."""
    return codec_of(config).unpack(tensors, _scheme(scheme_of, name)).dequantize(dtype)


def _read(config: Mapping[str, Any]) -> Encoding:
    """The encoding of another tool's format, whose codec tells shapes from headers and what small tensors hold."""
    codec = codec_of(config)
    scheme_of = codec.parse(config)

    def shape(name: str, stored: Mapping[str, Peeked]) -> tuple[int, int]:
        scheme = _scheme(scheme_of, name)
        try:
            return codec.dimensions(stored, scheme)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None

    return Encoding(config, frozenset(codec.leaves), shape, scheme_of, partial(_decoded, config, scheme_of))


def _mxfp4(config: Mapping[str, Any]) -> Encoding:
    leaves, scheme_of = frozenset(mxfp4.Mxfp4.leaves), mxfp4.Mxfp4().parse(config)
    return Encoding(config, leaves, mxfp4.shape, scheme_of, mxfp4.decode, mxfp4.JOINT, mxfp4.DENSE)


_ENCODINGS: dict[str, Callable[[Mapping[str, Any]], Encoding]] = {
    ct.METHOD: _compressed_tensors,
    "mxfp4": _mxfp4,
    **dict.fromkeys(("auto-round", "awq", "bitsandbytes", "fp8", "gptq", "modelopt"), _read),
}
