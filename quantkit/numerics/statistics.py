"""What calibration knows about the input of one linear."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from quantkit.numerics.input_range import InputRange

NOTED_DEAD = 0.05  # share of dead columns above which a note says so


def neutral(weight_of_columns: torch.Tensor) -> torch.Tensor:
    """Weights of columns [K] with the mean in place of 0.

    A column without a signal is one about which calibration knows nothing: with weight 0 it could be cut off or
    rounded away for free, and text in which it fires would pay.
    """
    mean = weight_of_columns.mean()
    return torch.where(weight_of_columns == 0, torch.where(mean > 0, mean, 1.0), weight_of_columns)


def dead_note(dead: int, columns: int, done: str) -> str | None:
    """What a report says about columns whose input was 0 on every token, if they are many.

    done: what was done with their weights.
    """
    if dead <= NOTED_DEAD * columns:
        return None
    return (
        f"{dead} of {columns} columns are dead (their input was 0 on every calibration token) and {done}; "
        "calibrate on more varied text"
    )


@dataclass
class Statistics:
    """Statistics over the calibration tokens of one linear's input x [tokens, K]; a field not asked for is None.

    hessian: H = 2/tokens * sum x xT, fp32 [K, K] (of the quantized prefix when that stream exists).
    drift:   D = 2/tokens * sum (x_full - x) xT, fp32 [K, K], for re-targeting.
    fired: bool [K], whether the input was ever nonzero; comes with the hessian, whose squares may underflow.
    amax, mean_abs, mean_square: fp32 [K].
    range: the smallest and the largest input, and how often each value came if that was asked for.
    tokens: number of (unmasked) tokens seen.
    """

    tokens: int = 0
    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    fired: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    mean_abs: torch.Tensor | None = None
    mean_square: torch.Tensor | None = None
    range: InputRange | None = None

    def to(self, device: torch.device) -> Statistics:
        """The same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)
        }
        return replace(self, **moved)
