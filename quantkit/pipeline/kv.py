"""The KV cache of a block in a run: calibrated behind the quantized linears that feed it, stored beside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.kv import BlockKV
from quantkit.calibration.kv_range import cache_range, find_writer
from quantkit.pipeline.clock import Clock
from quantkit.scheme import KVScheme


class CacheCalibration:
    """Scales of one block's cache, as soon as the linears that run before it are quantized.

    From then on the quantized stream reads rounded keys and values, and so do the statistics of the linears behind. A
    scheme that takes its scales from the entries themselves rounds them from the beginning. scheme: None, nothing is
    done. followed: False, calibration goes on with exact entries. waiting: planned linears that are not quantized yet
    and run before the cache.
    """

    def __init__(self, run: BlockRun, scheme: KVScheme | None, clock: Clock, followed: bool = True) -> None:
        self._run, self._clock = run, clock
        self._kv = None if scheme is None else BlockKV(scheme, followed=followed)
        run.kv = self._kv
        self._waiting: set[str] | None = None
        if scheme is not None and not scheme.dynamic:
            with clock("calibrate"):
                self._writer = find_writer(run)
            self._waiting = set(self._writer.before & run.plans.keys())
            self.quantized(())

    def quantized(self, names: Iterable[str]) -> None:
        """These linears are quantized; if they are the last before the cache, it is calibrated now."""
        if self._waiting is None or self._kv is None:
            return
        self._waiting -= set(names)
        if self._waiting:
            return
        with self._clock("calibrate"):
            found = cache_range(self._run, self._kv.scheme)
            self._kv.scales = found.scales(self._name, self._dtype)
        self._waiting = None

    @property
    def _name(self) -> str:
        return f"{self._run.name}.{self._writer.name}"

    @property
    def _dtype(self) -> torch.dtype:
        """That of the attention's own tensors on disk."""
        inside = f"{self._writer.name}."
        return next(dtype for name, dtype in self._run.stored.items() if name.startswith(inside))

    def stored(self) -> dict[str, torch.Tensor]:
        """The calibrated scales by the name they are stored under; empty for a scheme without."""
        scales = None if self._kv is None else self._kv.scales
        if scales is None:
            return {}
        return {f"{self._name}.k_scale": scales.keys.cpu(), f"{self._name}.v_scale": scales.values.cpu()}
