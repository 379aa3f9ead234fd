"""Checkpoints of other tools, and of older versions of compressed-tensors, packed anew while they are loaded.

Every quantized linear becomes the tensors of `formats/memory.py`, one after the other. What transformers is then given
is a state dict in place of the files: the packed linears, everything else as it is stored, and scales of the KV cache
under the names of compressed-tensors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantkit.errors import ModelError
from quantkit.formats.registry import MEMORY, Codec, codec
from quantkit.models.headers import quantized_linears
from quantkit.models.tensors import Peek, TensorInfo, torch_dtype
from quantkit.scheme import Scheme

_CACHE = re.compile(r"^(.*)\.([kv])_proj\.(\2_scale|output_scale)$")


@dataclass(frozen=True)
class Repacked:
    """stored: a `quantization_config` that `formats/memory.py` reads. state: tensors by their names on disk."""

    stored: dict[str, Any]
    state: dict[str, torch.Tensor]


def is_foreign(
    packing: Codec, scheme_of: Callable[[str], Scheme | None], tensors: Mapping[str, TensorInfo]
) -> bool:
    """Whether a checkpoint must be packed anew: one of another tool's format, or in an older form of ours."""
    if not packing.writes:
        return True
    for module, infos in quantized_linears(packing.leaves, tensors).items():
        scheme = scheme_of(module)
        with contextlib.suppress(ModelError):  # what does not fit is named when it is loaded
            if scheme is not None and packing.older(
                {leaf: Peek(info) for leaf, info in infos.items()}, scheme
            ):
                return True
    return False


def repacked(
    path: Path,
    packing: Codec,
    stored: Mapping[str, Any],
    scheme_of: Callable[[str], Scheme | None],
    tensors: Mapping[str, TensorInfo],
) -> Repacked:
    """The checkpoint in `path` as quantkit's layers take it. ModelError naming the linear that cannot be read."""
    linears = quantized_linears(packing.leaves, tensors, packing.joint)
    used = {info.name for infos in linears.values() for info in infos.values()}
    state: dict[str, torch.Tensor] = {}
    schemes: dict[str, Scheme] = {}
    for module, infos in linears.items():
        scheme = scheme_of(module)
        if scheme is None:
            raise ModelError(
                f"{path}: {module} is packed, but its quantization_config leaves it out; it is corrupt"
            )
        try:
            for linear, stacked in packing.linears(module, {k: read(v) for k, v in infos.items()}):
                parts, schemes[linear] = _packed(packing, stacked, scheme)
                state |= {f"{linear}.{leaf}": tensor for leaf, tensor in parts.items()}
        except ModelError as error:
            raise ModelError(f"{path}: {module}: {error}") from None
    kv = packing.kv_scheme(stored)
    for name, info in tensors.items():
        if name not in used:
            cache = _CACHE.sub(r"\1.\2_scale", name)
            tensor = read(info)
            if cache != name or name.endswith(("_attn.k_scale", "_attn.v_scale")):
                if kv is None:
                    continue
                tensor = tensor.view(1) if tensor.ndim == 0 else tensor
            state |= dict(packing.beside(cache, tensor))
    return Repacked({"quant_method": codec(MEMORY).method, "schemes": schemes, "kv_cache": kv}, state)


def _packed(
    packing: Codec, tensors: Mapping[str, torch.Tensor], scheme: Scheme
) -> tuple[dict[str, torch.Tensor], Scheme]:
    """(the tensors of one linear by leaf, what it really is: a format may tell its group size in the tensors)."""
    weight = packing.unpack(tensors, scheme)
    inputs = scheme.inputs
    if inputs is not None and not inputs.divides(weight.shape[1]):
        raise ModelError(f"its {weight.shape[1]} columns are no whole groups of {inputs.group_size} inputs")
    own = Scheme(weight.grid, inputs)
    return codec(MEMORY).pack_scheme(weight, own, packing.inputs_of(tensors)), own


def read(info: TensorInfo) -> torch.Tensor:
    """A stored tensor, in memory of its own."""
    with safe_open(info.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(info.name)
    assert tensor.dtype == torch_dtype(info.dtype)
    return tensor
