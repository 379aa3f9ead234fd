"""Load a model folder as a transformers model that generates text and runs on packed weights.

transformers does the loading, `device_map` included. What it only warns about (missing and foreign tensors) is an error
here. Afterwards each packed linear builds the layout of its backend and frees the tensors of the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint import kv
from quantkit.checkpoint.check import check_files, check_values, packing_of
from quantkit.checkpoint.repack import is_foreign, repacked
from quantkit.checkpoint.saving import refuse_saving, remember
from quantkit.device import find_device
from quantkit.errors import BackendError, ModelError, memory_named
from quantkit.formats.registry import MEMORY, Codec, codec
from quantkit.layers.kv_cache import attach
from quantkit.models import families
from quantkit.models.borders import foreign_errors, quiet
from quantkit.models.classes import model_class
from quantkit.models.config import GENERATION, check_sizes, open_config, quantization_config, read_config
from quantkit.models.experts import run_eagerly
from quantkit.models.headers import resolve_model
from quantkit.models.skeleton import misfits
from quantkit.models.tensors import TensorInfo, named, read_tensors, stored_dtype
from quantkit.scheme import KVScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_hinted = False  # whether this process was told that the native kernels are missing


@memory_named()
def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    backend: str | None = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    compute: str = "float",
    verify: bool = False,
    kv_cache: KVScheme | str | None = None,
) -> PreTrainedModel:
    """The model in folder `path` (or of a hub id), in eval mode; packed linears become `QuantLinear`.

    Its class is the one that config.json names, so a multimodal model comes with its towers.

    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"; device_map, max_memory, offload_folder
    as in `from_pretrained`, instead of it. dtype: of everything that is not packed, and so of the
    activations; left out, the checkpoint's on CUDA and float32 on the CPU. backend: a kernel backend by name,
    for every packed linear. compute: "float", or "int8" (activations rounded per token and group, as llama.cpp does)
    or "int8-token" for the native CPU kernels; what int8 costs is in docs/kernels.md. The sizes of the weight files
    and whether scales, norms and biases are finite are always checked; verify: the sha256 of every file that
    quantkit.json lists, too. kv_cache: instead of what the checkpoint says about its KV cache, a name of
    `quantkit.scheme.KV_PRESETS`, a `KVScheme`, or "exact"; a warning says so where they differ.

    ModelError: a folder that is corrupt, tensors that are missing, foreign or of the wrong shape (named), a
    device that is not there. BackendError: a backend that cannot run this model here. Remote code never runs.
    """
    path = resolve_model(path, Path(path))
    place = _placement(device, device_map, max_memory, offload_folder)
    if dtype in (None, "auto"):
        dtype = torch.float32 if dtype is None and _on_cpu(place["device_map"]) else "auto"
    raw = read_config(path)
    check_files(path, verify)
    stored = quantization_config(path, raw)
    packing, scheme_of = packing_of(path, stored)
    cache = kv.chosen_scheme(kv_cache, kv.stored_scheme(path, packing, stored))
    _, tensors = read_tensors(path)
    check_values(tensors, packing, str(raw.get("model_type", "")))
    check_sizes(path, raw, tensors)
    anew = None
    if packing is not None and scheme_of is not None and is_foreign(packing, scheme_of, tensors):
        anew = repacked(path, packing, stored, scheme_of, tensors)
        stored, packing = anew.stored, codec(MEMORY)
    model = _opened(path, dtype, place, packing, stored, tensors, None if anew is None else anew.state)
    if packing is not None:
        _finish(path, model, backend, compute, tensors)
        _hint_at_missing_kernels(model, backend)
        dtype_named = raw.get("dtype", raw.get("torch_dtype"))
        quantizer: Any = model.hf_quantizer
        if anew or quantizer.cut:
            refuse_saving(model, path)
        else:
            remember(model, path.resolve(), dtype_named if isinstance(dtype_named, str) else None)
    elif backend not in (None, "auto") or compute != "float":
        raise BackendError(
            f"{path} has no packed linears that backend {backend!r} could run with {compute!r}"
        )
    run_eagerly(model)
    if cache is not None:
        attach(model, cache, None if cache.dynamic else kv.scales_of(model))
    model.eval()
    return model


def _opened(
    path: Path,
    dtype: torch.dtype | str | None,
    place: dict[str, Any],
    packing: Codec | None,
    stored: Any,
    tensors: dict[str, TensorInfo],
    state: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """The model as transformers loads it; with a `packing`, its quantized linears are `QuantLinear`.

    place: arguments of `from_pretrained` that say where the weights go. stored: the `quantization_config` of `packing`.
    state: the tensors in place of those in the files.
    """
    from transformers import GenerationConfig

    from quantkit.checkpoint import plugin

    config = open_config(path)
    opens: Any = model_class(config)
    with quiet(), foreign_errors(f"{path} cannot be loaded"):
        if packing is not None:
            plugin.register()
            config.quantization_config = {
                "quant_method": plugin.METHOD,
                "stored": stored,
                "tensors": {name: (info.dtype, info.shape) for name, info in tensors.items()}
                if state is None
                else {name: (stored_dtype(t.dtype), tuple(t.shape)) for name, t in state.items()},
            }
        opened: Any = opens.from_pretrained(
            path if state is None else None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are listed, and refused by name below
            trust_remote_code=False,
            **place,
        )
    model: PreTrainedModel
    model, info = opened
    if state is not None and (path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    _refuse_incomplete(path, model, info)
    return model


def _placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> dict[str, Any]:
    """from_pretrained's arguments that say where the weights go."""
    if device_map is None and (max_memory or offload_folder):
        device_map = "auto"
    if device_map is not None:
        if device is not None:
            raise ModelError(f"give device={str(device)!r} or a device_map, not both")
        # Packed weights are buffers; without offload_buffers they would stay in memory whatever the map says.
        place = {"device_map": device_map, "offload_buffers": True}
        if max_memory:
            place["max_memory"] = max_memory
        return place | ({"offload_folder": str(offload_folder)} if offload_folder else {})
    where = find_device(device)
    return {"device_map": None if where.type == "cpu" else {"": where}}


