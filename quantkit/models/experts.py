"""Mixtures of experts: every expert as linears of its own, whatever transformers holds them in.

transformers keeps the experts of a layer as stacked parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], in
one module that is called with the hidden states and the router's choice. Here that module gives way to `Experts`, which
computes the same with `nn.Linear`s, so that planning, calibration, rounding, files and loading see an expert's linears
as they see any other. What the stacked module says of itself (which way its weights lie, how gate and up are combined)
is asked of it and never known by family, and that both compute the same is proved before anything is rounded.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.errors import ModelError
from quantkit.models.places import Place, Places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}  # role -> its name where the disk gives none
STACKS = ("gate_up_proj", "up_proj", "down_proj")  # parameters of transformers' modules
_UNFUSED = re.compile(r"^(.*)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")
_STACKED = re.compile(r"^(gate_up_proj|up_proj|down_proj)(_bias)?$")
_TOLERANCE = 1e-6  # of the proof, relative; it runs in float64, but some families add up in fp32


@dataclass(frozen=True)
class Shape:
    """What a stacked module says of itself.

    experts: how many it has weights of; hidden, width: features of its inputs and of what lies between. transposed: its
    weights lie [in, out]. interleaved: rows of gate and up alternate. gated: whether it has a gate.
    """

    experts: int
    hidden: int
    width: int
    transposed: bool
    interleaved: bool
    gated: bool
    bias: bool


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
        self.__dict__["stacked"] = stacked  # past nn.Module's bookkeeping: it has no weights to load
        self.__dict__["answer"] = None  # who computes the output instead
        shape = self.shape
        sizes = {
            "gate": (shape.hidden, shape.width),
            "up": (shape.hidden, shape.width),
            "down": (shape.width, shape.hidden),
        }
        dtype = stacked.get_parameter("down_proj").dtype
        with torch.device("meta"):
            for number in range(shape.experts):
                expert = nn.Module()
                for role, name in self.names.items():
                    expert.add_module(name, nn.Linear(*sizes[role], bias=shape.bias, dtype=dtype))
                self.add_module(str(number), expert.requires_grad_(False))
        for name, module in stacked.named_children():
            if any(True for _ in module.parameters()):  # a norm behind each expert
                self.add_module(name, module)

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
    def _answered(self) -> Callable[..., torch.Tensor] | None:
        found: Callable[..., torch.Tensor] | None = self.__dict__["answer"]
        return found

    def linear(self, expert: int, role: str) -> nn.Module:
        """One linear of one expert."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def between(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """What goes into down, from the outputs of gate and up [T, I]."""
        stacked: Any = self.__dict__["stacked"]
        if gate is not None and not hasattr(stacked, "_apply_gate"):
            activated: torch.Tensor = stacked.act_fn(gate)
            return activated * up
        return self.combined(up if gate is None else torch.cat((gate, up), -1))

    def combined(self, both: torch.Tensor) -> torch.Tensor:
        """What goes into down [T, I], from the outputs of gate and up side by side [T, 2I], or of up alone."""
        stacked: Any = self.__dict__["stacked"]
        if not self.shape.gated:
            out: torch.Tensor = stacked.act_fn(both)
            return out
        if not hasattr(stacked, "_apply_gate"):
            return self.between(*both.chunk(2, -1))
        if self.shape.interleaved:
            both = both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        combined: torch.Tensor = stacked._apply_gate(both)
        return combined

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
        """The weighted sum of the chosen experts, added up in the order of their numbers."""
        out = torch.zeros_like(hidden)
        if self._answered is not None:
            return self._answered(hidden, index, weights)
        if hidden.is_meta:
            return out
        for expert, token, slot in chosen(index, self.total):
            if expert < self.shape.experts:
                y = self.run(expert, hidden[token])
            else:  # an expert without weights hands on what it is given
                y = hidden[token]
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out

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
        for expert, own in enumerate(hidden.view(self.shape.experts, -1, hidden.shape[-1])):
            if len(token := own.any(-1).nonzero()[:, 0]):
                out.view(self.shape.experts, -1, hidden.shape[-1])[expert].index_copy_(
                    0, token, self.run(expert, own[token])
                )
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


def is_stacked(module: nn.Module) -> bool:
    """Whether a module of transformers holds the experts of a layer as stacked parameters."""
    down = module._parameters.get("down_proj")
    known = "gate_up_proj" in module._parameters or not {"gate_proj", "up_proj"} <= module._parameters.keys()
    return down is not None and down.dim() == 3 and known and not isinstance(module, Experts)


def shape_of(stacked: nn.Module) -> Shape:
    """What a stacked module says of itself; see `Shape`."""
    down = stacked.get_parameter("down_proj")
    up_name = "gate_up_proj" if "gate_up_proj" in stacked._parameters else "up_proj"
    up = stacked.get_parameter(up_name)
    gated = up_name == "gate_up_proj"
    by_shape = gated and up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
    transposed = bool(getattr(stacked, "is_transposed", by_shape))
    hidden, width = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    return Shape(
        experts=down.shape[0],
        hidden=hidden,
        width=width,
        transposed=transposed,
        interleaved=not getattr(stacked, "is_concatenated", True),
        gated=gated,
        bias="down_proj_bias" in stacked._parameters,
    )


def unfuse(model: PreTrainedModel, places: Places, only: frozenset[str] | None = None) -> Places:
    """Put `Experts` in place of the stacked modules of the language model; the places of their linears' tensors.

    Linears are called as on disk, or `gate_proj`, `up_proj` and `down_proj` where the disk stacks them too. only: names
    on disk, without leaf, of the linears whose modules are meant; None: all. ModelError if tensors on disk are made
    into experts in a way that is not understood, or if `Experts` does not compute what the stacked module does.
    """
    by_disk, proved = dict(places.by_disk), set()
    for name, stacked in list(model.named_modules()):
        if not is_stacked(stacked) or not places.in_text(name):
            continue
        found, names = _tensors(name, stacked, places)
        if only is not None and not any(disk.rpartition(".")[0] in only for disk in found):
            continue
        if not found:
            raise ModelError(
                f"{name} ({type(stacked).__name__}): the tensors of its experts are not one per expert and linear; "
                "this layout is not supported"
            )
        contract = inspect.signature(type(stacked).forward).parameters
        experts = (Experts if len(contract) > 2 or "args" in contract else SlottedExperts)(stacked, names)
        if type(stacked) not in proved:
            prove(stacked, type(experts), names)
            proved.add(type(stacked))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, experts)
        by_disk |= {disk: Place(disk, parameter, "linear", "Linear") for disk, parameter in found.items()}
    by_parameter: dict[str, tuple[Place, ...]] = {}
    for place in by_disk.values():
        if place.parameter is not None:
            by_parameter[place.parameter] = (*by_parameter.get(place.parameter, ()), place)
    kept = {
        name: parts for name, parts in places.by_parameter.items() if any(by_disk[p.disk] == p for p in parts)
    }
    return replace(places, by_disk=by_disk, by_parameter=kept | by_parameter)


def _tensors(name: str, stacked: nn.Module, places: Places) -> tuple[dict[str, str], dict[str, str]]:
    """(tensor on disk -> parameter of `Experts`, role -> name of its linears) for the stacked module `name`."""
    found: dict[str, str] = {}
    names = {role: leaf for role, leaf in ROLES.items() if role != "gate" or shape_of(stacked).gated}
    for parameter in stacked._parameters:
        match = _STACKED.match(parameter)
        for place in places.by_parameter.get(f"{name}.{parameter}", ()):
            if match is None or place.index is None or place.opaque:
                continue
            own = place.disk.split(".")
            leaf = "bias" if match[2] else own.pop()
            role = {"down_proj": "down", "up_proj": "up"}.get(match[1])
            role = role or ("gate" if place.rows is not None and place.rows[0] == 0 else "up")
            names[role] = own[-1]
            found[place.disk] = f"{name}.{place.index}.{own[-1]}.{leaf}"
    for disk in places.extra():
        match = _UNFUSED.match(disk)
        if match and places.in_model(match[1]) == name:
            found[disk] = f"{name}.{match[2]}.{match[3]}.{match[4]}"
    return found, names


@torch.no_grad()
def prove(stacked: nn.Module, unfused: type[Experts], names: Mapping[str, str]) -> None:
    """ModelError unless `Experts` gives what the stacked module gives, on small random weights and tokens, in float64.

    The small module is a copy of the stacked one with its sizes changed wherever they stand in it.
    """
    with torch.device("cpu"):  # a model is loaded under a device of its own
        off = _difference(stacked, unfused, names)
    if not off < _TOLERANCE:
        raise ModelError(
            f"{type(stacked).__name__}: its experts, taken apart, give another output (relative difference {off:.2g}); "
            "this kind of experts is not supported"
        )


def _difference(stacked: nn.Module, unfused: type[Experts], names: Mapping[str, str]) -> float:
    """The largest relative difference of `prove`."""
    small, shape = _small(stacked)
    experts = unfused(small, names)
    generator = torch.Generator().manual_seed(0)
    for parameter in small.parameters(recurse=False):
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for number in range(shape.experts):
        for role in names:
            linear = experts.linear(number, role)
            for leaf, _ in list(linear.named_parameters()):
                value = part_of(small.get_parameter(_holder(role, leaf, shape)), number, role, leaf, shape)
                setattr(linear, leaf, nn.Parameter(value.clone(), requires_grad=False))
    tokens = 12
    hidden = torch.randn(tokens, shape.hidden, generator=generator, dtype=torch.float64)
    if unfused is SlottedExperts:
        hidden = hidden.repeat(shape.experts, 1)
        hidden[::3] = 0
        given: tuple[torch.Tensor, ...] = (hidden,)
    else:
        scores = torch.rand(tokens, experts.total, generator=generator, dtype=torch.float64)
        weights, index = scores.topk(min(2, experts.total), -1)
        given = (hidden, index, weights)
    try:
        forward = getattr(type(stacked).forward, "__wrapped__", type(stacked).forward)
        wanted, got = forward(small, *given), experts(*given)
        return float((wanted - got).abs().max() / wanted.abs().max())
    except Exception as error:
        raise ModelError(
            f"{type(stacked).__name__} does not run with experts taken apart: {type(error).__name__}: {error}; "
            "this kind of experts is not supported"
        ) from error


def part_of(stacked: torch.Tensor, expert: int, role: str, leaf: str, shape: Shape) -> torch.Tensor:
    """The weight [N, K] or bias [N] of one linear, a view of a stacked parameter [E, ...]."""
    own = stacked[expert]
    if leaf == "weight" and shape.transposed:
        own = own.T
    if role == "down" or not shape.gated:
        return own
    first = 0 if role == "gate" else 1
    return own[first::2] if shape.interleaved else own.chunk(2)[first]


def _holder(role: str, leaf: str, shape: Shape) -> str:
    """The stacked parameter that holds a linear's weight or bias."""
    name = "down_proj" if role == "down" else "gate_up_proj" if shape.gated else "up_proj"
    return name if leaf == "weight" else f"{name}_bias"


