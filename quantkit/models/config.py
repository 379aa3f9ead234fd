"""`config.json` and `generation_config.json`: read within bounds, checked, and opened by transformers.

`read_config` needs no torch; `open_config` gives transformers' object. Remote code is off in both: a model type that
only exists as Python code beside the weights is refused by transformers, and an attention kernel that would be
downloaded from the hub (`attn_implementation: owner/kernel`) is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError
from quantkit.formats.encodings import quantization_of
from quantkit.models.blocks import LAYER_COUNTS, text_config
from quantkit.models.borders import foreign_errors, quiet
from quantkit.models.json_reader import DAMAGED, read_json
from quantkit.models.tensors import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_CONFIG = 10_000_000  # bytes
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
MODELOPT = "hf_quant_config.json"
# What every error about a model class that is missing offers.
MODEL_FREE = "or add model_free: true to the recipe (--set model_free=true), which needs no model class"
_POSITIONS = ("max_position_embeddings", "n_positions")
_SIZE = re.compile(r"(_size|_dim|_heads|_rank|^n_embd|^n_head|^n_inner|^d_model)$")
_SMALLEST_LIMIT = 1 << 20  # sizes below this cost nothing, whatever the weights say


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder as a dict; ModelError for an adapter, a missing file, or one out of bounds."""
    file = path / CONFIG
    refuse_adapter(path)
    if not file.is_file():
        gguf = sorted(each.name for each in path.glob("*.gguf"))
        found = f", but {gguf[0]}: a GGUF file, which quantkit does not read" if gguf else ""
        raise ModelError(
            f"{path} has no {CONFIG}{found}; a model is a folder with {CONFIG} and safetensors weights"
        )
    config: dict[str, Any] = read_json(file, limit=MAX_CONFIG, tag_infinities=True)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type; it is not the config of a transformers model")
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ModelError(f"{file}: architectures must be a list of class names, got {architectures!r}")
    for part in _parts(config):
        _check_positions(part, file)
        _check_kernels(part, file)
    return config


def quantization_config(path: Path, config: Mapping[str, Any]) -> Any:
    """What says how a checkpoint is quantized: config.json, or ModelOpt's own file.

    None: nothing says so.
    """
    stored = quantization_of(config)
    if stored is None and (path / MODELOPT).is_file():
        said = read_json(path / MODELOPT, limit=MAX_CONFIG).get("quantization")
        stored = {"quant_method": "modelopt", **(said if isinstance(said, Mapping) else {})}
    return stored


def refuse_adapter(path: Path) -> None:
    """ModelError for a LoRA adapter: transformers would load the base model that it names, not this folder."""
    file = path / ADAPTER
    if not file.is_file():
        return
    base = read_json(file, limit=MAX_CONFIG).get("base_model_name_or_path")
    told = f" of {base}" if isinstance(base, str) else ""
    raise ModelError(
        f"{path} is an adapter{told} ({ADAPTER}), not a model: merge it into its base model "
        "(peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)) and give "
        f"that folder; if the folder holds a whole model, remove {ADAPTER}"
    )


def check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """ModelError for numbers in config.json that no checkpoint with these tensors can have.

    Building a model from them would take hours or all memory before anything else noticed.
    """
    elements = 0
    for info in tensors.values():
        count = 1
        for n in info.shape:
            count *= n
        elements += count
    limit = max(elements, _SMALLEST_LIMIT)
    for part in _parts(config):
        for key, value in part.items():
            if type(value) is not int:
                continue
            if key in LAYER_COUNTS and value > len(tensors):
                raise ModelError(
                    f"{path / CONFIG}: {key} is {value}, but the checkpoint has only {len(tensors)} tensors; {DAMAGED}"
                )
            if _SIZE.search(key) and value > limit:
                raise ModelError(
                    f"{path / CONFIG}: {key} is {value}, but the checkpoint has only {elements} weights; {DAMAGED}"
                )


def longest_window(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model takes at once, by config.json; None if the file does not say."""
    for part in (text_config(config), config):
        for key in _POSITIONS:
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def open_config(path: Path, instead: str = "") -> PreTrainedConfig:
    """transformers' config object of a folder that `read_config` accepts, with generation_config.json tried too.

    instead: what a user can do whose transformers does not know the model, for the error.
    """
    from transformers import AutoConfig, GenerationConfig

    what, advice = f"{path / CONFIG} is refused by transformers", instead
    if read_config(path).get("auto_map"):
        what = f"{path / CONFIG} asks for Python code of the folder (auto_map), which quantkit never runs"
        advice = "if your transformers knows this model type without it, remove auto_map"
        advice += f", {instead}" if instead else ""
    with quiet(), foreign_errors(what, advice):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    if (path / GENERATION).is_file():
        read_json(path / GENERATION, limit=MAX_CONFIG, tag_infinities=True)
        with (
            quiet(),
            foreign_errors(f"{path / GENERATION} is refused by transformers", "mend or remove the file"),
        ):
            GenerationConfig.from_pretrained(path, local_files_only=True)
    return config


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _check_positions(part: Mapping[str, Any], file: Path) -> None:
    for key in _POSITIONS:
        value = part.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"{file}: {key} must be a positive number of tokens, got {value!r}; {DAMAGED}")


def _check_kernels(part: Mapping[str, Any], file: Path) -> None:
    for key, value in part.items():
        if key.endswith(("_implementation", "_implementation_internal")):
            names = value.values() if isinstance(value, dict) else [value]
            if any(isinstance(name, str) and "/" in name for name in names):
                raise ModelError(
                    f"{file}: {key} {value!r} names code on the hub, which quantkit never runs; remove the key"
                )
