"""By what a quantized tiny model is judged: how far its logits are from the original's, how much of it is packed.

A random model may amplify any change of its weights (sharp attention, recurrent states). So the error is compared with
that of the original whose weights got random noise of the size of rounding: that noise knows nothing of quantkit, and a
linear that is stored wrongly is far beyond it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantkit.layers.quant_experts import QuantExperts
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models import families
from quantkit.models.experts import Experts, part_of, stack_of
from quantkit.models.parallel import ParallelLinears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.scheme import Grid

NOISE = 2.0  # as many times the error by noise is wrong
DRAWS = 6  # of noise, if one is not enough: a router in doubt sends a token elsewhere with some and not with others
LEAST = 0.002  # relative error that is never wrong: that of sums in another order


def limit(by_noise: float) -> float:
    """The relative error of the logits from which on a result is wrong. by_noise: the error by noise of that size."""
    return max(LEAST, NOISE * by_noise)


def grids(loaded: nn.Module) -> dict[str, Grid]:
    """The packed linears of a model and the grids of their weights."""
    return {n: m.scheme.weights for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}


@torch.no_grad()
def noisy(original: PreTrainedModel, loaded: nn.Module, seed: int = 0) -> PreTrainedModel:
    """A copy of a model in which what is packed in `loaded` got noise: uniform, as wide as one step of an integer grid
    that spans each group of weights.
    """
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    for name, grid in grids(loaded).items():
        turned = _weight(model, loaded, name)
        groups = turned.reshape(turned.shape[0], -1, grid.group(turned.shape[1]))  # (N, K/G, G)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        span = 2 * torch.maximum(high, -low) if grid.symmetric else high - low
        noise = (torch.rand(groups.shape, generator=generator) - 0.5) * span / (2**grid.bits - 1)
        turned.add_(noise.reshape(turned.shape))
    return model


def _weight(model: nn.Module, loaded: nn.Module, name: str) -> torch.Tensor:
    """The weight [N, K] in a dense model, whose experts may be stacked, of the linear called `name` in another one."""
    owner, _, rest = name.rpartition(".")
    if isinstance(loaded.get_submodule(owner), ParallelLinears):
        return model.get_submodule(owner).get_parameter("weight").data[int(rest)]
    owner, _, number = owner.rpartition(".")
    experts = loaded.get_submodule(owner) if number.isdecimal() else None
    if not isinstance(experts, Experts | QuantExperts):
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight").data
        return weight.T if type(linear).__name__ == "Conv1D" else weight
    role = next(role for role, leaf in experts.names.items() if leaf == rest)
    stack = model.get_submodule(owner).get_parameter(stack_of(role, "weight", experts.shape)).data
    return part_of(stack, int(number), role, "weight", experts.shape)


def share(original: PreTrainedModel, loaded: nn.Module) -> float:
    """How much of the matrices of a language model is quantized, from 0 to 1, counted in weights.

    Embeddings, output head, and what a wrapper has beside its language model do not count; everything else with two
    axes and more does.
    """
    whole = _matrices(original)
    left = {name for name, _ in loaded.named_parameters()}
    total = sum(whole.values())
    return sum(n for name, n in whole.items() if name not in left) / total if total else 0.0


def _matrices(model: PreTrainedModel) -> dict[str, int]:
    """Name -> number of weights of the parameters that `share` counts."""
    apart = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    apart += [head for head in (model.get_output_embeddings(),) if head is not None]
    tables = {id(p) for module in apart for p in module.parameters(recurse=False)}
    wrapper = any(hasattr(model.config, f"{sense}_config") for sense in ("vision", "audio", "vq"))
    text = model.get_decoder() if wrapper else model
    inside = {id(p) for p in text.parameters()}
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and id(p) in inside and id(p) not in tables and not families.tower(name)
    }
