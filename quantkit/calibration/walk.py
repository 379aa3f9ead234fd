"""The block walk: calibration inputs go through the model one decoder block at a time.

Between `forward.embed` and `forward.finish` the blocks run one by one, and without quantization the walk gives the
whole model's logits.

Two streams of hidden states may be carried, each only if something needs it: `full` (the original model) and
`quantized` (the prefix already quantized). Memory is one block, the streams [windows, length, hidden], and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from quantkit.calibration.collect import Gatherer
from quantkit.calibration.forward import Call, Stop, finish, patched, refusing
from quantkit.calibration.held import HeldLinear
from quantkit.errors import ModelError
from quantkit.numerics.statistics import Statistics
from quantkit.structure.trace import Trace, trace

CHUNK_ELEMENTS = 1 << 20  # tokens per chunk x widest layer; larger chunks spend their time in page faults
# Inputs kept so that a finished attention or MLP need not run again: at least KEPT_BYTES, and what the matrices of the
# widest linear (H, its factor, the drift) leave of SPARE_BYTES.
KEPT_BYTES, SPARE_BYTES = 128 << 20, 480 << 20


@dataclass
class Streams:
    """Hidden states [windows, length, hidden], fp32, on the CPU; None where nothing needs that stream.

    `full` may hold only the first windows: what is measured on it (AWQ's search, the drift) needs fewer than a Hessian.
    """

    full: torch.Tensor | None
    quantized: torch.Tensor | None

    @property
    def leading(self) -> torch.Tensor:
        return self.quantized if self.quantized is not None else self.full

    def has(self, full: bool, chunk: slice) -> bool:
        """Whether a stream exists and reaches the windows of `chunk`."""
        stream = self.full if full else self.quantized
        return stream is not None and chunk.start < stream.shape[0]


@torch.no_grad()
def inputs_after_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    streams: Streams,
    ids: torch.Tensor,
    batch: int,
    name: str,
    fields: frozenset[str],
    device: torch.device,
    as_tuple: bool,
) -> Statistics:
    """Statistics of the input of a linear that runs after the blocks (the head).

    as_tuple: whether the blocks of this model return their hidden states in a tuple.
    """
    gatherer: Gatherer | None = None
    for start in range(0, len(ids), batch):
        chunk = slice(start, start + batch)
        seen: dict[bool, torch.Tensor] = {}
        for full, stream in ((False, streams.quantized), (True, streams.full)):
            if not streams.has(full, chunk):
                continue

            def hook(module: nn.Module, args: tuple, which: bool = full, into: dict = seen) -> None:
                into[which] = args[0]
                raise Stop

            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            try:
                finish(model, blocks, stream[chunk].to(device), ids[chunk].to(device), as_tuple)
            except Stop:
                pass
            finally:
                handle.remove()
            if full not in seen:
                raise ModelError(
                    f"{name} does not run after the decoder blocks; give it `algorithm: rtn` or a skip rule"
                )
        x = seen.get(False, seen.get(True))
        gatherer = gatherer or Gatherer(fields, x.shape[-1], device)
        gatherer.update(x, seen.get(True))
    return gatherer.finish()


@dataclass
class BlockRun:
    """One block with real weights, its planned linears held as `HeldLinear`, and the streams at its input."""

    index: int
    module: nn.Module
    streams: Streams
    calls: dict[int, Call]  # by batch size
    batch: int
    device: torch.device
    as_tuple: bool = False
    kept_bytes: int | None = None
    _kept: dict[tuple[bool, str], dict[int, torch.Tensor]] = field(default_factory=dict)
    _outputs: dict[tuple[bool, str], dict[int, torch.Tensor]] = field(default_factory=dict)
    _arity: dict[str, int] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _full_advanced: bool = False

    def __post_init__(self) -> None:
        if self.kept_bytes is None:
            widest = max((m.in_features for m in self.held.values()), default=0)
            self.kept_bytes = max(KEPT_BYTES, SPARE_BYTES - 3 * 4 * widest**2)
        x = self.streams.leading[:1].to(self.device)
        call = self.calls[1]
        with refusing(f"decoder block {self.index} ({type(self.module).__name__})"):
            self.trace: Trace = trace(self.module, x, call.args, call.kwargs)
        self._terminal = {linear: name for name, linear in self.trace.output_of.items()}
        for name in self.trace.output_of:
            self.module.get_submodule(name).register_forward_hook(self._note_arity(name))

    def _note_arity(self, name: str) -> Callable:
        arity = self._arity  # and not self: a hook stays with the module, which self holds

        def hook(module: nn.Module, args: object, out: object) -> None:
            arity.setdefault(name, len(out) if isinstance(out, tuple) else 0)

        return hook

    @property
    def held(self) -> dict[str, HeldLinear]:
        return {n: m for n, m in self.module.named_modules() if isinstance(m, HeldLinear)}

    def chunks(self) -> list[slice]:
        count = self.streams.leading.shape[0]
        return [slice(a, min(a + self.batch, count)) for a in range(0, count, self.batch)]

    def select(self, full: bool) -> None:
        """Choose which weights run: the original ones or the quantized ones (where they exist)."""
        for module in self.held.values():
            module.active = not full

    @torch.no_grad()
    def forward(self, chunk: slice, full: bool) -> torch.Tensor:
        """The block's output for the windows of `chunk`; finished submodules are replayed from what was kept."""
        self.select(full)
        hidden = (self.streams.full if full else self.streams.quantized)[chunk].to(self.device)
        call = self.calls[hidden.shape[0]]
        with patched(self._replays(chunk, full)):
            out = self.module(hidden, *call.args, **call.kwargs)
        self.as_tuple = isinstance(out, tuple)
        return out[0] if self.as_tuple else out

    def _replays(self, chunk: slice, full: bool) -> list[tuple[nn.Module, Callable]]:
        """Finished attention and MLP modules that need not run: their last linear runs once on the input kept for it,
        and its output, which takes the place of that input, serves every later pass.
        """
        replays = []
        for linear, name in self._terminal.items():
            at = (full, linear)
            kept, outputs = self._kept.get(at, {}), self._outputs.setdefault(at, {})
            if linear not in self._done or name not in self._arity:
                continue
            if chunk.start not in outputs:
                if chunk.start not in kept:
                    continue
                outputs[chunk.start] = self.module.get_submodule(linear)(kept.pop(chunk.start))

            def replay(*args: object, to: str = name, out: torch.Tensor = outputs[chunk.start], **kw):
                arity = self._arity[to]
                out = out.clone()  # a model may add to it in place
                return (out, *([None] * (arity - 1))) if arity else out

            replays.append((self.module.get_submodule(name), replay))
        return replays

    @torch.no_grad()
    def collect(self, stages: list[tuple[str, ...]], needs: dict[tuple[str, ...], frozenset[str]]) -> dict:
        """Statistics of each stage's shared input, in one pass over the chunks: {stage: Statistics}.

        The forward stops at the last stage's input; the full stream runs on when that was the block's last stage, as
        its weights will not change, and so advances in the same pass.
        """
        stages = [s for s in stages if needs[s]]
        if not stages:
            return {}
        gatherers: dict[tuple[str, ...], Gatherer] = {}
        final = stages[-1] == self.trace.stages[-1]
        for chunk in self.chunks():
            seen: dict[bool, dict] = {}
            for full in (False, True):
                if not self.streams.has(full, chunk):
                    continue
                seen[full] = {}
                out = self._forward_to(stages, chunk, full, seen[full], stop=not (full and final))
                if out is not None:
                    self.streams.full[chunk] = out.to(self.streams.full.device)
                    self._full_advanced = True
            for stage in stages:
                x = seen[False][stage] if False in seen else seen[True][stage]
                if stage not in gatherers:
                    gatherers[stage] = Gatherer(needs[stage], x.shape[-1], self.device)
                gatherers[stage].update(x, seen.get(True, {}).get(stage))
                for full, inputs in seen.items():
                    self._keep(stage, chunk, full, inputs[stage])
        return {stage: gatherers[stage].finish() for stage in stages}

    def _forward_to(
        self, stages: list[tuple[str, ...]], chunk: slice, full: bool, seen: dict, stop: bool
    ) -> torch.Tensor | None:
        def grab(stage: tuple[str, ...]) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                seen[stage] = args[0]
                if stop and len(seen) == len(stages):
                    raise Stop

            return hook

        handles = [self.module.get_submodule(s[0]).register_forward_pre_hook(grab(s)) for s in stages]
        try:
            return self.forward(chunk, full)
        except Stop:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, stage: tuple[str, ...], chunk: slice, full: bool, x: torch.Tensor) -> None:
        """Keep the input of a linear whose output is its parent's, while the budget lasts."""
        linear = stage[0]
        if len(stage) != 1 or linear not in self._terminal or (full and self._full_advanced):
            return
        stores = (*self._kept.values(), *self._outputs.values())
        used = sum(t.nbytes for store in stores for t in store.values())
        if used + x.nbytes <= self.kept_bytes:
            self._kept.setdefault((full, linear), {})[chunk.start] = x

    def finished(self, names: Iterable[str]) -> None:
        """These linears have their final weights: their parents may be replayed."""
        self._done.update(names)

    @torch.no_grad()
    def advance(self) -> None:
        """Bring both streams to the output of this block."""
        for chunk in self.chunks():
            if self.streams.has(True, chunk) and not self._full_advanced:
                self.streams.full[chunk] = self.forward(chunk, full=True).to(self.streams.full.device)
            if self.streams.quantized is not None:
                out = self.forward(chunk, full=False)
                self.streams.quantized[chunk] = out.to(self.streams.quantized.device)
        self._kept.clear()
        self._outputs.clear()

    @torch.no_grad()
    def observe(
        self, names: Iterable[str], windows: int
    ) -> dict[str, list[tuple[tuple, dict, torch.Tensor]]]:
        """(args, kwargs, output) of submodules on the first `windows` windows of the full stream (or the only one).

        One pass for all of them; "" is the block itself. Outputs are copies: a model may add to them in place.
        """
        calls: dict[str, list[tuple[tuple, dict, torch.Tensor]]] = {name: [] for name in names}

        def note(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
                calls[name].append((args, kwargs, (out[0] if isinstance(out, tuple) else out).clone()))

            return hook

        handles = [
            self.module.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
            for name in calls
        ]
        try:
            for chunk in self.chunks():
                full = self.streams.full is not None
                if chunk.start >= windows or not self.streams.has(full, chunk):
                    break
                self.forward(chunk, full)
        finally:
            for handle in handles:
                handle.remove()
        return calls
