"""Linears that are read, rounded and handed to a shard in pieces of rows, so that no weight is ever held whole.

Rounding to nearest treats rows alone, but for what a weight has once: the global scale of a two-level grid is chosen in
a pass of its own over the rows of all linears that share it. A grid with one scale for the whole tensor, and a weight
stored transposed or quantized, need all of the weight at once. Codes and scales are those of `rtn` on the whole weight,
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from quantkit.algorithms.config import RtnConfig
from quantkit.algorithms.rtn import rtn
from quantkit.calibration.memory import give_back
from quantkit.checkpoint.records import LayerRecord
from quantkit.checkpoint.shards import Streamed
from quantkit.checkpoint.verify import Made, probe
from quantkit.formats.registry import Codec
from quantkit.models import families
from quantkit.models.source import Source
from quantkit.models.tensors import stored_dtype, torch_dtype
from quantkit.numerics.range_search import chosen_global, chunk_rows, global_stride
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.block import judged
from quantkit.pipeline.run import Run
from quantkit.plan import LayerPlan

_PIECE = 1 << 20  # weights that are rounded at once, if the rows that belong together are not more
_WHOLE_WORDS = 128  # rows whose packed zero points fill words, and blocks of the usual size


def sharing(run: Run, part: int) -> list[list[LayerPlan]]:
    """The linears of a part: siblings that engines fuse together, if their weights have something once, else alone.

    Engines take one scale for all of a fused weight and one global scale of NVFP4.
    """
    sets: dict[tuple[Any, ...], list[LayerPlan]] = {}
    for plan in run.plans(part):
        parent, _, leaf = plan.name.rpartition(".")
        fused = next((members for members in families.SIBLINGS if leaf in members), None)
        key: tuple[Any, ...] = (plan.name,)
        if fused is not None and plan.scheme.weights.whole_share:
            dtype = run.parts[part][f"{plan.name}.weight"].dtype
            key = (parent, fused, plan.scheme, plan.algorithm, dtype)
        sets.setdefault(key, []).append(plan)
    return list(sets.values())


class Alike:
    """Linears of one scheme that share what a weight has once. dtype: the model's, in which scales are stored."""

    def __init__(self, plans: Sequence[LayerPlan], source: Source, codec: Codec) -> None:
        first = plans[0]
        assert isinstance(first.algorithm, RtnConfig)
        self.plans, self.config, self.scheme = plans, first.algorithm, first.scheme
        self.grid, self.source, self.codec = first.scheme.weights, source, codec
        self.dtype = torch_dtype(source.raw(f"{first.name}.weight").dtype)
        self._whole: dict[str, QuantizedWeight] = {}

    @cached_property
    def global_scale(self) -> torch.Tensor | None:
        """Of a two-level grid, from one pass over all rows; None for another grid."""
        if not self.grid.two_level:
            return None
        rows = sum(plan.shape[0] for plan in self.plans)
        stride = global_stride(rows, self.plans[0].shape[1])
        sample, span, begin = [], torch.zeros(()), 0
        for plan in self.plans:
            for first, weight in self.read(plan):
                low, high = weight.aminmax()
                span = torch.maximum(span, torch.maximum(-low, high))
                sample.append(weight[-(begin + first) % stride :: stride].clone())
            begin += plan.shape[0]
        return chosen_global(span, torch.cat(sample), self.grid, self.config.range)

    def quantized(self, plan: LayerPlan) -> Iterator[tuple[int, torch.Tensor, QuantizedWeight]]:
        """(number of the first row, rows of a linear in fp32, what they became), piece by piece."""
        if self.grid.granularity == "tensor":
            yield 0, torch.cat([piece for _, piece in self.read(plan)]), self._together(plan)
            return
        for first, weight in self.read(plan):
            yield first, weight, self._rtn(weight, self.global_scale)

    def read(self, plan: LayerPlan) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, rows of a linear in fp32 [rows, K]), piece by piece."""
        n, name, step = plan.shape[0], f"{plan.name}.weight", self._rows(plan)
        whole = self._stored_whole(plan)
        for first in range(0, n, step):
            last = min(first + step, n)
            if whole is None:
                yield first, self.source.rows(name, first, last)
            else:
                yield first, whole[first:last].contiguous().float()

    def _stored_whole(self, plan: LayerPlan) -> torch.Tensor | None:
        """A weight [N, K] that is stored transposed or quantized, which is not read by rows; None for another."""
        name = f"{plan.name}.weight"
        if not (plan.transposed or self.source.raw(name).parts):
            return None
        weight = self.source.tensor(name)
        return weight.T if plan.transposed else weight

    def _rows(self, plan: LayerPlan) -> int:
        """Rows of a piece: whole groups of rows that share a scale, whole words of zero points, whole chunks."""
        n, k = plan.shape
        if self.grid.granularity == "tensor":
            return n
        chunk = 1 if self.config.range == "minmax" else chunk_rows(k)
        unit = math.lcm(_WHOLE_WORDS, self.grid.rows(n), chunk)
        return unit * max(1, _PIECE // (unit * k))

    def _rtn(self, weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> QuantizedWeight:
        config = self.config
        return rtn(weight, self.grid, self.dtype, config.range, config.refit, global_scale=global_scale)

    def _together(self, wanted: LayerPlan) -> QuantizedWeight:
        """One of the linears, all of which are rounded as one weight when the first of them is asked for."""
        if not self._whole:
            outcome = self._rtn(torch.cat([piece for plan in self.plans for _, piece in self.read(plan)]))
            end = 0
            for plan in self.plans:
                end += plan.shape[0]
                self._whole[plan.name] = outcome.rows(slice(end - plan.shape[0], end))
        return self._whole.pop(wanted.name)


class PiecewiseLinear:
    """One linear of an `Alike`: its stored tensors, made while they are written, and what is known of it afterwards."""

    def __init__(self, plan: LayerPlan, alike: Alike) -> None:
        self.plan, self.alike, self.name, self.shape = plan, alike, plan.name, plan.shape
        self._beside: list[dict[str, torch.Tensor]] = []
        self._zero = True

    def leaves(self) -> dict[str, Streamed]:
        """The stored tensors by leaf. The codes must be written before the others: they come first in their names."""
        codec, scheme = self.alike.codec, self.alike.scheme
        shapes, dtypes = codec.shapes(*self.shape, scheme), codec.dtypes(scheme)
        codes = codec.codes_leaf(scheme)
        return {
            leaf: Streamed(
                stored_dtype(dtypes[leaf] or self.alike.dtype),
                shape,
                self._codes if leaf == codes else partial(self._joined, leaf),
            )
            for leaf, shape in shapes.items()
        }

    def _codes(self) -> Iterator[torch.Tensor]:
        codec, scheme, (n, k) = self.alike.codec, self.alike.scheme, self.shape
        codes = codec.codes_leaf(scheme)
        _, given = probe(k, scheme.inputs, self.alike.dtype)
        self._product, self._error, self._norm = torch.empty(len(given), n), torch.empty(n), torch.empty(n)
        for first, weight, quantized in self.alike.quantized(self.plan):
            self._seen(slice(first, first + len(weight)), weight, quantized, given)
            packed = codec.pack_scheme(quantized, scheme)
            yield packed.pop(codes)
            self._beside.append(packed)
        give_back()

    def _joined(self, leaf: str) -> Iterator[torch.Tensor]:
        parts = [part[leaf] for part in self._beside]
        yield self.alike.codec.joined(leaf, parts, self.shape, self.alike.global_scale)

    def _seen(
        self, rows: slice, weight: torch.Tensor, quantized: QuantizedWeight, given: torch.Tensor
    ) -> None:
        """Keep what the record of the linear and its verification need of some rows."""
        decoded, self._error[rows], self._norm[rows] = quantized.compared(weight)
        torch.mm(given, decoded.T, out=self._product[:, rows])
        self._zero &= quantized.is_zero

    def made(self) -> Made:
        """What the written tensors must be."""
        return Made(self.shape, self.alike.scheme, self.alike.dtype, self._product)

    def record(self) -> LayerRecord:
        """The errors of the linear; NumericalError naming it if it has collapsed."""
        error, norm = self._error, self._norm
        total = float(norm.sum(dtype=torch.float64))
        relative = float(error.sum(dtype=torch.float64)) / total if total else 0.0
        sound = judged(self.name, self._zero, relative, relative, error, norm)
        return LayerRecord(
            name=self.name,
            scheme=str(self.plan.scheme),
            algorithm=self.plan.algorithm.name,
            weight_error=sound.weight_error,
            relative_error=sound.objective,
            worst_row_error=sound.worst_row,
            fallbacks=sound.notes or None,
        )
