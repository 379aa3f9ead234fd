"""How long a run will take on this machine, phase by phase, from the plan and measured rates; without torch.

The work is counted as a run does it. With T tokens of calibration text, of which the original model's stream has T':

    start      Python and its imports
    load       opening, sha256 of the source, every byte read
    search     walks of a search before the first block
    transform  AWQ's trials: a rounding and a forward of the part each, for every group of linears with one input
    calibrate  passes over the chunks up to each set of linears in turn; attention or MLP are not run again once they
               are final, as far as their inputs are kept (calibration/replay.py); T K^2 for a Hessian, T' K^2 for the
               drift
    quantize   K^3 to factor a Hessian, N K^2 for the columns, once more for each sweep, 3 N K^2 to re-target; N K to
               search a grid
    write      codes packed, bytes of the shards and of the hidden states that a resumed run needs
    verify     every weight read back and multiplied, every file read again
    evaluate   (if asked for) original and quantized model on the windows after which an evaluation usually stops
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.algorithms.config import GptqConfig, RtnConfig
from quantkit.cost.rates import Rates
from quantkit.models.blocks import text_config
from quantkit.models.headers import Headers
from quantkit.plan import Plan
from quantkit.predict.block import (
    BlockShape,
    Siblings,
    blocks_of,
    chosen_experts,
    chunk_windows,
    hidden,
    kinds_of,
    streams_of,
)
from quantkit.predict.memory import KEPT, SPARE, USUAL, Ways, stream_bytes
from quantkit.predict.sizes import stored_bytes
from quantkit.recipe.recipe import Recipe
from quantkit.transforms.config import AwqConfig, SmoothQuantConfig, SmoothQuantPlusConfig

PHASES = ("start", "load", "search", "transform", "calibrate", "quantize", "write", "verify", "evaluate")
WINDOWS = 18  # after which an evaluation that may stop early is expected to (pipeline/tracker.py)
CONTEXT = 2048  # longest context of an evaluation
_CLIP_STEPS = 10


@dataclass(frozen=True)
class Duration:
    """Seconds of a run. phases: by name, those of `PHASES` that it has. parts: of each block and of what lies outside
    the blocks, all their phases together.
    """

    phases: Mapping[str, float]
    parts: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """Until the checkpoint is written and verified; the evaluation comes on top."""
        return sum(seconds for phase, seconds in self.phases.items() if phase != "evaluate")

    def report(self, rates: Rates) -> dict[str, Any]:
        """Of schema `quantkit-plan/1`."""
        facts = {"total": self.total, "threads": rates.threads, "cpu": rates.cpu}
        return facts | {"phases": {name: s for name, s in self.phases.items() if s}}


@dataclass
class _Spent:
    """Seconds of a part by phase."""

    phases: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def duration(recipe: Recipe, plan: Plan, headers: Headers, rates: Rates, ways: Ways = USUAL) -> Duration:
    """What a run of `plan` will take. ways: how it saves memory."""
    stored = stored_bytes(plan, headers)
    written, read = [0] * (plan.n_blocks + 1), [0] * (plan.n_blocks + 1)
    for disk, n_bytes in stored.items():
        part = plan.parts.get(disk, plan.n_blocks)
        written[part] += n_bytes
        read[part] += headers.tensors[disk].nbytes
    blocks = blocks_of(plan, headers)
    kinds = kinds_of(blocks)
    work = _Work(recipe, plan, headers, rates, ways)
    known: dict[int, dict[str, float]] = {}
    parts = []
    for part in range(plan.n_blocks + 1):
        shape = kinds.get(part if part < plan.n_blocks else None)
        spent = _Spent()
        if shape is not None:
            if id(shape) not in known:
                known[id(shape)] = work.block(shape, part == plan.n_blocks).phases
            spent.phases |= known[id(shape)]
        spent.add("load", read[part] * rates.at("read"))
        last = part >= plan.n_blocks - 1
        spent.add("write", (written[part] + (0 if last else work.streams)) * rates.at("write"))
        parts.append(spent)
    whole = _Spent()
    for spent in parts:
        for phase, seconds in spent.phases.items():
            whole.add(phase, seconds)
    whole.add(
        "load", rates.at("open") + sum(info.nbytes for info in headers.stored.values()) * rates.at("hash")
    )
    whole.add("start", rates.at("start"))
    whole.add("verify", sum(written) * rates.at("hash"))
    whole.add("search", work.search(kinds))
    weights = sum(math.prod(headers.tensors[disk].shape) for disk in plan.parts if disk in headers.tensors)
    whole.add("evaluate", work.evaluation(weights))
    phases = {name: whole.phases[name] for name in PHASES if whole.phases.get(name)}
    return Duration(phases, tuple(spent.total for spent in parts))


class _Work:
    """What one run has in common, and the seconds of its parts."""

    def __init__(self, recipe: Recipe, plan: Plan, headers: Headers, rates: Rates, ways: Ways) -> None:
        self.recipe, self.plan, self.rates, self.ways = recipe, plan, rates, ways
        self.text = plan.needs_text(recipe)
        self.length = recipe.calibration.sequence_length
        self.hidden = hidden(plan, headers)
        batch = chunk_windows(recipe, plan)
        full, quantized = streams_of(recipe, plan) if self.text else (0, 0)
        self.full, self.quantized, self.chunk = (n * self.length for n in (full, quantized, batch))
        self.streams = stream_bytes(recipe, plan, headers) if self.text else 0
        self.chosen = chosen_experts(text_config(headers.config))
        table = [i.shape for d, i in headers.tensors.items() if d not in plan.parts and len(i.shape) == 2]
        self.vocabulary = max((shape[0] for shape in table), default=0)

    def block(self, shape: BlockShape, outside: bool) -> _Spent:
        """One block, or the linears outside the blocks."""
        spent, at = _Spent(), self.rates.at
        for siblings, count in self._sets(shape):
            spent.add("quantize", count * self.quantize(siblings))
            spent.add("write", count * siblings.weights * at("pack", siblings.columns))
            spent.add("verify", count * siblings.weights * at("verify", siblings.columns))
        if not self.text:
            return spent
        for siblings, count in self._sets(shape):
            share = max(1, self.chosen) / count if count > 1 else 1.0
            spent.add("calibrate", count * self._statistics(siblings, share))
        if outside:
            return spent
        spent.add("calibrate", self._passes(shape) + self._experts(shape))
        for config in self.recipe.transforms:
            spent.add("transform", self._transform(config, shape))
        return spent

    def _sets(self, shape: BlockShape) -> list[tuple[Siblings, int]]:
        return [*((s, 1) for s in shape.own), *((s, shape.count) for s in shape.experts)]

    def quantize(self, siblings: Siblings) -> float:
        """A set of linears with one input, as one matrix, by the algorithm of its first one.

        Of an algorithm that is not ours only the rounding is known.
        """
        n, k, at, config = siblings.rows, siblings.columns, self.rates.at, siblings.algorithm
        if not isinstance(config, RtnConfig | GptqConfig):
            return at("solve") + n * k * at("round", k)
        search = at("round", k) if config.range == "minmax" else at("search", k)
        if isinstance(config, RtnConfig):
            return at("solve") + n * k * (search * (1 + config.refit) + at("round", k))
        products = at("columns", k) + config.refine * at("sweep", k)
        if config.retarget:
            products += 3 * at("linear", k)
        return at("solve") + k**3 * at("factor", k) + n * k**2 * products + n * k * search

    def _statistics(self, siblings: Siblings, share: float) -> float:
        """Sums over all tokens of an input. share: of the tokens that come to it."""
        k, needs, at = siblings.columns, siblings.needs, self.rates.at
        tokens = self.quantized or self.full
        seconds = tokens * k**2 * at("hessian", k) if "hessian" in needs else 0.0
        if "drift" in needs:
            seconds += self.full * k**2 * at("drift", k)
        return share * seconds

    def _run(self, sets: list[Siblings], tokens: int, original: bool, attention: bool) -> float:
        """A forward of some linears, and of attention itself, on `tokens` tokens of one of the streams."""
        if not tokens or not (sets or attention):
            return 0.0
        at, chunks = self.rates.at, math.ceil(tokens / self.chunk)
        weight = "cast" if original else "decode"
        seconds = 0.0
        for s in sets:
            seconds += s.weights * (tokens * at("linear", s.columns) + chunks * at(weight, s.columns))
        if attention:
            seconds += tokens * self.length * self.hidden * at("scores", self.hidden)
        return seconds + tokens * self.hidden * at("vector", self.hidden) / 2 + chunks * at("call") / 2

    def _passes(self, shape: BlockShape) -> float:
        """All forwards of a block: up to each set of linears, with what is final replayed, and to its output."""
        first = [s for s in shape.own if s.attention and not s.output]
        end = [s for s in shape.own if s.attention and s.output]
        inner = [s for s in shape.own if not s.attention and not s.output]
        last = [s for s in shape.own if not s.attention and s.output]
        needs = frozenset().union(*(s.needs for s in shape.every))
        seconds, kept = 0.0, self._kept(shape)
        for tokens, original in ((self.full, True), (self.quantized, False)):
            if not tokens:
                continue
            ahead, behind = self._run(first, tokens, original, True), self._run(end, tokens, original, False)
            middle, out = self._run(inner, tokens, original, False), self._run(last, tokens, original, False)
            attention, mlp = ahead + behind, middle + out
            if not needs:
                seconds += attention + mlp
                continue
            if not shape.sequential:  # one pass to the last set; then, behind quantized weights, all of it
                seconds += attention + mlp if original else 2 * (attention + mlp) - out
                continue
            again = (1 - kept[0]) * attention
            seconds += ahead + kept[0] * behind + again + again + middle
            if original:
                seconds += out
            else:
                seconds += again + out + (1 - kept[1]) * middle
        return seconds

    def _kept(self, shape: BlockShape) -> tuple[float, float]:
        """The shares of the inputs of what ends attention and MLP that are kept."""
        widest = max((s.columns for s in shape.own), default=0)
        left = float(max(KEPT, SPARE - 12 * widest**2)) if self.ways.kept is None else float(self.ways.kept)
        shares = []
        for attention in (True, False):
            columns = sum(s.columns for s in shape.own if s.output and s.attention is attention)
            wanted = 4.0 * (self.full + self.quantized) * columns
            shares.append(min(1.0, left / wanted) if wanted else 1.0)
            left = max(0.0, left - wanted)
        return shares[0], shares[1]

    def _experts(self, shape: BlockShape) -> float:
        """Every expert on its tokens: once for each of its sets, and its outputs of both streams."""
        if not shape.experts:
            return 0.0
        share = max(1, self.chosen) / shape.count
        every = list(shape.experts)
        seconds = 0.0
        for tokens, original in ((self.full, True), (self.quantized, False)):
            own = math.ceil(tokens * share)
            passes = 2 if any(s.needs for s in every) else 1
            seconds += passes * self._run(every, own, original, False) if own else 0.0
        router = self._run([s for s in shape.own if s.attention], self.full + self.quantized, True, True)
        return shape.count * (seconds + len(every) * self.rates.at("call")) + router

    def _transform(self, config: Any, shape: BlockShape) -> float:
        at = self.rates.at
        if isinstance(config, AwqConfig):
            tokens, seconds = config.windows * self.length, 0.0
            whole = sum(self._run([s], tokens, True, s.attention and not s.output) for s in shape.own)
            for s in shape.own:
                part = [each for each in shape.own if each.attention is s.attention]
                trial = s.weights * s.columns * at("linear", s.columns)  # tr(E H E^T) of a single linear
                if not s.output:
                    trial = self._run(part, tokens, True, s.attention)
                seconds += config.grid * (2 * s.weights * at("round", s.columns) + trial) * config.scale
            rounds_only = all(isinstance(s.algorithm, RtnConfig) for s in shape.every)
            if config.clip is True or (config.clip == "auto" and rounds_only):
                group = max(16, min(s.layers[0].scheme.weights.group(s.columns) for s in shape.own))
                per_weight = _CLIP_STEPS * (2 * at("round", self.hidden) + group * at("linear", self.hidden))
                seconds += whole + per_weight * sum(s.weights for s in shape.own)
            return seconds + whole + at("call") * 20
        tokens = self.full
        if isinstance(config, SmoothQuantConfig) and config.alpha == "auto":
            tokens += (config.grid + 1) * config.search_windows * self.length
        return self._run(list(shape.own), tokens, True, True)

    def search(self, kinds: Mapping[int | None, BlockShape]) -> float:
        """SmoothQuant+'s walks: all windows once, and in every block each strength on its windows, weights rounded."""
        config = next((t for t in self.recipe.transforms if isinstance(t, SmoothQuantPlusConfig)), None)
        if config is None or config.strength != "search":
            return 0.0
        trials = 22 if config.search == "full" else 14
        windows = min(config.search_windows, self.recipe.calibration.samples)
        tokens, walks = windows * self.length, math.ceil(trials / config.beside)
        seconds = 0.0
        for number, shape in kinds.items():
            if number is None:
                continue
            every, whole = list(shape.own), self.recipe.calibration.samples * self.length
            seconds += self._run(every, whole + (walks - 1) * tokens, True, True)
            rounding = sum(s.weights * 3 * self.rates.at("round", s.columns) for s in every)
            seconds += trials * (self._run(every, tokens, True, True) + rounding)
        logits = self.vocabulary * (
            self.hidden * self.rates.at("linear", self.hidden) + self.rates.at("logits")
        )
        return seconds + trials * tokens * logits

    def evaluation(self, weights: int) -> float:
        """Two models on as many windows as are usually enough."""
        tokens, at = WINDOWS * min(self.length, CONTEXT), self.rates.at
        shared = (
            self.plan.n_blocks
            * self.hidden
            * (self.length * at("scores", self.hidden) + at("vector", self.hidden))
        )
        head = self.vocabulary * (2 * self.hidden * at("linear", self.hidden) + at("logits"))
        return 1.0 + tokens * (2 * weights * at("linear", self.hidden) + 2 * shared + head)


__all__ = ["PHASES", "Duration", "duration"]
