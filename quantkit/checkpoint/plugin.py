"""How transformers builds our layers: a quantization config and a quantizer, registered by `register()` only.

`quantkit.load` hands the `quantization_config` of config.json to transformers under the name "quantkit",
together with what the safetensors headers say; on the meta skeleton the quantizer swaps linears for
`QuantLinear` and checks every stored tensor before a byte of it is read. Saving writes the original config
back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as registry
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import BackendError, ModelError
from quantkit.formats.registry import Codec, Shape, codec_of
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.tensors import WEIGHT_DTYPES, stored_dtype, torch_dtype
from quantkit.scheme import Scheme

METHOD = "quantkit"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name in the model -> (dtype on disk, shape)


class PackedConfig(QuantizationConfigMixin):
    """stored: `quantization_config` of config.json. tensors: what the headers of the weight files say."""

    def __init__(self, stored: dict[str, Any], tensors: Tensors, **_: Any) -> None:
        self.quant_method = METHOD
        self.stored, self.tensors = stored, tensors

    def to_dict(self) -> dict[str, Any]:
        return dict(self.stored)


class PackedQuantizer(HfQuantizer):
    """Swaps and checks; reading is transformers' own."""

    requires_calibration = True  # reads what is quantized, quantizes nothing

    def _process_model_before_weight_loading(self, model: nn.Module, **__: Any) -> None:
        tensors = self.quantization_config.tensors
        stored = self.quantization_config.stored
        codec = codec_of(stored)
        swap(model, codec, codec.parse(stored), tensors)
        check_shapes(model, codec, tensors)
        self.quantization_config.tensors = {}  # done with; the config lives as long as the model
        # Some families (GPT-2) initialize the `c_proj.weight` of their blocks before loading: an empty stand-in.
        for _, module in packed_linears(model):
            module.weight = torch.empty(0)

    def _process_model_after_weight_loading(self, model: nn.Module, **__: Any) -> nn.Module:
        for _, module in packed_linears(model):
            del module.weight
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict | None, dict]:
        """What a checkpoint stores, also of layers that run on a layout of their own."""
        prepared = [(name, module) for name, module in packed_linears(model) if module.prepared]
        if not prepared:
            return None, {}
        state = model.state_dict()
        for name, module in prepared:
            try:
                state |= {f"{name}.{leaf}": tensor for leaf, tensor in module.on_disk().items()}
            except BackendError as error:
                raise BackendError(
                    f"{name}: {error}; copy the folder it was loaded from, or load it with backend='reference'"
                ) from None
        return state, {}

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


def swap(model: nn.Module, codec: Codec, scheme_of: Callable[[str], Scheme | None], tensors: Tensors) -> None:
    """Put a `QuantLinear` on meta in place of every linear (subclasses and Conv1D too) that has a scheme."""
    for name, module in list(model.named_modules()):
        scheme = scheme_of(name) if isinstance(module, nn.Linear | Conv1D) else None
        if scheme is None:
            continue
        n, k = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        packed = _packed(name, (n, k), scheme, module, codec, tensors)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def _packed(
    name: str, shape: Shape, scheme: Scheme, module: nn.Module, codec: Codec, tensors: Tensors
) -> QuantLinear:
    n, k = shape
    if not scheme.weights.divides(k):
        raise ModelError(
            f"{name} has {k} columns, which its groups of {scheme.weights.group_size} do not divide"
        )
    stored, _ = tensors.get(f"{name}.{codec.scale}", ("BF16", ()))
    if stored not in WEIGHT_DTYPES:
        raise ModelError(
            f"{name}.{codec.scale} has the dtype {stored}; a scale is {', '.join(WEIGHT_DTYPES)}"
        )
    bias = module.bias
    dtype = None if bias is None else bias.dtype
    return QuantLinear(k, n, scheme, bias is not None, torch_dtype(stored), dtype, "meta", codec.name)


def check_shapes(model: nn.Module, codec: Codec, tensors: Tensors) -> None:
    """ModelError naming every stored tensor that does not fit its place in the model.

    transformers casts, broadcasts or keeps what does not fit without a word, depending on the version.
    """
    problems, hints = [], set()
    linears = dict(packed_linears(model))
    for name, place in model.state_dict().items():
        if name not in tensors:
            continue  # missing ones are what loading reports
        dtype, shape = tensors[name]
        owner, _, leaf = name.rpartition(".")
        own = codec.leaves.get(leaf) if owner in linears else None
        kind = stored_dtype(own) if own else dtype
        if tuple(shape) != tuple(place.shape):
            problems.append(f"{name} is {list(shape)}, the model has {list(place.shape)}")
            if owner in linears:
                linear = linears[owner]
                hints.add(
                    codec.why_misfit(leaf, shape, linear.out_features, linear.in_features, linear.scheme)
                )
        elif dtype != kind:
            problems.append(f"{name} is {dtype}, not {kind}")
    if problems:
        hint = "".join(f"; {each}" for each in sorted(filter(None, hints)))
        raise ModelError(f"{len(problems)} tensors do not fit the model: {'; '.join(problems[:8])}{hint}")
