import copy
import pickle
import weakref

import pytest
import torch
from quantkit_kernels.cpu import library, ops
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from watching import Ops

from quantkit.errors import BackendError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import integer

W4 = integer(4, 32, False)


def layer(grid=W4, n=48, k=64, bias=True, dtype=torch.bfloat16):
    """(module, dense fp32 weight, bias)."""
    g = torch.Generator().manual_seed(0)
    groups = k // grid.group(k)
    codes = torch.randint(0, 2**grid.bits, (n, k), dtype=torch.uint8, generator=g)
    zero = torch.randint(0, 2**grid.bits, (n, groups), dtype=torch.uint8, generator=g)
    scale = (torch.rand(n, groups, generator=g) * 0.1).to(dtype)
    weight = QuantizedWeight(codes, scale, None if grid.symmetric else zero, grid)
    shift = torch.randn(n, generator=g) if bias else None
    return QuantLinear.from_quantized(weight, shift), weight.dequantize(), shift


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
needs_native = pytest.mark.skipif(not library.available(), reason="the native library is not built")
NATIVE = pytest.param("cpu", marks=needs_native)


@pytest.mark.parametrize("grid", [integer(4, 32, False), integer(3, 16, True), integer(8, None, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_linear(grid, bias):
    module, dense, shift = layer(grid, bias=bias)
    assert torch.equal(module(X), torch.nn.functional.linear(X, dense, shift))


def test_it_is_no_linear_and_has_no_weight():
    module, _, _ = layer()
    assert not isinstance(module, torch.nn.Linear)
    assert not hasattr(module, "weight")
    assert "in_features=64, out_features=48, W4A16 g32 asym, reference" in repr(module)


@pytest.mark.parametrize("symmetric", [True, False])
def test_state_dict_holds_the_stored_names(symmetric):
    module, _, _ = layer(integer(4, 32, symmetric))
    names = {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert module.state_dict().keys() == names | (set() if symmetric else {"weight_zero_point"})
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("grid", [integer(4, 32, False), integer(4, 64, True), integer(8, None, True)])
def test_a_backend_with_a_layout_frees_the_stored_tensors(grid):
    module, _, _ = layer(grid)
    truth = module(X)
    module.prepare("torch", torch.float32)
    module.prepare("torch", torch.float32)  # again is harmless
    assert module.backend == "torch"
    assert module.leaves == {}
    assert module.state_dict().keys() == {"bias"}
    assert ((module(X) - truth).square().mean() / truth.square().mean()).sqrt() < 2e-6
    assert module(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(BackendError, match="already runs on 'torch'"):
        module.prepare("reference", torch.float32)


def test_a_backend_that_cannot_run_is_an_error_and_changes_nothing():
    module, dense, shift = layer(integer(3, 32, True))
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
    assert module.to("meta").offloaded


@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
def test_compiles_without_a_break_and_equals_eager(backend):
    module, _, _ = layer()
    module.prepare(backend, torch.float32)
    traced = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(traced(X), module(X))
    assert torch.equal(traced(X[:1, :3]), module(X[:1, :3]))


@needs_native
@pytest.mark.parametrize(
    "grid", [integer(4, 32, False), integer(3, 64, True), integer(8, None, True), integer(2, 32, False)]
)
def test_the_native_layout_gives_the_stored_tensors_back(grid):
    module, _, _ = layer(grid)
    before = {name: tensor.clone() for name, tensor in module.on_disk().items()}
    module.prepare("cpu", torch.float32)
    assert module.leaves == {}
    after = module.on_disk()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


@needs_native
def test_int8_compute_is_close_and_only_native():
    module, _, _ = layer(integer(4, 32, False))
    truth = module(X)
    with pytest.raises(BackendError, match="only the native CPU kernels"):
        module.prepare("reference", torch.float32, "int8")
    module.prepare("cpu", torch.float32, "int8")
    off = ((module(X) - truth).square().mean() / truth.square().mean()).sqrt()
    assert 1e-4 < off < 1e-2


class Calls(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def native(**kind):
    module, _, _ = layer(**kind)
    module.prepare("cpu", torch.float32)
    return module


def by_the_op(module, x):
    with Ops() as ops:
        y = module(x)
    assert "quantkit.cpu_linear.default" in ops.names
    return y


@needs_native
@pytest.mark.parametrize("bias", [True, False])
def test_eager_calls_pass_the_dispatcher_by_with_the_same_result(bias, monkeypatch):
    module = native(bias=bias)
    shapes = ((64,), (1, 1, 64), (2, 5, 64), (0, 64), (3, 64))
    inputs = [X[0, 0].expand(shape).clone().mul_(i + 1) for i, shape in enumerate(shapes)]
    inputs += [X.transpose(0, 1), X[:, ::2], torch._neg_view(X), X.double(), X.bfloat16(), nn.Parameter(X)]
    expected = [by_the_op(module, x.contiguous()) for x in inputs]

    def refuse(*_):
        raise AssertionError("called the op")

    with torch.no_grad():
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(module(x), y)
        monkeypatch.setattr(ops, "cpu_linear", refuse)
        for x in (*inputs[:7], inputs[-1]):
            module(x)
        with pytest.raises(AssertionError, match="called the op"):
            module(torch._neg_view(X))


@needs_native
def test_input_of_the_wrong_width_is_named():
    module = native()
    for bad in (torch.ones(2, 32), torch.ones(4, 128), torch.ones(2, 32).bfloat16()):
        with pytest.raises(ValueError, match=f"x has {bad.shape[1]} features, the weight takes 64"):
            module(bad)


@needs_native
def test_whoever_traces_or_transforms_gets_the_op():
    module = native()
    y = module(X)
    for strict in (True, False):
        exported = torch.export.export(module, (X,), strict=strict)
        assert "quantkit.cpu_linear" in str(exported.graph)
        assert torch.equal(exported.module()(X), y)
    graph = make_fx(module)(X)
    assert "quantkit.cpu_linear" in graph.code
    assert torch.equal(graph(X * 2), module(X * 2))
    assert torch.equal(torch.func.functionalize(module)(X), y)
    with Calls() as calls:
        module(X)
    assert "quantkit.cpu_linear.default" in calls.names
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(X)).shape == y.shape
    assert module(X.requires_grad_()).requires_grad != module(X.detach()).requires_grad
    X.requires_grad_(False)
    module.bias.requires_grad_()
    assert module(X).requires_grad
    with torch.no_grad():
        assert torch.equal(module(X), y)


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_tracing_records_the_op():
    module = native()
    traced = torch.jit.trace(module, X, check_trace=False)
    assert torch.equal(traced(X * 2), module(X * 2))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_bias_is_used(dtype):
    module, x = native(), X[0]
    module.bias.data = module.bias.data.to(dtype)
    y = module(x)
    module.bias.data.add_(1)
    torch.testing.assert_close(module(x), y + 1, rtol=0, atol=0.1)
    module.bias = nn.Parameter(module.bias + 1, requires_grad=False)
    torch.testing.assert_close(module(x), y + 2, rtol=0, atol=0.1)
    module.bias = None
    assert torch.equal(module(x), native(bias=False)(x))
    module.bias = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(ValueError, match=r"bias must be contiguous fp32 \[48\]"):
        module(x)


@needs_native
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_do_not_use_the_memory_of_the_original(copied):
    module = native()
    y = module(X)
    twin = copied(module)
    if copied is not copy.copy:
        module.units.zero_()
    del module
    assert torch.equal(twin(X), y)


@needs_native
def test_a_replaced_layout_is_used_and_the_old_one_let_go():
    module = native()
    y = module(X)
    old = weakref.ref(module.units)
    module.move_layout(torch.clone)
    assert old() is None
    assert torch.equal(module(X), y)
    module.units.data = module.units.data.clone()
    assert torch.equal(module(X), y)
    module.units = torch.zeros_like(module.units)
    assert torch.equal(module(X), module.bias.expand(2, 5, 48))
    module.units = module.units[:-1]
    with pytest.raises(ValueError, match="units of a 4-bit"):
        module(X)
