"""How a router ranks the experts that it does not choose, found by watching it.

The experts of a layer are given the router's choice alone: k experts per token and their weights. The scores that it
chose by are some tensor [T, E] computed on the way: logits, probabilities, or either after a correction. Routers are
told apart by what they compute and not by name: every such tensor is kept while the block runs, and one by which the
chosen experts of every token come before all others explains the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import ModelError
from quantkit.models.experts import Experts

if TYPE_CHECKING:
    from quantkit.calibration.ranks import Ranks

INSTEAD = "use experts.calibrate: routed, or all"


class Scores(TorchDispatchMode):
    """Keeps a copy of every tensor of floats with a row of E for each of T tokens that is computed inside, in order."""

    def __init__(self, tokens: int, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape = (tokens, experts)
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, op: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op, and look at what it gives."""
        out = op(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if self._are(each):
                scores = each.detach().reshape(self._shape)
                if not (self.seen and torch.equal(self.seen[-1], scores)):
                    self.seen.append(scores.clone())
        return out

    def _are(self, value: object) -> bool:
        tokens, experts = self._shape
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape[-1:] == (experts,)
            and value.numel() == tokens * experts
        )


def explains(scores: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether the chosen experts of every token [T, K] are those with the highest scores [T, E], ties allowed.

    Scores that are the same for all others, such as the choice itself written as a mask, rank nothing and do not count.
    """
    experts = scores.shape[1]
    if not index.numel() or int(index.min()) < 0 or int(index.max()) >= experts:
        return False
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index.long(), value=True)
    inside, outside = scores.masked_fill(~chosen, torch.inf), scores.masked_fill(chosen, -torch.inf)
    lowest, best, worst = inside.amin(1), outside.amax(1), scores.masked_fill(chosen, torch.inf).amin(1)
    ranks = experts - index.shape[1] < 2 or bool((best > worst).any())
    return bool((lowest >= best).all() and (lowest > best).any()) and ranks


def rankings(seen: Sequence[torch.Tensor], index: torch.Tensor, top: int) -> dict[int, torch.Tensor]:
    """Place in `seen` of every tensor of scores that explains the choice -> each token's first experts [T, top].

    Ties, such as all experts of groups that were left out, are in the order of the scores computed before.
    """
    found: dict[int, torch.Tensor] = {}
    if not seen:
        return found
    index = index.to(seen[0].device)
    order = torch.arange(seen[0].shape[1], device=index.device).expand_as(seen[0])
    for place, scores in enumerate(seen):
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
        if explains(scores, index):
            found[place] = order[:, :top].to(torch.int32).cpu()
    return found


def agreed(found: Iterable[Iterable[int]], ranks: Ranks, where: str, top: int) -> int:
    """The first tensor of scores that explains the choice in every chunk of every process; ModelError if none does.

    found: by chunk of this process, the places of those that do. where: name of the experts.
    """
    own = [set(each) for each in found]
    gathered = ranks.gather(set.intersection(*own) if own else None)
    places = set.intersection(*(each for each in gathered if each is not None))
    if not places:
        raise ModelError(
            f"{where}: experts.calibrate: top:{top} goes by the router's scores of all experts, and its choice follows "
            f"no scores that its block computes; {INSTEAD}"
        )
    return min(places)


def refuse_weighted(model: nn.Module, top: int) -> None:
    """ModelError if a model's experts are given tokens that are weighted already, so that no others can be added."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and not module.routed:
            raise ModelError(
                f"{name}: experts.calibrate: top:{top} needs tokens that an expert was not chosen for, and its inputs "
                f"are multiplied by the router's weight of the choice; {INSTEAD}"
            )
