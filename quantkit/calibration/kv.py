"""The KV cache of a decoder block while it is being calibrated.

A block is called with a cache object, where the model would put its own. The object keeps nothing: `update` gets keys
after rotary embedding and values as projected, and returns what attention is to read. So the range of both is seen, and
the quantized stream reads them rounded, for every architecture that hands its cache to its blocks. One forward over a
window shows what decoding token by token does, as every entry is rounded once, when it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from quantkit.calibration.forward import Stop
from quantkit.errors import ModelError, NumericalError
from quantkit.numerics.kv import FP8_LARGEST, KVScales, rounded
from quantkit.scheme import Grid, KVScheme

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun

Act = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class PassingCache(DynamicCache):
    """An empty cache whose `update` gives (keys, values), [B, H, T, d], to `act` and returns what that returns."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self._act = act

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._act(key_states, value_states)


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


@dataclass
class BlockKV:
    """How one block's cache is quantized. scales: of a scheme with stored scales, once they are calibrated."""

    scheme: KVScheme
    scales: KVScales | None = None

    @property
    def ready(self) -> bool:
        """Whether the quantized stream reads rounded entries.

        Not with a residual window: which entries are rounded depends on who reads them.
        """
        return not self.scheme.residual and (self.scheme.dynamic or self.scales is not None)

    def cache(self) -> PassingCache:
        """A cache that gives every entry rounded."""
        return PassingCache(lambda keys, values: rounded(keys, values, self.scheme, self.scales))


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
    return found


def _with_cache(run: BlockRun, chunk: slice, cache: PassingCache, windows: int | None = None) -> None:
    """Run a block with a cache on the leading stream, on the first `windows` of a chunk (None: all)."""
    full = run.streams.quantized is None
    run.select(full)
    hidden = run.streams.leading[chunk][:windows].to(run.device)
    call = run.calls.at(chunk, hidden.shape[0], run.streams.shared.get((full, chunk.start)), cache)
    run.module(hidden, *call.args, **call.kwargs)
