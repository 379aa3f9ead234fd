"""What is a linear, decided by names and shapes alone: for checkpoints whose model class is not there; without torch.

A linear is a 2-D `.weight` in a numbered decoder block that no table of `families.py` knows as something else. A router
is also known by its place: it lies beside a list of experts and has as many rows. Stacked experts (3-D) are left, since
a file does not say which of their axes is the output. GPT-2's Conv1D stores [K, N]: a bias as long as the second axis
shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantkit.errors import ModelError
from quantkit.formats.expert_names import asked, asked_of_left
from quantkit.models import families
from quantkit.models.blocks import NUMBERED, Blocks, find_blocks
from quantkit.models.headers import Headers
from quantkit.models.tensors import TensorInfo

_EXPERT = re.compile(r"^(.+)\.experts\.(\d+)\.")
_STACKED = re.compile(r"^(.+)\.experts\.[^.]+(\.weight)?$")
_LEAF = ".weight"
ENGINES_HEAD = "lm_head"  # what engines call an output head, whatever the checkpoint has


@dataclass(frozen=True)
class Named:
    """A weight that names and shape allow to be a linear. shape: (N, K). left: why it stays unless a rule names it."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    left: str | None


@dataclass(frozen=True)
class Found:
    """What names and shapes say about a checkpoint. refused: matrix or stack -> why it is no linear for certain."""

    blocks: Blocks
    linears: tuple[Named, ...]
    refused: Mapping[str, str]


def find_linears(headers: Headers) -> Found:
    """Every tensor of two axes or more, as a linear, as one that is left, or as something else."""
    try:
        blocks = find_blocks(headers.path, headers.config, headers.tensors)
    except ModelError:
        if any(NUMBERED.match(name) and name.endswith(_LEAF) for name in headers.tensors):
            raise
        blocks = Blocks("", 0, {})
    experts = _experts(headers.tensors)
    turned = _transposed(headers)
    linears: list[Named] = []
    refused: dict[str, str] = {}
    for disk, info in headers.tensors.items():
        if len(info.shape) < 2:
            continue
        name = disk.removesuffix(_LEAF)
        reason = _no_linear(disk, info)
        if reason is None and headers.tied and families.is_head(name):
            reason = "tied to the embedding"
        if reason is not None:
            refused[name] = reason
            continue
        rows, columns = info.shape
        left = _left(headers, blocks, experts, disk, info)
        shape = (columns, rows) if name in turned else (rows, columns)
        linears.append(Named(name, shape, name in turned, blocks.of.get(disk), left))
    linears.sort(key=lambda linear: (linear.block is None, linear.block or 0))
    return Found(blocks, tuple(linears), refused)


def _no_linear(disk: str, info: TensorInfo) -> str | None:
    """Why a tensor of two axes or more is no linear, whatever a rule says."""
    name = disk.removesuffix(_LEAF)
    if families.is_head(name):
        return None
    if (table := _first(families.TABLES, name)) is not None:
        return table
    if len(info.shape) > 2:
        if _STACKED.match(disk):
            return "stacked experts: the file does not say which axis is the output"
        return f"{len(info.shape)} axes"
    if not disk.endswith(_LEAF):
        return "a parameter of its own, no layer's weight"
    return None if info.dtype.startswith(("F", "BF")) else f"stored as {info.dtype}"


def _left(
    headers: Headers, blocks: Blocks, experts: Mapping[str, int], disk: str, info: TensorInfo
) -> str | None:
    """Why a linear stays as it is unless a rule names it; None: it does not."""
    name = disk.removesuffix(_LEAF)
    if (part := families.tower(name)) is not None:
        return f"{part}: what sees or hears, or leads from there to the language model"
    if families.MTP.search(disk):
        return "a layer that predicts further tokens (MTP)"
    if (reason := _first(families.BY_NAME, name) or families.set_aside(name)) is not None:
        return reason
    parent, _, leaf = name.rpartition(".")
    if experts.get(parent) == info.shape[0] and not leaf.endswith("_proj"):
        return f"a router: one row for each of {info.shape[0]} experts"
    number = NUMBERED.match(disk)
    beside = headers.config.get("is_encoder_decoder") and number is not None
    if disk not in blocks.of and not beside:
        if number is not None and number[1] == blocks.prefix:
            return "a layer that predicts further tokens (MTP)"
        return "outside the decoder blocks"
    few = min(info.shape)
    return f"only {few} rows or columns" if few < families.FEWEST else None


