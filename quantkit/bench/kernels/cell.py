"""One cell of `quantkit bench --products`: all ops on one (N, K, M), interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from quantkit.bench.kernels.lane import BURST, ROTATION, Lane, Loaded
from quantkit.bench.kernels.ops import BF16, INT4, LLAMA, Refused
from quantkit.bench.roofline import Roofline, read_bandwidth

PAUSE = 0.02  # seconds between bursts: another engine's threads spin on for a while
LONG_ROUNDS = 3  # at most, of calls that take longer than a second
Peers = Callable[[int, int, int, int], list[Lane]]  # (n, k, m, rotation) -> lanes of another engine


def cell(
    loaded: Iterable[Loaded],
    n: int,
    k: int,
    m: int,
    roofline: Roofline,
    device: str = "cpu",
    rounds: int = 7,
    rotation: int = ROTATION,
    burst: float = BURST,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Time every op with a weight [N, K] on M tokens; ops that cannot run are listed with the reason.

    An op whose call takes longer than a second runs at most LONG_ROUNDS rounds of one call each, without a warm-up.
    """
    lanes, refused = [], {}
    with torch.inference_mode():
        for one in loaded:
            try:
                lanes.append(one.lane(m, burst))
            except Refused as reason:
                refused[one.op.name] = str(reason)
        lanes += peers(n, k, m, rotation) if peers else []
        read = read_bandwidth(device, buffer=rotation)
        times: dict[str, list[float]] = {lane.name: [] for lane in lanes}
        for i in range(rounds):
            for lane in lanes:
                if lane.long and i >= LONG_ROUNDS:
                    continue
                time.sleep(PAUSE)
                if not lane.long:
                    lane.burst()  # warm
                times[lane.name].append(lane.burst())
    here = roofline._replace(read=read)
    rows = [_row(lane, times, here, 2 * m * n * k) for lane in lanes]
    return {"n": n, "k": k, "m": m, "read_bytes_per_s": read, "ops": rows, "refused": refused}


def _row(lane: Lane, times: dict[str, list[float]], roofline: Roofline, operations: int) -> dict[str, Any]:
    """The report's row for one lane. times: seconds per call of every lane in each round."""
    spent = times[lane.name]
    middle = statistics.median(spent)
    return {
        "op": lane.name,
        "us": middle * 1e6,
        "us_min": min(spent) * 1e6,
        "us_max": max(spent) * 1e6,
        "rounds": len(spent),
        "weight_bytes": lane.n_bytes,
        "share_of_read": lane.n_bytes / middle / roofline.read,
        "share_of_roofline": roofline.seconds(lane.n_bytes, operations, lane.kind) / middle,
        "relative_rms_error": lane.error,
        "times_faster_than": {
            peer: statistics.median(b / a for a, b in zip(spent, times[peer], strict=False))  # rounds of both
            for peer in (BF16, INT4, LLAMA)
            if peer in times
        },
    }
