"""compressed-tensors `pack-quantized`, the format vLLM, SGLang and transformers load.

Tensors of a linear P with weight [N, K], K/G groups (channel: one):
    P.weight_packed      int32 [N, ceil(K bits / 32)]     unsigned codes, dense, lowest bits first
    P.weight_scale       model dtype [N, K/G]
    P.weight_shape       int64 [2] = (N, K)
    P.weight_zero_point  int32 [ceil(N bits / 32), K/G]   asymmetric only; the same packing along N
The signed code of the file is ours minus 2^(bits-1), and packing adds that back: ours is what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from quantkit_kernels import pack_bits, unpack_bits, words

from quantkit.errors import ModelError
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid, Scheme, integer

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
MIXED = "mixed-precision"  # what newer writers call several groups; each group then names its format
DTYPES = {"weight_packed": torch.int32, "weight_shape": torch.int64, "weight_zero_point": torch.int32}


def pack(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of one linear, by local name."""
    bits = weight.grid.bits
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
    grid = scheme.weights
    expected = {"weight_packed", "weight_scale", "weight_shape"} | (
        set() if grid.symmetric else {"weight_zero_point"}
    )
    if tensors.keys() != expected:
        raise ModelError(f"a {scheme} linear has the tensors {sorted(expected)}, got {sorted(tensors)}")
    n, k = (int(v) for v in tensors["weight_shape"])
    for name, shape in stored_shapes(n, k, scheme).items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(
                f"{name} of a {scheme} [{n}, {k}] linear is {shape}, got {tuple(tensors[name].shape)}"
            )
    zero = tensors.get("weight_zero_point")
    return QuantizedWeight(
        codes=unpack_bits(tensors["weight_packed"], grid.bits, k).contiguous(),
        scale=tensors["weight_scale"],
        zero=None if zero is None else unpack_bits(zero.T, grid.bits, n).T.contiguous(),
        grid=grid,
    )


def stored_shapes(n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor of a [N, K] linear, by local name."""
    grid = scheme.weights
    groups = k // grid.group(k)
    shapes = {
        "weight_packed": (n, words(k, grid.bits)),
        "weight_scale": (n, groups),
        "weight_shape": (2,),
    }
    if not grid.symmetric:
        shapes["weight_zero_point"] = (words(n, grid.bits), groups)
    return shapes


def _weights(grid: Grid) -> dict[str, Any]:
    grouping = (
        {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
    )
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "dynamic": False,
        **grouping,
    }


def _order(scheme: Scheme) -> tuple[int, int, bool]:
    """The order of config groups."""
    return scheme.weights.bits, scheme.weights.group_size or 0, scheme.weights.symmetric


def quantization_config(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. layers: scheme by module name; ignore: linears left as they were.

    One scheme targets the class "Linear"; several target their modules by name.
    """
    schemes = sorted(set(layers.values()), key=_order)
    groups = {}
    for number, scheme in enumerate(schemes):
        names = ["Linear"] if len(schemes) == 1 else sorted(n for n, s in layers.items() if s == scheme)
        groups[f"group_{number}"] = {"targets": names, "weights": _weights(scheme.weights), "format": FORMAT}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": groups,
    }


def parse_config(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """A function module name of a linear -> Scheme (None: not quantized) from a `quantization_config`.

    As compressed-tensors matches: `ignore` wins, then exact names, "re:" patterns (from the start of the
    name), and the class "Linear"; within a kind the first group. ModelError names what is not read: another
    method or format, quantized activations or KV cache, transforms, other weights, columns out of order.
    """
    if config.get("quant_method") != METHOD or config.get("format") not in (FORMAT, MIXED):
        raise ModelError(
            f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r} is not one "
            f"quantkit reads; it reads {METHOD!r}, {FORMAT!r}"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise ModelError(f"this checkpoint has a {key}, which quantkit does not read yet")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("quantization_config has no config_groups; the checkpoint is corrupt")
    rules = [(target, scheme) for name, group in groups.items() for target, scheme in _rules(name, group)]
    ignore = list(config.get("ignore") or [])

    def scheme_of(module: str) -> Scheme | None:
        if any(_rank(pattern, module) is not None for pattern in ignore):
            return None
        ranked = [(rank, scheme) for target, scheme in rules if (rank := _rank(target, module)) is not None]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    return scheme_of


def _rules(name: str, group: Mapping[str, Any]) -> list[tuple[str, Scheme]]:
    for other in ("input_activations", "output_activations"):
        if group.get(other):
            raise ModelError(f"config group {name} quantizes {other}; quantkit reads weight-only checkpoints")
    if group.get("format") not in (None, FORMAT):
        raise ModelError(f"config group {name} has the format {group['format']!r}; quantkit reads {FORMAT!r}")
    targets, weights = group.get("targets"), group.get("weights")
    if not targets or not isinstance(weights, Mapping):
        raise ModelError(f"config group {name} has no targets or no weights; the checkpoint is corrupt")
    scheme = _scheme(name, weights)
    return [(target, scheme) for target in targets]


def _scheme(name: str, weights: Mapping[str, Any]) -> Scheme:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size not in (None, -1) else "channel")
    if weights.get("type", "int") != "int" or weights.get("dynamic") or strategy not in ("group", "channel"):
        raise ModelError(
            f"config group {name}: {weights.get('type')} weights with strategy {strategy!r} are not read; "
            "quantkit reads static int weights by group or channel"
        )
    if weights.get("actorder") not in (None, "weight", "static"):
        raise ModelError(
            f"config group {name}: actorder {weights['actorder']!r} stores columns out of order "
            "(weight_g_idx), which quantkit does not read"
        )
    bits = weights.get("num_bits")
    if bits not in range(2, 9) or (strategy == "group" and (not isinstance(size, int) or size < 1)):
        raise ModelError(
            f"config group {name}: num_bits {bits!r}, group_size {size!r} is no scheme of this format"
        )
    symmetric = bool(weights.get("symmetric", True))
    return Scheme(integer(bits, size if strategy == "group" else None, symmetric))


def _rank(pattern: str, module: str) -> int | None:
    """How closely a target names a linear: 0 exactly, 1 by pattern, 2 by class; None: not at all."""
    if pattern == module:
        return 0
    if pattern.startswith("re:"):
        return 1 if re.match(pattern[3:], module) else None
    return 2 if pattern == "Linear" else None
