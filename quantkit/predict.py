"""How large a quantized checkpoint will be, and what disk and memory the run needs, before anything is computed.

Everything comes from the plan and the checkpoint's headers: no weight is read and torch is not imported. Sizes follow
the stored shapes; memory is an upper estimate, whose formula is in `_memory`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantkit.formats.compressed_tensors_config import PACKED, memory_format
from quantkit.models import families
from quantkit.models.blocks import hidden_size
from quantkit.models.companions import find_companions
from quantkit.models.headers import Headers
from quantkit.models.tensors import TensorInfo
from quantkit.plan import LayerPlan, Plan
from quantkit.recipe import Recipe

FLOAT = 4  # bytes; weights, statistics and hidden states are computed in fp32
PROCESS = 450_000_000  # Python with torch and transformers, before a model is read (427 MB measured)
MODEL = 100_000_000  # the model's code and empty modules, and what the allocator keeps (45 MB measured)
KEPT, SPARE = 128 << 20, 480 << 20  # inputs that calibration keeps for replay: the bounds of calibration/
LOGITS = 1 << 22  # elements of the logits that a search compares at once
CHUNK = 1 << 20  # elements of the largest tensor in one forward of a chunk of windows
EVALUATION = 1.3  # working space of an evaluation, as a share of the fp32 weights
PIECES = 128 << 20  # pieces of a weight while they are rounded, without a model class
# Kinds of layers; the last holds norms, biases, towers and whatever else is no matrix of a decoder block.
KINDS = ("attention", "MLP", "experts", "other linears", "head", "embedding", "carried")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp\d*|ffn|feed_?forward|moe|ff|fc\d*)([._]|$)")
_SHAPE = 16  # int64 [2], the shape stored beside every packed weight


@dataclass(frozen=True)
class Prediction:
    """Sizes in bytes.

    tensors: all stored tensors of the output, exact. output: the finished folder, within 2 %. disk: what must be free
    while it is made: the folder, and the hidden states that a resumed run needs. memory: peak resident memory of
    quantizing on the CPU, an upper estimate. evaluation: the same for the evaluation at the end of a run.
    """

    tensors: int
    output: int
    disk: int
    memory: int
    evaluation: int


def predict(recipe: Recipe, plan: Plan, headers: Headers) -> Prediction:
    """What a run of `plan` on the checkpoint of `headers` will need."""
    tensors = {disk: info for disk, info in headers.tensors.items() if disk not in headers.dropped}
    stored = sum(stored_bytes(plan, headers).values())
    names = sum(map(len, tensors))
    output = stored + _side_files(headers) + _lists(len(tensors), names, plan.layers)
    streams = _stream_bytes(recipe, plan, headers)
    evaluation = PROCESS + MODEL + EVALUATION * FLOAT * _parameters(tensors.values()) + 2 * stored
    return Prediction(
        tensors=stored,
        output=output,
        disk=output
        + 2 * streams,  # the new hidden states are complete on disk before the old ones are removed
        memory=_memory(recipe, plan, headers),
        evaluation=int(evaluation),
    )


def stored_bytes(plan: Plan, headers: Headers) -> dict[str, int]:
    """Tensor on disk -> the bytes it takes in the output, for all that are not dropped."""
    planned = {f"{layer.name}.weight": layer for layer in plan.layers}
    found = {}
    for disk, info in headers.tensors.items():
        if disk not in headers.dropped:
            layer = planned.get(disk)
            found[disk] = info.dense_bytes if layer is None else packed_bytes(layer, stored_itemsize(info))
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


def stored_itemsize(info: TensorInfo) -> int:
    """Bytes of one element of a tensor, decoded if it is stored quantized: also those of the scales of its codes."""
    return info.dense_bytes // max(1, math.prod(info.shape))


def _parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)


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


def _hidden(plan: Plan, headers: Headers) -> int:
    """Width of the hidden states; where the config does not name it, the narrowest input of a block's linears."""
    found = hidden_size(headers.config)
    if found is not None:
        return found
    return min((layer.shape[1] for layer in plan.layers), default=plan.widest)


def _needs(layers: Iterable[LayerPlan]) -> frozenset[str]:
    """Statistics that the algorithms of these layers collect."""
    return frozenset().union(*(layer.algorithm.needs for layer in layers))


