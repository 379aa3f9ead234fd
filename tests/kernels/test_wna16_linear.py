"""The op `wna16_linear`: its reference, its other backends, its behaviour under tracing."""

import importlib.util

import pytest
import quantkit_kernels
import torch
from packed_weights import packed_weight
from quantkit_kernels import BackendMissing, Spec, ops, wna16_linear
from quantkit_kernels.cpu import library
from quantkit_kernels.reference.wna16_linear import dequantize


def rms_error(name, found, truth, limit):
    """RMS error relative to the RMS of the fp64 truth, and the largest error."""
    error = (found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    worst = (found.double() - truth).abs().max() / truth.abs().max()
    assert error <= limit, f"{name}: relative RMS error {error:.3g}"
    assert worst <= 8 * limit, f"{name}: relative largest error {worst:.3g}"


def flat(stored):
    """The op's arguments for a weight."""
    return stored.packed, stored.scale, stored.zero_packed


SHAPES = [
    (2, 48, 64, 16),
    (3, 33, 96, 32),
    (4, 48, 128, 32),
    (5, 10, 60, 20),
    (6, 7, 64, 64),
    (8, 16, 100, 100),
]


@pytest.mark.parametrize(("bits", "n", "k", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_is_the_formula_in_the_promised_order(bits, n, k, group, symmetric):
    packed, w = packed_weight(bits, n, k, group, symmetric)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(3, 2, k, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = wna16_linear(x, *flat(packed), bias, bits, group, n, k)
        # The product is exact in fp64, so rounding it to fp32 is what fp32 computes; the cast to x's dtype follows.
        rounded = (w if dtype == torch.float64 else w.float()).to(dtype)
        assert y.dtype == dtype
        assert torch.equal(y, torch.nn.functional.linear(x, rounded, bias.to(dtype)))


def test_reference_in_pieces_is_the_whole(monkeypatch):
    packed, w = packed_weight(3, 50, 64, 32, False)
    module = "quantkit_kernels.reference.wna16_linear._ELEMENTS"
    whole = dequantize(packed, torch.float32)
    monkeypatch.setattr(module, 64 * 7)
    assert torch.equal(dequantize(packed, torch.float32), whole)
    rms_error("dequantized", whole, w, 1e-6)


@pytest.mark.parametrize(
    ("bits", "n", "k", "group", "symmetric"),
    [(4, 48, 64, 32, True), (4, 16, 256, 256, False), (4, 80, 128, 64, False), (8, 33, 96, 96, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 63])
def test_torch_backend_is_close_to_fp64(bits, n, k, group, symmetric, dtype, m):
    packed, w = packed_weight(bits, n, k, group, symmetric, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    backend = quantkit_kernels.backend("torch")
    y = backend.bind(backend.prepare(packed, dtype), dtype)(x, None)
    limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    rms_error(f"torch, {bits} bits, {dtype}", y, x.double() @ w.T, limit)


def test_select_names_the_backend_and_the_reason(monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    assert quantkit_kernels.backends() == ("cpu", "triton", "torch", "reference")
    assert quantkit_kernels.available("torch")
    assert not quantkit_kernels.available("marlin")
    spec = Spec.integer(4, 128, True, 64, 256)
    native = library.available()
    assert quantkit_kernels.select(spec, "cpu").name == ("cpu" if native else "torch")
    assert quantkit_kernels.select(Spec.integer(6, 128, True, 64, 256), "cpu").name == "reference"
    assert quantkit_kernels.select(spec, "cpu", dtype=torch.float64).name == "reference"
    assert quantkit_kernels.select(spec, "xpu").name == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_default, why = quantkit_kernels.select(spec, "cuda")
    assert by_default == "reference"
    assert "not triton: no CUDA device is here" in why
    assert quantkit_kernels.select(spec, "cuda", "triton") == ("triton", "asked for")
    assert quantkit_kernels.select(spec, "cpu", "torch") == ("torch", "asked for")
    monkeypatch.setenv("QUANTKIT_BACKEND", "torch")
    assert quantkit_kernels.select(spec, "cpu") == ("torch", "QUANTKIT_BACKEND says so")
    assert quantkit_kernels.select(spec, "cpu", "reference").name == "reference"
    with pytest.raises(BackendMissing, match=r"QUANTKIT_BACKEND says so.*on the CPU only, not on cuda"):
        quantkit_kernels.select(spec, "cuda")
    monkeypatch.setenv("QUANTKIT_BACKEND", "marlin")
    with pytest.raises(
        BackendMissing, match=r"unknown backend 'marlin'.*known: auto, cpu, triton, torch, reference"
    ):
        quantkit_kernels.select(spec, "cpu")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ((4, 16, True, 64, 256), "groups of 32, 64, 128 or 256, not 16"),
        ((4, 128, True, 40, 256), "N divisible by 16, got 40"),
        ((8, 256, False, 64, 256), "not asymmetric 8 bits in groups of 256"),
        ((8, 100, True, 33, 100), "K divisible by 32, got 100"),
        ((3, 128, True, 64, 256), "not symmetric 3 bits in groups of 128"),
    ],
)
def test_torch_backend_says_what_it_cannot_run(scheme, reason):
    with pytest.raises(BackendMissing, match=reason):
        quantkit_kernels.select(Spec.integer(*scheme), "cpu", "torch")


def test_torch_backend_refuses_fp64():
    packed, _ = packed_weight(4, 16, 32, 32, True)
    with pytest.raises(BackendMissing, match="float64"):
        quantkit_kernels.backend("torch").prepare(packed, torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_op_passes_opcheck(symmetric):
    packed, _ = packed_weight(3, 20, 64, 32, symmetric)
    bias = torch.zeros(20)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    result = torch.library.opcheck(
        wna16_linear, (torch.ones(2, 64), *flat(packed), bias, 3, 32, 20, 64), test_utils=checks
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_foreign_shapes_are_refused_by_the_op_and_its_fake(device):
    packed, scale = (tensor.to(device) for tensor in flat(packed_weight(4, 20, 64, 32, True)[0])[:2])
    x = torch.ones(2, 64, device=device)
    assert wna16_linear(x, packed, scale, None, None, 4, 32, 20, 64).shape == (2, 20)
    with pytest.raises(ValueError, match="x has 32 features, the weight takes 64"):
        wna16_linear(x[:, :32], packed, scale, None, None, 4, 32, 20, 64)
    with pytest.raises(ValueError, match=r"scale of a 4-bit \[20, 64\] weight is \(20, 2\), got \(20, 1\)"):
        wna16_linear(x, packed, scale[:, :1], None, None, 4, 32, 20, 64)


def test_eager_and_traced_dtype_agree_under_autocast():
    packed, scale, _ = flat(packed_weight(4, 20, 64, 32, True)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            wna16_linear(torch.ones(2, 64), packed, scale, None, None, 4, 32, 20, 64).dtype == torch.float32
        )


def test_a_second_import_does_not_define_the_op_again():
    spec = importlib.util.spec_from_file_location("quantkit_kernels_ops_again", ops.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.wna16_linear is ops.wna16_linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reference_runs_on_cuda():
    packed, w = packed_weight(4, 48, 128, 32, False)
    x = torch.randn(3, 128)
    on = [None if t is None else t.cuda() for t in (x, *flat(packed))]
    rms_error("cuda", wna16_linear(*on, None, 4, 32, 48, 128).cpu(), x.double() @ w.T, 2e-6)
