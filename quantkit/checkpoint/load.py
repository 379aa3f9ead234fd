"""Load a packed checkpoint, or any other causal LM folder, as a transformers model.

Loading goes through transformers' own `from_pretrained` with a quantizer of ours that puts `QuantLinear` where the
config says, so dtype, device maps, disk offload and tied weights behave as for every other model. What transformers
only warns about (missing, extra, mis-shaped tensors) is checked here against the headers first and raises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors import METHOD, parse_config
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.headers import TensorInfo, named, read_tensors
from quantkit.models.source import DTYPES
from quantkit.scheme import Scheme

OURS = "quantkit"
SCALE = ".weight_scale"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    backend: str | None = None,
    max_memory: Mapping | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """A transformers causal LM from a local folder, in eval mode.

    Packed linears become `QuantLinear` on their stored buffers; there is never a dense copy of the model.
    device: cpu, cuda[:n] or auto (default: CUDA if present). dtype of everything not packed: default the checkpoint's
    on CUDA, float32 on CPU. device_map, max_memory, offload_folder: as in transformers, instead of `device`.
    backend: a kernel backend by name for every packed linear (BackendError if one cannot run it).

    Raises ModelError naming tensors that are missing, extra or mis-shaped. Remote code never runs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: {error}") from error
    placed = _placement(device, device_map, max_memory, offload_folder)
    if dtype is None:
        on_cpu = device_map is None and torch.device(placed["device_map"][""]).type == "cpu"
        dtype = torch.float32 if on_cpu else "auto"
    stored = getattr(config, "quantization_config", None)
    ours = stored is not None and _get(stored, "quant_method") == METHOD
    if ours:
        _, tensors = read_tensors(path)
        config = copy.deepcopy(config)
        scales = {n.removesuffix(SCALE): i.dtype for n, i in tensors.items() if n.endswith(SCALE)}
        stored = _as_dict(stored)
        _check(path, config, stored, tensors, scales)
        _register()
        config.quantization_config = {"quant_method": OURS, "stored": stored, "scales": scales}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placed
        )
    except (ValueError, OSError, ImportError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ModelError(f"{path}: " + "; ".join(f"{k.replace('_', ' ')}: {named(v)}" for k, v in wrong.items() if v))
    if ours:
        model.config.quantization_config = stored
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.weight_packed.device.type != "meta":
                module.prepare(backend, model.dtype)
    return model.eval()


def _placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> dict[str, Any]:
    if device_map is not None:
        extra = {"max_memory": max_memory, "offload_folder": offload_folder, "offload_buffers": True}
        return {"device_map": device_map} | {k: v for k, v in extra.items() if v is not None}
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {where} is not there ({torch.cuda.device_count()} CUDA devices); use device='cpu'")
    return {"device_map": {"": str(where)}}


def _get(config: Any, key: str) -> Any:
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return getattr(value, "value", value)


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def _swap(model: nn.Module, stored: Mapping[str, Any], scales: Mapping[str, str]) -> None:
    """Replace the linears the config names by `QuantLinear` (on the device the skeleton is made on).

    scales: the stored dtype of each linear's scale, as safetensors spells it.
    """
    from transformers.pytorch_utils import Conv1D

    scheme_of = parse_config(stored)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        scheme: Scheme | None = scheme_of(name)
        if scheme is None:
            continue
        n, k = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
        parent, _, leaf = name.rpartition(".")
        replacement = QuantLinear(
            k,
            n,
            scheme,
            module.bias is not None,
            DTYPES[scales.get(name, "BF16")],
            module.weight.dtype,
            module.weight.device,
        )
        setattr(model.get_submodule(parent), leaf, replacement)


def _check(
    path: Path, config: Any, stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo], scales: Mapping[str, str]
) -> None:
    """Every tensor the model needs is there in its shape, and no other; else ModelError with the names."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    del plain.quantization_config
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(plain, trust_remote_code=False)
        _swap(model, stored, scales)
    wanted = dict(model.state_dict())
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    missing = sorted(wanted.keys() - tensors.keys() - tied)
    extra = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{n} {list(tensors[n].shape)} instead of {list(t.shape)}"
        for n, t in wanted.items()
        if n in tensors and tuple(tensors[n].shape) != tuple(t.shape)
    ]
    problems = [
        f"{what}: {named(names)}" for what, names in (("missing", missing), ("extra", extra), ("mis-shaped", shapes)) if names
    ]
    if problems:
        raise ModelError(f"{path} is not the checkpoint its config.json describes; tensors " + "; ".join(problems))


@cache
def _register() -> None:
    """Register our side of transformers' quantizer interface, once, on first use."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(OURS)
    class QuantkitConfig(QuantizationConfigMixin):
        """Carries the stored compressed-tensors config through `from_pretrained`; never saved."""

        def __init__(self, stored: dict, scales: Mapping[str, str], **_: Any) -> None:
            self.quant_method = OURS
            self.stored = stored
            self.scales = scales

    @register_quantizer(OURS)
    class QuantkitQuantizer(HfQuantizer):
        """Puts `QuantLinear` in place before the weights are read."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            _swap(model, self.quantization_config.stored, self.quantization_config.scales)

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True
