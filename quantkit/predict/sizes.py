"""How large a quantized checkpoint will be, and what disk and memory the run needs, before anything is computed.

Everything comes from the plan and the checkpoint's headers: no weight is read and torch is not imported. Sizes follow
the stored shapes; memory is an upper estimate, see `memory.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from quantkit.formats.compressed_tensors_config import PACKED, memory_format
from quantkit.models import families
from quantkit.models.blocks import text_config
from quantkit.models.companions import find_companions
from quantkit.models.headers import Headers
from quantkit.plan import LayerPlan, Plan
from quantkit.predict.block import FLOAT
from quantkit.predict.memory import (
    MODEL,
    PROCESS,
    USUAL,
    Ways,
    memory_of,
    spilled_bytes,
    stored_itemsize,
    stream_bytes,
)
from quantkit.recipe.recipe import Recipe

EVALUATION = 1.3  # the original in an evaluation and what its layers compute, as a share of its fp32 weights
WINDOW = 2048  # tokens of a window of the closing evaluation at most
BATCH_TOKENS, BATCH_LOGITS = 4096, 1 << 28  # of one batch of windows, the bounds of quantkit_eval/measure.py
CHUNK_LOGITS = (
    1 << 23
)  # elements that are turned into log-probabilities at once, the bound of quantkit_eval/windows.py
# Kinds of layers; the last holds norms, biases, towers and whatever else is no matrix of a decoder block.
KINDS = ("attention", "MLP", "experts", "other linears", "head", "embedding", "carried")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp\d*|ffn|feed_?forward|moe|ff|fc\d*)([._]|$)")
_SHAPE = 16  # int64 [2], the shape stored beside every packed weight


@dataclass(frozen=True)
class Prediction:
    """Sizes in bytes.

    tensors: all stored tensors of the output, exact. output: the finished folder, within 2 %. disk: what must be free
    while it is made: the folder, with a gate twice, and the hidden states that a resumed run needs. memory: peak
    resident memory of quantizing on the CPU, an upper estimate; moment: what runs at the peak. evaluation: memory of
    the evaluation at the end of a run. vram: of the GPU, if it quantizes on one (not measured).
    """

    tensors: int
    output: int
    disk: int
    memory: int
    evaluation: int
    vram: int = 0
    moment: str = ""


def predict(recipe: Recipe, plan: Plan, headers: Headers, ways: Ways = USUAL) -> Prediction:
    """What a run of `plan` on the checkpoint of `headers` will need. ways: how it saves memory."""
    tensors = {disk: info for disk, info in headers.tensors.items() if disk not in headers.dropped}
    stored = sum(stored_bytes(plan, headers).values())
    names = sum(map(len, tensors))
    output = stored + _side_files(headers) + _lists(len(tensors), names, plan.layers)
    streams = stream_bytes(recipe, plan, headers) if plan.needs_text(recipe) else 0
    memory = memory_of(recipe, plan, headers, ways)
    evaluation = PROCESS + MODEL + evaluation_bytes(headers, recipe.calibration.sequence_length) + 2 * stored
    return Prediction(
        tensors=stored,
        output=output,
        disk=(1 if recipe.gate is None else 2) * output  # of a gate: the best attempt, and the one being made
        + 2 * streams  # the new hidden states are complete on disk before the old ones are removed
        + (spilled_bytes(recipe, plan, headers) if ways.spilled else 0),
        memory=memory.peak,
        evaluation=evaluation,
        vram=memory_of(recipe, plan, headers, ways, cuda=True).peak,
        moment=memory.moment,
    )


@lru_cache(maxsize=2)  # a mixture has tens of thousands of tensors, and this is asked several times
def stored_bytes(plan: Plan, headers: Headers) -> Mapping[str, int]:
    """Tensor on disk -> the bytes it takes in the output, for all that are not dropped."""
    planned = {f"{layer.name}.weight": layer for layer in plan.layers}
    found: dict[str, int] = {}
    known: dict[tuple[tuple[int, int], int, str], int] = {}  # a mixture has thousands alike
    for disk, info in headers.tensors.items():
        if disk not in headers.dropped:
            layer = planned.get(disk)
            if layer is None:
                found[disk] = info.dense_bytes
                continue
            alike = (layer.shape, id(layer.scheme), info.dtype)
            if alike not in known:
                known[alike] = packed_bytes(layer, stored_itemsize(info))
            found[disk] = known[alike]
    return found


@dataclass(frozen=True)
class Part:
    """Tensors of one kind in the output. weights: their elements before quantization. n_bytes: as stored."""

    kind: str
    tensors: int
    weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.weights if self.weights else 0.0

    def report(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tensors": self.tensors,
            "weights": self.weights,
            "bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
        }


def parts_of(plan: Plan, headers: Headers) -> list[Part]:
    """The output by kind of layer, in the order of `KINDS`; together the `tensors` of the prediction."""
    found: dict[str, list[tuple[int, int]]] = {}
    for disk, n_bytes in stored_bytes(plan, headers).items():
        shape = headers.tensors[disk].shape
        kind = _kind(disk, disk in plan.parts) if len(shape) == 2 else KINDS[-1]
        found.setdefault(kind, []).append((math.prod(shape), n_bytes))
    return [
        Part(kind, len(each), sum(weights for weights, _ in each), sum(n_bytes for _, n_bytes in each))
        for kind in KINDS
        if (each := found.get(kind))
    ]


def _kind(disk: str, in_block: bool) -> str:
    """The kind of layer that a matrix belongs to, by its name."""
    name = disk.removesuffix(".weight")
    if families.is_head(name):
        return "head"
    if families.TABLES[0][0].search(name):
        return "embedding"
    if not in_block:
        return KINDS[-1]
    if families.EXPERT_TENSOR.search(name):
        return "experts"
    if _ATTENTION.search(name):
        return "attention"
    return "MLP" if _MLP.search(name) else "other linears"


def packed_bytes(layer: LayerPlan, scale_bytes: int) -> int:
    """Bytes of one quantized linear: codes, scales, zero points and what else its format stores.

    Packed integers: 32-bit words of codes per row, packed zero points, the shape; other formats store one code a byte,
    or two of FP4.
    """
    n, k = layer.shape
    grid, inputs = layer.scheme.weights, layer.scheme.inputs
    groups = k // grid.group(k)
    if grid.granularity == "tensor":
        scales = 1
    elif grid.granularity == "block":
        scales = -(-n // grid.group(k)) * groups
    else:
        scales = n * groups
    stored = scales * (scale_bytes if grid.scale is None else 1) + (FLOAT if grid.two_level else 0)
    if inputs is not None and not inputs.dynamic:
        stored += scale_bytes + (0 if inputs.symmetric else 1)
    if memory_format(layer.scheme) != PACKED:
        return stored + (n * k * grid.bits // 8 if grid.number.kind == "float" else n * k)
    zeros = 0 if grid.symmetric else _words(n, grid.bits) * groups
    return stored + 4 * (n * _words(k, grid.bits) + zeros) + _SHAPE


def _words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def evaluation_bytes(headers: Headers, sequence_length: int) -> int:
    """What the closing evaluation takes beside the process and the packed model: the original in fp32, and logits.

    Of one batch of windows there are three sets of logits, the model's, the original's, and those made again from kept
    hidden states to see that they are the same; of a chunk of them, five of log-probabilities and what KL is made of.
    """
    tensors = [info for disk, info in headers.tensors.items() if disk not in headers.dropped]
    weights = EVALUATION * FLOAT * sum(math.prod(info.shape) for info in tensors)
    vocabulary = text_config(headers.config).get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        vocabulary = max((info.shape[0] for info in tensors if len(info.shape) == 2), default=1)
    window = min(sequence_length, WINDOW)
    batch = max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary) // window) * window * vocabulary
    return int(weights) + FLOAT * (3 * batch + 5 * min(batch, CHUNK_LOGITS))


def _side_files(headers: Headers) -> int:
    """Bytes of config.json, which grows by a scheme or two, and of the files beside the weights, which travel as is."""
    config = headers.path / "config.json"
    companions = find_companions(headers.path).files.values()
    return sum(each.nbytes for each in companions) + (config.stat().st_size if config.is_file() else 0)


def _lists(tensors: int, names: int, layers: tuple[LayerPlan, ...]) -> int:
    """Bytes of what names every tensor: shard headers, index and manifest.

    Each tensor is named once in each, and a quantized one (three or four tensors) in two more lists. The constants were
    measured on the embedded model's runs.
    """
    per_layer = 3 * (110 + 75) + 330
    long_names = sum(len(layer.name) for layer in layers)
    return tensors * 250 + 3 * names + len(layers) * per_layer + 10 * long_names


__all__ = [
    "KINDS",
    "Part",
    "Prediction",
    "packed_bytes",
    "parts_of",
    "predict",
    "stored_bytes",
    "stored_itemsize",
]
