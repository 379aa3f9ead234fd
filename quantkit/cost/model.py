"""What one forward of a planned checkpoint multiplies and reads: its linears, its attention, its vectors; no torch.

Shapes and widths are those of the plan and of the headers, so every family is described in the same way. Linears that
differ only in the numbers of their names are one entry.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from quantkit.cost.attention import Attention, find_attention
from quantkit.models import families
from quantkit.models.blocks import hidden_size, text_config
from quantkit.models.headers import Headers
from quantkit.plan import LayerPlan, Plan, starred
from quantkit.predict.block import chosen_experts
from quantkit.predict.sizes import packed_bytes, stored_itemsize
from quantkit.scheme import KVScheme, Scheme

_NORM = re.compile(r"norm[^.]*$|(^|\.)ln(_\w+)?$")
_EMBEDDING = re.compile(r"(embed|wte)[^.]*$")
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")


@dataclass(frozen=True)
class Linears:
    """Linears alike. name: behind the block's number, numbers as `*`. shape: (N, K). count: how many there are.

    n_bytes: of one, as stored, with its scales. scheme: None for a weight left as it is. layers: blocks that hold them.
    experts: of a mixture, experts that its router chooses from; 0 for a linear that every token passes.
    """

    name: str
    shape: tuple[int, int]
    count: int
    n_bytes: float
    scheme: Scheme | None
    layers: int
    experts: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """hidden: width of the hidden states. norms: norms of that width in the blocks. chosen: experts per token.

    attention: by block. head: the output projection, tied or not; None if there is none. notes: what is not counted.
    """

    hidden: int
    blocks: int
    linears: tuple[Linears, ...]
    attention: tuple[Attention | None, ...]
    norms: int
    chosen: int
    head: Linears | None
    kv: KVScheme | None
    notes: tuple[str, ...] = ()

    def cache_bytes(self, context: int, batch: int) -> float:
        """Bytes of the KV cache of `batch` sequences of `context` tokens."""
        return sum(each.cache_bytes(self.kv, context, batch) for each in self.attention if each)


def find_model(plan: Plan, headers: Headers) -> Model:
    """The planned model: what its tensors' names and shapes and its config say."""
    planned = {layer.name: layer for layer in plan.layers}
    found: dict[tuple[Any, ...], tuple[Linears, list[str]]] = {}
    norms: dict[int, int] = {}
    members: dict[str, set[str]] = {}  # name of a list of experts -> their numbers
    for (kind, shape, *_), disks in _alike(plan, headers, planned).items():
        name = disks[0].removesuffix(".weight")
        if len(shape) == 1 and _NORM.search(name):
            norms[shape[0]] = norms.get(shape[0], 0) + len(disks)
        if len(shape) == 2 and not families.ANY_TABLE.search(name):
            one = _one(headers, name, planned.get(name))
            inside = kind.removesuffix(".weight").removeprefix(f"{starred(plan.blocks_prefix)}.")
            key = (inside.removeprefix("*."), one.shape, id(one.scheme), one.n_bytes)
            found.setdefault(key, (one, []))[1].extend(disks)
            for disk in disks if _EXPERT.match(disks[0]) else ():
                listed, member = _listed(disk)
                members.setdefault(listed, set()).add(member)
    experts = {name: len(each) for name, each in members.items()}
    linears = []
    for (name, shape, _, n_bytes), (one, disks) in found.items():
        layers = len({plan.parts[each] for each in disks})
        of = experts[_listed(disks[0])[0]] if _EXPERT.match(disks[0]) else 0
        linears.append(Linears(name, shape, len(disks), n_bytes, one.scheme, layers, of))
    hidden = hidden_size(headers.config) or max(norms, key=norms.__getitem__, default=0)
    attention = find_attention(headers.config, plan.n_blocks)
    text = text_config(headers.config)
    chosen = chosen_experts(text)
    return Model(
        hidden=hidden,
        blocks=plan.n_blocks,
        linears=tuple(linears),
        attention=attention,
        norms=norms.get(hidden, 0),
        chosen=chosen or max(experts.values(), default=0),
        head=_head(headers, planned, hidden),
        kv=plan.kv,
        notes=_notes(attention, bool(experts) and not chosen),
    )


def _one(headers: Headers, name: str, layer: LayerPlan | None) -> Linears:
    """One linear as it will be stored."""
    info = headers.tensors[f"{name}.weight"]
    if layer is not None:
        return Linears(name, layer.shape, 1, packed_bytes(layer, stored_itemsize(info)), layer.scheme, 1)
    n, k = info.shape
    shape = (k, n) if families.is_conv1d(headers.text_type, name) else (n, k)
    return Linears(name, shape, 1, info.dense_bytes, None, 1)


def _alike(plan: Plan, headers: Headers, planned: dict[str, LayerPlan]) -> dict[tuple[Any, ...], list[str]]:
    """(name with numbers as `*`, shape, ...) -> the weights alike in blocks: a mixture has thousands of a few kinds."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for disk in plan.parts:
        if disk.endswith(".weight") and disk not in headers.dropped:
            info, layer = headers.tensors[disk], planned.get(disk[: -len(".weight")])
            key = (starred(disk), info.shape, info.dtype, info.dense_bytes, layer and id(layer.scheme))
            found.setdefault(key, []).append(disk)
    return found


def _listed(disk: str) -> tuple[str, str]:
    """What stands before `experts.` in the name of an expert's weight, and the number of the expert."""
    listed, _, inside = disk.rpartition("experts.")
    return listed, inside.partition(".")[0]


def _head(headers: Headers, planned: dict[str, LayerPlan], hidden: int) -> Linears | None:
    """The output projection: its own weight, or the embeddings that it shares."""
    matrices = {
        disk.removesuffix(".weight"): info.shape
        for disk, info in headers.tensors.items()
        if disk.endswith(".weight") and len(info.shape) == 2
    }
    own = next((name for name in matrices if families.is_head(name)), None)
    tables = [n for n, shape in matrices.items() if _EMBEDDING.search(n) and shape[1] == hidden]
    shared = max(tables, key=lambda name: matrices[name][0], default=None)
    tied = headers.tied and shared is not None and own not in planned
    name = shared if own is None or tied else own
    return None if name is None else _one(headers, name, planned.get(name))


def _notes(attention: tuple[Attention | None, ...], unknown_router: bool) -> tuple[str, ...]:
    """What the config leaves open."""
    notes = []
    without = sum(each is None for each in attention)
    if without == len(attention):
        notes.append("config.json names no attention heads: attention and its cache are not counted")
    elif without:
        notes.append(f"{without} blocks without softmax attention: their recurrent state is not counted")
    if unknown_router:
        notes.append("config.json does not say how many experts a token uses: all are counted")
    return tuple(notes)


__all__ = ["Linears", "Model", "find_model"]
