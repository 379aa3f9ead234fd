"""The peak memory of a run, moment by moment, and how a run with less of it would work; without torch.

Every moment is beside the process and the hidden states of all windows (which a run with a budget may keep on disk):

    embedding   everything outside the blocks in fp32, once more as stored while it is read
    collecting  a block: its weights as stored and the codes of those that are quantized (a byte each), the sums of the
                widest input [K, K], the inputs kept for replay, a weight in fp32 and what one chunk of windows computes
    solving     the same weights and kept inputs; of one set of linears with one input W, the shift of its target and
                its codes, and with K columns H, its factor and a copy in another order
    experts     what reaches them and what they give, for both streams; one expert (or several) as a block of its own
    head        a quantized head as the block
    search      what a search before the first block carries

Constants are measured (tests/predict/test_predict.py; docs/LOG.md, 2026-11-29).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.models import families
from quantkit.models.blocks import text_config
from quantkit.models.headers import Headers
from quantkit.models.tensors import TensorInfo
from quantkit.plan import Plan
from quantkit.predict.block import (
    CHUNK,
    FLOAT,
    BlockShape,
    Siblings,
    blocks_of,
    chosen_experts,
    chunk_windows,
    hidden,
    kinds_of,
    streams_of,
)
from quantkit.recipe.recipe import Recipe

PROCESS = 450_000_000  # Python with torch and transformers, before a model is read (427 MB measured)
MODEL = 100_000_000  # the model's code and empty modules, and what the allocator keeps (45 MB measured)
CONTEXT = 700_000_000  # of a GPU: what CUDA and its libraries take (not measured here)
KEPT, SPARE = 128 << 20, 480 << 20  # inputs that calibration keeps for replay: the bounds of calibration/
LOGITS = 1 << 22  # elements of the logits that a search compares at once
ROWS = 1 << 21  # elements of the rows that GPTQ solves at once
SUM = 8  # bytes of an element of the sums that become H and the drift, fp64
PIECES = 128 << 20  # pieces of a weight while they are rounded, without a model class
BRANCHES = 2 << 30  # bytes of hidden states that branch off in one walk while sensitivities are measured
AT_ONCE = 64  # branches of one walk at most, so that an interruption costs little
HELD = 4 << 30  # bytes that experts which are worked on together may take, see pipeline/experts.py
IMBALANCE = 3  # tokens of the busiest expert over the mean


@dataclass(frozen=True)
class Ways:
    """How a run saves memory, if it must; it writes the same bytes whichever way it works.

    spilled: hidden states, and what is recorded of experts, lie in a file. kept: bytes of inputs that a block keeps for
    replay; None: as many as usual. held: bytes of the experts that are worked on at once.
    """

    spilled: bool = False
    kept: int | None = None
    held: int = HELD


USUAL = Ways()
LEAST = Ways(spilled=True, kept=0, held=0)


@dataclass(frozen=True)
class Memory:
    """Bytes. process: before anything is read. streams: hidden states in memory. moments: what else each one takes."""

    process: int
    streams: int
    moments: Mapping[str, int]

    @property
    def peak(self) -> int:
        return self.process + self.streams + max(self.moments.values(), default=0)

    @property
    def moment(self) -> str:
        """The one with the peak."""
        return max(self.moments, key=self.moments.__getitem__, default="")


def stored_itemsize(info: TensorInfo) -> int:
    """Bytes of one element of a tensor, decoded if it is stored quantized: also those of the scales of its codes."""
    return info.dense_bytes // max(1, math.prod(info.shape))


def stream_bytes(recipe: Recipe, plan: Plan, headers: Headers) -> int:
    """Bytes of the hidden states of all windows: of the quantized model, and as far as needed of the original."""
    return sum(streams_of(recipe, plan)) * recipe.calibration.sequence_length * hidden(plan, headers) * FLOAT


def spilled_bytes(recipe: Recipe, plan: Plan, headers: Headers) -> int:
    """What a run that spills keeps on disk beside what a resumed run needs: hidden states, of experts too, and those
    that branch off while a search of bits measures.
    """
    each = recipe.calibration.sequence_length * hidden(plan, headers) * FLOAT
    every = recipe.calibration.samples * each
    measured = 2 * every + min(BRANCHES, AT_ONCE * every) if recipe.searched else 0
    if not plan.needs_text(recipe):
        return measured
    mixture = any(families.EXPERT_TENSOR.search(layer.name) for layer in plan.layers)
    trials = max((getattr(transform, "searched", 0) for transform in recipe.transforms), default=0)
    return max(measured, (3 if mixture else 1) * stream_bytes(recipe, plan, headers) + trials * each)


def memory_of(
    recipe: Recipe,
    plan: Plan,
    headers: Headers,
    ways: Ways = USUAL,
    cuda: bool = False,
) -> Memory:
    """Peak memory of quantizing on the CPU, an upper estimate; with `cuda` that of the GPU which blocks run on."""
    process = CONTEXT if cuda else PROCESS + MODEL
    if recipe.model_free:
        largest = max((math.prod(layer.shape) for layer in plan.layers), default=0)
        return Memory(process, 0, {"rounding": FLOAT * largest + PIECES})
    if not plan.needs_text(recipe):
        return Memory(process, 0, {"rounding": _rounding(plan)})
    shapes = dict(blocks_of(plan, headers))
    batch = chunk_windows(recipe, plan)
    head = shapes.pop(None, None)
    kinds = set(kinds_of(shapes).values())
    outside, largest = _outside(plan, headers)
    moments = {"the embeddings": outside + largest}
    facts = _Facts(recipe, plan, headers, ways, batch, cuda)
    for name, work in (
        ("collecting", facts.collecting),
        ("solving", facts.solving),
        ("experts", facts.experts),
    ):
        moments[name] = max(map(work, kinds), default=0)
    if head is not None:
        moments["the head"] = outside + max(facts.collecting(head), facts.solving(head))
    if plan.calibrates_cache:
        biggest = max(_block_bytes(plan, headers).values(), default=0)
        moments["the cache"] = 2 * biggest + 4 * FLOAT * facts.chunk_elements
    if (searching := _search(recipe, plan, headers, ways)) is not None:
        moments["search"] = searching - (0 if ways.spilled or cuda else facts.streams)
    return Memory(process, 0 if ways.spilled or cuda else facts.streams, moments)


class _Facts:
    """What the moments of one run have in common."""

    def __init__(
        self, recipe: Recipe, plan: Plan, headers: Headers, ways: Ways, batch: int, cuda: bool
    ) -> None:
        self.recipe, self.ways, self.cuda = recipe, ways, cuda
        self.length = recipe.calibration.sequence_length
        self.windows = streams_of(recipe, plan)
        self.streams = stream_bytes(recipe, plan, headers)
        self.tokens = batch * self.length
        self.widest = max((max(layer.shape) for layer in plan.kinds), default=plan.widest)
        self.hidden = hidden(plan, headers)
        self.text = text_config(headers.config)
        self.observed = max((getattr(each, "observed", 0) for each in recipe.transforms), default=0)

    @property
    def chunk_elements(self) -> int:
        return self.tokens * self.widest

    def kept(self, shape: BlockShape) -> int:
        """Bytes of inputs kept for replay: what ends each part, of both streams, within the bound."""
        widest = max((s.columns for s in shape.own), default=0)
        most = max(KEPT, SPARE - 3 * FLOAT * widest**2) if self.ways.kept is None else self.ways.kept
        rows = sum(self.windows) * self.length
        return int(min(most, sum(rows * s.columns * FLOAT for s in shape.own if s.output)))

    def activations(self, shape: BlockShape) -> int:
        """What a forward of one chunk holds: the inputs of every set, and attention's queries, keys and scores."""
        inputs = sum(s.columns + s.rows for s in shape.own) + 2 * self.hidden
        heads = int(self.text.get("num_attention_heads") or 0)
        scores = heads * self.length * self.tokens
        return FLOAT * (self.tokens * inputs + scores)

    def held(self, shape: BlockShape) -> int:
        """The block as stored, a code for every weight, and what is kept."""
        return shape.stored + sum(s.weights for s in shape.own) + self.kept(shape)

    def collecting(self, shape: BlockShape) -> int:
        """Statistics of the widest set, or of all where they are collected together."""
        if not shape.own:
            return 0
        sums = [_sums(s) for s in shape.own]
        matrices = max(sums) if shape.sequential else sum(sums)
        largest = max(math.prod(layer.shape) for s in shape.own for layer in s.layers)
        copies = FLOAT * self.observed * self.length * sum(s.columns for s in shape.own)
        trial = FLOAT * 2 * sum(s.weights for s in shape.own) if self.recipe.transforms else 0
        return self.held(shape) + matrices + 2 * FLOAT * largest + self.activations(shape) + copies + trial

    def solving(self, shape: BlockShape) -> int:
        """The set that takes most while it is solved."""
        waiting = 0 if shape.sequential else sum(_matrices(s) for s in shape.own)
        return self.held(shape) + waiting + max((_solved(s) for s in shape.own), default=0)

    def experts(self, shape: BlockShape) -> int:
        """What reaches the experts and what they give, and those that are worked on at once."""
        if not shape.experts:
            return 0
        routed = 0 if self.ways.spilled or self.cuda else 2 * self.streams
        one = self.expert(shape)
        at_once = max(one, min(self.ways.held, 32 * one)) if self.cuda else one
        return self.held(shape) + routed + at_once

    def expert(self, shape: BlockShape) -> int:
        """One expert, with the tokens that come to it."""
        chosen = chosen_experts(self.text) or shape.count
        widest = max(s.columns for s in shape.experts)
        mean = self.windows[1] * self.length * chosen / max(1, shape.count)
        tokens = min(sum(self.windows) * self.length, max(widest, IMBALANCE * mean))
        weights = sum(s.weights for s in shape.experts)
        inputs = 2 * FLOAT * tokens * self.hidden
        working = max(max(_sums(s) for s in shape.experts), max(_solved(s) for s in shape.experts))
        part = FLOAT * min(tokens, self.tokens) * (sum(s.columns + s.rows for s in shape.experts))
        return int(shape.expert_stored + weights + inputs + working + part + 2 * FLOAT * weights)


