"""The Triton kernels, interpreted on the CPU, against the reference; run by `test_triton_interpreter.py`."""

from dataclasses import replace

import pytest
import torch
import triton_mended
from packed_weights import exact_weight, integers
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.triton import layout, selfcheck
from quantkit_kernels.triton.configs import Config
from quantkit_kernels.triton.launch import dequantize, launch
from quantkit_kernels.triton.op import triton_linear
from racing import race
from wrong_arguments import refusals

assert triton_mended


# bits, N, K, group: several groups per chunk, several chunks per group, groups that straddle chunks, ragged N and K
SCHEMES = [
    (4, 65, 256, 128),
    (4, 64, 192, 64),
    (4, 20, 96, 32),
    (4, 33, 288, 96),
    (4, 130, 100, 100),
    (4, 64, 512, 256),
    (2, 65, 256, 128),
    (2, 64, 96, 32),
    (2, 10, 104, 104),
    (3, 65, 384, 128),
    (3, 64, 64, 32),
    (3, 7, 250, 250),
    (8, 65, 256, 128),
    (8, 64, 96, 32),
    (8, 33, 100, 100),
    (5, 64, 128, 64),
    (7, 17, 130, 130),
]


@pytest.mark.parametrize(("bits", "n", "k", "group"), SCHEMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_equals_reference(bits, n, k, group, symmetric):
    stored = exact_weight(bits, n, k, group, symmetric)
    built = layout.build(stored)
    bias = integers(n, seed=1)
    w = reference_dequantize(stored, torch.float64)
    for m, dtype in ((3, torch.float32), (1, torch.float16)):
        x = integers(m, k).to(dtype)
        truth = x.double() @ w.T + bias.double()
        y = triton_linear(x, *built, bias, bits, group, n, k)
        assert y.dtype == dtype
        assert torch.equal(y, truth.to(dtype))


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 128), (4, 32), (4, 128), (8, 128)])
@pytest.mark.parametrize(
    "config", [Config(16, 64, 1, 3, 4, 1), Config(16, 128, 2, 2, 4, 1), Config(32, 128, 1, 1, 4, 1)]
)
def test_every_tiling_gives_the_same(bits, group, config):
    n, k, m = 70, 512, 18
    stored = exact_weight(bits, n, k, group, False)
    built = layout.build(stored)
    x = integers(m, k)
    y = launch(x, *built, None, bits, group, n, k, config, torch.full((m, n), torch.nan))
    assert torch.equal(y.double(), x.double() @ reference_dequantize(stored, torch.float64).T)
    assert torch.equal(launch(x, *built, None, bits, group, n, k, config), y)  # the tickets are back at 0


@pytest.mark.parametrize(("bits", "n", "k", "group"), SCHEMES)
def test_dequantize_equals_reference(bits, n, k, group):
    stored = exact_weight(bits, n, k, group, False)
    built = layout.build(stored)
    for dtype in (torch.float32, torch.float16):
        w = dequantize(*built, bits, group, n, k, dtype)
        assert torch.equal(w, reference_dequantize(stored, dtype))


@pytest.mark.parametrize(("n", "k", "group"), [(65, 256, 128), (20, 96, 32), (33, 100, 100)])
def test_fp8_is_every_value(n, k, group):
    code = torch.arange(n * k).view(n, k) % 256
    code[code % 128 == 127] = 0  # NaN
    weight = code.to(torch.uint8).view(torch.float8_e4m3fn)
    scale = 2.0 ** -torch.arange(n * (k // group)).view(n, -1).remainder(3)
    built = layout.build_fp8(weight, scale)
    w = weight.double() * scale.double().repeat_interleave(group, 1)
    assert torch.equal(dequantize(*built, None, 8, group, n, k, torch.float32).double(), w)
    y = triton_linear(torch.eye(k), *built, None, None, 8, group, n, k)
    assert torch.equal(y.double(), w.T)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 128), (8, 128)])
