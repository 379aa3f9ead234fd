"""What a loaded model multiplies by: its linears by kind, where each runs, and the roofline of its steps.

Shapes and bytes are those of the tensors in memory, so the roofline is that of the weights as the kernels read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from quantkit.cost.attention import find_attention
from quantkit.cost.hardware import Hardware
from quantkit.cost.model import Linears, Model
from quantkit.cost.roofline import Bound, Operator, Step, operators
from quantkit.layers.kv_cache import attached
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.blocks import text_config
from quantkit.plan import starred
from quantkit.predict.block import chosen_experts
from quantkit.scheme import INT8_TOKEN, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = re.compile(r"^.*?\.\d+\.")
_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.")
_TRANSPOSED = ("Conv1D",)  # weights [K, N]


@dataclass(frozen=True)
class Weight:
    """A weight of a linear. shape: (N, K), of each of `count`. backend: what multiplies by it. head: the output one."""

    name: str
    shape: tuple[int, int]
    count: int
    n_bytes: int
    scheme: Scheme | None
    backend: str
    head: bool = False


def weights(model: PreTrainedModel, native: str | None = None, compute: str = "float") -> Iterator[Weight]:
    """Every weight that a forward multiplies by; a head that shares the embeddings is one of them.

    native: name of the instruction set if the native decoder runs the model, whose `compute` packed linears then have.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            shape = (module.out_features, module.in_features)
            n_bytes = sum(buffer.nbytes for buffer in module.buffers())
            scheme, where = module.scheme, f"native {native}" if native else module.backend
            if compute.startswith("int8") and scheme.inputs is None and module.spec.integers:
                scheme = replace(scheme, inputs=INT8_TOKEN)
            yield Weight(name, shape, 1, n_bytes, scheme, where, module is head)
            continue
        if isinstance(module, nn.Embedding):
            continue
        for leaf, tensor in module._parameters.items():
            if tensor is None or tensor.dim() not in (2, 3):
                continue
            count = tensor.shape[0] if tensor.dim() == 3 else 1
            n, k = tensor.shape[-2:]
            shape = (k, n) if type(module).__name__ in _TRANSPOSED else (n, k)
            whole = name if leaf == "weight" else f"{name}.{leaf}"
            where = f"native {native}" if native else "torch"
            each = tensor.nbytes // count
            yield Weight(whole, shape, count, each, None, where, module is head)


def kinds(found: list[Weight]) -> list[dict[str, Any]]:
    """Weights alike, as the report lists them: of one kind, shape, scheme and backend."""
    groups: dict[tuple[Any, ...], list[Weight]] = {}
    for one in found:
        key = (_kind(one.name), one.shape, one.scheme, one.backend)
        groups.setdefault(key, []).append(one)
    return [
        {
            "kind": kind,
            "count": sum(one.count for one in group),
            "shape": list(shape),
            "scheme": None if scheme is None else str(scheme),
            "backend": backend,
            "bytes": sum(one.count * one.n_bytes for one in group),
        }
        for (kind, shape, scheme, backend), group in groups.items()
    ]


def cost_model(model: PreTrainedModel, found: list[Weight]) -> Model:
    """The loaded model as `quantkit.cost` describes one."""
    config = model.config.to_dict()
    text = text_config(config)
    blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    groups: dict[tuple[Any, ...], list[Weight]] = {}
    for one in found:
        if not one.head:
            groups.setdefault((_kind(one.name), one.shape, one.scheme, one.n_bytes), []).append(one)
    hidden = model.config.get_text_config(decoder=True).hidden_size
    told = attached(model)
    return Model(
        hidden=hidden,
        blocks=blocks,
        linears=tuple(_linears(name, group) for (name, *_), group in groups.items()),
        attention=find_attention(config, blocks),
        norms=_norms(model, hidden),
        chosen=chosen_experts(text),
        head=next((_linears(one.name, [one]) for one in found if one.head), None),
        kv=None if told is None else told.scheme,
    )


def _norms(model: PreTrainedModel, hidden: int) -> int:
    """Norms of the hidden states in the blocks."""
    shapes = (
        getattr(getattr(module, "weight", None), "shape", None)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and _BLOCK.match(f"{name}.")
    )
    return sum(shape == (hidden,) for shape in shapes)


def bounds(model: Model, step: Step, hardware: Hardware, entry_bytes: int = 2) -> list[Bound]:
    """Every operator of a forward with its limits on a device. entry_bytes: of an exact cache's numbers."""

    def held(one: Operator) -> Operator:
        cached = model.kv is None and one.name.startswith(("qk", "sv"))
        return replace(one, n_bytes=one.n_bytes * entry_bytes / 2) if cached else one

    return [held(each).on(hardware) for each in operators(model, step)]


def _kind(name: str) -> str:
    """model.layers.3.mlp.experts.5.up_proj -> mlp.experts.*.up_proj; lm_head as it is."""
    return starred(_BLOCK.sub("", name, count=1))


def _linears(name: str, group: list[Weight]) -> Linears:
    """Weights alike as one entry; those of a mixture's experts know how many there are in a block."""
    first = group[0]
    lists = {match[1] for one in group if (match := _EXPERT.match(one.name))}
    stacked = first.count > 1
    layers = len(lists) if lists else len(group)
    experts = first.count if stacked else len(group) // len(lists) if lists else 0
    count = sum(one.count for one in group)
    return Linears(name, first.shape, count, first.n_bytes, first.scheme, layers, experts)
