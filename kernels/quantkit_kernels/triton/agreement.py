"""When an output of a kernel agrees with fp64, in a self-test."""

from __future__ import annotations

import torch

REPEATS = 3  # runs that must give the same bits


def close(found: torch.Tensor, truth: torch.Tensor, slack: float = 0.0) -> bool:
    """Whether every number is within the precision of its type; small sums may be off by a little more.

    slack: of the RMS of the truth, that each number may be off besides.
    """
    rms = truth.square().mean().sqrt()
    most = torch.finfo(found.dtype).eps * (truth.abs() + rms / 16) + slack * rms
    return bool(((found.double() - truth).abs() <= most).all())  # not so if any is NaN


def steady(runs: list[torch.Tensor]) -> bool:
    """Whether all runs gave the same bits."""
    return all(torch.equal(run, runs[0]) for run in runs)
