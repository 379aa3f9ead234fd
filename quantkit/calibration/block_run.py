"""`BlockRun`: one decoder block with real weights, and everything that works on a block may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quantkit.calibration.block_forward import BlockForward, Groups
from quantkit.calibration.collect import Gatherers, extremes, sample
from quantkit.calibration.forward import Stop, refusing
from quantkit.calibration.kept_statistics import FIELDS, divided
from quantkit.calibration.kv import BlockKV
from quantkit.calibration.streams import Streams
from quantkit.errors import NumericalError
from quantkit.models.families import ATTENTION_LOGIT_NAMES
from quantkit.numerics.input_range import InputRange
from quantkit.numerics.statistics import Statistics
from quantkit.structure.discover import discover
from quantkit.structure.fold import ScalingGroup, fold
from quantkit.structure.trace import first_output

FOLD_TOLERANCE = 2e-3  # change of the block's output after a real fold, relative to its RMS, in fp32
Inputs = dict[tuple[str, ...], torch.Tensor]  # siblings -> what they read
Observed = dict[
    str, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]
]  # (args, kwargs, output) per chunk


class BlockRun(BlockForward):
    """A block that can be run, with the statistics of its inputs, its outputs and its scaling groups.

    They may be asked for as long as the block is loaded; `leave` ends that.
    """

    @torch.no_grad()
    def collect(
        self, sets: list[tuple[str, ...]], needs: dict[tuple[str, ...], frozenset[str]]
    ) -> dict[tuple[str, ...], Statistics]:
        """Statistics of the input that each set of siblings shares, in one pass over the chunks for those not kept.

        Inputs count as the siblings round them (see `rounded`), those of the full stream as they are.

        The forward stops at the last set's input; the full stream runs on when that was the block's last set, as its
        weights will not change, and so advances in the same pass.
        """
        sets = [s for s in sets if needs[s]]
        found = {s: self._from_kept(s[0], needs[s]) for s in sets if self._are_kept(s)}
        sets = [s for s in sets if s not in found]
        if not sets:
            return found
        gatherers: Gatherers[tuple[str, ...]] = Gatherers(self.device)
        final = self._may_advance(sets[-1])
        for chunk in self.chunks():
            seen: dict[bool, Inputs] = {}
            for full in (False, True):
                if self.streams.has(full, chunk):
                    seen[full] = {}
                    self._forward_to(sets, chunk, full, seen[full], stop=not (full and final))
            for siblings in sets:
                original = False not in seen or self._on_original(siblings)
                x = seen[original][siblings]
                x_full = None if self._unpaired(siblings) else seen.get(True, {}).get(siblings)
                gatherers.update(siblings, needs[siblings], self.rounded(siblings, x), x_full)
                for full, inputs in seen.items():
                    if not (full and self._full_advanced):
                        self._replay.keep(siblings, chunk, full, inputs[siblings])
        return found | gatherers.finish(self.ranks)

    def _are_kept(self, siblings: tuple[str, ...]) -> bool:
        """Whether the statistics that siblings need are those that are kept: of the original model's inputs."""
        original = self.streams.quantized is None or self._on_original(siblings)
        exact = all(self.plans[name].scheme.inputs is None for name in siblings if name in self.plans)
        return self.kept is not None and original and exact

    def _from_kept(self, name: str, fields: frozenset[str]) -> Statistics:
        """Kept statistics of the input of a linear, as it is behind the scales that were folded into its producer."""
        assert self.kept is not None
        found = self.kept.of(f"{self.name}.{name}", fields).to(self.device)
        return divided(found, self._folded[name]) if name in self._folded else found

    def _on_original(self, siblings: tuple[str, ...]) -> bool:
        """Whether the statistics of siblings are those of the original model's inputs."""
        planned = [self.plans[name] for name in siblings if name in self.plans]
        return any(getattr(plan.algorithm, "stream", None) == "original" for plan in planned)

    def _unpaired(self, siblings: tuple[str, ...]) -> bool:
        """Whether the two streams' inputs of some siblings are of other tokens, as a router chooses them."""
        owner = self.module.get_submodule(siblings[0].rpartition(".")[0])
        return bool(getattr(owner, "chooses_rows", False))

    def _may_advance(self, siblings: tuple[str, ...]) -> bool:
        """Whether the full stream may go on to the block's output once these siblings have been seen."""
        return siblings == self.trace.siblings[-1] and all(each.done for each in self.experts.values())

    def rounded(self, siblings: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """The shared input [..., K] of siblings on the grid that all planned ones round it to; if they differ in it, as
        it is.
        """
        held = [self.held[name] for name in siblings if name in self.plans]
        if len({(linear.inputs, linear.in_features) for linear in held}) != 1:
            return x
        return held[0].rounded(x)

    @torch.no_grad()
    def ranges(self, sets: list[tuple[str, ...]], field: str) -> dict[tuple[str, ...], InputRange]:
        """The range of the input that each set of siblings shares, in the stream that quantized layers will see.

        field: "range" for the smallest and the largest input, "counts" for how often each value came too.
        """
        found = self._over_chunks(sets, field, full=self.streams.quantized is None, stop=True)
        return {siblings: each.range for siblings, each in found.items() if each.range is not None}

    @torch.no_grad()
    def largest_inputs(self, sets: list[tuple[str, ...]]) -> dict[tuple[str, ...], torch.Tensor]:
        """max|x| [K] of the input of each set of siblings, not rounded, over the full stream, which goes on to the
        block's output in the same pass, unless they are kept.
        """
        if self.kept is not None:
            return {
                s: amax for s in sets if (amax := self._from_kept(s[0], frozenset({"amax"})).amax) is not None
            }
        found = self._over_chunks(sets, "amax", full=True, stop=False)
        return {siblings: each.amax for siblings, each in found.items() if each.amax is not None}

    def _over_chunks(
        self, sets: list[tuple[str, ...]], field: str, full: bool, stop: bool
    ) -> dict[tuple[str, ...], Statistics]:
        """One field of `Statistics` of the input of each set as it is, over one stream; stop: see `_forward_to`."""
        gatherers: Gatherers[tuple[str, ...]] = Gatherers(self.device)
        for chunk in self.chunks():
            seen: Inputs = {}
            self._forward_to(sets, chunk, full, seen, stop)
            for siblings, x in seen.items():
                gatherers.update(siblings, frozenset({field}), x)
        return gatherers.finish(self.ranks)

    def _forward_to(
        self, sets: list[tuple[str, ...]], chunk: slice, full: bool, seen: Inputs, stop: bool
    ) -> None:
        """Fill `seen` with the input of each set; without `stop`, the stream goes on to the block's output."""

        def grab(siblings: tuple[str, ...]) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                seen[siblings] = args[0]
                if stop and len(seen) == len(sets):
                    raise Stop

            return hook

        handles = [self.module.get_submodule(s[0]).register_forward_pre_hook(grab(s)) for s in sets]
        try:
            self._step(chunk, full)
            self._full_advanced = self._full_advanced or full
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def observe(self, names: Iterable[str], windows: int) -> Observed:
        """(args, kwargs, output) of submodules on the first `windows` windows of the full stream (or the only one).

        One pass for all of them; "" is the block itself. Outputs are copies: a model may add to them in place.
        """
        calls: Observed = {name: [] for name in names}

        def note(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                calls[name].append((args, kwargs, first_output(out).clone()))

            return hook

        modules = {name: self.module.get_submodule(name) for name in calls}
        handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in modules.items()]
        self._look(handles, windows)
        return calls

    @torch.no_grad()
    def inputs_of(self, names: Iterable[str], field: str, windows: int | None) -> dict[str, torch.Tensor]:
        """One field of `Statistics` over the inputs of linears, on the windows that `observe` looks at; None: on all.

        One pass for all of them, none where the statistics of all windows are kept. No input is kept.
        """
        if self.kept is not None and windows is None and field in FIELDS:
            return {name: getattr(self._from_kept(name, frozenset({field})), field) for name in names}
        gatherers: Gatherers[str] = Gatherers(self.device)

        def note(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                gatherers.update(name, frozenset({field}), args[0])

            return hook

        modules = {name: self.module.get_submodule(name) for name in names}
        self._look([m.register_forward_pre_hook(note(name)) for name, m in modules.items()], windows)
        return {name: getattr(found, field) for name, found in gatherers.finish(self.ranks).items()}

    def _look(self, handles: list[RemovableHandle], windows: int | None) -> None:
        """Run the first windows of the full stream (or the only one) for hooks, which are removed afterwards."""
        full = self.streams.full is not None
        try:
            for chunk in self.chunks():
                number = self.ranks.number(chunk.start, self.batch)
                beyond = windows is not None and number >= windows
                if beyond or not self.streams.has(full, chunk):
                    break
                self.forward(chunk, full)
        finally:
            for handle in handles:
                handle.remove()

    def gather(self, field: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One field of `Statistics` over some inputs [..., K], of all processes."""
        gatherers: Gatherers[str] = Gatherers(self.device)
        for x in inputs:
            gatherers.update("", frozenset({field}), x)
        found: torch.Tensor = getattr(gatherers.finish(self.ranks)[""], field)
        return found

    def extremes(self, inputs: list[torch.Tensor], columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest of each column [K] of some inputs [..., K], of all processes."""
        return extremes(inputs, columns, self.device, self.ranks)

    def sample(self, inputs: list[torch.Tensor]) -> torch.Tensor | None:
        """Some of the inputs [..., K] of all processes, fp32 [rows, K], see `collect.sample`."""
        return sample(inputs, self.device, self.ranks)

    # for transforms ---------------------------------------------------------------------------------------------

    def scaling_groups(self, instead: str) -> Groups:
        """The proved scaling groups of this block, and the pairings that were refused with the reason.

        Found once for all blocks of one structure. instead: what to do where a block does not run on its own.
        """
        shape = tuple((n, tuple(p.shape)) for n, p in self.module.named_parameters())
        if shape not in self._groups:
            hidden, call = self.first_call()
            self.select(full=True)
            where = f"scaling groups of decoder block {self.index} ({type(self.module).__name__}, in float64)"
            begin = self._now()
            with refusing(where, instead=instead):
                found = discover(self.module, hidden, call.args, call.kwargs)
            self._groups[shape] = self.ranks.first(found)
            self.seconds_once += self._now() - begin
        return self._groups[shape]

    @contextmanager
    def trial(self, groups: Iterable[ScalingGroup]) -> Iterator[None]:
        """Inside, the planned linears have copies of their weights in fp32 and the producers of `groups` copies of
        theirs, to be changed at will; afterwards the block is what it was.
        """
        modules = [*self.held.values(), *(self.module.get_submodule(g.producer) for g in groups)]
        kept = {p: p.data for module in modules for p in module.parameters(recurse=False)}
        changed, self.changed = self.changed, {}
        try:
            weights = {id(held.weight) for held in self.held.values()}
            for parameter, value in kept.items():
                dtype = torch.float32 if id(parameter) in weights else value.dtype
                parameter.data = value.to(dtype, copy=True)
            yield
        finally:
            for parameter, value in kept.items():
                parameter.data = value
            self.changed = changed

    @torch.no_grad()
    def carry(self, streams: Streams, kv: BlockKV | None = None) -> None:
        """Bring another stream to this block's output, with the weights that the block has now.

        A full-precision one; with a KV cache that rounds, the quantized one of `streams`.
        """
        own, self.streams = self.streams, streams
        cache, self.kv = self.kv, kv
        try:
            for chunk in self.chunks():
                self._step(chunk, full=kv is None)
        finally:
            self.streams, self.kv = own, cache

    @torch.no_grad()
    def fold_on_trial(self, group: ScalingGroup, scale: torch.Tensor) -> None:
        """Fold `scale` [channels] into a group inside `trial`, where nothing is kept and the output is not compared."""
        fold(self.module, group, scale, self.stored.get(f"{group.producer}.weight"))

    @torch.no_grad()
    def fold(self, group: ScalingGroup, scale: torch.Tensor, instead: str) -> float:
        """Fold `scale` [channels] into a group for good; the change of the block's output, relative to its RMS.

        What is not quantized and has changed goes into `changed`. NumericalError if the output moved.
        """
        chunks = self.chunks()[:1]  # none in a process that no token has reached
        before = [self.forward(chunk, self.streams.has(True, chunk)) for chunk in chunks]
        folded = fold(self.module, group, scale, self.stored.get(f"{group.producer}.weight"))
        columns = folded if group.expand is None else folded[group.expand.to(folded.device)]
        for name in group.consumers:
            self._folded[name] = self._folded[name] * columns if name in self._folded else columns
        after = [self.forward(chunk, self.streams.has(True, chunk)) for chunk in chunks]
        changes = [
            float((now - then).square().mean().sqrt() / then.square().mean().sqrt())
            for now, then in zip(after, before, strict=True)
        ]
        found = [change for each in self.ranks.gather(changes) for change in each]
        moved = next((change for change in found if not change < FOLD_TOLERANCE), max(found, default=0.0))
        if not moved < FOLD_TOLERANCE:
            raise NumericalError(
                f"folding scales from {group.producer} into {', '.join(group.consumers)} in block {self.index} "
                f"changed its output by {moved:.2g} of its RMS (limit {FOLD_TOLERANCE:g}); {instead}"
            )
        producer = self.module.get_submodule(group.producer)
        for leaf, parameter in producer.named_parameters(recurse=False):
            name = f"{group.producer}.{leaf}"
            if group.form != "rows" or leaf == "bias":
                self.changed[name] = parameter.data.to(self.stored[name])
        return moved

    @staticmethod
    def output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The output, as `observe` gives it, of a submodule for a call that was observed."""
        return first_output(module(*args, **kwargs))

    @staticmethod
    def feeds_attention_logits(name: str) -> bool:
        """Whether a linear's error is seen through attention logits, where its own output error misleads."""
        return any(part in name for part in ATTENTION_LOGIT_NAMES)
