"""Mixtures of experts: every expert as linears of its own, whatever transformers holds them in.

transformers keeps the experts of a layer as stacked parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], in
one module that is called with the hidden states and the router's choice. Here that module gives way to `Experts`, which
computes the same with `nn.Linear`s, so that planning, calibration, rounding, files and loading see an expert's linears
as they see any other. What the stacked module says of itself (which way its weights lie, how gate and up are combined)
is asked of it and never known by family, and that both compute the same is proved before anything is rounded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Role of a linear -> its name where the disk gives none.
ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Layout:
    """Where a stacked module has its experts.

    stacks: role -> parameter that holds its weights [E, ...]; gate and up may share one. With two axes the first is
    that of all experts, and the module counts them in `num_experts`. activation: what is applied to the gate. turned:
    roles whose weights lie [in, out], where the module does not say it of all.
    """

    stacks: Mapping[str, str]
    activation: str = "act_fn"
    turned: frozenset[str] = frozenset()


LAYOUTS = (
    Layout({"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}),
    Layout({"up": "up_proj", "down": "down_proj"}),
    Layout({"gate": "mlp.w1", "up": "mlp.v1", "down": "mlp.w2"}, "mlp.activation_fn", frozenset({"down"})),
)


@dataclass(frozen=True)
class Shape:
    """What a stacked module says of itself.

    experts: how many it has weights of; hidden, width: features of its inputs and of what lies between. transposed:
    roles whose weights lie [in, out]. interleaved: rows of gate and up alternate. stacks: see `Layout`.
    """

    experts: int
    hidden: int
    width: int
    transposed: frozenset[str]
    interleaved: bool
    bias: bool
    stacks: Mapping[str, str]

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return "gate" in self.stacks

    @property
    def halved(self) -> bool:
        """Whether gate and up share a stack."""
        return self.stacks.get("gate") == self.stacks["up"]


class Experts(nn.Module):
    """The experts of one layer; expert e's linears are the children of child "e".

    stacked: the module of transformers in whose place it stands, on meta. names: role ("gate", "up", "down") -> name of
    the linear. Forward as there: (hidden [T, H], index [T, K] of the chosen experts, their weights [T, K]) -> [T, H].
    """

    is_experts = True
    routed = True  # called with the router's choice; else with tokens of each expert

    def __init__(self, stacked: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.shape, self.names = shape_of(stacked), dict(names)
        self._activation = attrgetter(layout_of(stacked).activation)
        self.__dict__["stacked"] = stacked  # past nn.Module's bookkeeping: it has no weights to load
        self.__dict__["answer"] = None  # who computes the output instead
        shape = self.shape
        sizes = {
            "gate": (shape.hidden, shape.width),
            "up": (shape.hidden, shape.width),
            "down": (shape.width, shape.hidden),
        }
        dtype = stacked.get_parameter(shape.stacks["down"]).dtype
        with torch.device("meta"):
            for number in range(shape.experts):
                expert = nn.Module()
                for role, name in self.names.items():
                    expert.add_module(name, nn.Linear(*sizes[role], bias=shape.bias, dtype=dtype))
                self.add_module(str(number), expert.requires_grad_(False))
        for name, module in stacked.named_children():
            holds = any(stack.startswith(f"{name}.") for stack in shape.stacks.values())
            if not holds and any(True for _ in module.parameters()):  # a norm behind each expert
                self._modules[name] = module  # `add_module` refuses names that `stacked` answers to

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        """A copy with the same stacked module, which is never changed."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        for shared in (self.__dict__["stacked"], self.__dict__["answer"]):
            memo[id(shared)] = shared
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def __getattr__(self, name: str) -> Any:
        """What a family's own code asks of the module it has made: sizes, and stacks that it would fill."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stacked"], name)

    @property
    def stacks(self) -> list[str]:
        """The parameters of the stacked module."""
        stacked: nn.Module = self.__dict__["stacked"]
        return list(dict.fromkeys((*stacked._parameters, *self.shape.stacks.values())))

    @property
    def _answered(self) -> Callable[..., torch.Tensor] | None:
        found: Callable[..., torch.Tensor] | None = self.__dict__["answer"]
        return found

    @torch.no_grad()
    def with_weights(self, stacked: nn.Module) -> Experts:
        """Such experts with the weights of a stacked module that is loaded, which may be let go of afterwards."""
        made = type(self)(self.__dict__["stacked"], self.names)
        for number in range(self.shape.experts):
            for role in self.names:
                linear = made.linear(number, role)
                for leaf, _ in list(linear.named_parameters()):
                    held = stacked.get_parameter(stack_of(role, leaf, self.shape))
                    own = part_of(held, number, role, leaf, self.shape).clone()
                    setattr(linear, leaf, nn.Parameter(own, requires_grad=False))
        for name, module in stacked.named_children():
            if name in made._modules:
                made._modules[name] = module
        return made.eval()

    def linear(self, expert: int, role: str) -> nn.Module:
        """One linear of one expert."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def between(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """What goes into down, from the outputs of gate and up [T, I]."""
        return self.combined(up if gate is None else torch.cat((gate, up), -1))

    def combined(self, both: torch.Tensor) -> torch.Tensor:
        """What goes into down [T, I], from the outputs of gate and up side by side [T, 2I], or of up alone."""
        stacked: Any = self.__dict__["stacked"]
        out: torch.Tensor
        if not self.shape.gated:
            out = self._activation(stacked)(both)
        elif not hasattr(stacked, "_apply_gate"):
            gate, up = both.chunk(2, -1)
            out = self._activation(stacked)(gate) * up
        else:
            if self.shape.interleaved:
                both = both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            out = stacked._apply_gate(both)
        return out

    def behind(self, out: torch.Tensor) -> torch.Tensor:
        """What happens to the output of down before it is weighted."""
        norm = self._modules.get("post_expert_norm")
        normed: torch.Tensor = out if norm is None else norm(out)
        return normed

    def through(self, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the linears of one expert, children of `expert`, make of some tokens [..., H], not weighted."""
        gate = expert.get_submodule(self.names["gate"])(x) if self.shape.gated else None
        up = expert.get_submodule(self.names["up"])(x)
        return self.behind(expert.get_submodule(self.names["down"])(self.between(gate, up)))

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The output [T, H] of one expert for some tokens, not weighted."""
        return self.through(self.get_submodule(str(expert)), x)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, added up in the order of their numbers. hidden: also [..., T, H]."""
        whole, hidden = hidden, hidden.flatten(0, -2)
        out = torch.zeros_like(hidden)
        if self._answered is not None:
            return self._answered(hidden, index, weights).view(whole.shape)
        if hidden.is_meta:
            return out.view(whole.shape)
        for expert, token, slot in chosen(index, self.total):
            if expert < self.shape.experts:
                y = self.run(expert, hidden[token])
            else:  # an expert without weights hands on what it is given
                y = hidden[token]
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out.view(whole.shape)

    @property
    def total(self) -> int:
        """How many experts the router chooses from, those without weights too."""
        return int(getattr(self.__dict__["stacked"], "total_experts", self.shape.experts))


