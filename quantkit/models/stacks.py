"""Tensors that stack all experts of a layer, taken apart by their names and shapes; without torch.

Some families store a layer's experts as [E, 2I, H] and [E, H, I] (or with the last two exchanged) instead of two or
three matrices per expert. Everything behind the headers sees one tensor for every linear of every expert, as if it had
been stored so. How the stack lies is known when the model is built (`Source.lay_stack`); names and shapes do not need
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.models.blocks import text_config
from quantkit.models.tensors import OfExpert, TensorInfo

_ALONE = ("",)  # linears that are called by the number of their expert
_BOTH, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Stack:
    """Tensors [E, ...] of one kind.

    pattern: of their names on disk; its first group and `behind` are the name of the experts. linears: those in it, in
    order. leaf: "weight" or "bias". count: keys of config.json that lead to the number of experts, of tensors whose
    first axis is that of the rows of all experts.
    """

    pattern: re.Pattern[str]
    linears: tuple[str, ...]
    leaf: str = "weight"
    behind: str = ""
    count: tuple[str, ...] = ()


_EXPERTS = r"^((?:.*\.)?experts)\."
_DBRX = ("ffn_config", "moe_num_experts")
STACKS = (
    Stack(re.compile(_EXPERTS + r"(?:gate_up_proj|fc1|w13_weight)(?:\.weight)?$"), _BOTH),
    Stack(re.compile(_EXPERTS + r"gate_up_proj_bias$"), _BOTH, "bias"),
    Stack(re.compile(_EXPERTS + r"up_proj(?:\.weight)?$"), ("up_proj",)),
    Stack(re.compile(_EXPERTS + r"(?:down_proj|fc2|w2_weight)(?:\.weight)?$"), _DOWN),
    Stack(re.compile(_EXPERTS + r"down_proj_bias$"), _DOWN, "bias"),
    Stack(re.compile(r"^(.*block_sparse_moe)\.input_linear\.weight$"), _BOTH, behind=".experts"),
    Stack(re.compile(r"^(.*block_sparse_moe)\.output_linear\.weight$"), _DOWN, behind=".experts"),
    *(
        Stack(re.compile(rf"^(.*\.moe)\.{name}\.weight$"), (name,), behind=".experts")
        for name in (*_BOTH, *_DOWN)
    ),
    Stack(re.compile(r"^(.*\.(?:mlp|experts)\.(?:in|out)put_linear)\.weight$"), _ALONE),
    *(
        Stack(re.compile(_EXPERTS + rf"mlp\.{leaf}$"), (name,), count=_DBRX)
        for leaf, name in (("w1", "gate_proj"), ("v1", "up_proj"), ("w2", "down_proj"))
    ),
)


Sizes = Mapping[tuple[str, ...], tuple[int, ...]]  # linears of a stack of weights -> its last two axes


def taken_apart(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint with every linear of every expert in place of the stacks that hold them."""
    text = text_config(config)
    hidden = text.get("hidden_size", text.get("d_model"))
    stacks = {name: each for name, info in tensors.items() if (each := _stack(name, info, text))}
    sizes: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}
    for stack, experts, shape in stacks.values():
        if stack.leaf == "weight":
            sizes.setdefault(experts, {})[stack.linears] = shape[1:]
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name not in stacks:
            found[name] = info
            continue
        stack, experts, shape = stacks[name]
        turned = stack.leaf == "weight" and _turned(stack.linears, sizes[experts], hidden)
        found |= {each.name: each for each in _apart(experts, stack, info, shape, turned)}
    return found


def _stack(
    name: str, info: TensorInfo, config: Mapping[str, Any]
) -> tuple[Stack, str, tuple[int, ...]] | None:
    """(kind, name of the experts, shape [E, ...]) of a tensor that is a stack. config: of the language model."""
    if len(info.shape) == 2 and name.endswith(".weight"):
        return None  # as nearly every tensor: matrices with this ending are no stacks
    pairs = ((stack, stack.pattern.match(name)) for stack in STACKS)
    stack, match = next(((each, m) for each, m in pairs if m), (None, None))
    if stack is None or match is None:
        return None
    shape = info.shape
    if stack.count:
        found: Any = config
        for key in stack.count:
            found = found.get(key) if isinstance(found, Mapping) else None
        if type(found) is not int or found < 1 or len(shape) != 2 or shape[0] % found:
            return None
        shape = (found, shape[0] // found, shape[1])
    if len(shape) != (3 if stack.leaf == "weight" else 2):
        return None
    return stack, f"{match[1]}{stack.behind}", shape


def _apart(
    experts: str, stack: Stack, info: TensorInfo, shape: tuple[int, ...], turned: bool
) -> Iterator[TensorInfo]:
    """One tensor for every linear of a stack. shape: [E, ...]. turned: its matrices lie [in, out]."""
    count, *own = shape
    if turned:
        own.reverse()
    each = (own[0] // len(stack.linears), *own[1:])
    share = info.nbytes // max(1, count * len(stack.linears))
    for expert in range(count):
        for linear in stack.linears:
            which = OfExpert(expert, linear.removesuffix("_proj"), len(stack.linears) == 2, count)
            name = ".".join(filter(None, (experts, str(expert), linear, stack.leaf)))
            yield TensorInfo(name, info.dtype, each, info.file, 0, share, (info,), which)


def _turned(linears: tuple[str, ...], sizes: Sizes, hidden: object) -> bool:
    """Whether matrices lie [in, out], as gate and up beside down say, or the side of the hidden size where only one has
    it.
    """
    if linears == _ALONE:
        return False
    both, down = sizes.get(_BOTH), sizes.get(_DOWN)
    if both and down:
        straight, turned = both == (2 * down[1], down[0]), both == (down[1], 2 * down[0])
        if straight != turned:
            return turned
    rows, columns = sizes[linears]
    inner, outer = (rows, columns) if linears == _DOWN else (columns, rows)
    return hidden == outer != inner
