"""compressed-tensors `pack-quantized`, the format vLLM, SGLang and transformers load.

Tensors of a linear P with weight [N, K], K/G groups (channel: one):
    P.weight_packed      int32 [N, ceil(K bits / 32)]     codes + 2^(bits-1), dense, least significant bit first
    P.weight_scale       model dtype [N, K/G]
    P.weight_shape       int64 [2] = (N, K)
    P.weight_zero_point  int32 [ceil(N bits / 32), K/G]   asymmetric only; the same packing along N
The file's signed code is ours minus 2^(bits-1), and the stored value adds it back: stored value = our unsigned code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from quantkit_kernels import pack_bits, unpack_bits

from quantkit.errors import ModelError
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of one linear, by local name."""
    bits = weight.scheme.bits
    tensors = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = pack_bits(weight.zero.T.contiguous(), bits).T.contiguous()
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`. ModelError if tensors are missing, foreign or of the wrong shape."""
    expected = {"weight_packed", "weight_scale", "weight_shape"} | (
        set() if scheme.symmetric else {"weight_zero_point"}
    )
    if tensors.keys() != expected:
        raise ModelError(f"a {scheme} linear has the tensors {sorted(expected)}, got {sorted(tensors)}")
    n, k = (int(v) for v in tensors["weight_shape"])
    for name, shape in stored_shapes(n, k, scheme).items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{name} of a {scheme} [{n}, {k}] linear is {shape}, got {tuple(tensors[name].shape)}")
    zero = tensors.get("weight_zero_point")
    return QuantizedWeight(
        codes=unpack_bits(tensors["weight_packed"], scheme.bits, k).contiguous(),
        scale=tensors["weight_scale"],
        zero=None if zero is None else unpack_bits(zero.T, scheme.bits, n).T.contiguous(),
        scheme=scheme,
    )


def stored_shapes(n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor of a [N, K] linear, by local name."""
    groups = k // scheme.group(k)
    shapes = {
        "weight_packed": (n, -(-k * scheme.bits // 32)),
        "weight_scale": (n, groups),
        "weight_shape": (2,),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (-(-n * scheme.bits // 32), groups)
    return shapes


def _weights(scheme: Scheme) -> dict[str, Any]:
    grouping = {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False, **grouping}


def quantization_config(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. layers: scheme by module name; ignore: linears left as they were.

    One scheme targets the class "Linear"; several target their modules by name.
    """
    schemes = sorted(set(layers.values()), key=lambda s: (s.bits, s.group_size or 0, s.symmetric))
    groups = {}
    for number, scheme in enumerate(schemes):
        names = ["Linear"] if len(schemes) == 1 else sorted(n for n, s in layers.items() if s == scheme)
        groups[f"group_{number}"] = {"targets": names, "weights": _weights(scheme), "format": FORMAT}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": groups,
    }


def parse_config(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """A function module name -> Scheme (None: not quantized) from a `quantization_config` of this format.

    ModelError names what cannot be read: another method or format, activations, other types of weights.
    """
    if config.get("quant_method") != METHOD or config.get("format") != FORMAT:
        raise ModelError(
            f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r} is not one quantkit "
            f"reads (it reads {METHOD!r}, {FORMAT!r})"
        )
    rules: list[tuple[list[str], Scheme]] = []
    for name, group in (config.get("config_groups") or {}).items():
        for other in ("input_activations", "output_activations"):
            if group.get(other):
                raise ModelError(f"config group {name} quantizes {other}; quantkit reads weight-only checkpoints")
        rules.append((list(group["targets"]), _scheme(name, group["weights"])))
    ignore = list(config.get("ignore") or [])

    def scheme_of(module: str) -> Scheme | None:
        if any(_matches(pattern, module) for pattern in ignore):
            return None
        named = [s for targets, s in rules if any(_matches(t, module) for t in targets)]
        classes = [s for targets, s in rules if "Linear" in targets]
        return (named or classes or [None])[0]

    return scheme_of


def _scheme(name: str, weights: Mapping[str, Any]) -> Scheme:
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise ModelError(f"config group {name}: {weights.get('type')} weights with strategy {strategy} are not read")
    group = weights.get("group_size") if strategy == "group" else None
    return Scheme(int(weights["num_bits"]), None if group in (None, -1) else int(group), bool(weights["symmetric"]))


def _matches(pattern: str, module: str) -> bool:
    return re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern == module