def _experts(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Module that holds experts -> how many there are."""
    counts: dict[str, int] = {}
    for disk, info in tensors.items():
        if match := _EXPERT.match(disk):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
        elif (match := _STACKED.match(disk)) and len(info.shape) == 3:
            counts[match[1]] = info.shape[0]
    return counts


def _transposed(headers: Headers) -> set[str]:
    """The linears stored as [K, N]: by family, or shown by a bias. Square ones go with the others of GPT-2's names."""
    names = [disk.removesuffix(_LEAF) for disk in headers.tensors if disk.endswith(_LEAF)]
    found = {name for name in names if families.is_conv1d(headers.model_type, name)}
    shown = {name for name in names if _bias_says(headers.tensors, name)}
    if shown:
        leaves = {name.rpartition(".")[2] for name in shown} | families.CONV1D
        found |= shown | {name for name in names if name.rpartition(".")[2] in leaves}
    return found


def _bias_says(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether a bias is as long as the second axis of a weight and not as the first, in a linear of GPT-2's names."""
    weight, bias = tensors[f"{name}{_LEAF}"], tensors.get(f"{name}.bias")
    if bias is None or len(weight.shape) != 2 or len(bias.shape) != 1:
        return False
    return weight.shape[1] == bias.shape[0] != weight.shape[0]


def _first(table: Iterable[tuple[re.Pattern[str], str]], name: str) -> str | None:
    return next((reason for pattern, reason in table if pattern.search(name)), None)


def ignore_patterns(left: Iterable[str], quantized: Iterable[str], prefix: str, count: int) -> list[str]:
    """What a config's `ignore` says: the names of linears that are left, as expressions that no quantized one fits.

    Engines rename the front of names, so an expression is the shortest end of a name, numbers left open, that is
    enough; towers, MTP layers and stacked experts are named by the part that says so. `lm_head` is always there: a
    model has one even if its checkpoint does not. prefix, count: of the decoder blocks.
    """
    taken, left = set(quantized), list(left)
    beside = asked_of_left(left, taken)
    taken |= {*asked(taken)}
    found = dict.fromkeys([ENGINES_HEAD])
    for name in [*left, *beside]:
        known = any(re.match(each.removeprefix("re:"), name) for each in found if each.startswith("re:"))
        if name not in found and not known and _first(families.TABLES, name) is None:
            found[_pattern(name, taken, prefix, count)] = None
    return sorted(found)


def _pattern(name: str, quantized: set[str], prefix: str, count: int) -> str:
    """One expression for a name, or the name."""
    tower, parts = families.tower(name), name.split(".")
    tries = [rf"re:.*{re.escape(tower)}.*"] if tower else []
    if families.MTP.search(f"{name}."):
        tries.append("re:.*mtp.*")
    number = NUMBERED.match(f"{name}.")
    if number is not None and number[1] == prefix and int(number[2]) >= count:
        tries.append(rf"re:.*{re.escape(prefix.rpartition('.')[2])}\.{number[2]}\..*")
    if _STACKED.match(name):
        tries += [r"re:.*\.experts(\..*)?$", rf"re:.*\.{_expression(_holder(name))}\.experts(\..*)?$"]
    ends = [parts[-count:] for count in range(1, len(parts))]
    tries += [rf"re:.*\.{_expression(end)}$" for end in ends]
    tries += [rf"re:.*\.{re.escape('.'.join(end))}$" for end in ends]
    return next((each for each in tries if not any(re.match(each[3:], q) for q in quantized)), name)


def _holder(name: str) -> list[str]:
    """The last part of the name of the module that holds stacked experts."""
    return name.split(".experts.")[0].split(".")[-1:]


def _expression(parts: Iterable[str]) -> str:
    """The parts of a name as an expression, numbers left open."""
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in parts)
