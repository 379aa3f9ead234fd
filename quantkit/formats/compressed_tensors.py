"""compressed-tensors `pack-quantized`, the format that vLLM, SGLang and transformers load.

Tensors of a linear P with weight [N, K] and K/G groups per row (channel: one):
    P.weight_packed      int32 [N, ceil(K bits / 32)]     unsigned codes, dense, lowest bits first
    P.weight_scale       model dtype [N, K/G]
    P.weight_shape       int64 [2] = (N, K)
    P.weight_zero_point  int32 [ceil(N bits / 32), K/G]   asymmetric only; the same packing along N
The format counts codes from -2^(bits-1) and adds 2^(bits-1) when it packs them: the words hold our unsigned codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from quantkit_kernels import Spec, Stored, pack_bits, unpack_bits, words

from quantkit.errors import ModelError
from quantkit.formats.patterns import PatternError, matches, parsed
from quantkit.formats.registry import Codec, Shape, register
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid, Scheme, integer

FORMAT = "pack-quantized"
MIXED = "mixed-precision"  # what newer writers call several groups; each group then names its format
CORRUPT = "the checkpoint is corrupt, fetch it again"


@register
class CompressedTensors(Codec):
    """The codec of this format."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    leaves: ClassVar[dict[str, torch.dtype | None]] = {
        "weight_packed": torch.int32,
        "weight_scale": None,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }
    scale = "weight_scale"

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        grid = scheme.weights
        groups = k // grid.group(k)
        shapes = {
            "weight_packed": (n, words(k, grid.bits)),
            "weight_scale": (n, groups),
            "weight_shape": (2,),
        }
        return shapes if grid.symmetric else shapes | {"weight_zero_point": (words(n, grid.bits), groups)}

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        bits = weight.grid.bits
        tensors = {
            "weight_packed": pack_bits(weight.codes, bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            tensors["weight_zero_point"] = pack_bits(weight.zero.T.contiguous(), bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        grid = scheme.weights
        n, k = self.dimensions(tensors, scheme)
        shapes = self.shapes(n, k, scheme)
        if tensors.keys() != shapes.keys():
            raise ModelError(f"a {scheme} linear has the tensors {sorted(shapes)}, got {sorted(tensors)}")
        for leaf, shape in shapes.items():
            if tuple(tensors[leaf].shape) != shape:
                raise ModelError(
                    f"{leaf} of a {scheme} [{n}, {k}] linear is {shape}, got {tuple(tensors[leaf].shape)}"
                )
        zero = tensors.get("weight_zero_point")
        return QuantizedWeight(
            codes=unpack_bits(tensors["weight_packed"], grid.bits, k).contiguous(),
            scale=tensors["weight_scale"],
            zero=None if zero is None else unpack_bits(zero.T, grid.bits, n).T.contiguous(),
            grid=grid,
        )

    def stored(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Stored:
        """The very same tensors."""
        zero = tensors.get("weight_zero_point")
        return Stored(tensors["weight_packed"], tensors["weight_scale"], zero, spec)

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        if "weight_shape" not in tensors or "weight_scale" not in tensors:
            raise ModelError(
                f"a {scheme} linear lacks its weight_shape or weight_scale, got {sorted(tensors)}; {CORRUPT}"
            )
        said = tensors["weight_shape"]
        sizes = said.tolist() if said.dtype == torch.int64 and tuple(said.shape) == (2,) else None
        scales = tuple(tensors["weight_scale"].shape)
        grid = scheme.weights
        if sizes is None or min(sizes) < 1 or not grid.divides(sizes[1]):
            raise ModelError(f"weight_shape is {said.flatten()[:4].tolist()}, no shape of a {scheme} weight")
        if scales != (sizes[0], sizes[1] // grid.group(sizes[1])):
            raise ModelError(
                f"weight_shape says {sizes}, which does not fit {list(scales)} scales of a {scheme} weight; {CORRUPT}"
            )
        return sizes[0], sizes[1]

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """One scheme targets the class "Linear"; several target their modules by name."""
        kinds = sorted(set(schemes.values()), key=_order)
        groups = {}
        for number, scheme in enumerate(kinds):
            names = ["Linear"] if len(kinds) == 1 else sorted(n for n, s in schemes.items() if s == scheme)
            groups[f"group_{number}"] = {"targets": names, "weights": _written(scheme), "format": FORMAT}
        return {
            "quant_method": self.method,
            "format": FORMAT,
            "quantization_status": "compressed",
            "ignore": sorted(ignore),
            "config_groups": groups,
        }

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """As compressed-tensors matches: `ignore` wins, then exact names, "re:" patterns (from the start of the
        name), and the class "Linear"; within a kind the first group.
        """
        stored = config.get("format")
        if config.get("quant_method") != self.method or stored not in (FORMAT, MIXED):
            raise ModelError(
                f"quantization method {_short(config.get('quant_method'))}, format {_short(stored)} is not one "
                f"quantkit reads; it reads {self.method!r}, {FORMAT!r}"
            )
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(key):
                raise ModelError(f"this checkpoint has a {key}, which quantkit does not read yet")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ModelError(f"quantization_config has no config_groups; {CORRUPT}")
        rules = [(target, scheme) for name, group in groups.items() for target, scheme in _rules(name, group)]
        ignore = _texts("ignore", config.get("ignore") or [])

        def scheme_of(module: str) -> Scheme | None:
            if any(_rank(pattern, module) is not None for pattern in ignore):
                return None
            ranked = [
                (rank, scheme) for target, scheme in rules if (rank := _rank(target, module)) is not None
            ]
            return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

        return scheme_of

    def why_misfit(self, leaf: str, shape: tuple[int, ...], n: int, k: int, scheme: Scheme) -> str | None:
        older = -(-k // (32 // scheme.weights.bits))
        if leaf == "weight_packed" and shape and shape[-1] == older != words(k, scheme.weights.bits):
            return "words that hold whole codes only (compressed-tensors of before May 2026) are not read"
        return None


def _order(scheme: Scheme) -> tuple[int, int, bool]:
    """The order of config groups."""
    return scheme.weights.bits, scheme.weights.group_size or 0, scheme.weights.symmetric


def _written(scheme: Scheme) -> dict[str, Any]:
    """The `weights` of a config group."""
    grid = scheme.weights
    if scheme.inputs is not None or grid.number.kind != "int" or grid.granularity not in ("channel", "group"):
        raise ModelError(f"{FORMAT} stores integer weights by channel or group, not {scheme}")
    sizes: dict[str, Any] = {"strategy": grid.granularity}
    if grid.group_size:
        sizes["group_size"] = grid.group_size
    return {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False, **sizes}


def _rules(name: str, group: Any) -> list[tuple[str, Scheme]]:
    """(target, scheme) for every target of a config group."""
    if not isinstance(group, Mapping):
        raise ModelError(f"config group {name} must be an object, got {_short(group)}; {CORRUPT}")
    for other in ("input_activations", "output_activations"):
        if group.get(other):
            raise ModelError(f"config group {name} quantizes {other}; quantkit reads weight-only checkpoints")
    if group.get("format") not in (None, FORMAT):
        raise ModelError(
            f"config group {name} has the format {_short(group['format'])}; quantkit reads {FORMAT!r}"
        )
    targets, weights = group.get("targets"), group.get("weights")
    if not targets or not isinstance(weights, Mapping):
        raise ModelError(f"config group {name} has no targets or no weights; {CORRUPT}")
    scheme = Scheme(_grid(name, weights))
    return [(target, scheme) for target in _texts(f"the targets of config group {name}", targets)]


def _texts(what: str, value: Any) -> list[str]:
    """The names and patterns of a list, all of them usable."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelError(
            f"quantization_config: {what} must be a list of texts, got {_short(value)}; {CORRUPT}"
        )
    for each in value:
        if each.startswith("re:"):
            _checked(parsed, each)
    return value


def _grid(name: str, weights: Mapping[str, Any]) -> Grid:
    """The grid that the `weights` of a config group describe."""
    size, bits, symmetric = weights.get("group_size"), weights.get("num_bits"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if size not in (None, -1) else "channel")
    if weights.get("type", "int") != "int" or weights.get("dynamic") or strategy not in ("group", "channel"):
        raise ModelError(
            f"config group {name}: {_short(weights.get('type'))} weights with strategy {_short(strategy)} are not "
            "read; quantkit reads static int weights by group or channel"
        )
    if weights.get("actorder") not in (None, "weight", "static"):
        raise ModelError(
            f"config group {name}: actorder {_short(weights['actorder'])} stores columns out of order "
            "(weight_g_idx), which quantkit does not read"
        )
    sized = strategy == "channel" or (type(size) is int and size >= 1)
    if type(bits) is not int or bits not in range(2, 9) or not sized or type(symmetric) is not bool:
        raise ModelError(
            f"config group {name}: num_bits {_short(bits)}, group_size {_short(size)}, symmetric "
            f"{_short(symmetric)} is no scheme of this format"
        )
    return integer(bits, size if strategy == "group" else None, symmetric)


def _rank(pattern: str, module: str) -> int | None:
    """How closely a target names a linear: 0 exactly, 1 by pattern, 2 by class; None: not at all."""
    if pattern == module:
        return 0
    if pattern.startswith("re:"):
        return 1 if _checked(matches, pattern, module) else None
    return 2 if pattern == "Linear" else None


def _checked(use: Callable[..., Any], pattern: str, *args: str) -> Any:
    try:
        return use(pattern[3:], *args)
    except PatternError as error:
        raise ModelError(
            f"quantization_config: the pattern {_short(pattern)} cannot be used: {error}; {CORRUPT}"
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