def _sums(siblings: Siblings) -> int:
    """Sums [K, K] while statistics of one input are collected: half of one for H, and a copy in fp32."""
    wanted = len(siblings.needs & {"hessian", "drift"})
    return int((wanted * SUM + wanted / 2) * siblings.columns**2)


def _matrices(siblings: Siblings) -> int:
    """The statistics of one input, once collected."""
    return len(siblings.needs & {"hessian", "drift"}) * FLOAT * siblings.columns**2


def _solved(siblings: Siblings) -> int:
    """Bytes that solving a set takes beside the weights as stored and the codes."""
    square, weights = siblings.columns**2, siblings.weights
    if "hessian" not in siblings.needs:
        return 5 * FLOAT * weights
    rows = 10 * FLOAT * min(ROWS, weights) + 2 * weights
    shift = weights if "drift" in siblings.needs else 0
    aimed = FLOAT * (2 * square + weights + 2 * shift)
    return max(aimed, FLOAT * (2 * square + weights + shift) + rows)


def _rounding(plan: Plan) -> int:
    """Without text: copies of the largest linear in fp32, more for scales of two levels, and the codes of a block."""
    codes: dict[int | None, int] = {}
    for layer in plan.layers:
        codes[layer.block] = codes.get(layer.block, 0) + math.prod(layer.shape)
    largest = max((math.prod(layer.shape) for layer in plan.layers), default=0)
    copies = 5 if any(layer.scheme.weights.two_level for layer in plan.kinds) else 3
    return copies * FLOAT * largest + max(codes.values(), default=0)


