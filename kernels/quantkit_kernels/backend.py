"""The interface of a backend: a name, the weights it refuses, and functions from a `Stored` to a call and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch

from quantkit_kernels.checks import check_slots
from quantkit_kernels.stored import FLOATS, Layout, Spec, Stored

Call = Callable[
    [torch.Tensor, torch.Tensor | None], torch.Tensor
]  # x [..., K], bias [N] or None -> y [..., N]

GroupedCall = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # x [T, K], rows [S], offsets [E + 1] -> y [S, each * N]


class BackendMissing(ValueError):
    """A backend was asked for by name and cannot run here."""


class Verdict(NamedTuple):
    """Whether "auto" may take a backend that accepts the weight, and why."""

    trusted: bool
    why: str


class Backend:
    """One way to multiply by packed weights. A subclass says what it refuses, builds its layout and calls its op."""

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("float",)  # of `Spec.inputs`
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = FLOATS  # of activations; None: any float type
    keeps_stored: ClassVar[bool] = False  # whether the layout is the stored tensors themselves

    def refuses(self, spec: Spec, device: torch.device) -> str | None:
        """Why this backend cannot run a weight on a device, or None."""
        if spec.inputs not in self.inputs:
            return f"backend {self.name!r} has no compute {spec.inputs!r}; only the native CPU kernels have"
        return self._refuses(spec, device)

    def verdict(self, spec: Spec, device: torch.device, dtype: torch.dtype | None) -> Verdict:
        """Whether "auto" may take it for activations of `dtype`. None: for any dtype, and without running a test."""
        return Verdict(True, "")

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        """The layout for activations of type `dtype`. BackendMissing if it cannot run them or the weight."""
        reason = self.refuses(stored.spec, stored.device)
        if reason is None and self.dtypes is not None and dtype not in self.dtypes:
            names = [
                {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(d)[6:]] for d in self.dtypes
            ]
            reason = (
                f"backend {self.name!r} takes {', '.join(names[:-1])} or {names[-1]} activations, not {dtype}"
            )
        if reason:
            raise BackendMissing(reason)
        return self._prepare(stored, dtype)

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] W^T + bias by the backend's torch op; x has the type the layout was prepared for."""
        raise NotImplementedError

    def bind(self, layout: Layout, dtype: torch.dtype) -> Call:
        """call(x, bias) -> y in x's type, for x of any float type; it is computed in `dtype`.

        The tensors are looked up in `layout.tensors` at every call, so replaced ones are used.
        """
        linear = self.linear

        def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return linear(layout, x.to(dtype), bias).to(x.dtype)

        return call

    def bind_grouped(
        self,
        layouts: Sequence[Layout],
        bias: Callable[[int], torch.Tensor | None],
        each: int,
        dtype: torch.dtype,
    ) -> GroupedCall:
        """call(x, rows, offsets) -> y: the products of all experts of a mixture, of any float type as in `bind`.

        layouts: `each` weights [N, K] per expert that read the same x, expert by expert, all of one `Spec`. bias:
        number of a weight -> its bias now. x [T, K]; rows int64 [S], the row of x of each slot; offsets int64 [E + 1]:
        slots offsets[e] to offsets[e + 1] - 1 are those of expert e. y [S, each * N]: the outputs of an expert's
        weights side by side. Here expert by expert, which is what backends with a product of their own must equal.
        """
        calls = [self.bind(layout, dtype) for layout in layouts]
        spec = layouts[0].spec

        def call(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            check_slots(x, rows, offsets, len(layouts) // each, spec.k)
            bounds, parts = offsets.tolist(), []
            for e, (start, stop) in enumerate(pairwise(bounds)):
                if start < stop:
                    mine, own = range(e * each, (e + 1) * each), x[rows[start:stop]]
                    parts.append(torch.cat([calls[i](own, bias(i)) for i in mine], -1))
            return torch.cat(parts) if parts else x.new_empty(0, each * spec.n)

        return call

    def restore(self, layout: Layout) -> Stored:
        """What `prepare` was given, bit for bit. BackendMissing if the layout does not keep all of it."""
        raise BackendMissing(f"backend {self.name!r} keeps its own layout only, not what a checkpoint stores")

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        raise NotImplementedError

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        raise NotImplementedError
