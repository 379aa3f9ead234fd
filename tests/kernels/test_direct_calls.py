"""Native code trusts sizes, so every direct call is checked in Python: wrong arguments are errors, never a crash.

Each case changes one argument of a call that is right, at random with a fixed seed, to another shape, dtype, device,
stride or number. In a process of its own, so that a crash is a failure of the test and not its end.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from packed_weights import packed_weight
from quantkit_kernels import Spec, Stored, backend, wna16_linear
from quantkit_kernels.cpu import decoder, layout, library, ops, rounding
from quantkit_kernels.cpu.grouped import cpu_grouped_linear
from quantkit_kernels.cpu.range_errors import range_errors
from quantkit_kernels.triton import layout as triton_layout
from quantkit_kernels.triton.op import triton_linear
from wrong_arguments import refusals

CASES = 150  # per call


def cpu_arguments():
    weight = layout.pack(packed_weight(4, 20, 128, 32, False)[0])
    facts = (4, 32, 20, 128, False, ops.FLOAT, weight.scale_factor, weight.scale_type)
    return [torch.randn(3, 128), weight.units, torch.zeros(20), *facts, 0]


def grouped_of(x, rows, offsets, units, bias, *numbers):
    """The grouped op; two of its lists of tensors are a tensor each here, so that they are attacked too."""
    return cpu_grouped_linear(
        x, rows, offsets, [*units], [*bias], *numbers[:-2], [numbers[-2]] * 4, [0] * 4, 0
    )


def grouped_arguments():
    made = [layout.pack(packed_weight(4, 20, 128, 32, False, seed=seed)[0]) for seed in range(4)]
    units, rows = torch.stack([weight.units for weight in made]), torch.tensor([0, 2, 1])
    facts = (2, 4, 32, 20, 128, False, ops.FLOAT, made[0].scale_factor, 0)
    return [torch.randn(3, 128), rows, torch.tensor([0, 1, 3]), units, torch.zeros(4, 20), *facts]


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
    ops.bind(layout.pack(packed_weight(4, 20, 128, 32, False)[0]), torch.float32, compute)(x, bias)
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


def sized(hidden, intermediate, heads, kv_heads, head_dim, rotary_dim, window, length):
    """A model of one layer whose sizes are other than those of its matrices."""

    def dense(*shape):
        return decoder.Matrix(torch.randn(*shape))

    ones = decoder.Norm(torch.ones(64), 1e-5)
    parts = ((dense(64, 64),) * 3, dense(64, 64), (dense(128, 64),) * 2, dense(64, 128))
    layer = decoder.Layer(ones, ones, *parts, 0.1, window)
    sizes = (hidden, intermediate, heads, kv_heads, head_dim, rotary_dim)
    running = decoder.Decoder(decoder.Tables((layer,), dense(100, 64), dense(100, 64), ones, *sizes))
    running.step(torch.tensor([1, 2, 3]), *torch.ones(2, 3, rotary_dim))
    running.truncate(length)
    running.step(torch.tensor([4]), *torch.ones(2, 1, rotary_dim))


def on_torch(x, bias, codes, pairs):
    """PyTorch's int4 product on tensors that were replaced."""
    aten = backend("torch")
    prepared = aten.prepare(packed_weight(4, 32, 128, 32, False)[0], torch.float32)
    return aten.linear(prepared._replace(tensors={"codes": codes, "pairs": pairs}), x, bias)


def on_torch_arguments():
    tensors = backend("torch").prepare(packed_weight(4, 32, 128, 32, False)[0], torch.float32).tensors
    return [torch.randn(3, 128), torch.zeros(32), tensors["codes"], tensors["pairs"]]


