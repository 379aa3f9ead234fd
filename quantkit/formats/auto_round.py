"""AutoRound's own files, whose tensors are those of GPTQ or AWQ, as `packing_format` says. Read only.

Zero points of its GPTQ words are stored minus one, and there is no `g_idx`. `extra_config` overrides single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.awq import Awq
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.gptq import BITS, Gptq
from quantkit.formats.reader import by_name, integers, overridden
from quantkit.formats.registry import Codec, register
from quantkit.scheme import NUMBERS, Grid, KVScheme, Scheme

_PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptq", "auto_round:awq", "auto_round")


@register
class AutoRound(Gptq):
    """The reader of files with GPTQ's tensors; `of` gives that of AWQ's where the config says so."""

    name = method = "auto-round"

    def of(self, config: Mapping[str, Any]) -> Codec:
        packing = config.get("packing_format", "auto_round:auto_gptq")
        if packing not in _PACKINGS:
            raise ModelError(
                f"AutoRound's packing_format {short(packing)} is not read; quantkit reads {', '.join(_PACKINGS[:2])}"
            )
        return _AutoRoundAwq() if packing.endswith("awq") else type(self)(1)

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        return _parsed(config)

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        return _cache(config)


class _AutoRoundAwq(Awq):
    name = method = "auto-round"

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        return _parsed({**config, "sym": False})

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        return _cache(config)


def _parsed(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ModelError(
            f"quantization_config: extra_config must be an object, got {short(extra)}; {CORRUPT}"
        )

    def scheme_of(module: str) -> Scheme | None:
        own = overridden(config, extra, module) or config
        bits = own.get("bits")
        if type(bits) is int and bits >= 16:
            return None
        return integers("AutoRound", own, BITS, bool(own.get("sym", True)))

    scheme_of("")
    return by_name(scheme_of)


def _cache(config: Mapping[str, Any]) -> KVScheme | None:
    """The scheme of a cache with stored FP8 scales, which AutoRound calls `static_kv_dtype`."""
    said = config.get("static_kv_dtype")
    if said is None:
        return None
    if str(said) not in ("fp8", "float8_e4m3fn", "torch.float8_e4m3fn"):
        raise ModelError(f"static_kv_dtype {short(said)} is not read; quantkit reads 'fp8'")
    grid = Grid(NUMBERS["fp8_e4m3"], "tensor")
    return KVScheme(grid, grid)