def _stream_bytes(recipe: Recipe, plan: Plan, headers: Headers) -> int:
    """Bytes of the hidden states of all windows: of the quantized model, and as far as needed of the original."""
    needs = _needs(plan.layers)
    every = recipe.calibration.samples
    looked = (getattr(transform, "windows", 0) for transform in recipe.transforms)
    full = max((every if windows is None else windows for windows in looked), default=0)
    if "drift" in needs:
        full = max(full, -(-every // 2))
    quantized = every if plan.follows_quantized else 0
    if needs and not quantized:
        full = every
    if full:  # whole chunks of windows, of which one may be half empty
        full += max(0, CHUNK // (recipe.calibration.sequence_length * _hidden(plan, headers)))
    return (
        (min(every, full) + quantized) * recipe.calibration.sequence_length * _hidden(plan, headers) * FLOAT
    )


def _memory(recipe: Recipe, plan: Plan, headers: Headers) -> int:
    """Peak resident memory of quantizing on the CPU, an upper estimate.

    With text, the largest of three moments, each beside the process and the hidden states (`_stream_bytes`):
      embedding: everything outside the blocks in fp32, once more as stored while it is read;
      a block: its weights as stored, their codes (a byte each), three matrices [K, K] in fp32 (the Hessian, its
        factor, the drift) and one for reordering, the inputs kept for replay, four copies in fp32 of the largest set of
        linears with one input, and three times the inputs and outputs of one chunk in fp32;
      the head, if it is quantized: the same with the head as the block;
      a block whose cache is calibrated: its weights in fp32 and a chunk;
    or what a search before them takes (`_search_memory`).
    Without text five copies of the largest linear in fp32 and two of a block's codes remain; of a run without a model
    class, what was written of the largest linear and its layout for kernels, and pieces. Against measurements: see
    tests/test_predict.py (the embedded model, and docs/benchmarks/memory-*.json).
    """
    if recipe.model_free:
        largest = max((math.prod(layer.shape) for layer in plan.layers), default=0)
        return PROCESS + MODEL + FLOAT * largest + PIECES
    by_block: dict[int | None, list[LayerPlan]] = {}
    for layer in plan.layers:
        by_block.setdefault(layer.block, []).append(layer)
    block_bytes: dict[int | None, int] = {}
    outside = 0
    for disk, info in headers.tensors.items():
        if disk in headers.dropped:
            continue
        number = plan.parts.get(disk)
        if number is not None:
            block_bytes[number] = block_bytes.get(number, 0) + info.dense_bytes
        elif not (families.is_head(disk.removesuffix(".weight")) or families.tower(disk)):
            outside += (FLOAT + stored_itemsize(info)) * math.prod(info.shape)
    working = max(
        (_block_working(recipe, layers, block_bytes.get(block, 0)) for block, layers in by_block.items()),
        default=0,
    )
    if plan.calibrates_cache:  # blocks without quantized linears are loaded in fp32, from 16 bits at most
        chunk = 4 * FLOAT * max(CHUNK, recipe.calibration.sequence_length * plan.widest)
        working = max(working, 2 * max(block_bytes.values()) + chunk)
    if not plan.needs_text(recipe):
        return PROCESS + MODEL + working
    streams = _stream_bytes(recipe, plan, headers)
    needed = PROCESS + MODEL + streams + max(outside, working)
    return max(needed, PROCESS + MODEL + _search_memory(recipe, plan, headers, block_bytes, outside))


def _search_memory(
    recipe: Recipe, plan: Plan, headers: Headers, block_bytes: dict[int | None, int], outside: int
) -> int:
    """Bytes beside the process that a search before the first block takes; 0 without one.

    Hidden states of all windows of the original model and of the windows of each trial; beside them a block as stored
    and its linears in fp32, one of them three times while it is rounded, and a chunk; or, with what lies outside the
    blocks, the logits.
    """
    trials = max((getattr(transform, "searched", 0) for transform in recipe.transforms), default=0)
    if not trials:
        return 0
    length = recipe.calibration.sequence_length
    streams = (recipe.calibration.samples + trials) * length * _hidden(plan, headers) * FLOAT
    sizes: dict[int | None, int] = {}
    for layer in plan.layers:
        sizes[layer.block] = sizes.get(layer.block, 0) + math.prod(layer.shape)
    largest = max(math.prod(layer.shape) for layer in plan.layers)
    widest = max(max(layer.shape) for layer in plan.layers)
    chunk = 6 * FLOAT * max(CHUNK, length * widest)
    block = max(block_bytes.values(), default=0) + FLOAT * (max(sizes.values()) + 3 * largest)
    return streams + max(block + chunk, outside + 6 * FLOAT * LOGITS)


def _block_working(recipe: Recipe, layers: list[LayerPlan], stored: int) -> int:
    """Bytes that quantizing the linears of one block takes, see `_memory`. stored: bytes of its tensors."""
    needs = _needs(layers)
    codes = sum(math.prod(layer.shape) for layer in layers)
    siblings: dict[
        tuple[str, int], int
    ] = {}  # rows of the linears that may share an input: solved as one matrix
    for layer in layers:
        key = (layer.name.rpartition(".")[0], layer.shape[1])
        siblings[key] = siblings.get(key, 0) + layer.shape[0]
    if not (needs or recipe.transforms or any(layer.calibrates_inputs for layer in layers)):
        return 5 * FLOAT * max(math.prod(layer.shape) for layer in layers) + 2 * codes
    copies = 4 * FLOAT * max(n * k for (_, k), n in siblings.items())
    widest = max(k for _, k in siblings)
    matrices = 4 * FLOAT * widest**2 if needs & {"hessian", "drift"} else 0
    kept = max(KEPT, SPARE - 3 * FLOAT * widest**2)
    length = recipe.calibration.sequence_length
    chunk = 3 * FLOAT * max(CHUNK, length * widest) * len(siblings)
    observed = max((getattr(transform, "observed", 0) for transform in recipe.transforms), default=0)
    return stored + codes + matrices + copies + kept + chunk + 4 * FLOAT * observed * length * widest


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
