"""`quantization_config` of compressed-tensors: schemes to JSON and back. docs/checkpoint.md shows an example.

A config group says for its targets how weights and inputs are quantized and in which of the formats of
`compressed_tensors.py` they are stored; `kv_cache_scheme` says the same of a KV cache with stored scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.expert_names import ASKED, EXPERT, asked_of_left
from quantkit.formats.patterns import PatternError, matches, parsed
from quantkit.scheme import NUMBERS, Grid, KVScheme, Number, Scheme, integer

METHOD = "compressed-tensors"
PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (PACKED, INT, FLOAT, NVFP4, MXFP4, MXFP8)
DENSE = "dense"  # no weight is quantized, only the cache
MIXED = "mixed-precision"  # several groups; each then names its format
HEADS = ("lm_head", "embed_out")
CORRUPT = "the checkpoint is corrupt, fetch it again"
VERSION = "0.19.0"  # of compressed-tensors, whose files these equal
_SCALES = {"fp8_e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
# (number, what its scales are, columns that share one) -> the format
_SHORT_SCALES: dict[tuple[str, str | None, int | None], str] = {
    ("fp4_e2m1", "fp8_e4m3", 16): NVFP4,
    ("fp4_e2m1", "e8m0", 32): MXFP4,
    ("fp8_e4m3", "e8m0", 32): MXFP8,
}
_IN_KERNELS = ("fp8_e4m3", "fp4_e2m1", "nf4")  # beside integers; the keys of `quantkit_kernels.stored.TABLES`


def format_of(scheme: Scheme) -> str:
    """The format that stores a scheme; ModelError if none does."""
    grid = scheme.weights
    number, shape = grid.number.name, grid.granularity
    found = None
    if grid.number.kind == "int" and grid.scale is None:
        packed = scheme.inputs is None
        if (
            shape in ("channel", "group")
            if packed
            else (grid.symmetric and shape in ("channel", "group", "tensor"))
        ):
            found = PACKED if packed else INT
    elif number == "fp8_e4m3" and grid.scale is None and shape in ("tensor", "channel", "block"):
        found = FLOAT
    elif shape == "group":
        found = _SHORT_SCALES.get((number, grid.scale, grid.group_size))
    if found is None:
        raise ModelError(
            f"compressed-tensors has no format for {scheme}; its formats are {', '.join(FORMATS)}; choose another "
            "preset, or symmetric: true beside rounded inputs"
        )
    return found


def memory_format(scheme: Scheme) -> str:
    """The format in which a layer in memory keeps a scheme: also numbers that no file holds, packed as integers are.

    ModelError if no kernel takes it.
    """
    try:
        return format_of(scheme)
    except ModelError:
        number = scheme.weights.number
        if scheme.weights.scale is not None or (number.kind != "int" and number.name not in _IN_KERNELS):
            raise ModelError(f"no kernel multiplies by weights in {scheme.weights}") from None
        return PACKED


def written_config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
) -> dict[str, Any]:
    """One scheme targets the class "Linear" and a quantized head; several target their modules by name, and the experts
    of a layer that share one by a pattern.

    kv: of a cache with stored scales.

    Weights alone, as integers, are described by the keys that say something; everything else by all keys that
    llm-compressor writes.
    """
    kinds = sorted(set(schemes.values()), key=_order)
    formats = [format_of(scheme) for scheme in kinds]
    short = kv is None and set(formats) == {PACKED}
    groups = {}
    for number, (scheme, kind) in enumerate(zip(kinds, formats, strict=True)):
        targets = _targets(scheme, schemes)
        if len(kinds) == 1:  # to engines a head is no Linear, so it is named
            targets = [
                "Linear",
                *(f"re:.*{head}$" for head in HEADS if any(n.endswith(head) for n in schemes)),
            ]
        if short:
            groups[f"group_{number}"] = {
                "targets": targets,
                "weights": _in_short(scheme.weights),
                "format": kind,
            }
        else:
            groups[f"group_{number}"] = _in_full(targets, scheme, kind)
    top = DENSE if not formats else formats[0] if len(set(formats)) == 1 else MIXED
    config = {
        "quant_method": METHOD,
        "format": top,
        "quantization_status": "compressed",
        "ignore": sorted({*ignore, *asked_of_left(ignore, schemes)}),
        "config_groups": groups,
    }
    if short:
        return config
    return config | {
        "global_compression_ratio": None,
        "kv_cache_scheme": None if kv is None else _stored_cache(kv),
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _targets(scheme: Scheme, schemes: Mapping[str, Scheme]) -> list[str]:
    """The targets of one scheme among several; patterns of experts also fit the names that vLLM asks for."""
    of_layer: dict[str, set[Scheme]] = {}
    leaves = {*ASKED}
    for name, each in schemes.items():
        if match := EXPERT.match(name):
            of_layer.setdefault(match[1], set()).add(each)
            leaves.add(match[2])
    alike = {layer for layer, found in of_layer.items() if found == {scheme}}
    named = {n for n, s in schemes.items() if s == scheme}
    named -= {n for n in named if (match := EXPERT.match(n)) and match[1] in alike}
    behind = rf"\.\d+\.({'|'.join(sorted(leaves))})$"
    if alike and alike == of_layer.keys():
        return sorted([*named, rf"re:.*experts{behind}"])
    return sorted([*named, *(f"re:{re.escape(layer)}{behind}" for layer in alike)])


def parsed_config(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """Module name of a linear -> its Scheme, or None if it is not quantized.

    As compressed-tensors matches: `ignore` wins, then exact names, "re:" patterns (from the start of the name), and the
    class "Linear"; within a kind the first group.
    """
    stored = config.get("format")
    if config.get("quant_method") != METHOD or stored not in (*FORMATS, MIXED, DENSE):
        raise ModelError(
            f"quantization method {short(config.get('quant_method'))}, format {short(stored)} is not one "
            f"quantkit reads; it reads {METHOD!r}, {', '.join(map(repr, FORMATS))}"
        )
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ModelError(f"this checkpoint has a {key}, which quantkit does not read yet")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or (kv_scheme(config) is None and not groups):
        raise ModelError(f"quantization_config has no config_groups; {CORRUPT}")
    rules = [
        (target, scheme) for name, group in groups.items() for target, scheme in _rules(name, group, stored)
    ]
    ignore = _texts("ignore", config.get("ignore") or [])

    def scheme_of(module: str) -> Scheme | None:
        if any(_rank(pattern, module) is not None for pattern in ignore):
            return None
        ranked = [(rank, scheme) for target, scheme in rules if (rank := _rank(target, module)) is not None]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    return scheme_of


def kv_scheme(config: Mapping[str, Any]) -> KVScheme | None:
    """The scheme of a cache whose scales are stored; None if the cache is not quantized."""
    args = config.get("kv_cache_scheme")
    if args is None:
        return None
    where = "kv_cache_scheme"
    if not isinstance(args, Mapping):
        raise ModelError(f"{where} must be an object, got {short(args)}; {CORRUPT}")
    number = _number(where, args)
    granularity = {"tensor": "tensor", "attn_head": "head"}.get(str(args.get("strategy") or "tensor"))
    if granularity is None or number.bits != 8 or args.get("dynamic") or not args.get("symmetric", True):
        raise ModelError(
            f"{where}: {number.name}, strategy {short(args.get('strategy'))}, dynamic {short(args.get('dynamic'))}, "
            f"symmetric {short(args.get('symmetric'))} is not read; quantkit reads static symmetric 8-bit caches by "
            "tensor or attn_head"
        )
    grid = Grid(number, granularity)  # type: ignore[arg-type]
    return KVScheme(grid, grid)


def _order(scheme: Scheme) -> tuple[Any, ...]:
    """The order of config groups."""
    grid = scheme.weights
    return grid.bits, grid.group_size or 0, grid.symmetric, str(scheme)


def _strategy(grid: Grid) -> str:
    if grid.two_level:
        return "tensor_group"
    return {"head": "attn_head"}.get(grid.granularity, grid.granularity)


def _in_short(grid: Grid) -> dict[str, Any]:
    """The `weights` of a config group without the keys that have their usual value."""
    sizes: dict[str, Any] = {"strategy": grid.granularity}
    if grid.group_size:
        sizes["group_size"] = grid.group_size
    return {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False, **sizes}


def _in_full(targets: list[str], scheme: Scheme, kind: str) -> dict[str, Any]:
    """A config group with every key."""
    inputs = scheme.inputs
    return {
        "format": kind,
        "input_activations": None
        if inputs is None
        else _arguments(inputs, "static_minmax" if inputs.two_level or not inputs.dynamic else None),
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(scheme.weights, "memoryless_minmax"),
    }


def _stored_cache(kv: KVScheme) -> dict[str, Any]:
    """The `kv_cache_scheme` of a cache with stored FP8 scales; ModelError for another: vLLM refuses the checkpoint."""
    if kv.dynamic or kv.keys != kv.values or kv.keys.number.name != "fp8_e4m3":
        raise ModelError(f"a kv_cache_scheme is written for FP8 with stored scales only, not for {kv}")
    return _arguments(kv.keys, None)


def _arguments(grid: Grid, observer: str | None) -> dict[str, Any]:
    """The twelve keys of compressed-tensors' QuantizationArgs."""
    block = grid.granularity == "block"
    return {
        "actorder": None,
        "block_structure": [grid.group_size, grid.group_size] if block else None,
        "dynamic": "local" if grid.dynamic and grid.two_level else grid.dynamic,
        "group_size": None if block else grid.group_size,
        "num_bits": grid.bits,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": _SCALES.get(str(grid.scale)),
        "strategy": _strategy(grid),
        "symmetric": grid.symmetric,
        "type": grid.number.kind,
        "zp_dtype": None if grid.symmetric else "torch.int8",
    }


