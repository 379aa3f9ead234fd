"""What quantized KV caches cost by themselves: the original model with each, block by block, beside the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantkit.allocation.targets import cache_scheme
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.divergence import window_kl
from quantkit.calibration.kv import BlockKV
from quantkit.calibration.kv_range import cache_range, find_writer
from quantkit.calibration.returned import FIRST
from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import Wanted, chunk_windows, walk
from quantkit.pipeline.produce import full_precision
from quantkit.pipeline.run import Run
from quantkit.scheme import KVScheme


@full_precision()
def cache_damages(run: Run, names: Sequence[str], windows: int) -> dict[str, float]:
    """Mean KL in nats of the model with each cache and its own weights, by the name of the cache, "none" left out.

    In one walk over the first `windows` calibration windows. Every entry is rounded once, as in decoding.
    """
    schemes = {name: scheme for name in names if (scheme := cache_scheme(name)) is not None}
    if not schemes:
        return {}
    assert run.windows is not None
    plan = replace(run.plan, kv=next(iter(schemes.values())))  # so that blocks are called with a cache
    batch = chunk_windows(plan, run.windows.ids)
    ids = run.windows.ids[: -(-windows // batch) * batch]
    streams: dict[str, Streams] = {}
    original, form = None, FIRST
    for block in walk(
        run.model,
        run.source,
        plan,
        ids,
        Wanted(full=len(ids), quantized=False, behind_last=True),
        device=run.device,
        timed=run.clock,
        now=run.clock.now,
        thrift=run.thrift,
    ):
        original = block.streams.of(full=True)
        for name, scheme in schemes.items():
            if block.index == 0:
                streams[name] = Streams(None, run.thrift.first(original, len(ids)))
            block.carry(streams[name], _calibrated(block, scheme))
        form = block.form
    assert original is not None
    others = [streams[name].of(full=False) for name in schemes]
    found = window_kl(run.model, run.source, plan.blocks_prefix, ids, original, others, form, run.device)
    return {name: float(each.mean()) for name, each in zip(schemes, found, strict=True)}


def _calibrated(block: BlockRun, scheme: KVScheme) -> BlockKV:
    """The cache of one block, with scales of the original model's entries if its scheme stores them."""
    if scheme.dynamic:
        return BlockKV(scheme)
    writer = find_writer(block)
    name = f"{block.name}.{writer.name}"
    return BlockKV(scheme, cache_range(block, scheme).scales(name, torch.float32))
