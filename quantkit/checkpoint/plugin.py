"""How transformers builds our layers: a quantization config and a quantizer, registered by `register()` only.

`quantkit.load` hands the `quantization_config` of config.json to transformers under the name "quantkit",
together with what the safetensors headers say; on the meta skeleton the quantizer swaps linears for
`QuantLinear` and checks every stored tensor before a byte of it is read. Saving writes the original config
back.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto as registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint import kv
from quantkit.checkpoint.saving import all_as_stored
from quantkit.checkpoint.split import cutting
from quantkit.errors import BackendError, ModelError
from quantkit.formats.registry import Codec, Shape, codec, codec_of
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models import families
from quantkit.models.experts import Experts
from quantkit.models.places import Place, find_places
from quantkit.models.skeleton import find_blocks
from quantkit.models.tensors import WEIGHT_DTYPES, stored_dtype, torch_dtype
from quantkit.models.unfuse import unfuse
from quantkit.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "quantkit"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype on disk, shape)


class PackedConfig(QuantizationConfigMixin):
    """stored: `quantization_config` of config.json. tensors: what the headers of the files say, by name on disk."""

    quant_method: Any

    def __init__(self, stored: dict[str, Any], tensors: Tensors, **_: Any) -> None:
        self.quant_method = METHOD
        self.stored, self.tensors = stored, tensors

    def to_dict(self) -> dict[str, Any]:
        """What config.json says; of a checkpoint that was packed anew, the method alone."""
        return {key: value for key, value in self.stored.items() if key not in ("schemes", "kv_cache")}


class PackedQuantizer(HfQuantizer):
    """Swaps and checks; reading is transformers' own."""

    quantization_config: PackedConfig
    requires_calibration = True  # reads what is quantized, quantizes nothing
    stacks: list[str]  # parameters in whose place experts have linears of their own
    experts: dict[str, str]  # expert -> its name on disk
    cut: list[str]  # packed linears that are one on disk with others

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **__: Any) -> None:
        stored = self.quantization_config.stored
        packing = codec_of(stored)
        names, tensors = by_module(model, packing, self.quantization_config.tensors)
        apart = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        self.stacks = [f"{name}.{stack}" for name, module in apart.items() for stack in module.stacks]
        self.experts = {
            f"{name}.{number}": names[f"{name}.{number}"]
            for name, module in apart.items()
            for number in range(module.shape.experts)
        }
        swap(model, packing, either(packing.parse(stored), names), tensors)
        if packing.kv_scheme(stored) is not None:
            kv.place_scales(model, tensors)
        check_shapes(model, packing, tensors)
        several = Counter(names[name] for name, _ in packed_linears(model))
        self.cut = [name for name, _ in packed_linears(model) if several[names[name]] > 1]
        self._shared = leave_out_shared(model)
        # What is left lives as long as the model: the types to save in.
        self.quantization_config.tensors = {n: (dtype, ()) for n, (dtype, _) in tensors.items()}
        # Some families (GPT-2) initialize weights of their blocks before loading: a stand-in without memory.
        for _, module in packed_linears(model):
            if "weight" not in module.tensors:
                module.weight = torch.empty(module.out_features, module.in_features, device="meta")

    def update_weight_conversions(self, conversions: list[Any], *_: Any) -> list[Any]:
        """transformers' conversions, without those that would stack experts which stay linears of their own."""
        kept = [
            each
            for each in cutting(conversions, self.cut)
            if not (isinstance(each, WeightConverter) and any(map(self._unstacked, each.target_patterns)))
        ]
        return kept + _namings(kept, self.experts)

    def _unstacked(self, target: str) -> bool:
        """Whether a conversion makes a stack that the model does not have any more. target: the end of its name."""
        return any(f".{stack}".endswith(f".{target.lstrip('.')}") for stack in self.stacks)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **__: Any) -> PreTrainedModel:
        for _, module in packed_linears(model):
            module.__dict__.pop("weight", None)
        for name, source in self._shared.items():
            model.set_submodule(name, model.get_submodule(source))
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What a checkpoint stores, also of layers that run on a layout of their own."""
        prepared = [(name, module) for name, module in packed_linears(model) if module.prepared]
        stored = {n: torch_dtype(dtype) for n, (dtype, _) in self.quantization_config.tensors.items()}
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            return None, {}  # offloaded: transformers fetches each tensor when it writes it
        state = all_as_stored(_once(model), stored)
        for name, module in prepared:
            try:
                state |= {f"{name}.{leaf}": tensor for leaf, tensor in module.on_disk().items()}
            except BackendError as error:
                raise BackendError(
                    f"{name}: {error}; copy the folder it was loaded from, or load it with backend='reference'"
                ) from None
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Every packed linear becomes the dense layer it stands for."""
        if any(module.offloaded for _, module in packed_linears(model)):
            raise BackendError("dequantize needs every layer in memory; load the model without a device_map")
        wanted = dtype if isinstance(dtype, torch.dtype) else model.dtype
        if any(module.scheme.inputs is not None for _, module in packed_linears(model)):
            warnings.warn(
                "dequantize keeps the weights only: inputs of linears are not rounded any more", stacklevel=3
            )
        dense = {id(module): _dense(module, wanted) for _, module in packed_linears(model)}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, dense[id(module)])
        model.__dict__.pop("save_pretrained", None)
        vars(model)["is_quantized"] = False
        move: Callable[..., PreTrainedModel] = model.to
        return move(wanted)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make the two classes known to transformers; again is harmless."""
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, PackedConfig)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, PackedQuantizer)


def packed_linears(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    """The packed linears of a model by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def _namings(conversions: list[Any], experts: Mapping[str, str]) -> list[WeightRenaming]:
    """Renamings that bring experts to their place where transformers' conversions name stacks of them only.

    experts: expert in the model -> its name on disk.
    """
    renamings = copy.deepcopy([each for each in conversions if isinstance(each, WeightRenaming)])
    found = {}
    for own, disk in experts.items():
        name = f"{disk}."
        for each in renamings:
            name, _ = each.rename_source_key(name)
        name, own = _inside_block(name.rstrip(".")), _inside_block(own)
        if name != own:
            found[re.escape(f".{name}.")] = f".{own}."
    return [WeightRenaming(name, own) for name, own in found.items()]