def through_the_triton_layout(codes, scales, zeros, n, k, weight, scale):
    """Both ways through the layout, of integers and of FP8."""
    triton_layout.restore(codes, scales, zeros, Spec.integer(4, 32, zeros is None, n, k))
    built = triton_layout.build_fp8(weight, scale)
    triton_layout.restore_fp8(*built, weight.shape[1] // scale.shape[1], *weight.shape)


def triton_layout_arguments():
    fp8 = [torch.randn(20, 64).to(torch.float8_e4m3fn), torch.rand(20, 2)]
    return [*triton_layout.build(packed_weight(4, 20, 128, 32, False)[0]), 20, 128, *fp8]


def placed(size, tensor):
    """A tensor in an arena of huge pages."""
    return library.Arena(size).place(tensor)


def range_arguments():
    return [torch.randn(24, 128), torch.ones(5, 24), torch.ones(5, 24), 15, torch.ones(4, 128)]


def rounded(w, scale, zero, qmax, edges, code_of, values):
    """To codes of every kind and back."""
    rounding.encode_integers(w, scale, zero, qmax)
    rounding.encode_table(w, scale, edges, code_of)
    rounding.compare(rounding.encode_fp8(w, scale), scale, values, w)


def rounded_arguments():
    table = [torch.linspace(-2, 2, 15), torch.arange(16, dtype=torch.uint8), torch.randn(256)]
    return [torch.randn(24, 128), torch.ones(24, 4), torch.ones(24, 4), 15, *table]


CALLS = {
    "cpu_linear": (ops.cpu_linear, cpu_arguments),
    "cpu_grouped_linear": (grouped_of, grouped_arguments),
    "cpu backend": (packed_and_multiplied, packing_arguments),
    "cpu layout": (with_units, with_units_arguments),
    "decoder": (decoded, decoder_arguments),
    "decoder sizes": (sized, lambda: [64, 128, 2, 2, 32, 32, 8, 1]),
    "torch backend": (on_torch, on_torch_arguments),
    "triton layout": (through_the_triton_layout, triton_layout_arguments),
    "range_errors": (range_errors, range_arguments),
    "rounding": (rounded, rounded_arguments),
    "arena": (placed, lambda: [4096, torch.zeros(100, dtype=torch.uint8)]),
    "wna16_linear": (wna16_linear, reference_arguments),
    "triton_linear": (triton_linear, triton_arguments),
}
NATIVE = {"cpu_linear", "cpu_grouped_linear", "cpu backend", "cpu layout", "decoder", "decoder sizes"}
NATIVE |= {"range_errors", "rounding", "arena"}
QUICK = {"cpu_linear", "cpu backend", "decoder"}  # the others are attacked in the slow tier


def attack(name: str) -> None:
    """Wrong calls must raise one of our errors, or be calls that are right after all; the process must live."""
    call, arguments = CALLS[name]
    refused = refusals(call, arguments, CASES, name)
    assert refused > CASES // 3, f"{name}: only {refused} of {CASES} were refused"


@pytest.mark.parametrize(
    "name",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CALLS],
)
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


def test_what_is_bound_for_a_type_takes_no_other():
    weight = layout.pack(packed_weight(4, 20, 128, 32, False)[0])
    call = ops.bind(weight, torch.float32)
    with pytest.raises(
        ValueError, match=r"x must be torch.float32, for which the weight was bound, got torch.float16"
    ):
        call(torch.ones(3, 128).half(), None)
    with pytest.raises(ValueError, match=r"bias must be an ordinary tensor on the CPU.* on meta"):
        call(torch.ones(3, 128), torch.ones(20, device="meta"))


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (1, torch.zeros(1), r"bias must be \[32\] of a float type, got torch.float32 \[1\]"),
        (0, torch.zeros(3, 64), "x has 64 features, the weight takes 128"),
        (
            3,
            torch.zeros(1, 32, 2),
            r"pairs must be contiguous torch.float32 \[4, 32, 2\], got torch.float32 \[1, 32",
        ),
        (2, torch.zeros(16, 64, dtype=torch.uint8), r"codes must be contiguous torch.uint8 \[32, 64\]"),
    ],
)
def test_the_torch_backend_names_what_its_op_would_read_past(at, value, says):
    given = on_torch_arguments()
    given[at] = value
    with pytest.raises(ValueError, match=says):
        on_torch(*given)


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
