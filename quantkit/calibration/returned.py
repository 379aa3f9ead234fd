"""In what a decoder block returns its hidden states: alone, or first among several values.

What stands in for a block has to return as many values as the block does, since models unpack them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.structure.fold import map_tensors

if TYPE_CHECKING:
    from quantkit.calibration.forward import Call

Returned = tuple[type, int] | None  # (tuple or list, its length); None: the hidden states alone


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
