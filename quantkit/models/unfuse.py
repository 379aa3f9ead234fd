"""`unfuse`: a model's stacked experts give way to experts with linears of their own, under their names on disk."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from quantkit.errors import ModelError
from quantkit.models.experts import ROLES, Experts, SlottedExperts, is_stacked, shape_of
from quantkit.models.experts_proof import prove, prove_parallel
from quantkit.models.parallel import ParallelLinears, is_parallel
from quantkit.models.places import Place, Places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNFUSED = re.compile(r"^(.*)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")
_NUMBERED = re.compile(r"^(.*)\.(\d+)\.weight$")
_STACKED = re.compile(r"^(gate_up_proj|up_proj|down_proj)(_bias)?$")


def unfuse(model: PreTrainedModel, places: Places, only: frozenset[str] | None = None) -> Places:
    """Put `Experts` in place of the stacked modules of the language model; the places of their linears' tensors.

    Linears are called as on disk, or `gate_proj`, `up_proj` and `down_proj` where the disk stacks them too. only: names
    on disk, without leaf, of the linears whose modules are meant, in towers too; None: all. ModelError if tensors on
    disk are made into experts in a way that is not understood, or if `Experts` does not compute what the stacked module
    does.
    """
    by_disk, proved = dict(places.by_disk), set()
    for name, stacked in list(model.named_modules()):
        if is_parallel(stacked):
            by_disk |= _parallel(model, name, stacked, places, only)
            continue
        if not is_stacked(stacked) or (only is None and not places.in_text(name)):
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


def _parallel(
    model: PreTrainedModel, name: str, stacked: nn.Module, places: Places, only: frozenset[str] | None
) -> dict[str, Place]:
    """Put `ParallelLinears` in place of the module `name`, if the disk has a tensor for each; the places of those."""
    pairs = ((disk, _NUMBERED.match(disk)) for disk in places.extra())
    found = {
        disk: f"{name}.{match[2]}.weight"
        for disk, match in pairs
        if match and places.in_model(match[1]) == name
    }
    if not found or (only is not None and not any(disk.rpartition(".")[0] in only for disk in found)):
        return {}
    prove_parallel(stacked)
    model.set_submodule(name, ParallelLinears(stacked))
    return {disk: Place(disk, parameter, "linear", "Linear") for disk, parameter in found.items()}


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
