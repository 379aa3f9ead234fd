"""The products of all experts of a mixture in one native call, as a torch op and bound to the weights.

`quantkit::cpu_grouped_linear(x, rows, offsets, units, bias, each, bits, group_size, n, k, symmetric, compute,
scale_factor, scale_type, table, input_scale, input_zero)`
    x [T, K] fp32, bf16 or fp16; rows int64 [S], the row of x of each slot; offsets int64 [E + 1]: slots offsets[e] to
    offsets[e + 1] - 1 are those of expert e; units: `each` weights [N, K] per expert that read the same x, expert by
    expert, as `layout.pack` makes them; bias: fp32 [N] of each or an empty list; returns [S, each * N] in x's dtype,
    the outputs of an expert's weights side by side. The numbers of `cpu_linear`, one per weight where weights differ.
    No gradient. Slots of an expert are a row of `cpu_linear` each, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from quantkit_kernels.backend import GroupedCall
from quantkit_kernels.checks import check_slots
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.layout import Packed, check_bias, check_units, packed_of
from quantkit_kernels.cpu.ops import TYPES, check_kind, failure, spec_of
from quantkit_kernels.registration import define
from quantkit_kernels.stored import InputRange, Layout

_GROUPED = (
    "(Tensor x, Tensor rows, Tensor offsets, Tensor[] units, Tensor[] bias, int each, int bits, int group_size, int n, "
    "int k, bool symmetric, int compute, float[] scale_factor, int[] scale_type, int table=0, float[] input_scale=[], "
    "int[] input_zero=[]) -> Tensor"
)
Bias = torch.Tensor | None


def bind(layouts: Sequence[Layout], bias: Callable[[int], Bias], each: int, compute: int) -> GroupedCall:
    """call(x [T, K], rows [S], offsets [E + 1]) -> y [S, each * N] for `plain` tensors, past torch's dispatcher.

    layouts: of the weights, all of one `Spec`. bias: number of a weight -> its bias now. Units and biases of the
    experts that have slots are looked up at every call, so replaced tensors are used.
    """
    bound = _Bound([packed_of(layout) for layout in layouts], compute)

    def call(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        nonlocal bound
        bounds = offsets.tolist()
        hit = [e * each + r for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1] for r in range(each)]
        now = bound
        if not now.holds(layouts, hit):
            bound = now = _Bound([packed_of(layout) for layout in layouts], compute)
        return now.run(x, rows, offsets, each, {i: found for i in hit if (found := bias(i)) is not None})

    return call


class _Bound:
    """The C structs of some weights, checked once. Nothing changes it, so threads share it."""

    def __init__(self, weights: Sequence[Packed], compute: int) -> None:
        spec = weights[0].spec
        for weight in weights:
            if weight.spec != spec:
                raise ValueError(f"weights of one call are of one kind, got {weight.spec} beside {spec}")
        self.spec, self.compute = spec, compute
        self._units = [(weight.units, weight.units.data_ptr()) for weight in weights]
        self._structs = (library.Weight * len(weights))(*(weight.weight() for weight in weights))

    def holds(self, layouts: Sequence[Layout], hit: Sequence[int]) -> bool:
        """Whether the units of these weights are where they were."""
        for i in hit:
            kept, at = self._units[i]
            units = layouts[i].tensors["units"]
            if units is not kept or units.data_ptr() != at:
                return False
        return True

    def run(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        offsets: torch.Tensor,
        each: int,
        bias: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        spec, structs = self.spec, self._structs
        check_kind(x.dtype, self.compute, spec)
        check_slots(x, rows, offsets, len(structs) // each, spec.k)
        x, kept = x.contiguous(), {i: tensor.float() for i, tensor in bias.items()}
        if kept:
            structs = type(structs).from_buffer_copy(structs)
        for i, tensor in kept.items():
            check_bias(tensor, spec.n)
            structs[i].bias = tensor.data_ptr()
        y, kind = x.new_empty(len(rows), each * spec.n), TYPES[x.dtype]
        places = (ctypes.addressof(structs), offsets.data_ptr(), rows.data_ptr())
        group = library.Grouped(*places, len(rows), len(structs) // each, each)
        run = library.required().qk_grouped_linear
        threads = torch.get_num_threads()
        status = run(group, x.data_ptr(), kind, len(x), self.compute, y.data_ptr(), kind, threads)
        if status == 3:
            raise ValueError(
                f"offsets ascend from 0 to the number of slots, {len(rows)}, and rows are 0 to {len(x) - 1}"
            )
        if status:
            raise failure(status)
        return y


def _run(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    units: list[torch.Tensor],
    bias: list[torch.Tensor],
    each: int,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: list[float],
    scale_type: list[int],
    table: int = 0,
    input_scale: Sequence[float] = (),
    input_zero: Sequence[int] = (),
) -> torch.Tensor:
    spec = spec_of(bits, group_size, n, k, symmetric, table)
    ranges = _ranges(units, bias, each, scale_factor, scale_type, input_scale, input_zero)
    facts = zip(units, scale_factor, scale_type, ranges, strict=True)
    weights = [Packed(u, spec, factor, kind, torch.float32, given) for u, factor, kind, given in facts]
    for tensor in bias:
        check_bias(tensor, n)
    return _Bound(weights, compute).run(x, rows, offsets, each, dict(enumerate(bias)))


def _ranges(
    units: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    each: int,
    scale_factor: Sequence[float],
    scale_type: Sequence[int],
    input_scale: Sequence[float],
    input_zero: Sequence[int],
) -> list[InputRange | None]:
    """The range of the inputs of each weight; ValueError unless there is as much of everything as of weights."""
    count = len(units)
    if each < 1 or count < 1 or count % each:
        raise ValueError(f"there are {each} weights per expert, got {count} in all")
    fits = len(scale_factor) == len(scale_type) == count and len(bias) in (0, count)
    if not fits or len(input_scale) != len(input_zero) or len(input_scale) not in (0, count):
        raise ValueError(
            f"give each of the {count} weights a scale factor and a scale type, and all or none a bias"
        )
    ranges = [InputRange(*pair) for pair in zip(input_scale, input_zero, strict=True)]
    for each_range in ranges:
        each_range.check()
    return [*ranges] or [None] * count


def _fake(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    units: list[torch.Tensor],
    bias: list[torch.Tensor],
    each: int,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: list[float],
    scale_type: list[int],
    table: int = 0,
    input_scale: Sequence[float] = (),
    input_zero: Sequence[int] = (),
) -> torch.Tensor:
    spec = spec_of(bits, group_size, n, k, symmetric, table)
    check_kind(x.dtype, compute, spec)
    _ranges(units, bias, each, scale_factor, scale_type, input_scale, input_zero)
    check_slots(x, rows, offsets, len(units) // each, k)
    for tensor, kind in zip(units, scale_type, strict=True):
        check_units(tensor, spec, kind, x.device.type)
    return x.new_empty(len(rows), each * n)


define("cpu_grouped_linear", _GROUPED, {"CPU": _run}, _fake)

cpu_grouped_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.cpu_grouped_linear.default


def grouped_linear(
    weights: Sequence[Packed],
    bias: Sequence[Bias],
    each: int,
    compute: int,
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """The torch op on some weights: what tracers see."""
    spec, ranges = weights[0].spec, [weight.inputs for weight in weights if weight.inputs is not None]
    none = torch.zeros(spec.n)
    kept = [] if all(b is None for b in bias) else [none if b is None else b.float() for b in bias]
    return cpu_grouped_linear(
        x,
        rows,
        offsets,
        [weight.units for weight in weights],
        kept,
        each,
        *(spec.bits, spec.group_size, spec.n, spec.k, spec.symmetric),
        compute,
        [weight.scale_factor for weight in weights],
        [weight.scale_type for weight in weights],
        weights[0].table,
        [range_.scale for range_ in ranges],
        [range_.zero for range_ in ranges],
    )
