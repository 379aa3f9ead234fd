"""How a quantized checkpoint stores its linears, as far as config.json and the headers tell; without torch.

An `Encoding` finds which stored tensors are one weight, and the shape of that weight. The values are decoded by the
codec of the same method (`registry.codec_of`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from quantkit.errors import ModelError
from quantkit.formats import compressed_tensors_config as ct
from quantkit.formats.foreign import METHODS
from quantkit.formats.registry import codec_of
from quantkit.scheme import Scheme

Shapes = Mapping[str, tuple[int, ...]]  # of the stored tensors of one linear, by leaf
_CACHE_SCALE = re.compile(r"\.((k|v|q)_scale|(k_proj|v_proj|q_proj)\.output_scale)$")


@dataclass(frozen=True)
class Encoding:
    """The quantization of a checkpoint.

    config: its `quantization_config`. leaves: what the name of a stored tensor of a linear P may have behind "P.".
    shape: (name of a linear, its stored shapes) -> (N, K). scheme: a linear's scheme.
    """

    config: Mapping[str, Any]
    leaves: frozenset[str]
    shape: Callable[[str, Shapes], tuple[int, int]]
    scheme: Callable[[str], Scheme | None]

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

    def shape(name: str, stored: Shapes) -> tuple[int, int]:
        scheme = scheme_of(name)
        if scheme is None:
            raise ModelError(f"{name} is stored quantized, but quantization_config gives it no scheme")
        codes = stored.get("weight") or stored.get("weight_packed") or ()
        if len(codes) != 2 or len(stored.get("weight_scale", ())) not in (1, 2):
            raise ModelError(f"{name} lacks its codes or its scales; {ct.CORRUPT}")
        n, columns = codes
        if "weight" in stored:
            return n, columns
        if ct.format_of(scheme) != ct.PACKED:
            return n, 2 * columns
        size = scheme.weights.group_size
        return n, columns * 32 // scheme.weights.bits if size is None else stored["weight_scale"][1] * size

    own = ("weight", "packed", "scale", "shape", "zero_point", "global_scale", "g_idx")
    leaves = {each if each == "weight" else f"weight_{each}" for each in own}
    inputs = {"input_scale", "input_zero_point", "input_global_scale"}
    return Encoding(config, frozenset(leaves | inputs), shape, scheme_of)


class _Sized(NamedTuple):
    """What stands for a stored tensor where only its shape is asked for."""

    shape: tuple[int, ...]


def _read(config: Mapping[str, Any]) -> Encoding:
    """The encoding of another tool's format, whose codec tells shapes without values."""
    codec = codec_of(config)
    scheme_of = codec.parse(config)

    def shape(name: str, stored: Shapes) -> tuple[int, int]:
        scheme = scheme_of(name)
        if scheme is None:
            raise ModelError(f"{name} is stored quantized, but quantization_config gives it no scheme")
        try:
            return codec.dimensions({leaf: _Sized(each) for leaf, each in stored.items()}, scheme)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None

    return Encoding(config, frozenset(codec.leaves), shape, scheme_of)


_ENCODINGS: dict[str, Callable[[Mapping[str, Any]], Encoding]] = {
    ct.METHOD: _compressed_tensors,
    **dict.fromkeys(("auto-round", "awq", "fp8", "gptq", "modelopt"), _read),
}