def test_the_order_by_row_gives_the_same(bits, group):
    stored = exact_weight(bits, 70, 512, group, False)
    built = layout.build(stored, True)
    w = reference_dequantize(stored, torch.float32)
    x = integers(3, 512)
    assert torch.equal(dequantize(*built, bits, group, 70, 512, torch.float32), w)
    assert torch.equal(triton_linear(x, *built, None, bits, group, 70, 512), x @ w.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_every_type(dtype, symmetric):
    """The interpreter cannot add bf16, but scales are words until they are fp32. An odd number of groups."""
    stored = exact_weight(4, 65, 320, 64, symmetric)
    stored = replace(stored, scale=stored.scale.to(dtype))
    built = layout.build(stored)
    x = integers(3, 320)
    y = triton_linear(x, *built, None, 4, 64, 65, 320)
    assert torch.equal(y.double(), x.double() @ reference_dequantize(stored, torch.float64).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_bias_is_added_before_the_rounding(dtype):
    stored = exact_weight(4, 20, 96, 32, False)
    x = integers(3, 96).half()
    bias = torch.arange(40).to(dtype)[::2] + 2.0**-8  # the sum has more bits than fp16
    y = triton_linear(x, *layout.build(stored), bias, 4, 32, 20, 96)
    truth = x.double() @ reference_dequantize(stored, torch.float64).T + bias.double()
    assert torch.equal(y, truth.half())


def test_large_m_is_dequantized_once(monkeypatch):
    stored = exact_weight(4, 20, 96, 32, False)
    x = integers(800, 96)
    monkeypatch.setattr("quantkit_kernels.triton.op.launched", None)
    y = triton_linear(x, *layout.build(stored), None, 4, 32, 20, 96)
    assert torch.equal(y, x @ reference_dequantize(stored, torch.float32).T)


def test_the_kernels_pass_their_own_check():
    assert selfcheck.compare(torch.device("cpu"), "int4", 128, False, True, torch.float16) is None


def test_the_check_sees_a_split_that_is_left_out(monkeypatch):
    def half(x, codes, scales, zeros, bias, bits, group_size, n, k, config, y):
        first = x.clone()
        first[:, k // config.splits :] = 0  # what the first program alone would add up
        return launch(first, codes, scales, zeros, bias, bits, group_size, n, k, config, y)

    monkeypatch.setattr(selfcheck, "launch", half)
    found = selfcheck.compare(torch.device("cpu"), "int4", 128, True, True, torch.float16)
    assert "int4 on 1 tokens is not what the reference computes" in found


def test_threads_wait_for_each_other_in_the_interpreter():
    stored = exact_weight(4, 64, 128, 64, False)
    built = layout.build(stored)
    x = integers(2, 128)
    truth = x @ reference_dequantize(stored, torch.float32).T

    def work(number):
        for _ in range(8):
            assert torch.equal(triton_linear(x, *built, None, 4, 64, 64, 128), truth)
            w = torch.ops.quantkit.triton_dequantize(*built, 4, 64, 64, 128, torch.float32)
            assert torch.equal(x @ w.T, truth)

    race(work, threads=6)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 128, False), (3, 64, True), (8, 384, False)])
def test_weights_behind_each_other_run_as_one(bits, group, symmetric):
    rows, k = (64, 192, 128), 384
    built = [layout.build(exact_weight(bits, n, k, group, symmetric)) for n in rows]
    joint = [None if parts[0] is None else torch.cat(parts) for parts in zip(*built, strict=True)]
    bias, x = integers(sum(rows), seed=1), integers(3, k).half()
    y = triton_linear(x, *joint, bias, bits, group, sum(rows), k)
    done = 0
    for n, single in zip(rows, built, strict=True):
        mine = slice(done, done + n)
        alone = triton_linear(x, *single, bias[mine], bits, group, n, k)
        views = [None if t is None else t[done // 64 : (done + n) // 64] for t in joint]
        assert torch.equal(y[:, mine], alone)
        assert torch.equal(triton_linear(x, *views, bias[mine], bits, group, n, k), alone)
        done += n


def right_launch():
    """Arguments of `launched`: those of the op, four tile sizes, and room for the result."""
    built = layout.build(exact_weight(4, 20, 128, 32, False))
    return [integers(3, 128), *built, integers(20), 4, 32, 20, 128, 16, 64, 1, 2, torch.zeros(3, 20)]


def launched(x, codes, scales, zeros, bias, bits, group, n, k, bm, bn, unroll, splits, y):
    return launch(x, codes, scales, zeros, bias, bits, group, n, k, Config(bm, bn, unroll, splits, 4, 1), y)


def right_dequantize():
    return [*layout.build(exact_weight(4, 20, 128, 32, False)), 4, 32, 20, 128]


def written_out(*arguments):
    return dequantize(*arguments, torch.float32)


@pytest.mark.parametrize(("call", "arguments"), [(launched, right_launch), (written_out, right_dequantize)])
def test_wrong_arguments_are_refused_and_never_crash(call, arguments):
    """The interpreter reads wherever the kernel does: a size that is trusted ends this process."""
    assert refusals(call, arguments, 100, call.__name__) > 50


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, torch.ones(3, 64), "x has 64 features, the weight takes 128"),
        (
            0,
            torch.ones(128, 3).T,
            r"x must be fp32, bf16 or fp16 \[M, 128\] with contiguous rows, got .*strides \[1, 3\]",
        ),
        (0, torch.ones(3, 128, dtype=torch.float64), "x must be fp32, bf16 or fp16.*got torch.float64"),
        (0, torch.ones(3, 128, device="meta"), "x is on meta, the weight on cpu"),
        (4, torch.ones(40)[::2], r"bias must be contiguous torch.float32 \[20\], got .* with strides \[2\]"),
        (
            2,
            torch.ones(1, 1, 64, 2).half(),
            r"scales of a 4-bit \[20, 128\] weight must be contiguous .* \[1, 2, 64, 2\]",
        ),
        (6, 48, "groups of 48 columns do not divide a row of 128"),
        (9, 24, "bm is 8, 16, 32, 64 or 128"),
        (11, 3, "unroll divides the chunks"),
        (12, 65, "splits are 1 to 64"),
        (
            13,
            torch.zeros(3, 19),
            r"y must be contiguous torch.float32 \[3, 20\], got torch.float32 \[3, 19\]",
        ),
        (13, torch.zeros(3, 20).half(), "y must be contiguous torch.float32"),
    ],
)
def test_a_launch_names_what_does_not_fit(at, value, says):
    given = right_launch()
    given[at] = value
    with pytest.raises(ValueError, match=says):
        launched(*given)


def test_a_weight_is_written_out_in_a_float_type():
    with pytest.raises(TypeError, match=r"written out in a float type, not in torch\.int32"):
        dequantize(*right_dequantize(), torch.int32)


def test_no_tokens_are_no_launch():
    given = right_launch()
    given[0], given[-1] = integers(0, 128), None
    assert launched(*given).shape == (0, 20)
