"""Linears that are called one after another with one input, as q, k and v are, run as one.

The first that is called multiplies x by the rows of all, whose weights lie behind each other, and keeps the other
outputs for those who will be called with the very same x. Anything else is multiplied again. Every row of a weight is
summed by itself, so on the CPU the results are the same bits; on a GPU they are where the tile sizes, which depend on
N, split K alike. With more than one token they are slices of the last dimension, so not contiguous.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import quantkit_kernels
import torch
from quantkit_kernels import COMPUTES
from quantkit_kernels.cpu import ops
from torch import is_inference_mode_enabled

LAYOUT = "layout_"  # begins the names of the buffers that hold a layout
_PATIENCE = 4  # times in a row that outputs may be left over
_PLAIN = (torch.Tensor, torch.nn.Parameter)

Call = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]  # x, bias, number of the compute -> y


class Member(Protocol):
    """What a `QuantLinear` is to its siblings."""

    backend: str
    compute: str
    out_features: int
    prepared: tuple[str, ...]
    layout: dict[str, Any]
    bias: torch.Tensor | None
    siblings: Siblings | None
    _buffers: dict[str, torch.Tensor]
    _dtype: torch.dtype


class _Storage(NamedTuple):
    """How a backend keeps a weight [N, K]: tensors whose first dimension goes over blocks of rows."""

    rows: int  # in a block
    plain: Callable[[torch.Tensor], bool]  # whether a tensor is memory that the product may read
    bind: Callable[[dict[str, Any], torch.dtype], Call]  # the product on a layout
    gathers: bool  # whether `join` lays weights and biases behind each other; else whoever loaded them did


def _in_memory(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and not tensor.is_meta


def _bind_cpu(layout: dict[str, Any], dtype: torch.dtype) -> Call:
    return ops.Packed(**layout).bind(dtype)


def _bind_triton(layout: dict[str, Any], dtype: torch.dtype) -> Call:
    def call(x: torch.Tensor, bias: torch.Tensor | None, compute: int) -> torch.Tensor:
        return quantkit_kernels.run("triton", x, layout, layout["group_size"], bias)

    return call


_STORAGES = {
    "cpu": _Storage(16, ops.plain, _bind_cpu, gathers=False),
    "triton": _Storage(64, _in_memory, _bind_triton, gathers=True),
}


class _Joint(NamedTuple):
    """The weights of all as one."""

    parts: dict[int, list[torch.Tensor]]  # of each layout, by id of the member, in the order of the rows
    first: torch.Tensor  # of these; moves with the storage of all
    at: int  # its address
    members: tuple[weakref.ref[Member], ...] = ()
    sizes: tuple[int, ...] = ()  # out_features
    call: Call | None = None  # None: they do not fit together

    def has(self, member: Member, units: torch.Tensor) -> bool:
        """Whether these are the tensors of the member's layout, `units` being the first."""
        mine = self.parts.get(id(member))
        return (
            mine is not None
            and mine[0] is units
            and (len(mine) == 1 or all(map(operator.is_, mine, _parts(member).values())))
        )


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
        """Run these as one from now on, if they are of one kind and their weights lie behind each other.

        Weights for Triton are moved there.
        """
        backends = {each.backend for each in members}
        if len(members) < 2 or len(backends) > 1 or not backends <= _STORAGES.keys():
            return False
        storage = _STORAGES[members[0].backend]
        if storage.gathers and _alike(members, storage):
            _gather(members)
        if _joint(members).call is None:
            return False
        group = cls(members)
        for member in members:
            member.siblings = group
        return True

    def run(
        self, member: Member, x: torch.Tensor, units: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The member's output for an x that its product may be given as it is; None: it has to run alone.

        units: the first tensor of its layout.
        """
        local, name, compute = self._local, id(member), member.compute
        slot = local.slot
        state = (
            x.data_ptr(),
            _version(x),
            is_inference_mode_enabled(),
            compute,
            x.is_cuda and _queue(x.device),
        )
        if slot is not None:
            kept, then, joint, biases, outputs = slot
            if (
                kept is x
                and then == state
                and name in outputs
                and joint.has(member, units)
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
        if joint is None or not joint.has(member, units) or joint.first.data_ptr() != joint.at:
            members = [found for ref in self._members if (found := ref()) is not None]
            if len(members) < len(self._members) or member not in members:  # a copy of a member is none
                return None
            self._made = joint = _joint(members)
        if joint.call is None:
            return None
        biases = {}
        if bias is not None:
            found = [getattr(ref(), "bias", None) for ref in joint.members]
            storage = _STORAGES[member.backend]
            if not all(each is not None and storage.plain(each) for each in found):
                return None
            biases = {key: _stamp(each) for key, each in zip(joint.parts, found, strict=True)}
            whole = _whole(found) if storage.gathers else None
            bias = torch.cat(found) if whole is None else whole
        y = joint.call(x, bias, COMPUTES.index(compute))
        parts = y.unsafe_split_with_sizes(joint.sizes, -1)  # unsafe: no views that know of each other
        outputs = dict(zip(joint.parts, parts, strict=True))
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


def _queue(device: torch.device) -> tuple[int, bool]:
    """Where work for a GPU goes now: the stream, or the graph captured on it. What waits is for the same one only."""
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _parts(member: Member) -> dict[str, torch.Tensor]:
    """The tensors of the member's layout, by the name of the buffer."""
    return {LAYOUT + part: member._buffers[LAYOUT + part] for part in member.prepared}


def _alike(members: Sequence[Member], storage: _Storage) -> bool:
    """Whether rows of one could be rows of the other, by whole blocks."""

    def kind(member: Member) -> Any:
        facts = {k: value for k, value in member.layout.items() if k not in (*member.prepared, "n")}
        shapes = [(name, t.shape[1:], t.dtype, t.device) for name, t in _parts(member).items()]
        return facts, shapes, member._dtype, member.bias is None

    first = kind(members[0])
    return (
        all(storage.plain(tensor) for member in members for tensor in _parts(member).values())
        and all(kind(member) == first for member in members)
        and all(member.out_features % storage.rows == 0 for member in members)
    )


def _gather(members: Sequence[Member]) -> None:
    """Move weights and biases behind each other, in memory of their own."""
    for name in _parts(members[0]):
        tensors = [member._buffers[name] for member in members]
        pieces = torch.cat(tensors).split([len(tensor) for tensor in tensors])
        for member, piece in zip(members, pieces, strict=True):
            member._buffers[name] = piece
    biases = [member.bias for member in members]
    if biases[0] is not None and len({(bias.dtype, bias.device) for bias in biases}) == 1:
        pieces = torch.cat([bias.data for bias in biases]).split([len(bias) for bias in biases])
        for bias, piece in zip(biases, pieces, strict=True):
            bias.data = piece


def _whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """All of these as one, without a copy; None if they do not lie behind each other."""
    first, sizes = tensors[0], [tensor.numel() * tensor.element_size() for tensor in tensors]
    ends = itertools.accumulate(sizes, initial=first.data_ptr())
    if (
        len({(t.untyped_storage().data_ptr(), t.dtype, t.shape[1:]) for t in tensors}) > 1
        or not all(tensor.is_contiguous() for tensor in tensors)
        or any(tensor.data_ptr() != end for tensor, end in zip(tensors, ends, strict=False))
    ):
        return None
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(first.untyped_storage(), first.storage_offset(), shape)


def _joint(members: Sequence[Member]) -> _Joint:
    """The members as one weight, or without `call` if they are of several kinds or do not lie behind each other."""
    storage = _STORAGES[members[0].backend]
    parts = {id(member): list(_parts(member).values()) for member in members}
    first, *_ = parts[id(members[0])]
    apart = _Joint(parts, first, first.data_ptr() if storage.plain(first) else 0)
    if not _alike(members, storage):
        return apart
    members = sorted(members, key=lambda member: parts[id(member)][0].data_ptr())
    parts = {id(member): parts[id(member)] for member in members}
    wholes = [_whole(tensors) for tensors in zip(*parts.values(), strict=True)]
    if any(whole is None for whole in wholes):
        return apart
    first, *_ = parts[id(members[0])]
    sizes = tuple(member.out_features for member in members)
    layout = members[0].layout | dict(zip(members[0].prepared, wholes, strict=True)) | {"n": sum(sizes)}
    call = storage.bind(layout, members[0]._dtype)
    return _Joint(parts, first, first.data_ptr(), tuple(map(weakref.ref, members)), sizes, call)
