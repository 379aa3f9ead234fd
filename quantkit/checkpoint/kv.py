"""The KV cache of a checkpoint that is loaded: which scheme it has, and its stored scales.

Scales are tensors of attention modules, `k_scale` and `v_scale`, [1] or [kv_heads, 1, 1]. They become buffers of those
modules, so that they are loaded, moved and saved with the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.checkpoint.manifest import MANIFEST, read_manifest
from quantkit.errors import ModelError
from quantkit.formats.registry import Codec
from quantkit.layers.kv_cache import KEYS, VALUES
from quantkit.models import families
from quantkit.models.tensors import torch_dtype
from quantkit.numerics.kv import KVScales
from quantkit.scheme import KV_PRESETS, KVScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = "exact"


def stored_scheme(path: Path, packing: Codec | None, stored: Any) -> KVScheme | None:
    """How the checkpoint in `path` quantizes its cache: with stored scales, or as quantkit.json says; None: not."""
    if packing is not None and (scheme := packing.kv_scheme(stored)) is not None:
        return scheme
    if not (path / MANIFEST).is_file():
        return None
    record = read_manifest(path, ModelError).kv_cache
    return None if record is None else record.scheme


def chosen_scheme(asked: KVScheme | str | None, stored: KVScheme | None) -> KVScheme | None:
    """The scheme to run: what was asked for, else the checkpoint's; a warning where they differ.

    asked: a name of KV_PRESETS, a scheme, "exact", or None. ModelError for another name, and for stored scales that
    the checkpoint does not have.
    """
    if asked is None:
        return stored
    scheme = _named(asked) if isinstance(asked, str) else asked
    if scheme is not None and not scheme.dynamic and scheme != stored:
        raise ModelError(
            f"the cache {scheme} needs calibrated scales, which this checkpoint does not have; quantize it with "
            "kv_cache: FP8, or use INT8"
        )
    if stored is not None and scheme != stored:
        warnings.warn(
            f"the KV cache runs as {scheme or EXACT}, as asked for; the checkpoint was made for {stored}",
            stacklevel=3,
        )
    return scheme


def _named(name: str) -> KVScheme | None:
    if name.lower() == EXACT:
        return None
    known = {each.lower(): scheme for each, scheme in KV_PRESETS.items()}
    if name.lower() not in known:
        raise ModelError(f"unknown KV cache {name!r}; known: {EXACT}, {', '.join(KV_PRESETS)}")
    return known[name.lower()]


def attentions(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Layer number -> (name, module) of the attention that writes to it."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        text = families.tower(name) is None
        if isinstance(number, int) and text and type(module).__name__.endswith("Attention"):
            found[number] = name, module
    return found


def place_scales(model: nn.Module, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Give every attention of a skeleton buffers for its stored scales. ModelError naming those that are missing."""
    found = attentions(model)
    names = [f"{name}.{leaf}" for name, _ in found.values() for leaf in (KEYS, VALUES)]
    missing = [name for name in names if name not in tensors]
    if missing or not found:
        named = ", ".join(missing[:4]) or "k_scale of every layer"
        raise ModelError(
            f"scales of the KV cache are missing: {named}{' ...' if len(missing) > 4 else ''}; the checkpoint was "
            "never calibrated or is damaged, quantize again"
        )
    for name, module in found.values():
        for leaf in (KEYS, VALUES):
            dtype, shape = tensors[f"{name}.{leaf}"]
            module.register_buffer(leaf, torch.empty(shape, dtype=torch_dtype(dtype), device="meta"))


def scales_of(model: PreTrainedModel) -> dict[int, KVScales]:
    """The stored scales of a loaded model, by layer. ModelError if they are all 1.0, as of one never calibrated."""
    found = {
        number: KVScales(module.get_buffer(KEYS).detach().clone(), module.get_buffer(VALUES).detach().clone())
        for number, (_, module) in attentions(model).items()
        if KEYS in module._buffers
    }
    each = [scale for scales in found.values() for scale in (scales.keys, scales.values)]
    if each and all(bool((scale == 1).all()) for scale in each):
        raise ModelError(
            f"all scales of the KV cache are 1.0 ({KEYS}, {VALUES}): they were never calibrated; quantize again"
        )
    return found
