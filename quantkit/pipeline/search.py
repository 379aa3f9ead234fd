"""The search of a transform's one setting for the whole model, on the loss of the whole model with its weights rounded.

Several settings travel through one walk side by side, each with hidden states of its own: in every block, for each of
them, the weights are transformed and rounded to nearest on the grids of the plan, its hidden states go through, and the
block is put back. So each walk reads the checkpoint once, and memory is one block and the streams. Behind the last
block, the logits of all are compared with the original's. What was found is kept beside the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import AlgorithmConfig, RtnConfig
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.divergence import window_kl
from quantkit.calibration.returned import FIRST
from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import Wanted, chunk_windows, walk
from quantkit.checkpoint.records import SearchRecord, Trial, parse, plain
from quantkit.errors import NumericalError
from quantkit.numerics.inputs import input_scale, round_inputs
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.run import Run
from quantkit.pipeline.tracker import Tracker
from quantkit.scheme import Grid
from quantkit.transforms.catalog import transform
from quantkit.transforms.config import TransformConfig
from quantkit.transforms.registry import Search, Strength

SCHEMA = "quantkit-search/1"
InputMax = Mapping[tuple[str, ...], torch.Tensor]


class Kept(Protocol):
    """Where the finds of a search outlive an interruption."""

    def kept(self) -> dict[str, Any] | None:
        """What an interrupted run has found, None if nothing."""

    def keep(self, found: dict[str, Any]) -> None:
        """Keep it for the run that goes on."""


def searched(run: Run, journal: Kept, tracker: Tracker) -> list[SearchRecord]:
    """Find the settings that the recipe wants searched, or read what an interrupted run has found."""
    pairs = [(config, transform(config.name).search) for config in run.recipe.transforms]
    wanted = [(config, search) for config, search in pairs if search and search.rounds(config)]
    if not wanted:
        return []
    if (kept := run.ranks.first(journal.kept())) is not None:
        return [parse(SearchRecord, each) for each in kept["searches"]]
    with run.clock("search"):
        found = [_Searching(run, config, search, tracker).record() for config, search in wanted]
    journal.keep({"schema": SCHEMA, "searches": plain(found)})
    return found


def settled(run: Run, found: list[SearchRecord]) -> list[TransformConfig]:
    """The transforms of the recipe, with what was found."""
    by_name = {each.transform: each.strength for each in found}
    transforms: list[TransformConfig] = []
    for config in run.recipe.transforms:
        search = transform(config.name).search
        known = search is not None and config.name in by_name
        transforms.append(search.settled(config, by_name[config.name]) if search and known else config)
    return transforms


class _Searching:
    """One search: walks until the transform asks for no more strengths.

    losses: strength -> mean KL of each window, fp64 [windows]. input_max: by block, from the first walk, which carries
    all windows of the original model; later ones carry those that are compared.
    """

    def __init__(self, run: Run, config: Any, search: Search, tracker: Tracker) -> None:
        assert run.windows is not None
        self.run, self.config, self.search, self.tracker = run, config, search, tracker
        self.ids = run.windows.ids
        batch = run.ranks.chunk(len(self.ids), chunk_windows(run.plan, self.ids))
        self.windows = min(len(self.ids), -(-config.search_windows // batch) * batch)
        self.losses: dict[Strength, torch.Tensor] = {}
        self.input_max: list[InputMax] = []
        self.walks = 0
        rounds = search.rounds(config)
        self._whole = run.plan.n_blocks * (len(self.ids) + self.windows * (len(rounds) - 1 + sum(rounds)))
        self._done, self._began = 0, run.clock.now()

    def record(self) -> SearchRecord:
        """Search, and say what was found."""
        self.tracker.searched(0.0, 0.0)
        while strengths := self.search.following(self.config, self._means()):
            self._walk(strengths)
        self.tracker.searched(1.0, self.run.clock.now() - self._began)
        means = self._means()
        chosen = min(means, key=lambda each: (means[each], each is not None, each or 0.0))
        order = sorted(means, key=lambda each: -1.0 if each is None else each)
        return SearchRecord(
            transform=self.config.name,
            strength=chosen,
            windows=self.windows,
            tokens=self.windows * self.ids.shape[1],
            walks=self.walks,
            trials=[self._trial(each, chosen) for each in order],
        )

    def _means(self) -> dict[Strength, float]:
        return {strength: float(losses.mean()) for strength, losses in self.losses.items()}

    def _trial(self, strength: Strength, chosen: Strength) -> Trial:
        loss, over = self.losses[strength], self.losses[strength] - self.losses[chosen]
        return Trial(
            strength=strength,
            loss=float(loss.mean()),
            loss_se=_standard_error(loss),
            over_chosen=float(over.mean()),
            over_chosen_se=_standard_error(over),
        )

    def _walk(self, strengths: list[Strength]) -> None:
        """Measure the losses of some strengths in one walk."""
        run = self.run
        whole = not self.input_max and run.kept is None
        ids = self.ids if whole else self.ids[: self.windows]
        wanted = Wanted(full=len(ids), quantized=False, behind_last=True)
        streams: list[Streams] = []
        original, form, batch = None, FIRST, 1
        for block in walk(
            run.model,
            run.source,
            run.plan,
            ids,
            wanted,
            device=run.device,
            now=run.clock.now,
            ranks=run.ranks,
            thrift=run.thrift,
        ):
            original, batch = block.streams.of(full=True), block.batch
            block.kept = run.kept
            own = run.ranks.numbers(self.windows, batch)
            streams = streams or [Streams(run.thrift.first(original, len(own)), None) for _ in strengths]
            if block.index == len(self.input_max):
                planned = [s for s in block.trace.siblings if any(n in block.plans for n in s)]
                self.input_max.append(block.largest_inputs(planned))
            for strength, stream in zip(strengths, streams, strict=True):
                with self._tried(block, strength):
                    block.carry(stream)
            form = block.form
            self._step(len(ids) + len(strengths) * self.windows)
        assert original is not None
        others = [stream.of(full=True) for stream in streams]
        first, prefix = run.ranks.own(ids[: self.windows], batch), run.plan.blocks_prefix
        found = window_kl(run.model, run.source, prefix, first, original, others, form, run.device)
        losses = run.ranks.together(found, self.windows, batch)
        self.walks += 1
        for strength, loss in zip(strengths, losses, strict=True):
            if not bool(torch.isfinite(loss).all()):
                raise NumericalError(
                    f"{self.config.name}: the quantized model gives no finite logits with strength {strength}; "
                    "use more bits or a smaller group, or look for extreme weights"
                )
            self.losses[strength] = loss

    def _step(self, work: int) -> None:
        """Report that `work` windows more went through a block."""
        self._done += work
        self.tracker.searched(min(0.99, self._done / self._whole), self.run.clock.now() - self._began)

    @contextmanager
    def _tried(self, block: BlockRun, strength: Strength) -> Iterator[None]:
        """Inside, the block is transformed with a strength, and its planned linears are rounded, and their inputs."""
        with block.trial(self.search.groups(block)):
            smoothed = self.search.try_on(block, strength, self.input_max[block.index])
            largest = {name: x.amax().view(1) for siblings, x in smoothed.items() for name in siblings}
            handles = []
            for name, held in block.held.items():
                plan = block.plans[name]
                grid, inputs, rounding = plan.scheme.weights, plan.scheme.inputs, _rtn(plan.algorithm)
                dtype = block.stored[f"{name}.weight"]
                outcome = algorithm("rtn").quantize(held.weight.data, Statistics(), grid, dtype, rounding)
                held.weight.data = outcome.weight.dequantize(torch.float32)
                if inputs is not None:
                    handles.append(held.register_forward_pre_hook(_rounded(inputs, largest[name])))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


def _rtn(config: AlgorithmConfig) -> RtnConfig:
    """How the search rounds: as the recipe does if it rounds to nearest without statistics, else on min-max grids."""
    if isinstance(config, RtnConfig) and not config.needs:
        return config
    return RtnConfig(name="rtn", range="minmax", refit=0)


def _rounded(grid: Grid, largest: torch.Tensor) -> Callable[..., Any]:
    """A hook that rounds a linear's input; a static range is that of max|x|, [1], of the original model."""
    static = None if grid.dynamic else input_scale(-largest, largest, grid)

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (round_inputs(args[0], grid, static),)

    return hook


def _standard_error(values: torch.Tensor) -> float:
    """Of the mean of values [n]; 0 for a single one, which says nothing about it."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
