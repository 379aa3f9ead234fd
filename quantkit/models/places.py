"""Where every tensor on disk goes in the model: one table, made without reading a byte.

transformers renames, stacks and splits tensors while it loads a checkpoint. The rules are its own
(`get_model_conversion_mapping`), and here they are applied to the names on disk and the empty model only. Names on disk
always come from the checkpoint, never from reversing a rule: what a reversed rule gives depends on how the model was
made. Whatever no parameter takes is an extra tensor, which is carried as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from quantkit.errors import ModelError
from quantkit.models import families

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# transformers' operation that stacks experts of text and of pictures, which share a list on disk
_SHARED_OUT = "ErnieFuseAndSplitTextVisionExperts"
Kind = Literal["linear", "expert", "router", "embedding", "norm", "other", "extra"]
Read = Callable[[str], "torch.Tensor"]  # a tensor by its name on disk


@dataclass(frozen=True)
class Place:
    """The place of one tensor on disk.

    parameter: the parameter or buffer it belongs to, None for an extra tensor. owner: class name of the module that has
    the parameter. A tensor may be a part of its parameter: entry `index` of the first axis (an expert), or `rows`
    (first, behind last) of the first axis there. transposed: its last two axes are exchanged. opaque: only
    transformers' own operation makes the parameter, or several, from it. split: of a linear whose rows are those of
    several linears of the model, one behind the other, their weights and how many rows each has.
    """

    disk: str
    parameter: str | None
    kind: Kind
    owner: str = ""
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    opaque: bool = False
    split: tuple[tuple[str, int], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the tensor is its parameter, as it is."""
        return self.index is None and self.rows is None and not (self.transposed or self.opaque)


