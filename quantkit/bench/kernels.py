"""Every kernel against what is installed, op by op: `quantkit bench --kernels`.

One cell is (N, K, M). Weights of each op are copied until they fill the rotation (256 MB), so that every call reads
its weight from memory. All ops of a cell run in turns, round after round; a time is the median over rounds, a ratio
the median of the ratios within each round. The read bandwidth is measured in the same cell, and an op whose result
is wrong is not timed.

On a GPU one round of an op is the replay of a CUDA graph that holds a call per copy.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import quantkit_kernels
import torch
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.bench.machine import machine
from quantkit.bench.roofline import Roofline, describe, measure, read_bandwidth

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {  # (N, K); the last of each: siblings fused
    "1.1b": ((2048, 2048), (5632, 2048), (2048, 5632), (2560, 2048), (11264, 2048)),
    "llama-3-8b": ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)),
}
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
ROTATION = 256 << 20  # bytes
BURST = 0.02  # seconds of calls of one op in one round, one call at least
PAUSE = 0.02  # seconds between bursts: another engine's threads spin on for a while
TOLERANCE = 0.03  # RMS error over RMS of the fp64 result; int8 activations alone give 0.01
ROWS_CHECKED, TOKENS_CHECKED = 64, 16

BF16, INT4, LLAMA = "torch bf16", "torch int4 g128", "llama.cpp Q4_0"  # what ratios are against
Weights = dict[str, Any]  # tensors by name, and constants


class Refused(Exception):
    """An op that cannot run this cell; the message says why."""


class Source(NamedTuple):
    """A weight as it is stored: codes packed, scales bf16, symmetric; `dense` gives it back in any dtype."""

    packed: torch.Tensor
    scale: torch.Tensor
    bits: int
    n: int
    k: int

    @classmethod
    def random(cls, n: int, k: int, bits: int, group: int | None, device: str) -> Source:
        random = torch.Generator().manual_seed(n + k + bits)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=random)
        groups = k // (group or k)
        scale = torch.rand(n, groups, generator=random).add_(0.5).div_(2**bits * k**0.5).bfloat16()
        return cls(quantkit_kernels.pack_bits(codes, bits).to(device), scale.to(device), bits, n, k)

    def dense(self, dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """The first `rows` rows (all of them: None), dequantized."""
        n = self.n if rows is None else min(rows, self.n)
        return dequantize(self.packed[:n], self.scale[:n], None, self.bits, n, self.k, dtype)


class Op(NamedTuple):
    """One way to multiply.

    build(source, dtype of x) -> weights, the tensors among them are what is copied; run(x, weights) -> y [M, N].
    kind: the peak that bounds it. dtype: of x. prepare(x): outside the time, for ops that take other activations;
    finish(y, weights): to the scale of x W^T, for the check only. refuses(m, n, k) -> reason or None.
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
    name: str, bits: int, group: int | None, label: str, compute: str = "float", slow: bool = False
) -> Op:
    """A backend of quantkit_kernels, through the calls a loaded model makes."""

    def build(source: Source, dtype: torch.dtype) -> Weights:
        packed, scale, _, n, k = source
        columns = group or k
        try:
            quantkit_kernels.select(packed.device.type, bits, columns, True, 1, n, k, name)
            layout = quantkit_kernels.prepare(name, packed, scale, None, bits, n, k, dtype)
        except quantkit_kernels.BackendMissing as error:
            raise Refused(str(error)) from error
        return {"packed": packed, "scale": scale, "n": n, "k": k} if layout is None else layout

    def run(x: torch.Tensor, layout: Weights) -> torch.Tensor:
        return quantkit_kernels.run(name, x, layout, group or x.shape[1], None, compute)

    def run_stored(x: torch.Tensor, weights: Weights) -> torch.Tensor:
        packed, scale, n, k = weights.values()
        return quantkit_kernels.wna16_linear(x, packed, scale, None, None, bits, group or k, n, k)

    def refuses(m: int, _n: int, _k: int) -> str | None:
        return "the reference is timed at M=1 only" if slow and m > 1 else None

    return Op(
        label,
        bits,
        group,
        "bf16" if compute == "float" else "int8",
        build,
        run_stored if name == "reference" else run,
        refuses=refuses,
        place=in_huge_pages if name == "cpu" else None,
    )


def _int_mm_op(device: str) -> Op:
    """Products only: activations are int8 already and nobody scales the result."""

    def refuses(m: int, n: int, k: int) -> str | None:
        if device == "cuda" and (m <= 16 or n % 8 or k % 8):
            return "on CUDA it needs M > 16 and N, K divisible by 8"
        return None

    return Op(
        "torch int8 products only",
        8,
        None,
        "int8",
        lambda source, _: {"codes": _int8_codes(source).T, "scale": source.scale[:, 0].float()},
        lambda x, weights: torch._int_mm(x, weights["codes"]),
        prepare=lambda x: (x.float() * 31).round().clamp(-127, 127).to(torch.int8),
        finish=lambda y, weights: y / 31 * weights["scale"],
        refuses=refuses,
    )