def _rules(name: str, group: Any, stored: Any) -> list[tuple[str, Scheme]]:
    """(target, scheme) for every target of a config group. stored: the format of the whole config."""
    if not isinstance(group, Mapping):
        raise ModelError(f"config group {name} must be an object, got {short(group)}; {CORRUPT}")
    where = f"config group {name}"
    if group.get("output_activations"):
        raise ModelError(f"{where} quantizes output_activations, which quantkit does not run")
    targets, weights, inputs = group.get("targets"), group.get("weights"), group.get("input_activations")
    if targets and weights is None and inputs:
        raise ModelError(
            f"{where} quantizes the inputs of {short(targets)} without weights (attention), which quantkit does not run"
        )
    if not targets or not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None):
        raise ModelError(f"{where} has no targets or no weights; {CORRUPT}")
    scheme = Scheme(_weights(where, weights), None if inputs is None else _inputs(where, inputs))
    kind = group.get("format") or (format_of(scheme) if stored == MIXED else stored)
    if kind != format_of(scheme):
        raise ModelError(
            f"{where} stores {scheme} as {short(kind)}; quantkit reads it as {format_of(scheme)!r} only"
        )
    return [(target, scheme) for target in _texts(f"the targets of {where}", targets)]


def _texts(what: str, value: Any) -> list[str]:
    """The names and patterns of a list, all of them usable."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelError(
            f"quantization_config: {what} must be a list of texts, got {short(value)}; {CORRUPT}"
        )
    for each in value:
        if each.startswith("re:"):
            _checked(parsed, each)
    return value


def _number(where: str, args: Mapping[str, Any]) -> Number:
    """The number format that `type` and `num_bits` say."""
    kind, bits = args.get("type", "int"), args.get("num_bits")
    name = (
        f"int{bits}"
        if kind == "int"
        else {8: "fp8_e4m3", 4: "fp4_e2m1"}.get(bits if type(bits) is int else 0)
    )
    if kind not in ("int", "float") or type(bits) is not int or name not in NUMBERS:
        raise ModelError(f"{where}: num_bits {short(bits)} of type {short(kind)} is no number quantkit reads")
    return NUMBERS[name]


def _weights(where: str, args: Mapping[str, Any]) -> Grid:
    """The grid that the `weights` of a config group describe."""
    size, symmetric = args.get("group_size"), args.get("symmetric", True)
    number = _number(where, args)
    strategy = args.get("strategy") or ("group" if size not in (None, -1) else "channel")
    if args.get("dynamic"):
        raise ModelError(f"{where}: weights with a dynamic scale are not read")
    if args.get("actorder") not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise ModelError(f"{where}: actorder {short(args['actorder'])} is not one that quantkit knows")
    sized = type(size) is int and size >= 1
    if type(symmetric) is not bool or (strategy in ("group", "tensor_group") and not sized):
        raise ModelError(
            f"{where}: num_bits {short(args.get('num_bits'))}, group_size {short(size)}, symmetric "
            f"{short(symmetric)} is no scheme of this format"
        )
    if number.kind == "int" and strategy in ("group", "channel"):
        return integer(number.bits, size if strategy == "group" else None, symmetric)
    if symmetric and (grid := _float_weights(number, strategy, size, args)) is not None:
        return grid
    raise ModelError(
        f"{where}: {number.name} weights with strategy {short(strategy)}, group_size {short(size)}, scale_dtype "
        f"{short(args.get('scale_dtype'))}, symmetric {short(symmetric)} are not read; quantkit reads int by group or "
        "channel, fp8 by tensor, channel or block, NVFP4, MXFP4 and MXFP8"
    )


def _float_weights(number: Number, strategy: Any, size: Any, args: Mapping[str, Any]) -> Grid | None:
    """The grid of symmetric weights that are no integers by group or channel; None if it is not read."""
    scale = args.get("scale_dtype")
    if strategy == "tensor" and number.bits == 8 and scale is None:
        return Grid(number, "tensor")
    if number.name == "fp8_e4m3" and scale is None:
        if strategy == "channel":
            return Grid(number, "channel")
        block = args.get("block_structure")
        if (
            strategy == "block"
            and isinstance(block, list)
            and len(set(map(str, block))) == 1
            and len(block) == 2
        ):
            return Grid(number, "block", block[0]) if type(block[0]) is int and block[0] > 0 else None
    return _short_scales(number, strategy, size, scale)


def _short_scales(number: Number, strategy: Any, size: Any, scale: Any, dynamic: bool = False) -> Grid | None:
    """The grid of NVFP4, MXFP4 or MXFP8; FP4 says enough without a scale_dtype."""
    kind = {"tensor_group": "fp8_e4m3", "group": "e8m0"}.get(str(strategy))
    usual = scale is None and number.name == "fp4_e2m1"
    named = kind is not None and (usual or scale == _SCALES[kind]) and type(size) is int
    if not named or (number.name, kind, size) not in _SHORT_SCALES:
        return None
    return Grid(number, "group", size, dynamic=dynamic, scale=kind)


def _inputs(where: str, args: Mapping[str, Any]) -> Grid:
    """The grid that the `input_activations` of a config group describe."""
    number, size, symmetric = _number(where, args), args.get("group_size"), args.get("symmetric", True)
    dynamic, strategy = args.get("dynamic", False), args.get("strategy") or "tensor"
    plain = number.bits == 8 and args.get("scale_dtype") is None and type(symmetric) is bool
    grouped = strategy == "group" and type(size) is int and size >= 1
    if plain and (symmetric or number.kind == "int"):
        if dynamic is True and strategy == "token":
            return Grid(number, "token", None, symmetric, dynamic=True)
        if dynamic is True and grouped and symmetric:
            return Grid(number, "group", size, dynamic=True)
        if dynamic is False and strategy == "tensor":
            return Grid(number, "tensor", None, symmetric)
    local = strategy == "tensor_group" and dynamic == "local"  # a stored global scale, the rest of the values
    if (local or (strategy == "group" and dynamic is True)) and symmetric is True:
        short_grid = _short_scales(number, strategy, size, args.get("scale_dtype"), dynamic=True)
        if short_grid is not None:
            return short_grid
    raise ModelError(
        f"{where}: inputs as {number.name} with strategy {short(strategy)}, dynamic {short(dynamic)}, symmetric "
        f"{short(symmetric)}, scale_dtype {short(args.get('scale_dtype'))} are not run; quantkit runs int8 and fp8 "
        "inputs by token or group (dynamic) and by tensor (static), NVFP4, MXFP4 and MXFP8"
    )


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
            f"quantization_config: the pattern {short(pattern)} cannot be used: {error}; {CORRUPT}"
        ) from None


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
