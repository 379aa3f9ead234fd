"""`BlockForward`: one decoder block with real weights that is run on the windows of both streams, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.calibration.calls import BlockCalls, mappings, returned_as, written
from quantkit.calibration.experts import ExpertsStage
from quantkit.calibration.forward import Call, patched, refusing
from quantkit.calibration.held import HeldLinear
from quantkit.calibration.kv import BlockKV
from quantkit.calibration.memory import give_back
from quantkit.calibration.ranking import Scores, agreed, rankings
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.calibration.replay import Replay
from quantkit.calibration.returned import FIRST, Form, laid, returned, stacked
from quantkit.calibration.streams import Streams, kept
from quantkit.structure.fold import ScalingGroup
from quantkit.structure.trace import first_output, trace

if TYPE_CHECKING:
    from quantkit.calibration.kept_statistics import KeptStatistics
    from quantkit.plan import LayerPlan

Groups = tuple[list[ScalingGroup], list[tuple[str, str]]]  # proved ones, and (pairing, why it was refused)


class BlockForward:
    """One block, its planned linears held as `HeldLinear`, and the streams at its input, which it brings to its output.

    index, name: its number and module name ("model.layers.3"). plans: its planned linears; stored: the dtype on disk
    of every parameter; both by module or parameter name inside the block. trace: which tensor goes where.
    changed: parameters that a transform has changed and that are not quantized, in stored dtype, for the shard.
    kv: how the block's KV cache is quantized, for the quantized stream; None: it is exact.
    kept: statistics of the original model that need not be collected; None: there are none.
    model_type: of the model's config, for what the literature says of a family.
    ranks: the processes that hold this block, each with windows of its own; what is returned here of all windows is
    the same in all of them, outputs and inputs themselves are those of this process.
    replay_bytes: of inputs that are kept for replay; None: as many as usual.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        plans: dict[str, LayerPlan],
        stored: dict[str, torch.dtype],
        streams: Streams,
        calls: BlockCalls,
        batch: int,
        device: torch.device,
        groups: dict[tuple[Any, ...], Groups] | None = None,
        free: Callable[[], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
        experts: Iterable[ExpertsStage] = (),
        ranks: Ranks = ALONE,
        replay_bytes: int | None = None,
    ) -> None:
        self.ranks = ranks
        self.index, self.name, self.module = index, name, module
        self.plans, self.stored, self.streams = plans, stored, streams
        self.calls, self.batch, self.device = calls, batch, device
        self.changed: dict[str, torch.Tensor] = {}
        self.model_type = ""
        self.kv: BlockKV | None = None
        self.form = FIRST
        self.seconds_once = 0.0  # of this block's time, what the next ones of its structure will not need
        self.kept: KeptStatistics | None = None
        self._folded: dict[str, torch.Tensor] = {}  # linear -> what its input is divided by, [K]
        self._groups = {} if groups is None else groups
        self.last = False  # whether nothing runs after this block
        self._free, self._now = free, now
        self._full_advanced = False
        self._alive = True
        x, call = self.first_call()
        before = {place: dict(mapping) for place, mapping in mappings(call).items()}
        with refusing(f"decoder block {index} ({type(module).__name__})"):
            self.trace = ranks.first(trace(module, x, call.args, call.kwargs))
        self._writes = written(call, before)
        self.experts = {stage.name: stage for stage in experts}
        for stage in self.experts.values():
            stage.through()
        widest = max((m.in_features for m in self.held.values()), default=0)
        self._replay = Replay(module, self.trace, widest, not (self._writes or calls.hands), replay_bytes)

    @property
    def held(self) -> dict[str, HeldLinear]:
        """The planned linears, by module name inside the block."""
        return {n: m for n, m in self.module.named_modules() if isinstance(m, HeldLinear)}

    def chunks(self) -> list[slice]:
        """The windows, in pieces that run at once."""
        count = self.streams.leading.shape[0]
        return [slice(a, min(a + self.batch, count)) for a in range(0, count, self.batch)]

    def first_call(self) -> tuple[torch.Tensor, Call]:
        """(hidden states of the first window as the block takes them, the call that goes with them)."""
        full = self.streams.quantized is None
        hidden = self.streams.leading[:1].to(self.device)
        call = self.calls.at(self.chunks()[0], 1, self.streams.shared.get((full, 0)))
        return laid(hidden, call.axis), call

    @property
    def runs_original(self) -> bool:
        """Whether the original weights will run again after they were quantized."""
        return self.streams.full is not None

    def select(self, full: bool) -> None:
        """Choose which weights run: the original ones or the quantized ones (where they exist)."""
        for module in self.held.values():
            module.active = not full

    @torch.no_grad()
    def forward(self, chunk: slice, full: bool) -> torch.Tensor:
        """The block's output for the windows of `chunk`; finished parts are replayed from what was kept."""
        out, call = self._run(chunk, full)
        return stacked(first_output(out), call.axis)

    def _run(self, chunk: slice, full: bool) -> tuple[Any, Call]:
        """(what the block returns for the windows of `chunk`, the call that was made)."""
        self.select(full)
        hidden = self.streams.of(full)[chunk].to(self.device)
        cache = self.kv.cache() if self.kv is not None and self.kv.ready and not full else None
        call = self.calls.at(chunk, hidden.shape[0], self.streams.shared.get((full, chunk.start)), cache)
        with patched(self._replay.forwards(chunk, full)), self._experts_at((full, chunk.start)):
            out = call(self.module, hidden)
        self.form = Form(returned(out), call.axis)
        return out, call

    @contextmanager
    def _experts_at(self, at: tuple[bool, int]) -> Iterator[None]:
        """Inside, experts know which chunk runs, and so return what they have given for it, if they are finished."""
        stages = self.experts.values()
        for stage in stages:
            stage.at = at
        try:
            yield
        finally:
            for stage in stages:
                stage.at = None

    @torch.no_grad()
    def route(self, stage: ExpertsStage, top: int | None = None) -> None:
        """Record what reaches some experts in every chunk of both streams.

        top: an expert is to be calibrated on the tokens whose router ranks it among its first `top`.
        """
        experts, found = stage.experts.total, {}
        for chunk in self.chunks():
            for full in (False, True):
                if self.streams.has(full, chunk):
                    at, tokens = (full, chunk.start), self.streams.of(full)[chunk].shape[:-1].numel()
                    scores = None if top is None else Scores(tokens, experts)
                    stage.record(at, partial(self._run, chunk, full), scores)
                    if scores is not None and top is not None and stage.recorded(at).count:
                        found[at] = rankings(scores.seen, stage.recorded(at).index, top)
        if top is not None and any(self.ranks.gather(bool(found))):
            place = agreed(found.values(), self.ranks, f"{self.name}.{stage.name}", top)
            for at, each in found.items():
                stage.recorded(at).rank(each[place], experts)

    def _step(self, chunk: slice, full: bool) -> None:
        """Bring one chunk of one stream to the block's output, and keep what the block hands on beside it."""
        out, call = self._run(chunk, full)
        stream = self.streams.of(full)
        stream[chunk] = stacked(first_output(out), call.axis).to(stream.device)
        shared = self.streams.shared.setdefault((full, chunk.start), {})
        if self._writes:
            shared |= {place: kept(place, mapping) for place, mapping in mappings(call).items()}
        for number in self.calls.hands:
            name, value = returned_as(number), out[number]
            shared[name] = {} if value is None else kept(name, {0: value})

    def finished(self, names: Iterable[str]) -> None:
        """These linears have their final weights: what they are the last of may be replayed."""
        self._replay.finished(names)

    @torch.no_grad()
    def advance(self) -> None:
        """Bring both streams to the output of this block."""
        for chunk in self.chunks():
            if self.streams.has(True, chunk) and not self._full_advanced:
                self._step(chunk, full=True)
            if self.streams.quantized is not None:
                self._step(chunk, full=False)
        self._replay.clear()

    def leave(self) -> None:
        """Advance the streams, if anything runs after this block, and let its weights go. A second call does nothing.

        Left early, before the walk goes on, the block makes room for packing what it became.
        """
        if not self._alive:
            return
        self._alive = False
        if not self.last:
            self.advance()
        if self._free is not None:
            self._free()
        del self.module, self._replay
        give_back()