def _outside(plan: Plan, headers: Headers) -> tuple[int, int]:
    """(bytes in fp32 of what lies outside the blocks and runs before them, as stored of its largest tensor)."""
    total = largest = 0
    for disk, info in headers.tensors.items():
        if disk in plan.parts or disk in headers.dropped:
            continue
        if not (families.is_head(disk.removesuffix(".weight")) or families.tower(disk)):
            total += FLOAT * math.prod(info.shape)
            largest = max(largest, info.dense_bytes)
    return total, largest


def _block_bytes(plan: Plan, headers: Headers) -> dict[int, int]:
    """Bytes of the tensors of every block."""
    found: dict[int, int] = {}
    for disk, number in plan.parts.items():
        if disk in headers.tensors and disk not in headers.dropped:
            found[number] = found.get(number, 0) + headers.tensors[disk].dense_bytes
    return found


def _search(recipe: Recipe, plan: Plan, headers: Headers, ways: Ways) -> int | None:
    """Bytes beside the process that a search before the first block takes; None without one.

    Hidden states of all windows of the original model and of the windows of each trial; beside them a block as stored
    and its linears in fp32, one of them three times while it is rounded, and a chunk; or, with what lies outside the
    blocks, the logits.
    """
    trials = max((getattr(transform, "searched", 0) for transform in recipe.transforms), default=0)
    if not trials:
        return None
    length = recipe.calibration.sequence_length
    streams = (recipe.calibration.samples + trials) * length * hidden(plan, headers) * FLOAT
    sizes: dict[int | None, int] = {}
    for layer in plan.layers:
        sizes[layer.block] = sizes.get(layer.block, 0) + math.prod(layer.shape)
    largest = max(math.prod(layer.shape) for layer in plan.layers)
    widest = max(max(layer.shape) for layer in plan.layers)
    chunk = 6 * FLOAT * max(CHUNK, length * widest)
    block = max(_block_bytes(plan, headers).values(), default=0) + FLOAT * (max(sizes.values()) + 3 * largest)
    outside, _ = _outside(plan, headers)
    return (0 if ways.spilled else streams) + max(block + chunk, outside + 6 * FLOAT * LOGITS)


def least_ways(recipe: Recipe, plan: Plan, headers: Headers, limit: int, cuda: bool = False) -> Ways | None:
    """The first way of working that stays within `limit` bytes: as usual, with hidden states on disk, with fewer inputs
    kept, with fewer experts at once; None if none does.
    """
    for ways in (USUAL, Ways(spilled=True)):
        found = memory_of(recipe, plan, headers, ways, cuda)
        if found.peak <= limit:
            return ways
    least = memory_of(recipe, plan, headers, LEAST, cuda)
    if least.peak > limit:
        return None
    ways, spare = replace(LEAST, held=HELD), limit - least.peak
    if memory_of(recipe, plan, headers, ways, cuda).peak > limit:
        return replace(LEAST, held=spare)
    spare = limit - memory_of(recipe, plan, headers, ways, cuda).peak
    return replace(ways, kept=spare)
