"""What each scheme of each group of linears costs, measured on the model block by block before it is quantized.

One walk carries the original model's hidden states. In every block, each group is quantized on its own by the recipe's
algorithm with each scheme it may have, which gives the errors of its outputs. For a group's anchors a copy of the first
windows' hidden states branches off, goes through the block with that group alone quantized, and then through the
original blocks behind it; behind the last block, the logits of all branches are compared with the original's. Branches
beside each other take memory, so the groups are dealt out over several walks; what a walk has found is kept at once.
Transforms are left out: the damage is that of the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.allocation.damage import GroupRecord
from quantkit.allocation.groups import Group
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.divergence import window_kl
from quantkit.calibration.returned import FIRST, Form
from quantkit.calibration.streams import Rows, Shared, Streams
from quantkit.calibration.walk import Wanted, chunk_windows, walk
from quantkit.errors import NumericalError
from quantkit.models import families
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.produce import full_precision
from quantkit.pipeline.run import Run
from quantkit.pipeline.tries import ExpertTries, LinearTries, Tries, fields_of
from quantkit.predict.memory import AT_ONCE, BRANCHES

WINDOWS = 16  # on which KL is measured, unless the recipe says


@dataclass(frozen=True)
class Asked:
    """A group and the numbers of the schemes that it is measured with in the whole model."""

    group: Group
    anchors: tuple[int, ...]


@dataclass
class _Branch:
    """Hidden states of the first windows behind one group that alone is quantized. error: of the weights that ran."""

    place: int
    number: int
    streams: Streams
    error: float


@full_precision()
def measure(
    run: Run,
    asked: Sequence[Asked],
    windows: int,
    keep: Callable[[list[GroupRecord]], None],
    told: Callable[[float], None] = lambda share: None,
) -> None:
    """Measure groups, in the order of their blocks; `keep` is given what each walk has found.

    windows: how many calibration windows KL is measured on. told: how much is done, 0 to 1.
    """
    assert run.windows is not None
    ids = run.windows.ids
    batch = chunk_windows(run.plan, ids)
    count = min(len(ids), -(-windows // batch) * batch)
    walks = list(_walks(run, asked, count))
    for number, some in enumerate(walks):

        def part(share: float, done: int = number) -> None:
            told((done + share) / len(walks))

        keep(_Measuring(run, some, count).records(part))


def _walks(run: Run, asked: Sequence[Asked], windows: int) -> Iterator[list[Asked]]:
    """The groups dealt out over walks, so that the branches of each are not too many."""
    assert run.windows is not None
    hidden = run.model.get_input_embeddings().get_parameter("weight").shape[1]
    each = windows * run.windows.ids.shape[1] * hidden * 4
    most = max(1, min(AT_ONCE, BRANCHES // each))
    batch: list[Asked] = []
    for one in sorted(asked, key=lambda one: one.group.block):
        if batch and sum(len(other.anchors) for other in batch) + len(one.anchors) > most:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


class _Measuring:
    """One walk. errors, norms: of each group. branches: what has branched off so far."""

    def __init__(self, run: Run, asked: Sequence[Asked], windows: int) -> None:
        assert run.windows is not None
        self.run, self.asked, self.windows = run, asked, windows
        # What is compared must be alike: beside experts, which are rounded to nearest, everything is.
        self.nearest = any(families.EXPERT_TENSOR.search(layer.name) for layer in run.plan.layers)
        self.ids = run.windows.ids
        self.errors: dict[int, list[float]] = {}
        self.norms: dict[int, float] = {}
        self.branches: list[_Branch] = []

    def records(self, told: Callable[[float], None]) -> list[GroupRecord]:
        """Walk, and say what was found."""
        run, original, form = self.run, None, FIRST
        for block in walk(
            run.model,
            run.source,
            run.plan,
            self.ids,
            Wanted(full=len(self.ids), quantized=False, behind_last=True),
            device=run.device,
            timed=run.clock,
            now=run.clock.now,
            thrift=run.thrift,
        ):
            self._block(block)
            original, form = block.streams.of(full=True), block.form
            told((block.index + 1) / run.plan.n_blocks)
        losses = self._losses(original, form) if self.branches and original is not None else {}
        return [self._record(place, losses) for place in range(len(self.asked))]

    def _record(self, place: int, losses: Mapping[tuple[int, int], torch.Tensor]) -> GroupRecord:
        own = {number: loss for (at, number), loss in losses.items() if at == place}
        return GroupRecord(
            name=self.asked[place].group.name,
            errors=self.errors[place],
            norm=self.norms[place],
            kl={number: float(loss.mean()) for number, loss in own.items()},
            kl_se={number: _standard_error(loss) for number, loss in own.items()},
            anchor_errors={each.number: each.error for each in self.branches if each.place == place},
        )

    def _losses(self, original: Rows, form: Form) -> dict[tuple[int, int], torch.Tensor]:
        """(group, scheme) -> mean KL of each window."""
        run, ids = self.run, self.ids[: self.windows]
        others = [branch.streams.of(full=True) for branch in self.branches]
        prefix = run.plan.blocks_prefix
        found = window_kl(run.model, run.source, prefix, ids, original, others, form, run.device)
        for branch, loss in zip(self.branches, found, strict=True):
            if not bool(torch.isfinite(loss).all()):
                group = self.asked[branch.place].group
                raise NumericalError(
                    f"{group.name}: the model gives no finite logits with it in {group.schemes[branch.number]}; leave "
                    "this scheme out of target.choices, or look for extreme weights"
                )
        return {(b.place, b.number): loss for b, loss in zip(self.branches, found, strict=True)}

    def _block(self, block: BlockRun) -> None:
        """Measure the groups of a block, and bring the branches of earlier ones behind it."""
        here = [place for place, one in enumerate(self.asked) if one.group.block == block.index]
        base = block.streams
        start = self.run.thrift.first(base.of(full=True), self.windows) if here else None
        shared = {at: dict(mappings) for at, mappings in base.shared.items()} if here else {}
        for branch in self.branches:
            block.carry(branch.streams)
        statistics = self._statistics(block, here) if here else {}
        for place in here:
            assert start is not None
            group = self.asked[place].group
            tries: Tries
            if group.experts:
                tries = ExpertTries(block, group)
            else:
                tries = LinearTries(block, group, statistics, self.nearest)
            with self.run.clock("quantize"):
                self._try(block, place, tries, start, shared)

    def _try(
        self,
        block: BlockRun,
        place: int,
        tries: Tries,
        start: Rows,
        shared: Mapping[tuple[bool, int], Shared],
    ) -> None:
        """Quantize a group with each of its schemes, and branch off with its anchors."""
        one, self.errors[place] = self.asked[place], []
        self.norms[place] = tries.norm
        for number, scheme in enumerate(one.group.schemes):
            error = tries.error(scheme.weights)
            self.errors[place].append(error)
            if number in one.anchors:
                rows = self.run.thrift.first(start, self.windows)
                copy = Streams(rows, None, {at: dict(each) for at, each in shared.items()})
                with tries.running(scheme.weights):
                    block.carry(copy)
                self.branches.append(_Branch(place, number, copy, error))

    def _statistics(self, block: BlockRun, here: Sequence[int]) -> dict[tuple[str, ...], Statistics]:
        """Of the inputs of all siblings in the groups of this block, on all windows."""
        groups = [self.asked[place].group for place in here]
        planned = {layer.name for group in groups if not group.experts for layer in group.layers}
        sets = [
            s
            for s in block.trace.siblings
            if any(n in block.plans and block.plans[n].name in planned for n in s)
        ]
        fields = {s: fields_of(block.plans[n] for n in s if n in block.plans) for s in sets}
        with self.run.clock("calibrate"):
            return block.collect(sets, fields)


def _standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of values [n]; None for a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