def _int8_codes(source: Source) -> torch.Tensor:
    """int8 [N, K] of an 8-bit weight."""
    return (quantkit_kernels.unpack_bits(source.packed, 8, source.k) ^ 128).view(torch.int8)


def _fp8_op() -> Op:
    """Rowwise-scaled FP8 products, activations FP8 already; tensor cores do them at the rate of int8."""
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


def _gemlite_op() -> Op:
    def build(source: Source, _: torch.dtype) -> Weights:
        from gemlite.core import DType, GemLiteLinearTriton

        linear = GemLiteLinearTriton(
            source.bits,
            group_size=source.k // source.scale.shape[1],
            in_features=source.k,
            out_features=source.n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        codes = quantkit_kernels.unpack_bits(source.packed, source.bits, source.k)
        linear.pack(codes, source.scale, 2 ** (source.bits - 1), bias=None)
        return {"linear": linear}

    return Op("gemlite W4A16 g128", 4, 128, "bf16", build, lambda x, weights: weights["linear"](x))


def in_huge_pages(copies: list[Weights]) -> list[Weights]:
    """The same weights with their units in one arena, as a loaded model has them."""
    from quantkit_kernels.cpu.library import Arena

    arena = Arena(sum(-(-weights["units"].numel() // 64) * 64 for weights in copies))
    return [weights | {"units": arena.place(weights["units"])} for weights in copies]


def native_available() -> bool:
    """Whether the native CPU library is built and loads."""
    try:
        from quantkit_kernels.cpu.library import available
    except ImportError:
        return False
    return available()


def cpu_ops() -> list[Op]:
    """Ours first, then PyTorch's; a library that is not built is left out."""
    ours = []
    if native_available():
        for bits, group in ((4, 128), (8, None), (3, 128), (2, 64)):
            scheme = f"g{group}" if group else "channel"
            ours += [
                _backend_op("cpu", bits, group, f"quantkit W{bits}A16 {scheme}"),
                _backend_op("cpu", bits, group, f"quantkit W{bits}A8 {scheme}", "int8"),
            ]
        ours.append(_backend_op("cpu", 4, 128, "quantkit W4A8 g128 per token", "int8-token"))
    return [
        *ours,
        _backend_op("reference", 4, 128, "quantkit reference W4A16 g128", slow=True),
        _dense_op(BF16, torch.bfloat16, "bf16"),
        _dense_op("torch fp32", torch.float32, "fp32"),
        _backend_op("torch", 4, 128, INT4),
        _backend_op("torch", 8, None, "torch int8 channel"),
        _int_mm_op("cpu"),
    ]


def cuda_ops() -> list[Op]:
    """Ours, PyTorch's, and gemlite where it can be imported."""
    ours = []
    for name in quantkit_kernels.backends():
        if name not in ("cpu", "reference", "torch"):
            ours += [
                _backend_op(name, 4, 128, f"quantkit {name} W4A16 g128"),
                _backend_op(name, 8, None, f"quantkit {name} W8A16 channel"),
            ]
    peers = [_dense_op(BF16, torch.bfloat16, "bf16"), _int_mm_op("cuda")]
    if torch.cuda.get_device_capability() >= (8, 9):
        peers.append(_fp8_op())
    if importlib.util.find_spec("gemlite"):
        peers.append(_gemlite_op())
    return ours + peers


def weight_bytes(weights: Weights) -> int:
    """Bytes a call has to read."""
    return sum(t.nbytes for part in weights.values() for t in _tensors(part))


def _tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.nn.Module):
        return [*part.parameters(), *part.buffers()]
    return [part] if isinstance(part, torch.Tensor) else []


def copies(op: Op, weights: Weights, rotation: int) -> list[Weights]:
    """As many copies of `weights` as fill `rotation` bytes, two at least; the values do not matter for time."""

    number = max(2, -(-rotation // weight_bytes(weights)))
    if op.place is not None:
        return op.place([weights] * number)
    return [weights] + [
        {name: copy.deepcopy(part) if _tensors(part) else part for name, part in weights.items()}
        for _ in range(number - 1)
    ]


def relative_error(op: Op, source: Source, weights: Weights, x: torch.Tensor) -> float:
    """RMS error of the op over the RMS of the fp64 result, on some rows of the weight and of x [M, K]."""
    x = x[:TOKENS_CHECKED]
    if op.refuses(x.shape[0], source.n, source.k):
        x = x.repeat(-(-TOKENS_CHECKED * 2 // x.shape[0]), 1)
    given = op.prepare(x) if op.prepare else x
    y = op.run(given, weights)
    if op.finish:
        y = op.finish(y, weights)
    exact = x.double() @ source.dense(torch.float64, ROWS_CHECKED).T
    wrong = y[:, :ROWS_CHECKED].double() - exact
    return float(wrong.square().mean().sqrt() / exact.square().mean().sqrt())


class Lane(NamedTuple):
    """What is timed in a cell: burst() runs some calls and gives seconds per call. error: None if not checked."""

    name: str
    kind: str
    n_bytes: int
    error: float | None
    burst: Callable[[], float]


Peers = Callable[[int, int, int, int], list[Lane]]  # (n, k, m, rotation) -> lanes of another engine


def _cpu_burst(op: Op, rotating: list[Weights], x: torch.Tensor, seconds: float) -> Callable[[], float]:
    position = 0

    def calls(number: int) -> float:
        nonlocal position
        start = time.perf_counter()
        for i in range(position, position + number):
            op.run(x, rotating[i % len(rotating)])
        position += number
        return (time.perf_counter() - start) / number

    number = max(1, int(seconds / calls(1)))
    number = max(1, int(seconds / calls(min(number, len(rotating)))))  # the first call also woke things up
    return lambda: calls(number)


def _cuda_burst(op: Op, rotating: list[Weights], x: torch.Tensor) -> Callable[[], float]:
    for weights in rotating[:3]:
        op.run(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in rotating:
            op.run(x, weights)

    def replay() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / len(rotating)

    replay()
    return replay


def _lane(op: Op, n: int, k: int, m: int, device: str, rotation: int, burst: float) -> Lane:
    reason = op.refuses(m, n, k)
    if reason:
        raise Refused(reason)
    if op.group and k % op.group:
        raise Refused(f"K={k} is not divisible by {op.group}")
    random = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=random).to(device, op.dtype)
    source = Source.random(n, k, op.bits, op.group, device)
    weights = op.build(source, op.dtype)
    error = relative_error(op, source, weights, x)
    if not error <= TOLERANCE:
        raise Refused(f"wrong: relative RMS error {error:.3g}, more than {TOLERANCE}")
    rotating = copies(op, weights, rotation)
    given = op.prepare(x) if op.prepare else x
    timed = _cpu_burst(op, rotating, given, burst) if device == "cpu" else _cuda_burst(op, rotating, given)
    return Lane(op.name, op.kind, weight_bytes(weights), error, timed)


def cell(
    ops: Iterable[Op],
    n: int,
    k: int,
    m: int,
    roofline: Roofline,
    device: str = "cpu",
    rounds: int = 7,
    rotation: int = ROTATION,
    burst: float = BURST,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Time every op on one weight shape and number of tokens; refused ones are listed with the reason."""
    lanes, refused = [], {}
    with torch.inference_mode():
        for op in ops:
            try:
                lanes.append(_lane(op, n, k, m, device, rotation, burst))
            except Refused as reason:
                refused[op.name] = str(reason)
        lanes += peers(n, k, m, rotation) if peers else []
        read = read_bandwidth(device, buffer=rotation)
        times: dict[str, list[float]] = {lane.name: [] for lane in lanes}
        for _ in range(rounds):
            for lane in lanes:
                time.sleep(PAUSE)
                lane.burst()  # warm
                times[lane.name].append(lane.burst())
    here = roofline._replace(read=read)
    rows = []
    for lane in lanes:
        spent = times[lane.name]
        middle = statistics.median(spent)
        rows.append(
            {
                "op": lane.name,
                "us": middle * 1e6,
                "us_min": min(spent) * 1e6,
                "us_max": max(spent) * 1e6,
                "weight_bytes": lane.n_bytes,
                "share_of_read": lane.n_bytes / middle / read,
                "share_of_roofline": here.seconds(lane.n_bytes, 2 * m * n * k, lane.kind) / middle,
                "relative_rms_error": lane.error,
                "times_faster_than": {
                    peer: statistics.median(b / a for a, b in zip(spent, times[peer], strict=True))
                    for peer in (BF16, INT4, LLAMA)
                    if peer in times
                },
            }
        )
    return {"n": n, "k": k, "m": m, "read_bytes_per_s": read, "ops": rows, "refused": refused}


def shapes(names: Sequence[str]) -> list[tuple[int, int]]:
    """(N, K) of named models and of literal "4096x11008"s, each once, in order; ValueError for others."""
    found: dict[tuple[int, int], None] = {}
    for name in names:
        n, _, k = name.partition("x")
        if name in SHAPES:
            found |= dict.fromkeys(SHAPES[name])
        elif n.isdecimal() and k.isdecimal() and int(n) and int(k):
            found[int(n), int(k)] = None
        else:
            raise ValueError(f"unknown shape {name!r}; use NxK (4096x4096) or one of: {', '.join(SHAPES)}")
    return list(found)


def run(
    names: Sequence[str] = tuple(SHAPES),
    tokens: Sequence[int] = TOKENS,
    device: str = "cpu",
    only: Sequence[str] = (),
    rounds: int = 7,
    rotation: int = ROTATION,
    write: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda _report: None,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """All cells, each printed by `write` and handed to `save` as soon as it is measured, so that none is lost.

    only: parts of op names; the two that ratios are against always run.
    """
    ops = cpu_ops() if device == "cpu" else cuda_ops()
    if only:
        ops = [op for op in ops if op.name in (BF16, INT4) or any(part in op.name for part in only)]
    roofline = measure(device, rounds=rounds)
    report: dict[str, Any] = {
        "schema": "quantkit-kernels/1",
        "machine": machine() | where(device),
        "rotation_bytes": rotation,
        "rounds": rounds,
        "roofline": roofline.report(),
        "cells": [],
    }
    write(describe(roofline))
    if device == "cpu" and native_available():
        report["call_overhead_us"] = call_overhead()
        write(
            "overhead of a call: "
            + ", ".join(f"{name} {us:.1f} us" for name, us in report["call_overhead_us"].items())
        )
    for n, k in shapes(names):
        for m in tokens:
            report["cells"].append(cell(ops, n, k, m, roofline, device, rounds, rotation, peers=peers))
            write(table(report["cells"][-1]))
            save(report)
    return report


def call_overhead(calls: int = 1000, rounds: int = 7) -> dict[str, float]:
    """Microseconds per call on one unit of 16 x 128, warm, one thread, by way of calling.

    ctypes: the C function with addresses that are known and an output that is there; forward, layer: what a
    `QuantLinear` and its `__call__` take, which is what a loaded model pays; run: the backend's function, which the
    cells time; op: the torch op, which compiled and exported models contain.
    """
    from quantkit_kernels.cpu import library, ops

    from quantkit.layers.quant_linear import QuantLinear
    from quantkit.scheme import Scheme

    packed = ops.pack(*Source.random(16, 128, 4, 128, "cpu")[:2], None, 4, 16, 128)
    x, y, weight = torch.zeros(1, 128), torch.empty(1, 16), packed.weight()
    linear, x_at, y_at = library.required().qk_linear, x.data_ptr(), y.data_ptr()
    facts = (4, 128, 16, 128, True, ops.FLOAT, packed.scale_factor, packed.wide_scales)
    layout = packed._asdict()
    layer = QuantLinear(128, 16, Scheme(4, 128, True), False, torch.float16)
    for stored in (layer.weight_packed, layer.weight_scale):
        stored.zero_()
    layer.prepare("cpu", torch.float32)
    runs = {
        "ctypes": lambda: linear(weight, x_at, 0, 1, ops.FLOAT, y_at, 0, 1),
        "forward": lambda: layer.forward(x),
        "layer": lambda: layer(x),
        "run": lambda: quantkit_kernels.run("cpu", x, layout, 128, None, "float"),
        "op": lambda: torch.ops.quantkit.cpu_linear(x, packed.units, None, *facts),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, once in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    once()
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def where(device: str) -> dict[str, Any]:
    """The path that runs, for the head of the JSON."""
    facts: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "isa": None}
    if device != "cpu":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if native_available():
        from quantkit_kernels.cpu.library import isa

        facts["isa"] = isa()
    return facts


def table(measured: dict[str, Any]) -> str:
    """One cell as text, fastest first."""
    lines = [
        f"\n[{measured['n']}, {measured['k']}] M={measured['m']}   "
        f"read {measured['read_bytes_per_s'] / 1e9:.1f} GB/s",
        f"{'op':32}{'us':>10}{'min':>10}{'max':>10}{'read':>8}{'roofline':>10}{'x bf16':>8}{'x int4':>8}{'x llama':>8}",
    ]
    for row in sorted(measured["ops"], key=lambda row: row["us"]):
        ratios = [row["times_faster_than"].get(peer) for peer in (BF16, INT4, LLAMA)]
        lines.append(
            f"{row['op']:32}{row['us']:10.1f}{row['us_min']:10.1f}{row['us_max']:10.1f}"
            f"{row['share_of_read']:8.0%}{row['share_of_roofline']:10.0%}"
            + "".join(f"{ratio:8.2f}" if ratio else f"{'-':>8}" for ratio in ratios)
        )
    lines += [f"{name}: not timed, {reason}" for name, reason in measured["refused"].items()]
    return "\n".join(lines)
