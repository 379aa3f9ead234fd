"""What `ignore` in config.json says: which linears engines must not build quantized.

transformers compares the names of its modules, vLLM and SGLang their own, which they map from those on disk. So single
linears are named as on disk and as in the model. Towers and layers that predict further tokens (MTP), of which engines
build more linears than one checkpoint may name, get patterns that fit every spelling.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from torch import nn

from quantkit.models import families, skeleton
from quantkit.models.blocks import NUMBERED
from quantkit.models.places import Places
from quantkit.structure.trace import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ignore_list(model: PreTrainedModel, planned: Container[str]) -> list[str]:
    """Names and patterns ("re:", matched from the start of a name) of all linears that are not `planned`, sorted.

    model: made by `skeleton.build`. planned: names of the quantized linears, on disk and in the model.
    """
    places = skeleton.places(model)
    spellings = {
        name: places.on_disk(name)
        for name, module in model.named_modules()
        if is_linear(module) or _routes(name, module)
    }
    ties = {name: target.removesuffix(".weight") for name, target in skeleton.tied(model).items()}
    shared = {name: ties[f"{name}.weight"] for name in spellings if f"{name}.weight" in ties}
    for name, target in shared.items():  # a linear that blocks share is quantized under one name
        if target in planned:
            del spellings[name]
    used = [each for pair in spellings.items() for each in pair if each in planned]
    extra = [name.removesuffix(".weight") for name in places.extra() if name.endswith(".weight")]
    extra = [name for name in extra if "norm" not in name.rpartition(".")[2]]
    patterns = [*_of_towers(places, spellings), *_of_extra(places, extra)]
    patterns = [p for p in dict.fromkeys(patterns) if not any(re.match(p, name) for name in used)]
    single = {each for pair in spellings.items() for each in pair if each not in planned}
    single |= set(extra)
    left = [name for name in single if not any(re.match(pattern, name) for pattern in patterns)]
    return sorted([*left, *(f"re:{pattern}" for pattern in patterns)])


def _routes(name: str, module: nn.Module) -> bool:
    """Whether a module is the router of a mixture, which engines build as a linear, whatever transformers does."""
    weight = module._parameters.get("weight")
    return families.is_router(name) and weight is not None and weight.dim() == 2


def _of_towers(places: Places, spellings: dict[str, str]) -> Iterable[str]:
    """One pattern for each part of a name that says tower, of the linears beside the language model."""
    for module, disk in spellings.items():
        if not places.in_text(module):
            for part in filter(None, (families.tower(module), families.tower(disk))):
                yield f".*{part}.*"


def _of_extra(places: Places, extra: Iterable[str]) -> Iterable[str]:
    """Patterns of the layers that predict further tokens: by their name, or by the number of their block."""
    prefix = places.on_disk(places.blocks)
    for name in extra:
        match = NUMBERED.match(f"{name}.")
        if families.MTP.search(f"{name}."):
            yield ".*mtp.*"
        elif match and match[1] == prefix and int(match[2]) >= places.n_blocks:
            yield rf".*{re.escape(prefix.rpartition('.')[2])}\.{match[2]}\..*"
