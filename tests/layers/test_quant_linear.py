import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit.errors import BackendError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

W4 = Scheme(4, 32, False)


def layer(scheme=W4, n=48, k=64, bias=True, dtype=torch.bfloat16):
    """(module, dense fp32 weight, bias)."""
    g = torch.Generator().manual_seed(0)
    groups = k // scheme.group(k)
    codes = torch.randint(0, 2**scheme.bits, (n, k), dtype=torch.uint8, generator=g)
    zero = torch.randint(0, 2**scheme.bits, (n, groups), dtype=torch.uint8, generator=g)
    scale = (torch.rand(n, groups, generator=g) * 0.1).to(dtype)
    weight = QuantizedWeight(codes, scale, None if scheme.symmetric else zero, scheme)
    shift = torch.randn(n, generator=g) if bias else None
    return QuantLinear.from_quantized(weight, shift), weight.dequantize(), shift


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(not library.available(), reason="the native library is not built")
)


@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(3, 16, True), Scheme(8, None, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_linear(scheme, bias):
    module, dense, shift = layer(scheme, bias=bias)
    assert torch.equal(module(X), torch.nn.functional.linear(X, dense, shift))


def test_it_is_no_linear_and_has_no_weight():
    module, _, _ = layer()
    assert not isinstance(module, torch.nn.Linear)
    assert not hasattr(module, "weight")
    assert "in_features=64, out_features=48, W4A16 g32 asym, reference" in repr(module)


@pytest.mark.parametrize("symmetric", [True, False])
def test_state_dict_holds_the_stored_names(symmetric):
    module, _, _ = layer(Scheme(4, 32, symmetric))
    names = {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert module.state_dict().keys() == names | (set() if symmetric else {"weight_zero_point"})
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(4, 64, True), Scheme(8, None, True)])
def test_a_backend_with_a_layout_frees_the_stored_tensors(scheme):
    module, _, _ = layer(scheme)
    truth = module(X)
    module.prepare("torch", torch.float32)
    module.prepare("torch", torch.float32)  # again is harmless
    assert module.backend == "torch"
    assert module.weight_packed is None
    assert module.weight_scale is None
    assert module.state_dict().keys() == {"weight_shape", "bias"}
    assert ((module(X) - truth).square().mean() / truth.square().mean()).sqrt() < 2e-6
    assert module(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(BackendError, match="already runs on 'torch'"):
        module.prepare("reference", torch.float32)


def test_a_backend_that_cannot_run_is_an_error_and_changes_nothing():
    module, dense, shift = layer(Scheme(3, 32, True))
    with pytest.raises(BackendError, match=r"'torch'.*3 bits"):
        module.prepare("torch", torch.float32)
    with pytest.raises(BackendError, match="unknown backend 'nope'"):
        module.prepare("nope", torch.float32)
    assert torch.equal(module(X), torch.nn.functional.linear(X, dense, shift))


@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
def test_casting_the_model_keeps_what_the_codes_were_computed_for(backend):
    module, _, _ = layer(dtype=torch.float32)
    module.prepare(backend, torch.float32)
    before = {name: b.clone() for name, b in module.named_buffers()}
    module.bias = None
    truth = module(X)
    module.to(torch.bfloat16)
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert torch.equal(module(X), truth)
    assert module.to("meta").get_buffer("weight_shape").is_meta


@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
def test_compiles_without_a_break_and_equals_eager(backend):
    module, _, _ = layer()
    module.prepare(backend, torch.float32)
    traced = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(traced(X), module(X))
    assert torch.equal(traced(X[:1, :3]), module(X[:1, :3]))


@pytest.mark.skipif(not library.available(), reason="the native library is not built")
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, False), Scheme(3, 64, True), Scheme(8, None, True), Scheme(2, 32, False)]
)
def test_the_native_layout_gives_the_stored_tensors_back(scheme):
    module, _, _ = layer(scheme)
    before = {name: tensor.clone() for name, tensor in module.stored().items()}
    module.prepare("cpu", torch.float32)
    assert module.weight_packed is None
    after = module.stored()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.skipif(not library.available(), reason="the native library is not built")
def test_int8_compute_is_close_and_only_native():
    module, _, _ = layer(Scheme(4, 32, False))
    truth = module(X)
    with pytest.raises(BackendError, match="only the native CPU kernels"):
        module.prepare("reference", torch.float32, "int8")
    module.prepare("cpu", torch.float32, "int8")
    off = ((module(X) - truth).square().mean() / truth.square().mean()).sqrt()
    assert 1e-4 < off < 1e-2
