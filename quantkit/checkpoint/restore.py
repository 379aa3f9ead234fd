"""Quantized layers of a loaded checkpoint put back to full precision, one at a time, to see what each of them costs.

A layer is restored by putting the original model's module in its place. Where a transform has moved a scale from one
module into others, they only fit together: those modules are restored as one. So are the experts of a layer, and all
of a block in a checkpoint that does not say what was moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from quantkit.checkpoint.manifest import MANIFEST, read_manifest
from quantkit.checkpoint.plugin import packed_linears
from quantkit.errors import ModelError
from quantkit.models.skeleton import find_blocks

if TYPE_CHECKING:
    from quantkit_eval.attribution import Restore
    from transformers import PreTrainedModel

MOST = 300  # units; beyond that, whole blocks are restored
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")


def restorations(
    path: Path, model: PreTrainedModel, original: PreTrainedModel, most: int = MOST
) -> tuple[dict[str, Restore], str]:
    """(name -> what restores that part of `model`, what the parts are, in words).

    path: the folder that `model` was loaded from. original: the unquantized model, in the same dtype and on the same
    device; its modules are lent, not copied. most: with more parts than that, whole blocks are restored. ModelError for
    models that are spread over devices, and for an original that lacks a quantized module.
    """
    spread = [each for each in (model, original) if getattr(each, "hf_device_map", None)]
    if spread or model.device != original.device:
        raise ModelError(
            "layers can be restored only where model and original are on one device; load both without a device map"
        )
    prefix, blocks = find_blocks(model)
    targets = dict.fromkeys(_target(original, name) for name, _ in packed_linears(model))
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    groups, by = {name: {name} for name in targets}, "layer"
    if manifest is not None:
        groups = _joined(prefix, len(blocks), targets, _folded(manifest.scaling), original)
    if manifest is None or len(groups) > most:
        groups, by = _by_block(prefix, groups), "block"
    elif any(len(names) > 1 for names in groups.values()):
        by = "layer or group of layers that share a scale"
    return {name: partial(_lent, model, original, sorted(names)) for name, names in groups.items()}, by


def _target(original: nn.Module, name: str) -> str:
    """The module that is put in the place of a packed linear: the first one outwards that the original has too."""
    if match := _EXPERT.match(name):
        name = match[1]
    while name:
        if _has(original, name):
            return name
        name = name.rpartition(".")[0]
    raise ModelError("the original has none of the quantized modules; is it the model that was quantized?")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _folded(scaling: Iterable[Mapping[str, Any]]) -> list[set[str]]:
    """Names inside a block that one scale was moved between, in any block."""
    return [
        {str(each["producer"]), *map(str, each["consumers"])}
        for each in scaling
        if each.get("producer") and not each.get("left_out") and each.get("exponent", 1) is not None
    ]


def _joined(
    prefix: str, blocks: int, targets: Iterable[str], folds: list[set[str]], original: nn.Module
) -> dict[str, set[str]]:
    """The modules of each unit, under the name of its first quantized one."""
    groups = {name: {name} for name in targets}
    of = {name: name for name in groups}  # module -> its unit
    for number in range(blocks):
        for fold in folds:
            full = [f"{prefix}.{number}.{name}" for name in sorted(fold)]
            names = {_target(original, name) for name in full if _has(original, name) or name in of}
            units = [unit for unit in groups if unit in {of[name] for name in names if name in of}]
            if not units:
                continue
            first = units[0]
            groups[first] |= names
            for unit in units[1:]:
                groups[first] |= groups.pop(unit)
            of |= dict.fromkeys(groups[first], first)
    order = {name: number for number, (name, _) in enumerate(original.named_modules())}
    ordered = {unit: sorted(names, key=order.__getitem__) for unit, names in groups.items()}
    return {_label(prefix, unit, names): set(names) for unit, names in ordered.items()}


def _label(prefix: str, first: str, names: list[str]) -> str:
    """A unit by its modules: that of one module by its name."""
    if len(names) == 1:
        return first
    block = re.match(rf"{re.escape(prefix)}\.\d+\.", first)
    front = block[0] if block else ""
    return front + " + ".join(name.removeprefix(front) for name in names)


def _by_block(prefix: str, groups: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Whole blocks, and what is quantized outside them."""
    blocks: dict[str, set[str]] = {}
    for names in groups.values():
        for name in names:
            match = re.match(rf"{re.escape(prefix)}\.\d+(?=\.)", name)
            blocks.setdefault(match[0] if match else name, set()).add(match[0] if match else name)
    return blocks


@contextmanager
def _lent(model: nn.Module, original: nn.Module, names: list[str]) -> Iterator[None]:
    """While it is entered, these modules of `model` are those of `original`."""
    own = {name: model.get_submodule(name) for name in names}
    try:
        for name in names:
            model.set_submodule(name, original.get_submodule(name))
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


__all__ = ["MOST", "restorations"]
