"""`ExpertRun`: one expert as a block of its own, whose windows are the tokens that came to it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.calls import BlockCalls
from quantkit.calibration.experts import ExpertsStage, Routed
from quantkit.calibration.forward import Call
from quantkit.calibration.ranks import Ranks
from quantkit.calibration.streams import Streams

_TRACED = 32  # tokens that the expert's structure is looked at with


class _Alone(BlockCalls):
    """An expert is called with its tokens and nothing else."""

    def __init__(self) -> None:
        super().__init__({})

    def at(self, chunk: slice, windows: int, shared: Any = None, cache: Any = None) -> Call:
        return Call((), {})


class ExpertRun(BlockRun):
    """An expert, its tokens as windows of one token each; those that the full stream has too come first.

    block: the block it belongs to. stage: the experts module. wanted: how many tokens it is calibrated on at least; if
    fewer came to it, others of the layer are added, evenly spaced. own, others: how many came to it by themselves (or
    rank it high enough, see `BlockRun.route`), and how many were added. All of all processes together.
    """

    def __init__(self, block: BlockRun, stage: ExpertsStage, expert: int, wanted: int) -> None:
        self.stage, self.expert = stage, expert
        self._length = block.streams.leading.shape[1]
        self._leading = block.streams.quantized is None  # whether the leading stream is the full one
        starts = [chunk.start for chunk in block.chunks()]
        routed = {start: stage.recorded((self._leading, start)) for start in starts}
        picked = _picked(routed, expert, wanted, block.ranks)
        own = sum(len(routed[start].serving(expert)) for start in starts)
        x = [routed[start].inputs(expert, tokens) for start, tokens in picked.items()]
        leading = torch.cat([rows for rows in x if rows is not None]).unsqueeze(1)
        self.own, self.others = map(int, block.ranks.totals(own, len(leading) - own))
        full = None if self._leading else self._full(block, picked, leading)
        self._with_full = 0 if full is None else len(full)
        streams = Streams(leading, None) if self._leading else Streams(full, leading)
        super().__init__(
            block.index,
            f"{block.name}.{stage.name}.{expert}",
            stage.open(expert, block.device),
            dict(stage.plans.get(expert, {})),
            dict(stage.stored.get(expert, {})),
            streams,
            _Alone(),
            max(1, block.batch * self._length),
            block.device,
            block._groups,
            now=block._now,
            ranks=block.ranks,
        )
        self.last, self.model_type = block.last, block.model_type

    def _full(
        self, block: BlockRun, picked: dict[int, torch.Tensor], leading: torch.Tensor
    ) -> torch.Tensor | None:
        """The same tokens in the full stream, as far as it reaches; None where they are not known there.

        Empty in a process that has none, while others have some.
        """
        found = self._found(block, picked)
        seen = block.ranks.gather(None if found is None else len(found))
        if None in seen or not any(seen):
            return None
        return torch.cat(found).unsqueeze(1) if found else leading[:0]

    def _found(self, block: BlockRun, picked: dict[int, torch.Tensor]) -> list[torch.Tensor] | None:
        """Those tokens by chunk; None if they are not known."""
        found = []
        for start, tokens in picked.items():
            there = (
                self.stage.recorded((True, start))
                if block.streams.has(True, slice(start, start + 1))
                else None
            )
            if there is None:
                break
            rows = there.inputs(self.expert, tokens)
            if rows is None:
                return None
            found.append(rows)
        return found

    @property
    def runs_original(self) -> bool:
        return any(full for (full, _), _ in self.stage.all_recorded())

    def first_call(self) -> tuple[torch.Tensor, Call]:
        return self.streams.leading[:_TRACED].to(self.device).transpose(0, 1), Call((), {})

    def chunks(self) -> list[slice]:
        """Pieces that run at once; none has tokens with a counterpart in the full stream and tokens without."""
        count, edge = self.streams.leading.shape[0], self._with_full
        starts = [*range(0, edge, self.batch), *range(edge, count, self.batch)]
        return [slice(a, min(a + self.batch, edge if a < edge else count)) for a in starts]

    def _may_advance(self, siblings: tuple[str, ...]) -> bool:
        return False  # the streams stay what comes in

    def _look(self, handles: list[RemovableHandle], windows: int | None) -> None:
        super()._look(handles, None if windows is None else windows * self._length)

    @torch.no_grad()
    def advance(self) -> None:
        """Give back to the layer what the expert makes of the tokens that came to it, in both streams."""
        for (full, _), routed in self.stage.all_recorded():
            tokens = routed.tokens(self.expert)
            rows = routed.inputs(self.expert, tokens) if len(tokens) else None
            if rows is not None:
                self.select(full)
                given = [self.module(part.to(self.device)).cpu() for part in rows.split(self.batch)]
                routed.add(self.expert, torch.cat(given))


def _picked(routed: dict[int, Routed], expert: int, wanted: int, ranks: Ranks) -> dict[int, torch.Tensor]:
    """Tokens of every chunk that an expert is calibrated on: its own, and others where they are fewer than `wanted`.

    In all processes together; each takes its share of the others.
    """
    own = {start: each.serving(expert) for start, each in routed.items()}
    others = {start: _without(each.count, own[start]) for start, each in routed.items()}
    known = [each.inputs(expert, others[start][:1]) is not None for start, each in routed.items()]
    came, there, strange = ranks.totals(
        sum(map(len, own.values())), sum(map(len, others.values())), known.count(False)
    )
    lacking = wanted - came
    if lacking <= 0 or not there or strange:
        return own
    step, begin, found = max(1.0, there / lacking), 0, {}
    for start, tokens in others.items():
        places = torch.arange(-(-begin // step), -(-(begin + len(tokens)) // step)) * step - begin
        found[start] = torch.cat([own[start], tokens[places.long().clamp(0, max(0, len(tokens) - 1))]])
        begin += len(tokens)
    return found


def _without(count: int, tokens: torch.Tensor) -> torch.Tensor:
    """The numbers below `count` that are not among `tokens`."""
    left = torch.ones(count, dtype=torch.bool)
    left[tokens] = False
    return left.nonzero()[:, 0]
