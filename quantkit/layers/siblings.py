"""Linears that are called one after another with one input, as q, k and v are, run as one.

The first that is called multiplies x by the rows of all, whose native units lie behind each other, and keeps the
other outputs for those who will be called with the very same x. Anything else is multiplied again. The results
are the same bits: every row of a weight is summed by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from quantkit_kernels import COMPUTES
from quantkit_kernels.cpu import ops
from torch import is_inference_mode_enabled

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

UNITS = "layout_units"  # the buffer that holds a native layout
_PATIENCE = 4  # times in a row that outputs may be left over


class _Joint(NamedTuple):
    """The weights of all as one, as long as they stay where they are."""

    members: tuple[weakref.ref[QuantLinear], ...]  # in the order of their rows
    units: tuple[torch.Tensor, ...]
    at: int  # of the first, the others have its storage
    sizes: tuple[int, ...] = ()  # rows of each
    call: Callable[..., torch.Tensor] | None = None  # None: they do not fit together


class _Slot(NamedTuple):
    """Outputs that were not asked for yet, and what they were computed from.

    outputs: {id of the member: (y, its units, its bias, version of that)}.
    """

    x: torch.Tensor
    state: tuple[int | None, bool, str]  # version of x, inference mode, compute
    outputs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int | None]]


class _Local(threading.local):
    slot: _Slot | None = None


class Siblings:
    """The members hold their group, the group knows them weakly. What waits is kept per thread, for one x at most.

    In-place changes of x in between are seen by its version; inference tensors have none.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        self._members = tuple(weakref.ref(member) for member in members)
        self._local = _Local()
        self._made: _Joint | None = None
        self._left_over = 0

    @classmethod
    def join(cls, members: Sequence[QuantLinear]) -> bool:
        """Run these as one from now on, if they are of one kind and their units lie behind each other."""
        if len(members) < 2 or any(each.backend != "cpu" for each in members) or _joint(members).call is None:
            return False
        group = cls(members)
        for member in members:
            member.siblings = group
        return True

    def run(self, member: QuantLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The member's output for an x that may go to the C function; None: it has to run alone."""
        local = self._local
        slot = local.slot
        state = (None if x.is_inference() else x._version, is_inference_mode_enabled(), member.compute)
        if slot is not None:
            found = slot.outputs.pop(id(member), None) if slot.x is x and slot.state == state else None
            if found is not None:
                y, units, used, version = found
                if units is member._buffers[UNITS] and used is bias and version == _version(bias):
                    if not slot.outputs:
                        local.slot, self._left_over = None, 0
                    return y
            local.slot = None
            self._left_over += 1
        if self._left_over >= _PATIENCE:  # they are not called as siblings are
            return None
        outputs = self._together(x, bias, state[-1])
        if outputs is None:
            return None
        y = outputs.pop(id(member))[0]
        local.slot = _Slot(x, state, outputs)
        return y

    def _together(self, x: torch.Tensor, bias: torch.Tensor | None, compute: str) -> dict[int, Any] | None:
        """Every member's output as in `_Slot`; None if they do not fit together (any more)."""
        joint = self._current()
        if joint is None or joint.call is None:
            return None
        biases = [member().bias for member in joint.members]
        if bias is not None:
            if not all(each is not None and ops.plain(each) for each in biases):
                return None
            bias = torch.cat(biases)
        elif any(each is not None for each in biases):
            return None
        y = joint.call(x, bias, COMPUTES.index(compute))
        parts = y.unsafe_split_with_sizes(joint.sizes, -1)  # unsafe: no views that know of each other
        return {
            id(member()): (part.contiguous(), units, each, _version(each))
            for member, part, units, each in zip(joint.members, parts, joint.units, biases, strict=True)
        }

    def _current(self) -> _Joint | None:
        """The members' weights as they are now; None if a member is gone."""
        joint = self._made
        if joint is not None and joint.units[0].data_ptr() == joint.at:
            for member, units in zip(joint.members, joint.units, strict=True):
                if (found := member()) is None or found._buffers[UNITS] is not units:
                    break
            else:
                return joint
        members = [found for member in self._members if (found := member()) is not None]
        self._made = _joint(members) if len(members) == len(self._members) else None
        return self._made

    def __getstate__(self) -> dict[str, list[QuantLinear]]:
        return {"members": [member for ref in self._members if (member := ref()) is not None]}

    def __setstate__(self, state: dict[str, list[QuantLinear]]) -> None:
        self.__init__(state["members"])


def _version(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _joint(members: Sequence[QuantLinear]) -> _Joint:
    """The members as one weight, or without `call` if they are of several kinds or do not lie behind each other."""
    members = sorted(members, key=lambda member: member._buffers[UNITS].data_ptr())
    units = tuple(member._buffers[UNITS] for member in members)
    at, weights = [tensor.data_ptr() for tensor in units], [member.cpu_packed for member in members]
    joint = _Joint(tuple(weakref.ref(member) for member in members), units, at[0])
    kinds = {
        (weight._replace(units=None, n=0), member._dtype)
        for weight, member in zip(weights, members, strict=True)
    }
    if (
        not all(ops.plain(tensor) for tensor in units)
        or len(kinds) > 1
        or any(weight.n % 16 for weight in weights)
        or len({tensor.untyped_storage().data_ptr() for tensor in units}) > 1
        or any(a + tensor.numel() != b for a, tensor, b in zip(at, units, at[1:], strict=False))
    ):
        return joint
    rows = (
        units[0]
        .new_empty(0)
        .set_(
            units[0].untyped_storage(), units[0].storage_offset(), (sum(tensor.numel() for tensor in units),)
        )
    )
    sizes = tuple(weight.n for weight in weights)
    packed = weights[0]._replace(units=rows, n=sum(sizes))
    return joint._replace(sizes=sizes, call=ops.bind(packed, members[0]._dtype))
