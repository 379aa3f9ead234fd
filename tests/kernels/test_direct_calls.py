"""Native code trusts sizes, so every direct call is checked in Python: wrong arguments are errors, never a crash.

Each case changes one argument of a call that is right, at random with a fixed seed, to another shape, dtype, device,
stride or number. In a process of its own, so that a crash is a failure of the test and not its end.
"""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from packed_weights import packed_weight
from quantkit_kernels import Spec, Stored, backend, wna16_linear
from quantkit_kernels.cpu import decoder, layout, library, ops
from quantkit_kernels.cpu.range_errors import range_errors
from quantkit_kernels.triton import layout as triton_layout
from quantkit_kernels.triton.op import triton_linear

CASES = 150  # per call


def wrong_tensors(t: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """Another tensor than the one that is wanted; sometimes one that happens to do."""
    other = [d for d in (torch.float32, torch.float16, torch.uint8, torch.int32, torch.int64) if d != t.dtype]
    rows = max(1, len(t) - dice.randint(1, 3)) if t.dim() else 1
    return dice.choice(
        [
            lambda: t[:rows] if t.dim() else t[None],
            lambda: t[..., ::2] if t.dim() else t[None],
            lambda: torch.zeros(0, dtype=t.dtype),
            lambda: t.flatten()[:1],
            lambda: t[None],
            lambda: t.to("meta"),
            lambda: t.to(dice.choice(other)),
            lambda: t.T if t.dim() == 2 else t[None, None],
            lambda: torch.as_strided(t, t.shape, (0,) * t.dim()),
            lambda: torch.tensor(0, dtype=t.dtype),
        ]
    )()


def wrong(value, dice: random.Random):
    if isinstance(value, torch.Tensor):
        return wrong_tensors(value, dice)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice([0, 1, -1, value + 1, value - 1, 2 * value, value // 2, 99, 2**31, -(2**33)])
    if isinstance(value, float):
        return dice.choice([0.0, -1.0, float("nan"), float("inf")])
    if value is None:
        return torch.zeros(dice.choice([1, 3, 20]), dtype=dice.choice([torch.float32, torch.int32]))
    return value


def cpu_arguments():
    weight = layout.pack(packed_weight(4, 20, 128, 32, False)[0])
    facts = (4, 32, 20, 128, False, ops.FLOAT, weight.scale_factor, weight.wide_scales)
    return [torch.randn(3, 128), weight.units, torch.zeros(20), *facts, 0]


def reference_arguments():
    stored, _ = packed_weight(4, 20, 128, 32, False)
    return [
        torch.randn(3, 128),
        stored.packed,
        stored.scale,
        stored.zero_packed,
        torch.zeros(20),
        4,
        32,
        20,
        128,
    ]


def triton_arguments():
    stored, _ = packed_weight(4, 20, 128, 32, False)
    return [torch.randn(3, 128), *triton_layout.build(stored), torch.zeros(20), 4, 32, 20, 128]


def packed_and_multiplied(packed, scale, zero_packed, bits, group, n, k, inputs):
    """From tensors to a result, through every step of the backend."""
    spec = Spec(f"int{bits}", bits, group, zero_packed is None, n, k, ["float", "int8", "int8-token"][inputs])
    cpu = backend("cpu")
    prepared = cpu.prepare(Stored(packed, scale, zero_packed, spec), torch.float32)
    cpu.restore(prepared)
    return cpu.bind(prepared, torch.float32)(torch.randn(2, k), None)


def packing_arguments():
    stored, _ = packed_weight(4, 20, 128, 32, False)
    return [stored.packed, stored.scale, stored.zero_packed, 4, 32, 20, 128, 0]


def with_units(units, x, bias, compute):
    """A layout whose tensor was replaced."""
    weight = layout.pack(packed_weight(4, 20, 128, 32, False)[0])._replace(units=units)
    layout.unpack(weight)
    y = torch.empty(len(x), 20)
    ops.run(x, weight, compute, y, bias)
    return ops.linear(weight, x, bias, compute)


def with_units_arguments():
    units = layout.pack(packed_weight(4, 20, 128, 32, False)[0]).units
    return [units, torch.randn(3, 128), torch.zeros(20), 0]


def decoded(matrix, norm, head, tokens, cos, sin, keep):
    """A step of a model of one layer."""

    def dense(*shape):
        return decoder.Matrix(torch.randn(*shape))

    ones = decoder.Norm(torch.ones(64), 1e-5)
    qkv = (decoder.Matrix(matrix), dense(64, 64), dense(64, 64))
    layer = decoder.Layer(
        decoder.Norm(norm, 1e-5), ones, qkv, dense(64, 64), (dense(128, 64),) * 2, dense(64, 128), 0.1
    )
    tables = decoder.Tables((layer,), dense(100, 64), decoder.Matrix(head), ones, 64, 128, 2, 2, 32, 32)
    return decoder.Decoder(tables).step(tokens, cos, sin, keep)


def decoder_arguments():
    sizes = (torch.randn(64, 64), torch.ones(64), torch.randn(100, 64))
    return [*sizes, torch.tensor([1, 2, 3]), torch.ones(3, 32), torch.ones(3, 32), 1]


def placed(tensor):
    """A tensor in an arena of huge pages."""
    return library.Arena(4096).place(tensor)


def range_arguments():
    return [torch.randn(24, 128), torch.ones(5, 24), torch.ones(5, 24), 15, torch.ones(4, 128)]


CALLS = {
    "cpu_linear": (ops.cpu_linear, cpu_arguments),
    "cpu backend": (packed_and_multiplied, packing_arguments),
    "cpu layout": (with_units, with_units_arguments),
    "decoder": (decoded, decoder_arguments),
    "range_errors": (range_errors, range_arguments),
    "arena": (placed, lambda: [torch.zeros(100, dtype=torch.uint8)]),
    "wna16_linear": (wna16_linear, reference_arguments),
    "triton_linear": (triton_linear, triton_arguments),
}
NATIVE = {"cpu_linear", "cpu backend", "cpu layout", "decoder", "range_errors", "arena"}
ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError, IndexError, OverflowError)


def attack(name: str) -> None:
    """Wrong calls must raise one of our errors, or be calls that are right after all; the process must live."""
    call, arguments = CALLS[name]
    dice, refused = random.Random(name), 0
    torch.manual_seed(0)
    call(*arguments())  # is right
    for _ in range(CASES):
        given = arguments()
        for at in dice.sample(range(len(given)), dice.choice([1, 1, 1, min(2, len(given))])):
            given[at] = wrong(given[at], dice)
        try:
            call(*given)
        except ERRORS:
            refused += 1
    assert refused > CASES // 3, f"{name}: only {refused} of {CASES} were refused"


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused_and_never_crash(name):
    if name in NATIVE and not library.available():
        pytest.skip("needs the native library (a C++ compiler)")
    done = subprocess.run(
        [sys.executable, __file__, name],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, f"signal or exit {done.returncode}: {done.stderr[-2000:]}"


needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")


@needs_native
@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (1, torch.zeros(1280, dtype=torch.uint8, device="meta"), None),
        (3, 5, "2, 3, 4 and 8 bits, not 5"),
        (4, 48, "groups of 48 columns do not divide a row of 128"),
        (8, 99, r"unknown compute 99; known: 0 \(float\)"),
        (11, 7, "unknown table 7"),
        (2, torch.zeros(20, dtype=torch.float16), r"bias must be contiguous fp32 \[20\]"),
        (0, torch.tensor(1.0), "x has 0 features"),
    ],
)
def test_errors_name_what_is_wrong(at, value, says):
    given = cpu_arguments()
    given[at] = value
    with pytest.raises(ValueError, match=says):
        ops.cpu_linear(*given)


def test_a_stored_weight_checks_itself():
    stored, _ = packed_weight(4, 20, 128, 32, False)
    for change, says in (
        ({"packed": stored.packed.to(torch.uint8)}, "packed must be int32"),
        ({"packed": stored.packed[:, :-1]}, r"packed of a 4-bit \[20, 128\] weight is \(20, 16\)"),
        ({"scale": stored.scale.double()}, "scale must be fp32, bf16 or fp16"),
        ({"scale": stored.scale.to("meta")}, "scale is on meta, packed on cpu"),
        ({"zero_packed": None}, "asymmetric weight needs zero points"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            replace(stored, **change)
    with pytest.raises(ValueError, match="unknown compute 'int7'; known: float, int8, int8-token"):
        stored.spec.with_inputs("int7")
    with pytest.raises(ValueError, match="groups of 100 columns do not divide a row of 257"):
        Spec.integer(4, 100, True, 16, 257)


if __name__ == "__main__":
    attack(sys.argv[1])
