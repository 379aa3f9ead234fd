"""The experts of a decoder block during calibration: a few at a time, however many there are.

A block is loaded without its experts. First the router's choices are recorded for all windows: what every token brings
to the experts, which ones it goes to, and how their outputs are weighted. Then each expert is read, worked on as a
small block of its own (`ExpertRun`) whose windows are the tokens that came to it, and freed; its outputs are added up
where the block will look for them. From then on the experts need not run again. So memory is that of the recorded
hidden states and of the experts that are worked on at once, on a CPU one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.calibration.forward import Stop
from quantkit.calibration.held import HeldLinear
from quantkit.calibration.ranking import Scores
from quantkit.calibration.spill import Spill, Spilled
from quantkit.calibration.streams import Rows
from quantkit.models.experts import Experts, chosen

if TYPE_CHECKING:
    from quantkit.plan import LayerPlan

At = tuple[bool, int]  # (whether of the full stream, first window of a chunk)


class OneExpert(nn.Module):
    """One expert as a block: hidden states [..., H] -> its output, not weighted. Its linears are `HeldLinear`s."""

    def __init__(self, experts: Experts, linears: Mapping[str, HeldLinear]) -> None:
        super().__init__()
        self.__dict__["experts"] = (
            experts  # past nn.Module's bookkeeping: a copy of this expert needs no other
        )
        for name, linear in linears.items():
            self.add_module(name, linear)

    def __deepcopy__(self, memo: dict[int, Any]) -> OneExpert:
        linears: Any = {name: copy.deepcopy(each, memo) for name, each in self.named_children()}
        return OneExpert(self.__dict__["experts"], linears).train(self.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What this expert makes of every token."""
        experts: Experts = self.__dict__["experts"]
        return experts.through(self, hidden)