@dataclass(frozen=True)
class _Group:
    """Tensors that one conversion of transformers makes into one parameter or several, by pattern in its order."""

    first: str
    converter: Any
    disk: dict[str, list[str]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """All places of one checkpoint in one model.

    blocks: module name of the list of decoder blocks. by_disk: in file order. by_parameter: what each parameter is made
    of. outside_text: module names of the parts beside the language model; towers: of those that are models themselves.
    """

    blocks: str
    n_blocks: int
    by_disk: Mapping[str, Place]
    by_parameter: Mapping[str, tuple[Place, ...]]
    outside_text: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    _groups: Mapping[str, _Group] = field(default_factory=dict)

    def block_of(self, disk: str) -> int | None:
        """The number of the decoder block that a tensor on disk belongs to, or None."""
        name, inside = self.by_disk[disk].parameter or "", f"{self.blocks}."
        number = name.removeprefix(inside).partition(".")[0] if name.startswith(inside) else ""
        return int(number) if number.isdecimal() else None

    def in_text(self, parameter: str) -> bool:
        """Whether a parameter or module belongs to the language model, and not to a tower beside it."""
        return not _under(parameter, self.outside_text)

    def in_tower(self, parameter: str) -> bool:
        """Whether a parameter belongs to a tower, which text never runs through."""
        return _under(parameter, self.towers)

    def extra(self) -> list[str]:
        """Names on disk of the tensors that the model has no parameter for."""
        return [name for name, place in self.by_disk.items() if place.parameter is None]

    def deinterleaved(self, disk: str) -> bool:
        """Whether a stack of experts has gate and up in turn where its parameter has one behind the other."""
        group = self._groups.get(self.by_disk[disk].parameter or "")
        operations = [] if group is None else list(group.converter.operations)
        kinds = [type(each).__name__ for each in operations]
        return kinds == ["Interleave"] and operations[0].dim == 1 and not operations[0].inverse

    def beside(self, disk: str) -> str:
        """The role of a stack of experts [E, I, H] whose parameter has those of gate and up one behind the other."""
        group = self._groups.get(self.by_disk[disk].parameter or "")
        operations = [] if group is None else list(group.converter.operations)
        if group is None or [type(each).__name__ for each in operations] != ["Concatenate"]:
            return ""
        patterns = group.converter.source_patterns
        if operations[0].dim != 1 or len(patterns) != 2:
            return ""
        return "gate" if disk in group.disk.get(patterns[0], ()) else "up"

    def of(self, names: Iterable[str]) -> Places:
        """The places of these names on disk; those that are not known are extra tensors."""
        by_disk = {name: self.by_disk.get(name) or Place(name, None, "extra") for name in names}
        kept = {
            p: tuple(each for each in parts if each.disk in by_disk) for p, parts in self.by_parameter.items()
        }
        return replace(self, by_disk=by_disk, by_parameter={p: parts for p, parts in kept.items() if parts})

    def on_disk(self, module: str) -> str:
        """The name on disk of a module of the model, told by its tensors or those of what it lies in."""
        return _translated(module, self._modules[1])

    def in_model(self, module: str) -> str:
        """The module of the model that is called `module` on disk, told by its tensors or those of what it lies in."""
        return _translated(module, self._modules[0])

    @cached_property
    def _modules(self) -> tuple[dict[str, str], dict[str, str]]:
        """(module on disk -> module of the model, the reverse), from names that end alike."""
        there: dict[str, str] = {}
        back: dict[str, str] = {}
        for place in self.by_disk.values():
            disk, module = place.disk, place.parameter or ""
            while disk and module and disk.rpartition(".")[2] == module.rpartition(".")[2]:
                disk, module = disk.rpartition(".")[0], module.rpartition(".")[0]
                there.setdefault(disk, module)
                back.setdefault(module, disk)
            for weight, _ in place.split:
                back[weight.removesuffix(".weight")] = place.disk.removesuffix(".weight")
        return there, back

    def opaque(self, parameter: str, read: Read, model: PreTrainedModel) -> torch.Tensor:
        """A parameter that only transformers' own operation makes. read: gives a tensor by its name on disk."""
        group = self._groups[parameter]
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.disk.items():
            converter.collected_tensors[pattern] = [read(name) for name in names]
        made = converter.convert(group.first, model=model, config=model.config)
        if parameter not in made:
            raise ModelError(
                f"transformers does not make {parameter} from {', '.join(self._names(parameter))}"
            )
        found = made[parameter]
        tensor: torch.Tensor = found[0] if isinstance(found, list) else found
        return tensor

    def _names(self, parameter: str) -> list[str]:
        return [place.disk for place in self.by_parameter[parameter]]


def find_places(
    model: PreTrainedModel, tensors: Mapping[str, tuple[int, ...]], blocks: str, n_blocks: int
) -> Places:
    """The places of tensors (name on disk -> shape) in an empty model; ModelError if two are one parameter.

    blocks, n_blocks: module name and length of its list of decoder blocks.
    """
    from transformers.core_model_loading import dot_natural_key

    state: dict[str, torch.Tensor] = model.state_dict()
    renamed = _rename(model, state)
    found: dict[str, str] = {}  # disk -> parameter, whole
    groups: dict[str, _Group] = {}
    for disk in sorted(tensors, key=dot_natural_key):
        name, pattern, converter = renamed(disk)
        if name not in state:
            continue
        if converter is None:
            found[disk] = name
            continue
        if name not in groups:
            targets = tuple(name.replace(converter.target_patterns[0], t) for t in converter.target_patterns)
            groups[name] = _Group(name, converter, {}, targets)
        groups[name].disk.setdefault(pattern, []).append(disk)
    places = {disk: _place(model, disk, name) for disk, name in found.items()}
    for group in groups.values():
        places |= {place.disk: place for place in _parts(model, group, tensors, state)}
    by_disk = {disk: places.get(disk) or Place(disk, None, "extra") for disk in tensors}
    by_parameter: dict[str, tuple[Place, ...]] = {}
    for place in by_disk.values():
        if place.parameter is not None:
            by_parameter[place.parameter] = (*by_parameter.get(place.parameter, ()), place)
    for parameter, parts in by_parameter.items():
        if len(parts) > 1 and any(part.whole for part in parts):
            raise ModelError(f"{' and '.join(part.disk for part in parts)} are both {parameter}; remove one")
    for group in groups.values():
        for target in group.targets:
            by_parameter.setdefault(target, by_parameter[group.first])
    by_target = {target: group for group in groups.values() for target in group.targets}
    towers = tuple(_towers(model, blocks))
    outside = (*towers, *_beside(model))
    return Places(blocks, n_blocks, by_disk, by_parameter, outside, towers, by_target)


def _rename(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Callable[[str], tuple[str, str, Any]]:
    """A function: name on disk -> (parameter or what it would be called, pattern and conversion that apply or None)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    base = model.base_model_prefix

    def renamed(disk: str) -> tuple[str, str, Any]:
        name, pattern = rename_source_key(disk, renamings, converters, base, state)
        if name not in state:
            plain, _ = rename_source_key(disk, [], [], base, state)
            if plain in state:
                return plain, "", None
        return name, pattern or "", None if pattern is None else by_pattern[pattern]

    return renamed


def _place(model: PreTrainedModel, disk: str, parameter: str, **how: Any) -> Place:
    module, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(module)
    kind = _kind(owner, module, leaf, how.get("index") is not None)
    return Place(disk, parameter, kind, type(owner).__name__, **how)


def _kind(owner: Any, module: str, leaf: str, stacked: bool) -> Kind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if stacked or "experts" in module.rpartition(".")[2]:
        return "expert"
    plain = isinstance(owner, Conv1D) or type(owner).__name__ in families.LINEARS
    if isinstance(owner, nn.Linear):  # a subclass may use its weight in another way
        plain = plain or type(owner).forward is nn.Linear.forward
    if leaf == "weight" and plain:
        return "router" if families.is_router(module) else "linear"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "norm" if "norm" in type(owner).__name__.lower() else "other"


def _parts(
    model: PreTrainedModel,
    group: _Group,
    tensors: Mapping[str, tuple[int, ...]],
    state: Mapping[str, torch.Tensor],
) -> Iterable[Place]:
    """The places of tensors that make one parameter: stacked, one behind the other, or transposed; others opaque."""
    operations = list(group.converter.operations)
    kinds = [type(each).__name__ for each in operations]
    stacked = kinds[:1] == ["MergeModulelist"] and operations[0].dim == 0
    joined = kinds == (["MergeModulelist", "Concatenate"] if stacked else ["Concatenate"])
    joined = joined and operations[-1].dim == (1 if stacked else 0)
    if len(group.targets) == 1 and kinds == ["Transpose"]:
        (disk,) = [name for names in group.disk.values() for name in names]
        axes = len(tensors[disk])
        if {operations[0].dim0 % axes, operations[0].dim1 % axes} == {axes - 2, axes - 1}:
            turned = not operations[0].check_dims or tensors[disk] != tuple(state[group.first].shape)
            yield _place(model, disk, group.first, transposed=turned)
            return
    if kinds == [_SHARED_OUT] and (operations[0].stack_dim, operations[0].concat_dim) == (0, 1):
        yield from _shared_out(model, group, tensors)
        return
    if len(group.targets) > 1 or not (joined or kinds == ["MergeModulelist"]):
        split = _split(model, group, state)
        for names in group.disk.values():
            for disk in names:
                yield _place(model, disk, group.first, opaque=True, split=split)
        return
    first = 0
    for pattern in group.converter.source_patterns:
        names = group.disk.get(pattern, [])
        for index, disk in enumerate(names):
            last = first + (tensors[disk][0] if tensors[disk] else 1)
            how = {"rows": (first, last)} if joined else {}
            yield _place(model, disk, group.first, index=index if stacked else None, **how)
            first = first if stacked else last
        if stacked and names:
            first += tensors[names[0]][0]


def _shared_out(
    model: PreTrainedModel, group: _Group, tensors: Mapping[str, tuple[int, ...]]
) -> Iterable[Place]:
    """The places of experts of which the first share makes one parameter, the next share another one."""
    first = dict.fromkeys(group.targets, 0)
    joined = len(group.converter.source_patterns) > 1
    for pattern in group.converter.source_patterns:
        names = group.disk.get(pattern, [])
        each = -(-len(names) // len(group.targets))
        for index, disk in enumerate(names):
            target = group.targets[index // each]
            rows = first[target], first[target] + tensors[disk][0]
            yield _place(model, disk, target, index=index % each, rows=rows if joined else None)
        for number, target in enumerate(group.targets):
            first[target] += sum(tensors[disk][0] for disk in names[number * each :][:1])


def _split(
    model: PreTrainedModel, group: _Group, state: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, int], ...]:
    """The weights of linears, and their rows, that a conversion cuts one tensor into; () if it does anything else."""
    operations = group.converter.operations
    alone = len(operations) == 1 and [len(names) for names in group.disk.values()] == [1]
    cuts = alone and type(operations[0]).__name__ in ("Chunk", "Split") and operations[0].dim == 0
    if not cuts or not all(target in state for target in group.targets):
        return ()
    if any(_place(model, "", target).kind != "linear" for target in group.targets):
        return ()
    return tuple((target, state[target].shape[0]) for target in group.targets)


def _translated(name: str, known: Mapping[str, str]) -> str:
    """A module's name with the longest part that is `known` replaced."""
    head = name
    while head and head not in known:
        head = head.rpartition(".")[0]
    return known[head] + name.removeprefix(head) if head else name


def _under(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in modules)


def _towers(model: PreTrainedModel, blocks: str) -> Iterable[str]:
    """Module names of the transformers models of their own that do not hold the decoder blocks."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and name and not f"{blocks}.".startswith(f"{name}."):
            yield name


def _beside(model: PreTrainedModel) -> Iterable[str]:
    """Module names of what lies beside the language model of a wrapper and its output head."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder = names.get(id(model.get_decoder()), "")
    if not decoder or model.config.get_text_config() is model.config:
        return
    kept = {decoder, names.get(id(model.get_output_embeddings()), decoder)}
    for name in names.values():
        if name and not any(_under(each, [name]) or _under(name, [each]) for each in kept):
            yield name
