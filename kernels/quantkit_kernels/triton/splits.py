"""K divided among programs: each stores its fp32 part and takes a ticket, the last of a tile adds the parts in order.

No second launch, and the same bits every time. The counter of the tickets is 0 before and after.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def leave_part(acc, parts, tickets, tile, split, splits, mask, BN: tl.constexpr, BM: tl.constexpr):
    """Store this program's part [BN, BM] where mask [1, BM] holds; its ticket, splits - 1 for the last program."""
    place = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
    mine = parts + tile.to(tl.int64) * (splits * BN * BM) + place
    tl.store(mine + split * (BN * BM), acc, mask=mask, cache_modifier=".cg")
    tl.debug_barrier()  # all stores of this program come before its ticket
    return tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu")


@triton.jit
def sum_parts(parts, tickets, tile, splits, mask, BN: tl.constexpr, BM: tl.constexpr):
    """The sum of a tile's parts in order; puts its counter back to 0."""
    place = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
    mine = parts + tile.to(tl.int64) * (splits * BN * BM) + place
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.range(0, splits):
        acc += tl.load(mine + i * (BN * BM), mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(tickets + tile, 0)
    return acc
