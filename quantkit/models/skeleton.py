"""A transformers causal LM whose parameters take no memory until a part of it is loaded, one decoder block at a time.

The parameters lie on torch's meta device. Buffers are real (`include_buffers=False`), because rotary tables and masks
are computed, not stored in checkpoints. A loaded block is a copy of its meta block; freeing it puts the meta block
back, whatever was swapped inside the copy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import nn

from quantkit.errors import ModelError
from quantkit.models.borders import foreign_errors, quiet
from quantkit.models.source import Source
from quantkit.models.tensors import named

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The empty model of a checkpoint, in eval mode, with meta parameters of type `dtype`.

    ModelError lists tensors the model lacks, those the checkpoint lacks, and shapes that differ. A head that is stored
    beside the embedding it is tied to joins `source.dropped`.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with (
        quiet(),
        foreign_errors(f"{source.path}: transformers cannot build a model from config.json"),
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    model.requires_grad_(False)
    model.eval()
    _check(model, source)
    source.dropped |= duplicates(model, source)
    return model


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tied parameter -> name of the parameter it shares, as transformers lists them."""
    ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return ties


def duplicates(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Disk name -> reason, for every stored tensor that is only the second name of another one: a tied head."""
    ties = tied(model)
    return {
        source.disk_name(name): f"tied to {ties[name]}"
        for name in source.names()
        if name in ties and ties[name] in source
    }


def ignored(model: PreTrainedModel, source: Source) -> list[str]:
    """Disk names of tensors that this version of transformers has no use for and says so; they are carried."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    wanted = _wanted(model)
    names = [name for name in source.names() if name not in wanted]
    return [source.disk_name(name) for name in names if any(re.search(p, name) for p in patterns)]


def find_blocks(model: PreTrainedModel, prefix: str | None = None) -> tuple[str, nn.ModuleList]:
    """(module name, list) of the decoder blocks: at `prefix`, or the longest list of modules of one class."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if prefix is not None:
        if prefix not in lists:
            raise ModelError(f"the model has no list of blocks {prefix!r}; it has {named(lists) or 'none'}")
        return prefix, lists[prefix]
    lists = {n: m for n, m in lists.items() if len({type(block) for block in m}) == 1}
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of equal decoder blocks; it is not supported")
    best = max(lists, key=lambda name: (len(lists[name]), -name.count(".")))
    return best, lists[best]


def load_outside(
    model: PreTrainedModel,
    source: Source,
    blocks_prefix: str,
    skip: Container[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Load what lies outside the blocks: embeddings, final norm, head; tied ones as one Parameter.

    skip: tensor names left on meta. dtype None: what the skeleton was built with.
    """
    ties, wanted = tied(model), _wanted(model)
    inside = f"{blocks_prefix}."
    names = [n for n in wanted if not n.startswith(inside) and n not in skip]
    for name in names:
        if name not in ties:
            _load(model, name, source, _stored_as(name, source, ties), dtype or wanted[name].dtype, device)
    for name in names:
        if name in ties:
            _assign(model, name, model.get_parameter(ties[name]))
    _move_buffers(model, device, lambda name: not name.startswith(inside))


def head_tensors(model: PreTrainedModel) -> set[str]:
    """Names of the output head's own tensors; empty when it is tied to the embedding."""
    head, ties = model.get_output_embeddings(), tied(model)
    prefix = next((n for n, m in model.named_modules() if m is head), None)
    names = set() if prefix is None else {f"{prefix}.{n}" for n in _wanted(head)}
    return set() if names & ties.keys() else names


def free_outside(model: PreTrainedModel, blocks_prefix: str) -> None:
    """Put every parameter outside the blocks back on meta."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not name.startswith(f"{blocks_prefix}."):
            _assign(model, name, torch.empty_like(parameter, device="meta"))


def load_block(
    model: PreTrainedModel,
    source: Source,
    index: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stored: Container[str] = (),
    blocks_prefix: str | None = None,
) -> nn.Module:
    """Load decoder block `index` in place in `model` and return it.

    dtype None: what the skeleton was built with. stored: full names of tensors read as stored.
    """
    prefix, blocks = find_blocks(model, blocks_prefix)
    meta: nn.Module = blocks[index].__dict__.get(
        "_meta_block", blocks[index]
    )  # another walk may have loaded it
    block = copy.deepcopy(meta, {id(model.config): model.config})
    for name, place in _wanted(block).items():
        full = f"{prefix}.{index}.{name}"
        _load(block, name, source, full, None if full in stored else dtype or place.dtype, device)
    _move_buffers(block, device, lambda name: True)
    block.__dict__["_meta_block"] = meta  # past nn.Module's bookkeeping: it is no submodule
    blocks[index] = block
    return block


def free_block(model: PreTrainedModel, index: int, blocks_prefix: str | None = None) -> None:
    """Put the meta block back; the loaded one is freed with the last reference to it."""
    _, blocks = find_blocks(model, blocks_prefix)
    blocks[index] = blocks[index].__dict__.get("_meta_block", blocks[index])


def _wanted(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers a checkpoint holds, tied ones under each of their names."""
    return dict(module.state_dict(keep_vars=True))


def _stored_as(name: str, source: Source, ties: dict[str, str]) -> str:
    """A checkpoint may hold a tied pair under either name."""
    if name in source:
        return name
    return next((other for other, target in ties.items() if target == name and other in source), name)


def _check(model: PreTrainedModel, source: Source) -> None:
    wanted, ties = _wanted(model), tied(model)
    gone = {*source.dropped, *ignored(model, source)}
    problems = []
    unknown = [
        source.disk_name(n) for n in source.names() if n not in wanted and source.disk_name(n) not in gone
    ]
    if unknown:
        problems.append(f"tensors {type(model).__name__} has no place for: {named(unknown)}")
    missing = [n for n in wanted if n not in ties and _stored_as(n, source, ties) not in source]
    if missing:
        problems.append(f"tensors that are missing: {named(missing)}")
    for name, parameter in wanted.items():
        if name in source and source.raw(name).shape != tuple(parameter.shape):
            problems.append(
                f"{source.disk_name(name)} has the shape {list(source.raw(name).shape)}, config.json "
                f"asks for {list(parameter.shape)}"
            )
    for name, target in ties.items():
        if name in source and target in source and not source.same(name, target):
            problems.append(
                f"{source.disk_name(name)} differs from {source.disk_name(target)}, to which config.json "
                "ties it; set tie_word_embeddings: false there"
            )
    if problems:
        raise ModelError(f"{source.path} does not fit its config.json: " + "; ".join(problems))


def _load(
    module: nn.Module,
    name: str,
    source: Source,
    stored_name: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    _assign(module, name, source.tensor(stored_name, dtype).to(device))


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _move_buffers(module: nn.Module, device: torch.device | str, chosen: Callable[[str], bool]) -> None:
    for name, buffer in list(module.named_buffers()):
        if chosen(name) and buffer.device.type != "meta":
            _assign(module, name, buffer.to(device))
