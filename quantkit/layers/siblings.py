"""Linears that are called one after another with one input, as q, k and v are, run as one.

The first that is called multiplies x by the rows of all, whose native units lie behind each other, and keeps the
other outputs for those who will be called with the very same x. Anything else is multiplied again. The results
are the same bits: every row of a weight is summed by itself. With more than one token they are slices of the last
dimension, so not contiguous.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from quantkit_kernels import COMPUTES
from quantkit_kernels.cpu import ops
from torch import is_inference_mode_enabled

UNITS = "layout_units"  # the buffer that holds a native layout
_PATIENCE = 4  # times in a row that outputs may be left over


class Member(Protocol):
    """What a `QuantLinear` is to its siblings."""

    backend: str
    compute: str
    cpu_packed: Any
    bias: torch.Tensor | None
    siblings: Siblings | None
    _buffers: dict[str, torch.Tensor]
    _dtype: torch.dtype


class _Joint(NamedTuple):
    """The weights of all as one."""

    units: dict[int, torch.Tensor]  # by id of the member, in the order of the rows
    first: torch.Tensor  # of these; its storage is that of all
    at: int  # its address
    members: tuple[weakref.ref[Member], ...] = ()
    sizes: tuple[int, ...] = ()  # out_features
    call: Callable[..., torch.Tensor] | None = None  # None: they do not fit together


class _Local(threading.local):
    """What waits in a thread: (x, its version and more, joint, stamps of the biases if there are any, outputs).

    The last two by id of the member. A plain tuple, as a named one takes half a microsecond.
    """

    slot: tuple[torch.Tensor, tuple, _Joint, dict[int, tuple], dict[int, torch.Tensor]] | None = None


class Siblings:
    """The members hold their group, the group knows them weakly. What waits is kept per thread, for one x at most.

    In-place changes of x in between are seen by its version; inference tensors have none.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(weakref.ref(member) for member in members)
        self._local = _Local()
        self._made: _Joint | None = None
        self._left_over = 0

    @classmethod
    def join(cls, members: Sequence[Member]) -> bool:
        """Run these as one from now on, if they are of one kind and their units lie behind each other."""
        if len(members) < 2 or any(each.backend != "cpu" for each in members) or _joint(members).call is None:
            return False
        group = cls(members)
        for member in members:
            member.siblings = group
        return True

    def run(
        self, member: Member, x: torch.Tensor, units: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The member's output for an x that may go to the C function; None: it has to run alone."""
        local, name, compute = self._local, id(member), member.compute
        slot, state = local.slot, (x.data_ptr(), _version(x), is_inference_mode_enabled(), compute)
        if slot is not None:
            kept, then, joint, biases, outputs = slot
            if (
                kept is x
                and then == state
                and name in outputs
                and joint.units[name] is units
                and (biases[name] == _stamp(bias) if biases else bias is None)
            ):
                if len(outputs) == 1:
                    local.slot, self._left_over = None, 0
                return outputs.pop(name)
            local.slot = None
            self._left_over += 1
        if self._left_over >= _PATIENCE:  # they are not called as siblings are
            return None
        joint = self._made
        if joint is None or joint.units.get(name) is not units or joint.first.data_ptr() != joint.at:
            members = [found for ref in self._members if (found := ref()) is not None]
            if len(members) < len(self._members) or member not in members:  # a copy of a member is none
                return None
            self._made = joint = _joint(members)
        if joint.call is None:
            return None
        biases = {}
        if bias is not None:
            found = [getattr(ref(), "bias", None) for ref in joint.members]
            if not all(each is not None and ops.plain(each) for each in found):
                return None
            biases = {key: _stamp(each) for key, each in zip(joint.units, found, strict=True)}
            bias = torch.cat(found)
        y = joint.call(x, bias, COMPUTES.index(compute))
        parts = y.unsafe_split_with_sizes(joint.sizes, -1)  # unsafe: no views that know of each other
        outputs = dict(zip(joint.units, parts, strict=True))
        mine = outputs.pop(name)
        local.slot = x, state, joint, biases, outputs
        return mine

    def forget(self) -> None:
        """Let go of all tensors, in every thread."""
        self._local, self._made = _Local(), None

    def __getstate__(self) -> dict[str, list[Member]]:
        return {"members": [found for ref in self._members if (found := ref()) is not None]}

    def __setstate__(self, state: dict[str, list[Member]]) -> None:
        self.__init__(state["members"])


def _version(tensor: torch.Tensor) -> int | None:
    """Changes with every change in place, as far as torch counts them."""
    return None if tensor.is_inference() else tensor._version


def _stamp(bias: torch.Tensor | None) -> tuple[int | None, ...]:
    """What tells a bias that was replaced or written to."""
    return () if bias is None else (id(bias), bias.data_ptr(), _version(bias))


def _joint(members: Sequence[Member]) -> _Joint:
    """The members as one weight, or without `call` if they are of several kinds or do not lie behind each other."""
    units = {id(member): member._buffers[UNITS] for member in members}
    first, *_ = units.values()
    if not all(ops.plain(tensor) for tensor in units.values()):
        return _Joint(units, first, 0)
    members = sorted(members, key=lambda member: member._buffers[UNITS].data_ptr())
    units = {id(member): member._buffers[UNITS] for member in members}
    first, *_ = units.values()
    at, packed = first.data_ptr(), [member.cpu_packed for member in members]
    kinds = {
        (p._replace(units=None, n=0), m._dtype, m.bias is None) for p, m in zip(packed, members, strict=True)
    }
    ends = itertools.accumulate((tensor.numel() for tensor in units.values()), initial=at)
    if (
        len(kinds) > 1
        or any(each.n % 16 for each in packed)
        or len({tensor.untyped_storage().data_ptr() for tensor in units.values()}) > 1
        or any(tensor.data_ptr() != end for tensor, end in zip(units.values(), ends, strict=False))
    ):
        return _Joint(units, first, at)
    rows = torch.empty(0, dtype=torch.uint8)
    length = sum(tensor.numel() for tensor in units.values())
    rows.set_(first.untyped_storage(), first.storage_offset(), (length,))
    sizes = tuple(each.n for each in packed)
    call = packed[0]._replace(units=rows, n=sum(sizes)).bind(members[0]._dtype)
    return _Joint(units, first, at, tuple(map(weakref.ref, members)), sizes, call)
