"""Gradients through packed layers are those of the dense layer with the same weights, on every backend."""

import warnings

import pytest
import tiny_models
import torch
from packed_weights import packed_weight
from quantkit_kernels import backend
from quantkit_kernels.cpu import layout, library, ops
from quantkit_kernels.triton import backend as triton_backend
from torch import nn

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.scheme import integer

needs_native = pytest.mark.skipif(not library.available(), reason="the native library is not built")
BACKENDS = [pytest.param("cpu", marks=needs_native), "torch", "reference"]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("cpu", torch.float32, marks=needs_native),
        pytest.param("cpu", torch.bfloat16, marks=needs_native),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("reference", torch.float32),
        ("reference", torch.bfloat16),
        ("triton", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (4, 64, True), (8, 128, True)])
def test_x_and_bias_get_the_gradients_of_the_formula(name, dtype, bits, group, symmetric, monkeypatch):
    monkeypatch.setattr(triton_backend, "refuses", lambda *_: None)  # its twin runs here
    stored, w = packed_weight(bits, 48, 128, group, symmetric)
    prepared = backend(name).prepare(stored, dtype)
    call = backend(name).bind(prepared, dtype)
    x = random(2, 3, 128).to(dtype).requires_grad_()
    bias = random(48, seed=1).requires_grad_()
    upstream = random(2, 3, 48, seed=2).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x, bias).backward(upstream)
    assert x.grad.dtype == dtype
    assert relative(x.grad, upstream.double() @ w) < LIMITS[dtype]
    assert relative(bias.grad, upstream.double().sum((0, 1))) < LIMITS[dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_pass_numerical_and_second_order_checks(name):
    """y is linear in x, so one-sided differences are exact but for rounding; the gradient is linear in upstream."""
    stored, w = packed_weight(4, 16, 32, 32, False)
    call = backend(name).bind(backend(name).prepare(stored, torch.float32), torch.float32)
    x, upstream = random(2, 32).requires_grad_(), random(2, 16, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(call(x, None), x, upstream, create_graph=True)
    weights = random(2, 32, seed=2)
    (second,) = torch.autograd.grad((grad * weights).sum(), upstream)
    assert relative(second, weights.double() @ w.T) < 1e-5


@needs_native
@pytest.mark.parametrize("compute", ["int8", "int8-token"])
def test_rounded_inputs_count_as_they_were(compute):
    stored, w = packed_weight(4, 48, 128, 32, False)
    prepared = backend("cpu").prepare(stored, torch.float32)
    prepared = prepared._replace(spec=prepared.spec.with_inputs(compute))
    x, upstream = random(3, 128).requires_grad_(), random(3, 48, seed=1)
    backend("cpu").bind(prepared, torch.float32)(x, None).backward(upstream)
    assert relative(x.grad, upstream.double() @ w) < 1e-5


@needs_native
@pytest.mark.parametrize("table", ["nf4", "fp8_e4m3", "fp4_e2m1"])
def test_weights_of_a_table_have_gradients(table):
    codes = torch.randint(0, 16, (20, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = layout.pack_codes(codes, random(20, 1).abs(), table)
    w = ops.linear(packed, torch.eye(300)).T  # the forward, which test_cpu_tables.py compares with fp64
    x, upstream = random(3, 300).requires_grad_(), random(3, 20, seed=1)
    ops.linear(packed, x).backward(upstream)
    assert relative(x.grad, upstream @ w) < 1e-6


def packed_model(name):
    """(a tiny Llama with packed linears on a backend, the same with their dense weights)."""
    packed, dense = tiny_models.FAMILIES["llama"](), tiny_models.FAMILIES["llama"]()
    for path, module in list(dense.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            weight = rtn(module.weight.data, integer(4, 32, False), torch.float32)
            module.weight.data = weight.dequantize()
            linear = QuantLinear.from_quantized(weight, None)
            linear.prepare(name, torch.float32)
            parent, _, leaf = path.rpartition(".")
            setattr(packed.get_submodule(parent), leaf, linear)
    packed.load_state_dict(dense.state_dict(), strict=False)
    return packed, dense


def assert_same_gradient(found, truth):
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), truth.flatten(), 0)
    assert float(cosine) > 0.9999
    assert abs(float(found.norm() / truth.norm()) - 1) < 0.01


@pytest.mark.parametrize("name", BACKENDS)
def test_a_whole_model_has_the_gradients_of_the_dense_one(name):
    packed, dense = packed_model(name)
    ids = tiny_models.ids(12)
    grads, named = [], []
    for model in (packed, dense):
        norms = {name: p.requires_grad_() for name, p in model.named_parameters() if "norm" in name}
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, labels=ids).loss.backward()
        grads.append(x.grad)
        named.append({name: p.grad for name, p in norms.items()})
    assert_same_gradient(*grads)
    for name, truth in named[1].items():
        assert_same_gradient(named[0][name], truth)


@pytest.mark.filterwarnings(
    "ignore:Unsupported layer type:UserWarning"
)  # what peft says of every custom layer
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # which peft asks for
@pytest.mark.parametrize("name", BACKENDS)
def test_lora_of_peft_on_top_trains_as_on_the_dense_model(name):
    """peft adapts linears it knows; ours it takes by wrapping the module, here through its custom-module table."""
    import peft

    ids, grads = tiny_models.ids(12), []
    for model, kind in zip(packed_model(name), (QuantLinear, nn.Linear), strict=True):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        if kind is QuantLinear:
            config._register_custom_module({QuantLinear: peft.tuners.lora.layer.Linear})
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        found = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
        assert all(grad is not None for grad in found.values())
        grads.append(found)
    assert grads[0].keys() == grads[1].keys()
    for each, truth in grads[1].items():
        assert_same_gradient(grads[0][each], truth)