def _inside_block(expert: str) -> str:
    """The name of an expert inside its decoder block."""
    holder, _, number = expert.rpartition(".")
    parts = holder.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join([*parts[numbers[-1] + 1 if numbers else 0 :], number])


def _once(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, that of packed linears which blocks share under their first names only."""
    firsts = {name for name, _ in packed_linears(model)}
    again = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear) and name not in firsts
    ]
    return {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in again}


def by_module(model: PreTrainedModel, packing: Codec, tensors: Tensors) -> tuple[dict[str, str], Tensors]:
    """(module of every linear -> its name on disk, the tensors by the model's names of them).

    model: still with dense linears. Packed tensors stand where the weight of their linear would. Parameters that
    transformers assembles are left to it.
    """
    weights: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        weights[f"{owner}.weight" if leaf in packing.leaves else name] = shape
    prefix, blocks = find_blocks(model)
    places = find_places(model, weights, prefix, len(blocks))
    owners = frozenset(name.rpartition(".")[0] for name in weights)
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(f".{packing.scale}")}
    if any(families.EXPERT_TENSOR.search(name) for name in packed):
        places = unfuse(model, places, owners)
    named: Tensors = {}
    for name, said in tensors.items():
        owner, _, leaf = name.rpartition(".")
        place, linear = places.by_disk.get(name), places.by_disk.get(f"{owner}.weight")
        if linear is not None and linear.split:
            named |= _of_parts(leaf, said, linear, packing)
        elif place is None or place.parameter is None:
            named[f"{places.in_model(owner)}.{leaf}"] = said
        elif place.whole:
            named[place.parameter] = said
    return {module: places.on_disk(module) for module, _ in model.named_modules()}, named


def _of_parts(leaf: str, said: tuple[str, tuple[int, ...]], linear: Place, packing: Codec) -> Tensors:
    """What the parts of a split linear have of a tensor by which their layers are made; `cutting` cuts the others."""
    if leaf not in (packing.scale, packing.order):
        return {}
    dtype, shape = said
    whole = shape[:1] == (sum(rows for _, rows in linear.split),) and leaf == packing.scale
    return {
        f"{weight.removesuffix('.weight')}.{leaf}": (dtype, (rows, *shape[1:]) if whole else shape)
        for weight, rows in linear.split
    }


def either(
    scheme_of: Callable[[str], Scheme | None], names: Mapping[str, str]
) -> Callable[[str], tuple[Scheme | None, bool]]:
    """A function: module -> (the scheme that the config gives it, by its own name or by that on disk, whether by both).

    names: module -> name on disk.
    """

    def found(module: str) -> tuple[Scheme | None, bool]:
        both = [scheme_of(name) for name in dict.fromkeys((module, names.get(module, module)))]
        return next(filter(None, both), None), None not in both

    return found


def swap(
    model: nn.Module,
    packing: Codec,
    scheme_of: Callable[[str], tuple[Scheme | None, bool]],
    tensors: Tensors,
) -> None:
    """Put a `QuantLinear` on meta in place of every linear (subclasses and Conv1D too) that has a scheme.

    scheme_of: as `either` gives it; a linear with a scheme by one of its names only may be stored as floats.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        scheme, agreed = scheme_of(name)
        if scheme is None or _left_dense(name, packing, tensors, agreed):
            continue
        n, k = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        packed = _packed(name, (n, k), scheme, module, packing, tensors)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def leave_out_shared(model: PreTrainedModel) -> dict[str, str]:
    """Take out the packed linears that are tied to another one, which several blocks share (Zamba): name -> that one.

    Nothing is stored under their names, and transformers ties parameters only, which packed tensors are not.
    """
    packed = {name for name, _ in packed_linears(model)}
    ties = model.all_tied_weights_keys
    shared = {
        name: ties[f"{name}.weight"].removesuffix(".weight") for name in packed if f"{name}.weight" in ties
    }
    for name in shared:
        model.set_submodule(name, nn.Identity())
        ties.pop(f"{name}.weight")
        ties.pop(f"{name}.bias", None)
    return shared


def _left_dense(name: str, packing: Codec, tensors: Tensors, told: bool) -> bool:
    """Whether a linear that the config counts as quantized is stored as floats, without scales.

    Some tools forget the head in `ignore`; plain transformers then runs it on uninitialised scales. told: warn of it.
    """
    dtype, _ = tensors.get(f"{name}.weight", ("", ()))
    if dtype not in WEIGHT_DTYPES or f"{name}.{packing.scale}" in tensors:
        return False
    if told:
        warnings.warn(
            f"{name} is stored as {dtype} although the config counts it as quantized; it is used as it is",
            stacklevel=2,
        )
    return True


def _packed(
    name: str, shape: Shape, scheme: Scheme, module: nn.Linear | Conv1D, packing: Codec, tensors: Tensors
) -> QuantLinear:
    n, k = shape
    if not scheme.weights.divides(k):
        raise ModelError(
            f"{name} has {k} columns, which its groups of {scheme.weights.group_size} do not divide"
        )
    stored = "BF16"
    if packing.dtypes(scheme)[packing.scale] is None:
        stored, _ = tensors.get(f"{name}.{packing.scale}", ("BF16", ()))
    if stored not in WEIGHT_DTYPES:
        raise ModelError(
            f"{name}.{packing.scale} has the dtype {stored}; a scale is {', '.join(WEIGHT_DTYPES)}"
        )
    bias = module.bias
    dtype = None if bias is None else bias.dtype
    ordered = f"{name}.{packing.order}" in tensors
    scales = torch_dtype(stored)
    packed = QuantLinear(k, n, scheme, bias is not None, scales, dtype, "meta", packing.name, ordered)
    packed.replaces = type(module)
    return packed


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """The layer of the class that a packed linear replaced, with its dequantized weight."""
    device = next(module.buffers()).device
    weight = codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize(dtype)
    n, k = weight.shape
    with torch.device("meta"):
        turned = issubclass(module.replaces, Conv1D)
        dense = module.replaces(n, k) if turned else module.replaces(k, n, bias=module.bias is not None)
    weight = weight.T.contiguous() if turned else weight
    dense.weight = nn.Parameter(weight.to(device), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return dense


def check_shapes(model: nn.Module, packing: Codec, tensors: Tensors) -> None:
    """ModelError naming every stored tensor that does not fit its place in the model.

    transformers casts, broadcasts or keeps what does not fit without a word, depending on the version.
    """
    problems = []
    linears = dict(packed_linears(model))
    for name, place in model.state_dict().items():
        if name not in tensors:
            continue  # missing ones are what loading reports
        dtype, shape = tensors[name]
        owner, _, leaf = name.rpartition(".")
        own = packing.dtypes(linears[owner].scheme).get(leaf) if owner in linears else None
        kind = stored_dtype(own) if own else dtype
        if tuple(shape) != tuple(place.shape):
            problems.append(f"{name} is {list(shape)}, the model has {list(place.shape)}")
        elif dtype != kind:
            problems.append(f"{name} is {dtype}, not {kind}")
    if problems:
        raise ModelError(f"{len(problems)} tensors do not fit the model: {'; '.join(problems[:8])}")
