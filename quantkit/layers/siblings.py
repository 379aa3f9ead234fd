"""Linears that share one input, as q, k and v do, run as one product inside transformers.

Their weights are contiguous in memory. The first of them to be called computes all outputs in one product; the others
pick up theirs when they are called with the same tensor. Any other call is computed alone. On the CPU the results are
the same bits, because each row of a weight is summed separately. On a GPU they are only if the tile sizes, which
depend on N, split K in the same way. With more than one token the outputs are slices of the last dimension, so they
are not contiguous.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import quantkit_kernels
import torch
from quantkit_kernels import Call, Layout
from quantkit_kernels.cpu.ops import unwatched
from torch import is_inference_mode_enabled

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

_PATIENCE = 4  # times in a row that outputs may be left over
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_Tensors = tuple[
    dict[str, torch.Tensor], dict[str, torch.Tensor]
]  # the buffers and the parameters of a module


class _Joint(NamedTuple):
    """The weights and biases of all members as one."""

    stamps: list[tuple[Any, ...]]  # of each member's tensors, when this was made
    call: Call | None = None  # None: they do not fit together
    bias: torch.Tensor | None = None  # of all, a copy


class _Local(threading.local):
    """The pending outputs of a thread: (x, its state, stamps of the members, outputs by member)."""

    slot: tuple[torch.Tensor, tuple[Any, ...], list[tuple[Any, ...]], dict[int, torch.Tensor]] | None = None


class Siblings:
    """A set of linears that run as one. It holds their dictionaries of tensors, so it notices replaced tensors.

    Pending outputs are kept per thread, for one x at most. In-place changes of x are detected by its version counter;
    inference-mode tensors have none.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        first = members[0]
        self._backend, self._names, self._dtype = first.backend, first.prepared, first.dtype
        self._spec, self._facts = first.spec, first._facts
        self._sizes = [member.out_features for member in members]
        self._tensors: list[_Tensors | None] = [(member._buffers, member._parameters) for member in members]
        self._local, self._made, self._left_over = _Local(), None, 0
        self._carried: dict[str, tuple[torch.Tensor, list[int]]] = {}

    @classmethod
    def join(cls, members: Sequence[QuantLinear]) -> bool:
        """Make these run as one if they are of one kind; copies their weights into contiguous memory if necessary."""
        if len(members) < 2 or not _alike(members):
            return False
        members = sorted(members, key=lambda member: member._buffers[member.prepared[0]].data_ptr())
        if any(_whole([member._buffers[name] for member in members]) is None for name in members[0].prepared):
            _gather(members)
        group = cls(members)
        for member in members:
            member.siblings = group
            member._call = None
        return True

    def bind(self, member: QuantLinear, alone: Call) -> Call:
        """call(x, bias) for one member: its part of the joint product, else the result of `alone`."""
        place = self._find(member)
        if place is None or member.spec.inputs != self._spec.inputs or member.dtype is not self._dtype:
            return alone
        buffers, first, dtype = member._buffers, self._names[0], self._dtype

        def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            plain = bias is None or not (bias.requires_grad and torch.is_grad_enabled())
            if plain and unwatched(x) and x.dtype is dtype and x.device == buffers[first].device:
                y = self._run(place, x)
                if y is not None:
                    return y
            return alone(x, bias)

        return call

    def forget(self) -> None:
        """Release all tensors, in every thread."""
        self._local, self._made, self._carried = _Local(), None, {}

    def place(self, member: QuantLinear) -> int | None:
        """Which part of the joint layout is this member's; None while the members do not fit together."""
        return self._find(member) if all(whole is not None for whole in self._wholes().values()) else None

    def restore(self, place: int, member: QuantLinear) -> None:
        """Give a member that was copied or unpickled its part of the layout, and know it from now on."""
        for name, (whole, sizes) in self._carried.items():
            member._buffers[name] = whole.split(sizes)[place]
        self._tensors[place] = member._buffers, member._parameters
        if None not in self._tensors:
            self._carried = {}

    def _find(self, member: QuantLinear) -> int | None:
        for place, tensors in enumerate(self._tensors):
            if tensors is not None and tensors[0] is member._buffers:
                return place
        return None

    def _wholes(self) -> dict[str, torch.Tensor | None]:
        """The joint layout by the names of its tensors, without a copy; None for what is not contiguous."""
        known = [tensors[0] for tensors in self._tensors if tensors is not None]
        if len(known) < len(self._tensors):
            return dict.fromkeys(self._names)
        return {name: _whole([buffers[name] for buffers in known]) for name in self._names}

    def _run(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """A member's output, pending or from the joint product; None if it has to run alone."""
        local, mine = self._local, self._stamp(place)
        stream = _stream(x.device) if x.is_cuda else None
        state = (x.data_ptr(), _version(x), is_inference_mode_enabled(), stream)
        if local.slot is not None:
            kept, then, stamps, outputs = local.slot
            if kept is x and then == state and place in outputs and stamps[place] == mine:
                if len(outputs) == 1:
                    local.slot, self._left_over = None, 0
                return outputs.pop(place)
            local.slot = None
            self._left_over += 1
        if self._left_over >= _PATIENCE:  # they are not called as siblings are
            return None
        joint = self._made
        if joint is None or joint.stamps[place] != mine:
            joint = self._join()
            if not (
                stream and stream[1]
            ):  # what a graph being captured computes is there only after a replay
                self._made = joint
        if joint.call is None:
            return None
        parts = joint.call(x, joint.bias).unsafe_split_with_sizes(
            self._sizes, -1
        )  # no views that know each other
        outputs = dict(enumerate(parts))
        y = outputs.pop(place)
        local.slot = x, state, joint.stamps, outputs
        return y

    def _stamp(self, place: int) -> tuple[Any, ...]:
        """A value that changes when a tensor is replaced or moved or the bias is written to."""
        if self._tensors[place] is None:
            return ()
        buffers, parameters = self._tensors[place]
        bias = parameters["bias"]
        layout = [(id(t), t.data_ptr()) for t in map(buffers.get, self._names)]
        return (*layout, None if bias is None else (id(bias), bias.data_ptr(), _version(bias)))

    def _join(self) -> _Joint:
        """The joint product; without `call` if the tensors are no longer contiguous or of one kind."""
        stamps = [self._stamp(place) for place in range(len(self._sizes))]
        wholes = self._wholes()
        if any(whole is None for whole in wholes.values()):
            return _Joint(stamps)
        biases = [parameters["bias"] for _, parameters in self._tensors]
        kinds = {None if bias is None else bias.dtype for bias in biases}
        pairs = zip(biases, self._sizes, strict=True)
        fit = len(kinds) == 1 and all(b is None or (_plain(b) and b.shape == (n,)) for b, n in pairs)
        if not fit:
            return _Joint(stamps)
        spec = self._spec.with_rows(sum(self._sizes))
        layout = Layout(wholes, spec, self._facts)
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        return _Joint(stamps, quantkit_kernels.backend(self._backend).bind(layout, self._dtype), bias)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: the layouts of all members, once. The members come back one by one (`restore`)."""
        sizes = {
            name: [len(buffers[name]) for buffers, _ in filter(None, self._tensors)] for name in self._names
        }
        carried = {n: (cut(whole), sizes[n]) for n, whole in self._wholes().items() if whole is not None}
        return self.__dict__ | {
            "_local": None,
            "_made": None,
            "_tensors": [None] * len(self._tensors),
            "_carried": carried,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_local": _Local()}


def _version(tensor: torch.Tensor) -> int | None:
    """The tensor's version counter; None for inference-mode tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def _stream(device: torch.device) -> tuple[int, bool]:
    """(current stream, whether a graph is captured on it); a pending output is used only there."""
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is ordinary memory whose changes are counted."""
    return type(tensor) in _PLAIN and not tensor.is_meta and not tensor.is_inference()


def _alike(members: Sequence[QuantLinear]) -> bool:
    """Whether these can run as one: same backend, kind, dtypes and device, and whole blocks of rows."""

    def kind(member: QuantLinear) -> Any:
        shapes = [
            (name, member._buffers[name].shape[1:], member._buffers[name].dtype) for name in member.prepared
        ]
        devices = {member._buffers[name].device for name in member.prepared}
        bias = member.bias is None or member.bias.dtype
        return member.backend, member.spec.with_rows(1), member._facts, shapes, devices, member.dtype, bias

    rows = quantkit_kernels.backend(members[0].backend).block_rows
    return (
        rows > 0
        and all(member.out_features % rows == 0 for member in members)
        and all(kind(member) == kind(members[0]) for member in members)
        and not any(member._buffers[name].is_meta for member in members for name in member.prepared)
    )


def _gather(members: Sequence[QuantLinear]) -> None:
    """Copy the weights into contiguous memory."""
    for name in members[0].prepared:
        tensors = [member._buffers[name] for member in members]
        pieces = torch.cat(tensors).split([len(tensor) for tensor in tensors])
        for member, piece in zip(members, pieces, strict=True):
            member._buffers[name] = piece


def _whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """All of these as one, without a copy; None if they are not contiguous in one piece of memory."""
    if any(type(t) not in _PLAIN or t.is_meta for t in tensors):
        return None
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


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own length, since a pickle or a copy takes the whole storage of a view."""
    storage = tensor.untyped_storage()
    if type(tensor) not in _PLAIN or tensor.is_meta or storage.nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous():
        return tensor.clone()
    start = tensor.storage_offset() * tensor.element_size()
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return own.set_(storage[start : start + tensor.nbytes], 0, tensor.shape)
