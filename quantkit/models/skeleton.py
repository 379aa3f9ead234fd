"""A transformers model whose parameters take no memory until a part of it is loaded, one decoder block at a time.

The parameters lie on torch's meta device. Buffers are real (`include_buffers=False`), because rotary tables and masks
are computed, not stored in checkpoints. A loaded block is a copy of its meta block; freeing it puts the meta block
back, whatever was swapped inside the copy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn

from quantkit.errors import ModelError
from quantkit.models import families
from quantkit.models.blocks import NUMBERED, predicts_further
from quantkit.models.borders import foreign_errors, quiet
from quantkit.models.classes import model_class
from quantkit.models.config import MODEL_FREE
from quantkit.models.experts import Experts
from quantkit.models.parallel import ParallelLinears
from quantkit.models.places import Place, Places, find_places
from quantkit.models.source import Source
from quantkit.models.tensors import TensorInfo, named, torch_dtype
from quantkit.models.unfuse import unfuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The empty model of a checkpoint, in eval mode, with meta parameters of type `dtype`; see `places`.

    ModelError lists tensors the checkpoint lacks, shapes that differ, and decoder blocks that config.json does not
    count. A head that is stored beside the embedding it is tied to joins `source.dropped`; tensors that the model has
    no parameter for are left for the run to carry.
    """
    config = copy.deepcopy(source.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with (
        quiet(),
        foreign_errors(f"{source.path}: transformers cannot build a model from config.json", MODEL_FREE),
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
    ):
        model: PreTrainedModel = model_class(config)._from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.eval()
    with quiet(), foreign_errors(f"{source.path}: the names of its tensors"):
        prefix, blocks = find_blocks(model)
        tensors = source.headers.tensors
        stacks = {each.parts[0].name: each for each in tensors.values() if each.expert}
        shapes = {name: each.parts[0].shape for name, each in stacks.items()}
        shapes |= {name: tensors[name].shape for name in source.names() if not tensors[name].expert}
        found = find_places(model, shapes, prefix, len(blocks))
        model.__dict__["_places"] = unfuse(model, found.of(source.names()))  # past nn.Module's bookkeeping
        _lay_stacks(model, source, stacks, found)
    check_fit(model, source)
    source.dropped |= duplicates(model, source)
    return model


def _lay_stacks(
    model: PreTrainedModel, source: Source, stacks: Mapping[str, TensorInfo], found: Places
) -> None:
    """Tell the source how the stacks of experts on disk lie.

    stacks: name -> one of the linears in it. found: places while the model stacks them too.
    """
    for name, linear in stacks.items():
        place, which = found.by_disk[name], linear.expert
        if place.whole and _is_parallel(model, place.parameter or ""):
            source.lay_stack(name, transposed=False, interleaved=False)
            continue
        experts = _experts_of(model, place.parameter or "")
        if experts is None or which is None:
            raise ModelError(
                f"{source.path}: {name} looks like the experts of a layer, and the model has no such place"
            )
        alternate, turned = found.deinterleaved(name), which.role in experts.shape.transposed
        beside = not (which.halved or turned) and found.beside(name) == which.role
        if not (place.whole or place.transposed or alternate or beside):
            raise ModelError(f"{source.path}: {name} is made into experts in a way that is not supported")
        transposed = turned != place.transposed and linear.name.endswith(".weight")
        source.lay_stack(name, transposed, experts.shape.interleaved != alternate)


def _is_parallel(model: PreTrainedModel, parameter: str) -> bool:
    """Whether linears of several experts stand where a parameter was."""
    return bool(parameter) and isinstance(model.get_submodule(parameter.rpartition(".")[0]), ParallelLinears)


def _experts_of(model: PreTrainedModel, parameter: str) -> Experts | None:
    """The experts that stand where a parameter was."""
    name = parameter.rpartition(".")[0]
    while name:
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            return module
        name = name.rpartition(".")[0]
    return None


def places(model: PreTrainedModel) -> Places:
    """Where every tensor of the checkpoint goes in a model that `build` has made."""
    found: Places = model.__dict__["_places"]
    return found


def reader(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that is called with the tokens of a text and gives logits: nearly always the whole model."""
    name = families.READERS.get(model.config.model_type, "")
    found: Any = model.get_submodule(name)
    return found  # type: ignore[no-any-return]


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tied parameter -> name of the parameter it shares, as transformers lists them."""
    ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return ties


def duplicates(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Disk name -> reason, for every stored tensor that is only the second name of another one: a tied head."""
    held, ties = places(model).by_parameter, tied(model)
    return {
        part.disk: f"tied to {_first(held, target)}"
        for name, target in ties.items()
        if name in held and target in held
        for part in held[name]
    }


def find_blocks(model: nn.Module, prefix: str | None = None) -> tuple[str, nn.ModuleList]:
    """(module name, list) of the decoder blocks.

    At `prefix`; else the list in the language model that is as long as its config says, the outermost of these; else
    the longest list of modules of one class.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if prefix is not None:
        if prefix not in lists:
            raise ModelError(f"the model has no list of blocks {prefix!r}; it has {named(lists) or 'none'}")
        return prefix, lists[prefix]
    decoder, count = _decoder(model)
    text = {n: m for n, m in lists.items() if n.startswith(decoder) and not families.tower(n)}
    counted = [name for name, blocks in text.items() if len(blocks) == count]
    if counted:
        best = min(counted, key=lambda name: name.count("."))
        return best, lists[best]
    lists = {n: m for n, m in (text or lists).items() if len({type(block) for block in m}) == 1}
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of equal decoder blocks; it is not supported")
    best = max(lists, key=lambda name: (len(lists[name]), -name.count(".")))
    return best, lists[best]


def _decoder(model: Any) -> tuple[str, int | None]:
    """(how names inside the language model begin, how many blocks its config counts)."""
    if not hasattr(model, "get_decoder"):
        return "", None
    decoder = model.get_decoder()
    name = next((n for n, m in model.named_modules() if m is decoder), "")
    return f"{name}." if name else "", getattr(model.config.get_text_config(), "num_hidden_layers", None)


def load_outside(
    model: PreTrainedModel,
    source: Source,
    blocks_prefix: str,
    skip: Container[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Load what lies outside the blocks: embeddings, final norm, head; tied ones as one Parameter.

    Towers stay on meta, but for the parameters that transformers asks for the model's device.

    skip: tensor names left on meta. dtype None: what the skeleton was built with.
    """
    ties, wanted = tied(model), _wanted(model)
    inside = f"{blocks_prefix}."
    where = places(model)
    asked = _first_parameters(model, blocks_prefix)
    names = [
        n for n in wanted if not (n.startswith(inside) or n in skip or (where.in_tower(n) and n not in asked))
    ]
    for name in names:
        if name not in ties:
            tensor = parameter(model, source, name, dtype or wanted[name].dtype)
            _assign(model, name, tensor.to(device))
    for name in names:
        if name in ties:
            _assign(model, name, model.get_parameter(ties[name]))
    _move_buffers(model, device, lambda name: not name.startswith(inside))


def _first_parameters(model: nn.Module, inside: str) -> set[str]:
    """The first parameter of the model and of every module around `inside`: `PreTrainedModel.device` is where it is."""
    parts = inside.split(".")
    around = (".".join(parts[:depth]) for depth in range(len(parts)))
    firsts = ((name, next(model.get_submodule(name).named_parameters(), None)) for name in around)
    return {f"{name}.{first[0]}".removeprefix(".") for name, first in firsts if first is not None}


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
    """Load decoder block `index` in place in `model` and return it; its experts stay on meta (`read_linear`).

    dtype None: what the skeleton was built with. stored: full names of tensors read as stored.
    """
    prefix, blocks = find_blocks(model, blocks_prefix)
    meta: nn.Module = blocks[index].__dict__.get(
        "_meta_block", blocks[index]
    )  # another walk may have loaded it
    configs = (model.config, model.config.get_text_config())
    block = copy.deepcopy(meta, {id(each): each for each in configs})
    experts = [f"{name}." for name, module in block.named_modules() if isinstance(module, Experts)]
    for name, place in _wanted(block).items():
        full = f"{prefix}.{index}.{name}"
        if any(name.startswith(each) and name.removeprefix(each)[0].isdecimal() for each in experts):
            continue
        tensor = parameter(model, source, full, None if full in stored else dtype or place.dtype)
        _assign(block, name, tensor.to(device))
    _move_buffers(block, device, lambda name: True)
    block.__dict__["_meta_block"] = meta  # past nn.Module's bookkeeping: it is no submodule
    blocks[index] = block
    return block


def read_linear(
    model: PreTrainedModel, source: Source, name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias or None) of the linear called `name` in the model, as stored, on the CPU."""
    bias = f"{name}.bias"
    has_bias = model.get_submodule(name).bias is not None
    weight = parameter(model, source, f"{name}.weight")
    return weight, parameter(model, source, bias) if has_bias else None


def free_block(model: PreTrainedModel, index: int, blocks_prefix: str | None = None) -> None:
    """Put the meta block back; the loaded one is freed with the last reference to it."""
    _, blocks = find_blocks(model, blocks_prefix)
    blocks[index] = blocks[index].__dict__.get("_meta_block", blocks[index])


def _wanted(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers a checkpoint holds, tied ones under each of their names."""
    return dict(module.state_dict(keep_vars=True))


def parameter(
    model: PreTrainedModel, source: Source, name: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A parameter or buffer of the model in `dtype` (None: as stored), on the CPU, made from its tensors on disk."""
    where = places(model)
    name = _stored_as(name, where, tied(model) if name not in where.by_parameter else {})
    if name not in where.by_parameter:
        raise ModelError(f"{source.path} has no tensor for {name}")
    parts = where.by_parameter[name]
    if len(parts) == 1 and parts[0].whole:
        return source.tensor(parts[0].disk, dtype)
    if any(part.opaque for part in parts):
        return where.opaque(name, lambda disk: source.tensor(disk, dtype), model)
    first = torch_dtype(source.raw(parts[0].disk).dtype)
    out = torch.empty(model.state_dict()[name].shape, dtype=dtype or first)
    for part in parts:
        into = out if part.index is None else out[part.index]
        into = into if part.rows is None else into[slice(*part.rows)]
        tensor = source.tensor(part.disk, dtype)
        into.copy_(tensor.transpose(-1, -2) if part.transposed else tensor)
    return out


def _stored_as(name: str, where: Places, ties: dict[str, str]) -> str:
    """A checkpoint may hold a tied pair under either name."""
    held = where.by_parameter
    if name in held:
        return name
    others = [ties.get(name, name), *(other for other, target in ties.items() if target == name)]
    return next((other for other in others if other in held), name)


def check_fit(model: PreTrainedModel, source: Source) -> None:
    """ModelError listing everything by which a checkpoint does not fit its config.json."""
    wanted, ties, where = _wanted(model), tied(model), places(model)
    held, problems = where.by_parameter, []
    missing = [n for n in wanted if n not in ties and _stored_as(n, where, ties) not in held]
    extra = {
        where.in_model(name.rpartition(".")[0]) + "." + name.rpartition(".")[2]: name
        for name in where.extra()
    }
    unknown = [extra[name] for name in misfits(model, source.headers.config, extra)]
    if missing:
        problems.append(f"tensors that are missing: {named(missing)}")
        unknown = unknown or where.extra()
    if unknown:
        problems.append(f"tensors {type(model).__name__} has no place for: {named(unknown)}")
    for name, place in wanted.items():
        for part in held.get(name, ()):
            shape = source.raw(part.disk).shape
            if part.whole and shape != tuple(place.shape):
                problems.append(
                    f"{part.disk} has the shape {list(shape)}, config.json asks for {list(place.shape)}"
                )
    for name, target in ties.items():
        if name not in held or target not in held:
            continue
        one, other = _first(held, name), _first(held, target)
        if not source.same(one, other):
            problems.append(
                f"{one} differs from {other}, to which config.json ties it; set tie_word_embeddings: false there"
            )
    if problems:
        raise ModelError(
            f"{source.path} does not fit its config.json: {'; '.join(problems)} (what must fit and what is only "
            "carried: docs/architectures.md)"
        )


def misfits(model: PreTrainedModel, config: Mapping[str, Any], extra: Iterable[str]) -> list[str]:
    """Those of the tensors without a parameter that show that config.json describes another model; others are carried.

    A tensor of a module that has others (a bias, say) would be left out of what it computes, and decoder blocks
    that config.json (`config`) does not count would be left out whole. extra: names as in the model. What transformers
    itself lists as unused, and layers that predict further tokens (MTP), fit.
    """
    prefix, blocks = find_blocks(model)
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    modules, found, beyond = dict(model.named_modules()), [], []
    for name in extra:
        match, owner = NUMBERED.match(name), modules.get(name.rpartition(".")[0])
        if match and match[1] == prefix and int(match[2]) >= len(blocks):
            beyond.append(name)
        elif owner is not None and (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            found.append(name)
    found += [] if predicts_further(config, beyond) else beyond
    return [name for name in found if not any(re.search(pattern, name) for pattern in patterns)]


def _first(held: Mapping[str, tuple[Place, ...]], name: str) -> str:
    return held[name][0].disk


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