class SlottedExperts(Experts):
    """Experts that are given every token once per expert, already weighted: [E * T, H] -> [E * T, H] (Llama 4)."""

    routed = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """A token that an expert was not chosen for is a row of zeros there, and stays one."""
        out = torch.zeros_like(hidden)
        if self._answered is not None:
            return self._answered(hidden)
        if hidden.is_meta:
            return out
        slots = (self.shape.experts, -1, hidden.shape[-1])
        for expert, (own, into) in enumerate(zip(hidden.view(slots), out.view(slots), strict=True)):
            if len(token := own.any(-1).nonzero()[:, 0]):
                into.index_copy_(0, token, self.run(expert, own[token]))
        return out


def chosen(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its tokens, the places among their K choices) of every expert that is chosen. index: [T, K]."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    first = 0
    for expert, count in enumerate(counts):
        if count:
            at = order[first : first + count]
            yield expert, at // index.shape[1], at % index.shape[1]
        first += count


def layout_of(module: nn.Module) -> Layout:
    """The layout of a stacked module; ModelError if it has none that is known."""
    for layout in LAYOUTS:
        held = [_held(module, stack) for stack in layout.stacks.values()]
        if all(each is not None for each in held) and "gate_proj" not in module._parameters:
            return layout
    raise ModelError(f"{type(module).__name__} has no stacked experts in a layout that is known")


def _held(module: nn.Module, path: str) -> nn.Parameter | None:
    """A parameter of a module or of what it holds, None where there is none."""
    owner, _, leaf = path.rpartition(".")
    holder = module._modules.get(owner) if owner else module
    return None if holder is None else holder._parameters.get(leaf)


def is_stacked(module: nn.Module) -> bool:
    """Whether a module of transformers holds the experts of a layer as stacked parameters."""
    if isinstance(module, Experts):
        return False
    try:
        down = module.get_parameter(layout_of(module).stacks["down"])
    except ModelError:
        return False
    return down.dim() == 3 or (down.dim() == 2 and hasattr(module, "num_experts"))


def run_eagerly(model: PreTrainedModel) -> None:
    """Let transformers run experts one by one, as quantkit does: in another order of adding up, a router in doubt sends
    tokens elsewhere, and models could not be compared.
    """
    # classes that know no other way do not let it be chosen
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")


def shape_of(stacked: nn.Module) -> Shape:
    """What a stacked module says of itself; see `Shape`."""
    layout = layout_of(stacked)
    down, up = (stacked.get_parameter(layout.stacks[role]) for role in ("down", "up"))
    count: Any = down.shape[0] if down.dim() == 3 else stacked.num_experts
    (first, second), own = ((each.numel() // each.shape[-1] // count, each.shape[-1]) for each in (down, up))
    halved = layout.stacks.get("gate") == layout.stacks["up"]
    by_shape = halved and own == (second, 2 * first)
    turned = frozenset(layout.stacks) if getattr(stacked, "is_transposed", by_shape) else layout.turned
    hidden, width = (second, first) if "down" in turned else (first, second)
    return Shape(
        experts=count,
        hidden=hidden,
        width=width,
        transposed=turned,
        interleaved=not getattr(stacked, "is_concatenated", True),
        bias=f"{layout.stacks['down']}_bias" in stacked._parameters,
        stacks=layout.stacks,
    )


def part_of(stacked: torch.Tensor, expert: int, role: str, leaf: str, shape: Shape) -> torch.Tensor:
    """The weight [N, K] or bias [N] of one linear, a view of a stacked parameter [E, ...]."""
    flat = leaf == "weight" and stacked.dim() == 2
    own = (stacked.unflatten(0, (shape.experts, -1)) if flat else stacked)[expert]
    if leaf == "weight" and role in shape.transposed:
        own = own.T
    if role == "down" or not shape.halved:
        return own
    first = 0 if role == "gate" else 1
    return own[first::2] if shape.interleaved else own.chunk(2)[first]


def stack_of(role: str, leaf: str, shape: Shape) -> str:
    """The stacked parameter that holds a linear's weight or bias."""
    name = shape.stacks[role]
    return name if leaf == "weight" else f"{name}_bias"
