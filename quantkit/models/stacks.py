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

_BOTH = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Stack:
    """Tensors [E, ...] of one kind.

    pattern: of their names on disk; its first group and `behind` are the name of the experts. linears: those in it, in
    order. leaf: "weight" or "bias".
    """

    pattern: re.Pattern[str]
    linears: tuple[str, ...]
    leaf: str = "weight"
    behind: str = ""


_EXPERTS = r"^((?:.*\.)?experts)\."
STACKS = (
    Stack(re.compile(_EXPERTS + r"(?:gate_up_proj|fc1|w13_weight)(?:\.weight)?$"), _BOTH),
    Stack(re.compile(_EXPERTS + r"gate_up_proj_bias$"), _BOTH, "bias"),
    Stack(re.compile(_EXPERTS + r"up_proj(?:\.weight)?$"), ("up_proj",)),
    Stack(re.compile(_EXPERTS + r"(?:down_proj|fc2|w2_weight)(?:\.weight)?$"), ("down_proj",)),
    Stack(re.compile(_EXPERTS + r"down_proj_bias$"), ("down_proj",), "bias"),
    Stack(re.compile(r"^(.*block_sparse_moe)\.input_linear\.weight$"), _BOTH, behind=".experts"),
    Stack(re.compile(r"^(.*block_sparse_moe)\.output_linear\.weight$"), ("down_proj",), behind=".experts"),
)


def taken_apart(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint with every linear of every expert in place of the stacks that hold them."""
    hidden = text_config(config).get("hidden_size")
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        pairs = ((stack, stack.pattern.match(name)) for stack in STACKS)
        stack, match = next(((each, m) for each, m in pairs if m), (None, None))
        if stack is None or match is None or len(info.shape) != (3 if stack.leaf == "weight" else 2):
            found[name] = info
        else:
            found |= {each.name: each for each in _apart(f"{match[1]}{stack.behind}", stack, info, hidden)}
    return found


def _apart(experts: str, stack: Stack, info: TensorInfo, hidden: object) -> Iterator[TensorInfo]:
    """One tensor for every linear of a stack. hidden: features of the experts' inputs and outputs."""
    count, *own = info.shape
    if stack.leaf == "weight" and _turned(own, stack.linears == ("down_proj",), hidden):
        own.reverse()
    shape = (own[0] // len(stack.linears), *own[1:])
    share = info.nbytes // max(1, count * len(stack.linears))
    for expert in range(count):
        for linear in stack.linears:
            which = OfExpert(expert, linear.removesuffix("_proj"), len(stack.linears) == 2)
            name = f"{experts}.{expert}.{linear}.{stack.leaf}"
            yield TensorInfo(name, info.dtype, shape, info.file, 0, share, (info,), which)


def _turned(own: list[int], down: bool, hidden: object) -> bool:
    """Whether matrices lie [in, out], as the side of the hidden size says where only one has it."""
    straight, turned = (own[0], own[1]) if down else (own[1], own[0])
    return hidden == turned != straight
