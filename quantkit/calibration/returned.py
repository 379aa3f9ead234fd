"""In what a decoder block takes and returns its hidden states: alone or beside other values, windows first or not.

What stands in for a block has to return as many values as the block does, since models unpack them. The walk keeps
hidden states with windows first; XLNet's blocks have them behind the tokens, Gemma 3n's behind four predictions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.structure.fold import map_tensors

if TYPE_CHECKING:
    from quantkit.calibration.forward import Call

Returned = tuple[type, int] | None  # (tuple or list, its length); None: the hidden states alone


@dataclass(frozen=True)
class Form:
    """How blocks take and return hidden states. axis: which of their axes counts the windows."""

    values: Returned = None
    axis: int = 0

    def returning(self, hidden: torch.Tensor) -> Any:
        """What a block returns for hidden states [windows, ...]."""
        return wrapped(laid(hidden, self.axis), self.values)


FIRST = Form()  # hidden states alone, windows first


def laid(hidden: torch.Tensor, axis: int) -> torch.Tensor:
    """Hidden states [windows, ...] as blocks take them, whose windows are at `axis`."""
    return hidden if axis == 0 else hidden.movedim(0, axis).contiguous()


def stacked(hidden: torch.Tensor, axis: int) -> torch.Tensor:
    """Hidden states as blocks have them, windows first; the inverse of `laid`."""
    return hidden if axis == 0 else hidden.movedim(axis, 0).contiguous()


def returned(out: Any) -> Returned:
    """The form of what a block has returned."""
    if not isinstance(out, tuple | list):
        return None
    return (list if isinstance(out, list) else tuple), len(out)


def wrapped(hidden: torch.Tensor, form: Returned) -> Any:
    """Hidden states as a block of this form returns them; the values beside them are None."""
    if form is None:
        return hidden
    kind, length = form
    return kind([hidden, *[None] * (length - 1)])


@torch.no_grad()
def seen_on_meta(block: nn.Module, hidden: torch.Tensor, call: Call) -> Returned:
    """The form that a block without weights returns, found by running it on the meta device.

    A block that does not run there (it looks at values) is taken to return its hidden states alone.
    """
    empty = copy.deepcopy(block).to("meta")
    try:
        args, kwargs = map_tensors((call.args, call.kwargs), lambda t: t.to("meta"))
        return returned(empty(hidden.to("meta"), *args, **kwargs))
    except Exception:  # whatever a block does with a tensor that has no values
        return None