def _on_cpu(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return all(str(where) in ("cpu", "disk") for where in device_map.values())
    return device_map is None or not torch.cuda.is_available()


def _refuse_incomplete(path: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """ModelError for what transformers only warns about; tensors that `quantize` leaves out or carries are none."""
    config = read_config(path)
    kind = str(config["model_type"])
    extra = [str(name) for name in info.get("unexpected_keys") or ()]
    left = families.dropped(kind, extra)
    unknown = misfits(model, config, [name for name in extra if name not in left])
    problems = [
        f"{what}: {named(str(name) for name in names)}"
        for what, names in (
            ("missing tensors", info.get("missing_keys")),
            ("tensors the model has no place for", unknown),
            ("tensors of another shape", [_mismatch(*each) for each in info.get("mismatched_keys") or ()]),
        )
        if names
    ]
    problems += [str(message) for message in info.get("error_msgs") or ()]
    if problems:
        raise ModelError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def _mismatch(name: str, stored: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} is {list(stored)} in the file and {list(wanted)} in the model"


def _finish(
    path: Path, model: PreTrainedModel, backend: str | None, compute: str, tensors: dict[str, TensorInfo]
) -> None:
    """Check what only the values show and build the layouts of the backend, layer by layer."""
    from quantkit.checkpoint.plugin import packed_linears

    for name, module in packed_linears(model):
        if module.offloaded:
            if backend not in (None, "auto", "reference") or compute != "float":
                wanted = f"compute {compute!r}" if compute != "float" else f"backend {backend!r}"
                raise BackendError(f"{wanted} needs every layer in memory; {name} is offloaded")
            continue
        try:
            said = codec(module.file_format).dimensions(module.leaves, module.scheme)
        except ModelError as error:
            raise ModelError(f"{path}: {name}: {error}") from None
        if said != (module.out_features, module.in_features):
            have = [module.out_features, module.in_features]
            raise ModelError(
                f"{path}: the tensors of {name} are a weight of {list(said)}, the model has {have}"
            )
    lay_out(model, backend, compute)


def lay_out(model: PreTrainedModel, backend: str | None, compute: str = "float") -> None:
    """Build the layouts of a backend for all packed linears that are in memory, the native ones in one arena.

    Experts that are alike become `QuantExperts`; others run one by one, which a warning says of those that differ.
    """
    from quantkit.checkpoint.plugin import packed_linears
    from quantkit.layers.quant_experts import DIFFER, fuse_experts
    from quantkit.layers.quant_linear import huge_pages

    linears = [module for _, module in packed_linears(model) if not module.offloaded]
    arena = None
    for module in linears:
        module.prepare(backend, model.dtype, compute)
        if module.backend == "cpu":
            arena = arena or huge_pages(linears)
            module.move_layout(arena.place)
    slow = {name: why for name, why in fuse_experts(model).items() if why.startswith(DIFFER)}
    if slow:
        name, why = next(iter(slow.items()))
        warnings.warn(
            f"experts of {len(slow)} layers run one by one, more slowly: {name}: {why}", stacklevel=3
        )


def _hint_at_missing_kernels(model: PreTrainedModel, backend: str | None) -> None:
    """Warn, once per process, if packed linears would run on native kernels that were never built."""
    global _hinted
    from quantkit.checkpoint.plugin import packed_linears
    from quantkit.layers.quant_linear import missing_kernels

    said = None if _hinted else missing_kernels([module for _, module in packed_linears(model)], backend)
    if said:
        _hinted = True
        warnings.warn(said, stacklevel=4)