def _small(stacked: nn.Module) -> tuple[nn.Module, Shape]:
    """(a copy with three experts of few features in float64, its shape)."""
    shape = shape_of(stacked)
    width = 4
    hidden = width if shape.hidden == shape.width else 2 * width if shape.hidden == 2 * shape.width else 6
    sizes = {2 * shape.width: 2 * width, shape.hidden: hidden, shape.width: width}
    few = min(3, shape.experts)
    small = copy.copy(stacked)
    small.__dict__.update(_parameters={}, _modules=dict(stacked._modules), _buffers=dict(stacked._buffers))
    extra = int(getattr(stacked, "total_experts", shape.experts)) - shape.experts
    counts = {shape.experts + extra: few + extra, shape.experts: few}
    for name, value in list(vars(small).items()):
        if type(value) is int:
            number = counts.get(value, value) if "expert" in name else sizes.get(value, value)
            setattr(small, name, number)
    for name, parameter in stacked.named_parameters(recurse=False):
        first, *rest = parameter.shape
        changed = [counts.get(first, first), *(sizes.get(size, size) for size in rest)]
        small._parameters[name] = nn.Parameter(
            torch.empty(changed, dtype=torch.float64, device="cpu"), requires_grad=False
        )
    for name, module in stacked._modules.items():
        if module is not None and any(True for _ in module.parameters()):
            small._modules[name] = _small_norm(module, sizes)
    return small, shape_of(small)


def _small_norm(module: nn.Module, sizes: Mapping[int, int]) -> nn.Module:
    """A copy of a norm with vectors of the small size."""
    made = copy.deepcopy(module)
    for each in made.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                size = [sizes.get(n, n) for n in parameter.shape]
                each._parameters[name] = nn.Parameter(
                    torch.ones(size, dtype=torch.float64), requires_grad=False
                )
    return made
