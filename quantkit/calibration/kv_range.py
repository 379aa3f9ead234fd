"""Calibration of a block's KV cache: who writes to it, and how large its keys and values are on the text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.calibration.forward import Stop
from quantkit.calibration.kv import PassingCache
from quantkit.errors import ModelError, NumericalError
from quantkit.numerics.kv import FP8_LARGEST, KVScales
from quantkit.scheme import Grid, KVScheme

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun


@dataclass
class KVRange:
    """The largest |key| and |value| of a block, per tensor [1] or per head [kv_heads, 1, 1]."""

    scheme: KVScheme
    largest: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in keys and values [B, H, T, d]."""
        for name, x, grid in (("k", keys, self.scheme.keys), ("v", values, self.scheme.values)):
            found = _largest(x, grid)
            self.largest[name] = torch.maximum(self.largest[name], found) if name in self.largest else found

    def scales(self, name: str, dtype: torch.dtype) -> KVScales:
        """max / 448, as stored in `dtype`. name: of the attention, for the NumericalError if a scale cannot be used."""
        found = {which: (most / FP8_LARGEST).to(dtype) for which, most in self.largest.items()}
        for which, scale in found.items():
            check_scale(f"{name}.{which}_scale", scale)
        return KVScales(found["k"], found["v"])


def check_scale(name: str, scale: torch.Tensor) -> None:
    """NumericalError for a scale of a cache that is zero, negative, not finite, or the 1.0 of one never calibrated."""
    bad = ~torch.isfinite(scale) | (scale <= 0)
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise NumericalError(
            f"{name}: the calibrated scale of head {at} is {float(scale.flatten()[at]):g}: keys or values are all "
            "zero or not finite on the calibration text; use other text, or another kv_cache scheme"
        )
    if bool((scale == 1).all()):
        raise NumericalError(
            f"{name}: the scale is 1.0, which readers take for one that was never calibrated"
        )


def _largest(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    magnitude = x.float().abs()
    if grid.granularity == "tensor":
        return magnitude.amax().view(1)
    return magnitude.amax((0, 2, 3)).view(-1, 1, 1)


@dataclass(frozen=True)
class Writer:
    """Who writes to a block's cache. name: of the attention inside the block. before: modules that ran before it."""

    name: str
    before: frozenset[str]


@torch.no_grad()
def find_writer(run: BlockRun) -> Writer:
    """The attention of a block, seen on the first window; ModelError unless one module writes to the cache, once."""
    running, done, found = list[str](), set[str](), list[Writer]()

    def enter(name: str) -> Callable[..., Any]:
        return lambda module, args: running.append(name)

    def leave(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            running.pop()
            done.add(name)

        return hook

    def note(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(Writer(running[-1] if running else "", frozenset(done)))
        return keys, values

    modules = list(run.module.named_modules())
    handles = [m.register_forward_pre_hook(enter(n)) for n, m in modules]
    handles += [m.register_forward_hook(leave(n)) for n, m in modules]
    try:
        _with_cache(run, run.chunks()[0], PassingCache(note), windows=1)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != 1:
        raise ModelError(
            f"decoder block {run.index} ({type(run.module).__name__}) writes to the KV cache {len(found)} times in a "
            "forward; only blocks with one attention of their own can have their cache quantized, leave kv_cache out"
        )
    return found[0]


@torch.no_grad()
def cache_range(run: BlockRun, scheme: KVScheme) -> KVRange:
    """The range of a block's keys and values over all windows, with the weights the block has now."""
    found = KVRange(scheme)

    def take(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found.update(keys, values)
        raise Stop

    for chunk in run.chunks():
        with suppress(Stop):
            _with_cache(run, chunk, PassingCache(take))
    for largest in found.largest.values():
        run.ranks.max(largest)
    return found


def _with_cache(run: BlockRun, chunk: slice, cache: PassingCache, windows: int | None = None) -> None:
    """Run a block with a cache on the leading stream, on the first `windows` of a chunk (None: all)."""
    full = run.streams.quantized is None
    run.select(full)
    hidden = run.streams.leading[chunk][:windows].to(run.device)
    call = run.calls.at(chunk, hidden.shape[0], run.streams.shared.get((full, chunk.start)), cache)
    call(run.module, hidden)
