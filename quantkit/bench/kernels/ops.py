"""The ops that `quantkit bench --products` compares: our kernels and those of installed libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import quantkit_kernels
import torch
from quantkit_kernels import Layout, Spec, Stored
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.bench.machine import native_available

BF16, INT4, LLAMA = "torch bf16", "torch int4 g128", "llama.cpp Q4_0"  # what ratios are against
PATIENCE = 5.0  # seconds for a call of an op that no ratio is against
Weights = dict[str, Any]  # tensors by name, and constants


class Refused(Exception):
    """An op that cannot run this cell; the message says why."""


class Source(NamedTuple):
    """A random symmetric weight as it is stored; `dense` dequantizes it to any dtype.

    Scales are bf16 numbers; of FP4 FP8 ones in groups of 16 (NVFP4), else powers of two (MXFP4).
    """

    stored: Stored

    @classmethod
    def random(cls, n: int, k: int, bits: int, group: int | None, device: str, number: str = "") -> Source:
        """number: of `quantkit_kernels.stored.TABLES`; left out: integers."""
        random = torch.Generator().manual_seed(n + k + bits)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=random)
        spec = Spec(number or f"int{bits}", bits, group or k, True, n, k)
        scale = torch.rand(n, spec.groups, generator=random).add_(0.5).div_(2**bits * k**0.5).bfloat16()
        divisor = None
        if number == "fp8_e4m3":
            codes[(codes & 127) == 127] = 0  # those are no numbers
        if number == "fp4_e2m1" and group == 16:
            divisor = torch.tensor([256 * 2**bits * k**0.5])
            scale = (scale * divisor).to(torch.float8_e4m3fn).float() / divisor
        elif number == "fp4_e2m1":
            scale = scale.log2().round().exp2()
        packed = quantkit_kernels.pack_bits(codes, bits)
        return cls(Stored(packed.to(device), scale.to(device), None, spec, divisor=divisor))

    def dense(self, dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """The first `rows` rows dequantized; None: all rows."""
        packed, scale, spec = self.stored.packed, self.stored.scale, self.stored.spec
        n = spec.n if rows is None else min(rows, spec.n)
        return dequantize(Stored(packed[:n], scale[:n], None, spec.with_rows(n)), dtype)


class Op(NamedTuple):
    """One way to multiply.

    build(source, dtype of x) -> weights, the tensors among them are what is copied; run(x, weights) -> y [M, N].
    kind: the peak that bounds it. number: of the codes, if they are no integers. dtype: of x. prepare(x): outside the
    time, for ops that take other activations; finish(y, weights): to the scale of x W^T, for the check only.
    refuses(m, n, k) -> reason or None.
    """

    name: str
    bits: int
    group: int | None
    kind: str
    build: Callable[[Source, torch.dtype], Weights]
    run: Callable[[torch.Tensor, Weights], torch.Tensor]
    dtype: torch.dtype = torch.bfloat16
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    finish: Callable[[torch.Tensor, Weights], torch.Tensor] | None = None
    refuses: Callable[[int, int, int], str | None] = lambda _m, _n, _k: None
    place: Callable[[list[Weights]], list[Weights]] | None = None  # where the copies live
    patience: float | None = None  # seconds that a call may take; None: any
    number: str = ""


def _dense_op(name: str, dtype: torch.dtype, kind: str) -> Op:
    return Op(
        name,
        8,
        None,
        kind,
        lambda source, dtype: {"w": source.dense(dtype)},
        lambda x, weights: torch.nn.functional.linear(x, weights["w"]),
        dtype,
    )


def _backend_op(
    name: str,
    bits: int,
    group: int | None,
    label: str,
    compute: str = "float",
    slow: bool = False,
    number: str = "",
) -> Op:
    """A backend of quantkit_kernels, called the way a loaded model calls it."""

    backend = quantkit_kernels.backend(name)

    def build(source: Source, dtype: torch.dtype) -> Weights:
        stored = source.stored
        spec = stored.spec.with_inputs(compute)
        try:
            layout = backend.prepare(replace(stored, spec=spec), dtype)
        except quantkit_kernels.BackendMissing as error:
            raise Refused(str(error)) from error
        return dict(layout.tensors) | {"spec": spec, "facts": layout.facts}

    def run(x: torch.Tensor, weights: Weights) -> torch.Tensor:
        return backend.linear(Layout(weights, weights["spec"], weights["facts"]), x, None)

    def refuses(m: int, _n: int, _k: int) -> str | None:
        return "the reference is timed at M=1 only" if slow and m > 1 else None

    eights = compute.startswith("int8") or (name == "triton" and compute != "float")
    floats = name == "cpu" and number in ("nf4", "fp8_e4m3")
    return Op(
        label,
        bits,
        group,
        "fp32" if floats else "int8" if eights else "bf16",
        build,
        run,
        number=number,
        refuses=refuses,
        place=in_huge_pages if name == "cpu" else None,
    )


def _int_mm_op(device: str) -> Op:
    """The product alone: activations are given in int8, and the result is not scaled."""

    def refuses(m: int, n: int, k: int) -> str | None:
        if device == "cuda" and (m <= 16 or n % 8 or k % 8):
            return "on CUDA it needs M > 16 and N, K divisible by 8"
        return None

    return Op(
        "torch int8 products only",
        8,
        None,
        "int8",
        lambda source, _: {"codes": _int8_codes(source).T, "scale": source.stored.scale[:, 0].float()},
        lambda x, weights: torch._int_mm(x, weights["codes"]),
        prepare=lambda x: (x.float() * 31).round().clamp(-127, 127).to(torch.int8),
        finish=lambda y, weights: y / 31 * weights["scale"],
        refuses=refuses,
    )


def _int8_codes(source: Source) -> torch.Tensor:
    """int8 [N, K] of an 8-bit weight."""
    return (quantkit_kernels.unpack_bits(source.stored.packed, 8, source.stored.spec.k) ^ 128).view(
        torch.int8
    )


def _fp8_op() -> Op:
    """FP8 products with a scale per row and FP8 activations; tensor cores run them at the rate of int8."""
    fp8 = torch.float8_e4m3fn

    def build(source: Source, _: torch.dtype) -> Weights:
        w = source.dense(torch.float32)
        scale = w.abs().amax(1, keepdim=True) / 448
        return {"w": (w / scale).to(fp8).T, "scale": scale.T.contiguous()}

    def run(x: torch.Tensor, weights: Weights) -> torch.Tensor:
        ones = x.new_ones(x.shape[0], 1, dtype=torch.float32)
        return torch._scaled_mm(
            x, weights["w"], scale_a=ones, scale_b=weights["scale"], out_dtype=torch.bfloat16
        )

    return Op("torch fp8 products only", 8, None, "int8", build, run, prepare=lambda x: x.to(fp8))


def _fp8_rounding_op() -> Op:
    """FP8 products of bf16 activations, which are rounded by ops of PyTorch in the same time."""
    products = _fp8_op()

    def run(x: torch.Tensor, weights: Weights) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / 448
        codes = (x.float() / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            codes, weights["w"], scale_a=scale, scale_b=weights["scale"], out_dtype=torch.bfloat16
        )

    return products._replace(name="torch fp8 with rounding", run=run, prepare=None)


def _gemlite_op() -> Op:
    def build(source: Source, _: torch.dtype) -> Weights:
        from gemlite.core import DType, GemLiteLinearTriton

        stored, spec = source.stored, source.stored.spec
        linear = GemLiteLinearTriton(
            spec.bits,
            group_size=spec.group_size,
            in_features=spec.k,
            out_features=spec.n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        codes = quantkit_kernels.unpack_bits(stored.packed, spec.bits, spec.k)
        linear.pack(codes, stored.scale, 2 ** (spec.bits - 1), bias=None)
        return {"linear": linear}

    return Op("gemlite W4A16 g128", 4, 128, "bf16", build, lambda x, weights: weights["linear"](x))


def in_huge_pages(copies: list[Weights]) -> list[Weights]:
    """The same weights with their units in one arena, as in a loaded model."""
    from quantkit_kernels.cpu.library import Arena

    arena = Arena(sum(-(-weights["units"].numel() // 64) * 64 for weights in copies))
    return [weights | {"units": arena.place(weights["units"])} for weights in copies]


def cpu_ops() -> list[Op]:
    """Our ops, then PyTorch's; ours are left out if the native library is not built."""
    ours = []
    if native_available():
        for bits, group in ((4, 128), (8, None), (3, 128), (2, 64)):
            scheme = f"g{group}" if group else "channel"
            ours += [
                _backend_op("cpu", bits, group, f"quantkit W{bits}A16 {scheme}"),
                _backend_op("cpu", bits, group, f"quantkit W{bits}A8 {scheme}", "int8"),
            ]
        ours.append(_backend_op("cpu", 4, 128, "quantkit W4A8 g128 per token", "int8-token"))
        ours += [  # inputs as a checkpoint of such a scheme rounds them
            _backend_op("cpu", 8, None, "quantkit W8A8 channel checkpoint", "int8-range"),
            _backend_op("cpu", 4, 128, "quantkit W4A8 g128 checkpoint", "int8-range"),
            _backend_op("cpu", 8, None, "quantkit FP8 W8A8 channel", "fp8-range", number="fp8_e4m3"),
            _backend_op("cpu", 8, 128, "quantkit FP8 W8A8 block", "fp8-group", number="fp8_e4m3"),
        ]
        ours += [
            _backend_op("cpu", 8, None, "quantkit FP8 W8A16 channel", number="fp8_e4m3"),
            _backend_op("cpu", 4, 16, "quantkit NVFP4A16", number="fp4_e2m1"),
            _backend_op("cpu", 4, 32, "quantkit MXFP4A16", number="fp4_e2m1"),
            _backend_op("cpu", 4, 64, "quantkit NF4A16 g64", number="nf4"),
        ]
    return [
        *ours,
        _backend_op("reference", 4, 128, "quantkit reference W4A16 g128", slow=True),
        _dense_op(BF16, torch.bfloat16, "bf16"),
        _dense_op("torch fp32", torch.float32, "fp32")._replace(patience=PATIENCE),
        _backend_op("torch", 4, 128, INT4),
        _backend_op("torch", 8, None, "torch int8 channel")._replace(patience=PATIENCE),
        _int_mm_op("cpu")._replace(patience=PATIENCE),
    ]


def cuda_ops() -> list[Op]:
    """Our ops, PyTorch's, and gemlite's if it can be imported."""
    ours = []
    for name in quantkit_kernels.backends():
        if name not in ("cpu", "reference", "torch"):
            ours += [
                _backend_op(name, 4, 128, f"quantkit {name} W4A16 g128"),
                _backend_op(name, 8, None, f"quantkit {name} W8A16 channel"),
                _backend_op(name, 8, None, f"quantkit {name} FP8 W8A16 channel", number="fp8_e4m3"),
                _backend_op(name, 8, None, f"quantkit {name} W8A8 channel", "int8-range"),
                _backend_op(
                    name, 8, None, f"quantkit {name} FP8 W8A8 channel", "fp8-range", number="fp8_e4m3"
                ),
                _backend_op(name, 8, 128, f"quantkit {name} FP8 W8A8 block", "fp8-group", number="fp8_e4m3"),
            ]
    peers = [_dense_op(BF16, torch.bfloat16, "bf16"), _int_mm_op("cuda")]
    if torch.cuda.get_device_capability() >= (8, 9):
        peers += [_fp8_op(), _fp8_rounding_op()]
    if importlib.util.find_spec("gemlite"):
        peers.append(_gemlite_op())
    return ours + peers
