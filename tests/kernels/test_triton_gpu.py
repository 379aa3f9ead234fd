"""The Triton kernels on a GPU: everything that the interpreter, the PTX machine and the compiler cannot show."""

import pytest
import quantkit_kernels
import torch
from quantkit_kernels import Spec, Stored, pack_bits
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.triton import layout
from quantkit_kernels.triton.configs import BUCKETS, rule
from quantkit_kernels.triton.launch import dequantize, launch
from quantkit_kernels.triton.op import triton_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


TRITON = quantkit_kernels.backend("triton")


def stored(bits, n, k, group, symmetric, dtype=torch.bfloat16):
    """Random stored tensors on the device, with a negative and an all-zero group and the extreme zero points."""
    g = torch.Generator("cuda").manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g, device="cuda")
    scale = torch.randn(n, k // group, generator=g, device="cuda") / k**0.5 / 2 ** (bits - 1)
    scale = scale.to(dtype)
    scale[0, 0] = 0
    zero = torch.randint(0, 2**bits, (k // group, n), dtype=torch.uint8, generator=g, device="cuda")
    zero[0, 0], zero[-1, -1] = 0, 2**bits - 1
    zero_packed = None if symmetric else pack_bits(zero, bits).T.contiguous()
    return Stored(pack_bits(codes, bits), scale, zero_packed, Spec.integer(bits, group, symmetric, n, k))


def activations(m, k, dtype, seed=0):
    x = torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    x[:, 3] *= 1000  # an outlier channel
    return x.to(dtype)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def assert_close(name, y, x, w):
    """Not 1.15 times further from fp64 than PyTorch's own linear on the weight in the same dtype."""
    truth = x.double() @ w.T
    own = error(torch.nn.functional.linear(x, w.to(x.dtype)), truth)
    ours = error(y, truth)
    assert ours <= 1.15 * own, f"{name}: {ours:.3g}, PyTorch {own:.3g}"
    worst, own_worst = (
        (t.double() - truth).abs().max() for t in (y, torch.nn.functional.linear(x, w.to(x.dtype)))
    )
    assert worst <= 2 * own_worst, f"{name}: largest error {worst:.3g}, PyTorch {own_worst:.3g}"


SCHEMES = [(b, g, s) for b in (2, 3, 4, 8) for g in (32, 64, 128, 0) for s in (True, False)] + [
    (6, 128, True)
]


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_close_to_fp64_at_every_m(bits, group, symmetric, dtype):
    n, k = 1000, 1024
    tensors = stored(bits, n, k, group or k, symmetric, dtype)
    built = layout.build(tensors)
    w = reference_dequantize(tensors, torch.float64)
    every = (1, 3, 8, 16, 17, 33, 63, 64, 128, 257, 800)
    for m in every if (bits, group) == (4, 128) else (3, 33, 257, 800):  # one tile size, one compilation
        x = activations(m, k, dtype, m)
        y = triton_linear(x, *built, None, bits, group or k, n, k)
        assert_close(f"M={m}", y, x, w)


@pytest.mark.parametrize(
    ("n", "k", "group"), [(6144, 4096, 128), (4096, 14336, 128), (65, 96, 32), (7, 100, 100)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ragged_and_real_shapes_with_bias_and_strides(n, k, group, symmetric):
    tensors = stored(4, n, k, group, symmetric)
    built = layout.build(tensors)
    w = reference_dequantize(tensors, torch.float64)
    bias = torch.randn(n, device="cuda").bfloat16()
    for m in (1, 5, 40):
        wide = activations(m, k + 8, torch.bfloat16, m)
        x = wide[:, :k]  # rows apart
        y = triton_linear(x, *built, bias, 4, group, n, k)
        assert_close(f"M={m}", triton_linear(x, *built, None, 4, group, n, k), x, w)
        truth = x.double() @ w.T + bias.double()
        assert error(y, truth) <= 1.15 * error(torch.nn.functional.linear(x, w.bfloat16(), bias), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "group"), [(1000, 1024, 128), (65, 96, 32), (33, 100, 100)])
def test_fp8_weights(dtype, n, k, group):
    weight = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    scale = (torch.rand(n, k // group, device="cuda") / k**0.5).to(dtype)
    built = layout.build_fp8(weight, scale)
    w = weight.double() * scale.double().repeat_interleave(group, 1)
    for m in (1, 17, 64, 200):
        x = activations(m, k, dtype, m)
        assert_close(f"M={m}", triton_linear(x, *built, None, None, 8, group, n, k), x, w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_written_out_weight_equals_reference(bits, group):
    tensors = stored(bits, 200, 1024, group, False)
    built = layout.build(tensors)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = dequantize(*built, bits, group, 200, 1024, dtype)
        assert torch.equal(w, reference_dequantize(tensors, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 16, 30, 64, 128])
def test_every_output_is_written_and_every_run_is_the_same(bits, m):
    n, k = 1000, 4096
    tensors = stored(bits, n, k, 128, False)
    built = layout.build(tensors)
    x = activations(m, k, torch.bfloat16)
    config = rule(bits, m, n, layout.geometry(bits, 128, k), 132)._replace(splits=4)
    first = None
    for _ in range(20):
        y = torch.full((m, n), torch.nan, dtype=x.dtype, device="cuda")
        launch(x, *built, None, bits, 128, n, k, config, y)
        assert torch.isfinite(y).all()
        assert first is None or torch.equal(first, y)
        first = y
    assert_close("split", first, x, reference_dequantize(tensors, torch.float64))


def test_buckets_agree_with_each_other():
    n, k = 512, 2048
    tensors = stored(4, n, k, 128, True)
    built = layout.build(tensors)
    x = activations(1, k, torch.bfloat16)
    cut = layout.geometry(4, 128, k)
    w = reference_dequantize(tensors, torch.float64)
    for m in BUCKETS:
        config = rule(4, m, n, cut, 132)
        assert_close(f"{config}", launch(x, *built, None, 4, 128, n, k, config), x, w)
    for bm, bn in ((8, 64), (8, 128)):
        config = rule(4, 1, n, cut, 132)._replace(bm=bm, bn=bn)
        assert_close(f"{config}", launch(x, *built, None, 4, 128, n, k, config), x, w)


@pytest.mark.parametrize("m", [1, 16, 64, 1024])
def test_graph_capture(m):
    n, k = 1024, 4096
    tensors = stored(4, n, k, 128, False)
    prepared = TRITON.prepare(tensors, torch.bfloat16)
    x = activations(m, k, torch.bfloat16)
    eager = TRITON.linear(prepared, x, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = TRITON.linear(prepared, x, None)
        second = TRITON.linear(prepared, x, None)
    for seed in (0, 1, 2):
        x.copy_(activations(m, k, torch.bfloat16, seed))
        graph.replay()
        assert torch.equal(first, second)
        assert torch.equal(first, TRITON.linear(prepared, x, None))
    x.copy_(activations(m, k, torch.bfloat16))
    graph.replay()
    assert torch.equal(first, eager)


def test_streams_do_not_share_tickets():
    n, k = 1024, 4096
    tensors = stored(4, n, k, 128, True)
    prepared = TRITON.prepare(tensors, torch.bfloat16)
    x = activations(1, k, torch.bfloat16)
    truth = TRITON.linear(prepared, x, None)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            found.append(TRITON.linear(prepared, x, None))
    torch.cuda.synchronize()
    assert all(torch.equal(y, truth) for y in found)


def test_the_compiled_graph_is_the_eager_result():
    n, k = 1000, 1024
    tensors = stored(4, n, k, 128, False)
    built = layout.build(tensors)
    x = activations(3, k, torch.bfloat16)
    arguments = (*built, None, 4, 128, n, k)
    compiled = torch.compile(lambda t: triton_linear(t, *arguments), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), triton_linear(x, *arguments))


def test_captured_launches_share_no_tickets_with_others():
    """A graph on one stream, eager launches on another, more of them than the ring has room for."""
    n, k = 1024, 4096
    tensors = stored(4, n, k, 128, False)
    prepared = TRITON.prepare(tensors, torch.bfloat16)
    x = activations(1, k, torch.bfloat16)
    truth = TRITON.linear(prepared, x, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [TRITON.linear(prepared, x, None) for _ in range(100)]
    side = torch.cuda.Stream()
    eager = []
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(side):
            eager.append([TRITON.linear(prepared, x, None) for _ in range(100)][-1])
        torch.cuda.synchronize()
        assert all(torch.equal(y, truth) for y in (*found, eager[-1]))


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_trusts_the_kernels(bits, group, symmetric, dtype):
    for k in (1024, 33 * (group or 32)):  # whole chunks, and not always
        found = quantkit_kernels.select(
            Spec.integer(bits, group or k, symmetric, 256, k), "cuda", "auto", dtype
        )
        assert found == ("triton", "agrees with the reference on this device")


def test_nothing_is_compared_inside_a_capture():
    spec = Spec.integer(4, 96, True, 256, 960)
    x = torch.ones(8, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        found = quantkit_kernels.select(spec, "cuda", "auto", torch.bfloat16)
        x + 1
    assert found.name == "reference"
    assert "captured" in found.why
    assert quantkit_kernels.select(spec, "cuda", "auto", torch.bfloat16).name == "triton"