class Routed:
    """What reached the experts of a layer in one chunk of one stream, and the sum of what they have given so far.

    Arguments as the experts are called with, on the CPU: hidden [T, H], and which of K experts each token goes to.
    spill: where hidden states and outputs lie instead of in memory.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: int,
        spill: Spill | None = None,
    ) -> None:
        self.index, self._weights = index, weights
        self.hidden: Rows = hidden if spill is None else spill.copy(hidden)
        self._of = {e: (token, slot) for e, token, slot in chosen(index, experts)}
        self._ranked: dict[int, torch.Tensor] | None = None
        self._out: Rows = (
            torch.zeros_like(hidden) if spill is None else spill.zeros(*hidden.shape, dtype=hidden.dtype)
        )

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return len(self.hidden)

    def tokens(self, expert: int) -> torch.Tensor:
        """Numbers of the tokens that an expert was chosen for, ascending."""
        return self._of[expert][0] if expert in self._of else torch.empty(0, dtype=torch.int64)

    def serving(self, expert: int) -> torch.Tensor:
        """Numbers of the tokens that an expert is calibrated on: its `tokens`, or those that `rank` gave it."""
        if self._ranked is None:
            return self.tokens(expert)
        return self._ranked.get(expert, torch.empty(0, dtype=torch.int64))

    def rank(self, ranking: torch.Tensor, experts: int) -> None:
        """From now on an expert is calibrated on the tokens that have it in their row of `ranking` [T, N]."""
        self._ranked = {expert: token for expert, token, _ in chosen(ranking, experts)}

    def inputs(self, expert: int, tokens: torch.Tensor) -> torch.Tensor | None:
        """What an expert would be given for any tokens; None if that is not known."""
        return self.hidden[tokens]

    def add(self, expert: int, given: torch.Tensor) -> None:
        """Take in what an expert gave for its `tokens`."""
        token, slot = self._of[expert]
        weighted = (given * self._weights[token, slot, None]).to(self._out.dtype)
        if isinstance(self._out, Spilled):
            rows, places = token.unique(return_inverse=True)
            self._out[rows] = self._out[rows].index_add_(0, places, weighted)
        else:
            self._out.index_add_(0, token, weighted)

    def forget(self) -> None:
        """Keep the output alone."""
        self.hidden = self.index = self._weights = torch.empty(0)
        self._ranked = None
        self._of.clear()

    def output(self) -> torch.Tensor:
        """What the experts return, once each has given its part."""
        return self._out[:]


class SlottedRouted(Routed):
    """The same where experts are given [E * T, H], every token once per expert and weighted by the choice already.

    Rows of zeros, where an expert was not chosen, are not kept (Llama 4).
    """

    def __init__(self, hidden: torch.Tensor, experts: int) -> None:
        self._shape, self._each, self._dtype = hidden.shape, len(hidden) // experts, hidden.dtype
        self._ranked = None
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for expert, rows in enumerate(hidden.view(experts, self._each, -1)):
            if len(token := rows.any(-1).nonzero()[:, 0]):
                self._given[expert] = token, rows[token].clone()

    @property
    def count(self) -> int:
        return self._each

    def tokens(self, expert: int) -> torch.Tensor:
        return self._given[expert][0] if expert in self._given else torch.empty(0, dtype=torch.int64)

    def inputs(self, expert: int, tokens: torch.Tensor) -> torch.Tensor | None:
        none = torch.empty(0, self._shape[-1], dtype=self._dtype)
        rows = self._given[expert][1] if expert in self._given else none
        return rows if torch.equal(self.tokens(expert), tokens) else None

    def add(self, expert: int, given: torch.Tensor) -> None:
        self._made[expert] = self._given[expert][0], given

    def forget(self) -> None:
        self._given.clear()

    def output(self) -> torch.Tensor:
        out = torch.zeros(self._shape, dtype=self._dtype)
        for expert, (tokens, given) in self._made.items():
            out[expert * self._each + tokens] = given
        return out


def _routed(
    hidden: torch.Tensor, choice: Sequence[torch.Tensor], experts: int, spill: Spill | None = None
) -> Routed:
    """What reached the experts. choice: their numbers and weights for every token, or nothing."""
    return Routed(hidden, choice[0], choice[1], experts, spill) if choice else SlottedRouted(hidden, experts)


@dataclass
class ExpertsStage:
    """The experts of one module of a loaded block.

    name: of the module, inside the block. plans: by expert, its planned linears by their names inside it. stored: by
    expert, the dtype on disk of its parameters. read, spill: see `expert_stages`.
    """

    name: str
    experts: Experts
    plans: Mapping[int, Mapping[str, LayerPlan]]
    stored: Mapping[int, Mapping[str, torch.dtype]]
    read: Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]
    spill: Spill | None = None
    at: At | None = None  # what the block is running, while it does
    done: bool = False
    _routed: dict[At, Routed] = field(default_factory=dict)
    _mode: str = "shapes"  # "shapes": zeros; "record"; "run"

    def __post_init__(self) -> None:
        self.experts.__dict__["answer"] = self._answer

    def through(self) -> None:
        """From now on the block can be run as a whole: an expert is read whenever a token comes to it."""
        self._mode = "run"

    def recorded(self, at: At) -> Routed:
        """What was recorded for a chunk."""
        return self._routed[at]

    def all_recorded(self) -> list[tuple[At, Routed]]:
        """What was recorded for every chunk of both streams."""
        return list(self._routed.items())

    def record(self, at: At, run: Callable[[], object], scores: Scores | None = None) -> None:
        """Record what reaches the experts in one chunk. run: runs the block on it. scores: watches it meanwhile.

        Nothing reaches experts that the block does not call for a text, such as those of pictures.
        """
        self._mode = "record"
        self.at = at
        try:
            with scores or nullcontext():
                run()
        except Stop:
            pass
        else:
            none = torch.empty(0, 1, dtype=torch.int64)
            width = self.experts.shape.hidden
            self._routed[at] = Routed(torch.empty(0, width), none, none.float(), self.experts.total)
        finally:
            self._mode, self.at = "run", None

    def finish(self) -> None:
        """Every expert with weights has given its outputs: with those of the others, they are replayed from now on."""
        self.done = True
        for routed in self._routed.values():
            for expert in range(self.experts.shape.experts, self.experts.total):
                if len(tokens := routed.tokens(expert)):
                    routed.add(expert, self._given(expert, routed, tokens, torch.device("cpu")))
            routed.forget()

    def close(self) -> None:
        """Forget everything: the block is done, and its module, which is there until the end, holds on to nothing."""
        self.experts.__dict__["answer"] = None
        self._routed.clear()

    def open(self, expert: int, device: torch.device) -> OneExpert:
        """One expert with its weights in their stored dtype."""
        linears = {}
        for name in self.experts.names.values():
            weight, bias = self.read(f"{self.name}.{expert}.{name}")
            plan = self.plans.get(expert, {}).get(name)
            inputs = None if plan is None else plan.scheme.inputs
            own = None if bias is None else bias.to(device)
            linears[name] = HeldLinear(weight.to(device), own, inputs)
        return OneExpert(self.experts, linears).eval()

    def _answer(self, hidden: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:
        """What the experts module returns, or Stop if it was only to be seen what it is given."""
        if self._mode == "shapes":
            return torch.zeros_like(hidden)
        if self._mode == "record":
            assert self.at is not None
            total = self.experts.total
            kept = [each.detach().cpu().clone() for each in choice]
            self._routed[self.at] = _routed(hidden.detach().cpu().clone(), kept, total, self.spill)
            raise Stop
        if self.done and self.at in self._routed:
            return self._routed[self.at].output().to(hidden)
        return self._now(hidden, *choice)

    def _now(self, hidden: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:
        """The output, from experts that are read for it alone."""
        total = self.experts.total
        routed = _routed(hidden, choice, total)
        for expert in range(total):
            if len(tokens := routed.tokens(expert)):
                routed.add(expert, self._given(expert, routed, tokens, hidden.device))
        return routed.output().to(hidden)

    def _given(self, expert: int, routed: Routed, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
        x = routed.inputs(expert, tokens)
        assert x is not None
        if expert >= self.experts.shape.experts:  # it has no weights and hands on what it is given
            return x
        given: torch.Tensor = self.open(expert, device)(x)
        return given


def expert_stages(
    block: nn.Module,
    plans: Mapping[str, LayerPlan],
    stored: Mapping[str, torch.dtype],
    read: Callable[[str], tuple[torch.Tensor, torch.Tensor | None]],
    spill: Spill | None = None,
) -> list[ExpertsStage]:
    """The experts modules of a loaded block, which are answered for from now on.

    plans: planned linears; stored: dtype on disk of parameters; both by name inside the block. read: gives (weight,
    bias or None) of a linear by its name inside the block. spill: where what is recorded lies instead of in memory.
    """
    return [
        ExpertsStage(name, module, _below(f"{name}.", plans), _below(f"{name}.", stored), read, spill)
        for name, module in block.named_modules()
        if isinstance(module, Experts)
    ]


def _below(prefix: str, named: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """By the number that follows `prefix` in their names, and by the rest: what is named there."""
    found: dict[int, dict[str, Any]] = {}
    for name, value in named.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal():
            found.setdefault(int(number), {})[rest] = value
    return found
