"""Siblings on the Triton storage: one op and one copy of the weights, with the results that each gives alone.

Small integers, so that sums are exact in any order. On the CPU the kernels' twin runs, on a GPU the kernels.
"""

import copy
import io
import weakref

import pytest
import torch
from quantkit_kernels.triton import backend
from racing import race
from torch import nn
from watching import Ops

from quantkit.layers import siblings
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.siblings import Siblings
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme, integer

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ASYM = integer(4, 64, False)
ROWS, K = (128, 64, 192), 128


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(backend, "refuses", lambda *_: None)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """N of every call of the op."""
    seen, op = [], backend.triton_linear

    def counted(*arguments):
        seen.append(arguments[-2])
        return op(*arguments)

    monkeypatch.setattr(backend, "triton_linear", counted)
    return seen


def linear(n, seed=0, grid=ASYM, k=K, bias=False, dtype=torch.bfloat16, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    groups = k // grid.group(k)
    codes = torch.randint(0, 2**grid.bits, (n, k), dtype=torch.uint8, generator=g)
    zero = torch.randint(0, 2**grid.bits, (n, groups), dtype=torch.uint8, generator=g)
    scale = (2.0 ** -torch.randint(0, 3, (n, groups), generator=g)).bfloat16()
    weight = QuantizedWeight(codes, scale, None if grid.symmetric else zero, grid)
    shift = torch.randint(-9, 9, (n,), generator=g).float() if bias else None
    module = QuantLinear.from_quantized(weight, shift).to(device)
    module.prepare("triton", dtype)
    return module


def alone(device="cpu", **kind):
    return nn.ModuleList(linear(n, seed, device=device, **kind) for seed, n in enumerate(ROWS))


def together(device="cpu", **kind):
    modules = alone(device, **kind)
    assert Siblings.join(list(modules))
    return modules


def tokens(*shape, seed=0, device="cpu", dtype=torch.bfloat16):
    x = torch.randint(-2, 3, (*shape, K), generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "grid", [ASYM, integer(3, 32, True), integer(8, None, True), integer(2, 128, False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_one_op_gives_the_bits_of_three(calls, device, grid, dtype, bias):
    kind = {"grid": grid, "bias": bias, "dtype": dtype}
    fused, single = together(device, **kind), alone(device, **kind)
    for shape in ((1, 1), (2, 5), (17,), (), (0,)):
        x = tokens(*shape, device=device, dtype=dtype)
        expected = [m(x) for m in single]
        calls.clear()
        assert_equal([m(x) for m in fused], expected)
        assert calls == [sum(ROWS)]
        assert fused[0].siblings._local.slot is None
    other = tokens(1, seed=1, device=device, dtype=dtype)
    calls.clear()
    assert torch.equal(fused[2](x), single[2](x))
    assert_equal([m(other) for m in fused], [m(other) for m in single])
    assert calls.count(sum(ROWS)) == 2


def storages(modules):
    tensors = {t.untyped_storage().data_ptr(): t for m in modules for t in (*m.buffers(), *m.parameters())}
    tensors = [t for t in tensors.values() if t.dtype != torch.int64]  # the shapes
    return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)


def test_there_is_one_copy_of_the_weights(device):
    single = alone(device, bias=True)
    old = [weakref.ref(t) for m in single for t in m.layout.tensors.values()]
    _, size = storages(single)
    assert Siblings.join(list(single))
    assert [ref() for ref in old] == [None] * len(old)
    for module in single:
        module(tokens(1, device=device))
    assert storages(single) == (3 + len(single), size)  # codes, scales, zeros, and each its bias


def test_the_stored_tensors_come_back(device):
    for fused, single in zip(together(device), alone(device), strict=True):
        found, expected = fused.on_disk(), single.on_disk()
        assert found.keys() == expected.keys()
        assert_equal(found.values(), expected.values())
    codes = torch.randint(0, 16, (64, K), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.rand(64, 2), None, integer(4, 64, True))
    module = QuantLinear.from_quantized(weight, None).to(device)
    before = {name: tensor.clone() for name, tensor in module.on_disk().items()}
    module.prepare("triton", torch.bfloat16)
    assert module.leaves == {}
    assert_equal(module.on_disk().values(), before.values())


def test_a_bias_is_copied_once_and_again_when_it_was_changed(device, monkeypatch):
    fused, single = together(device, bias=True), alone(device, bias=True)
    x = tokens(1, device=device)
    assert_equal([m(x) for m in fused], [m(x) for m in single])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_: pytest.fail("copied"))
        assert_equal([m(x) for m in fused], [m(x) for m in single])
    fused[0](x)
    for modules in (fused, single):
        modules[1].bias.add_(1)
    assert_equal([m(x) for m in fused[1:]], [m(x) for m in single[1:]])
    for modules in (fused, single):
        modules[2].bias.data = modules[2].bias.data + 2
    assert_equal([m(x) for m in fused], [m(x) for m in single])
    for modules in (fused, single):
        modules.to(torch.bfloat16)
        assert modules[0].bias.dtype == torch.bfloat16
    assert_equal([m(x) for m in fused], [m(x) for m in single])
    for modules in (fused, single):
        modules[1].bias = None
    assert_equal([m(x) for m in fused], [m(x) for m in single])


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_a_part_of_a_layout_replaced_in_between_is_seen(device, part):
    fused, single = together(device), alone(device)
    x = tokens(1, device=device)
    fused[0](x)
    for modules in (fused, single):
        for which in (1, 2):
            other = getattr(linear(ROWS[which], 7 + which, device=device), part)
            setattr(modules[which], part, other)
    assert_equal([fused[1](x), fused[2](x)], [single[1](x), single[2](x)])
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def test_new_memory_of_a_layout_is_seen(device):
    fused, single = together(device), alone(device)
    x = tokens(1, device=device)
    for module in fused:
        module(x)
    for modules in (fused, single):
        modules[0].codes.data = linear(ROWS[0], 9, device=device).codes
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def test_members_that_lie_in_one_memory_but_not_behind_each_other_run_alone(calls, device):
    fused, single = together(device), alone(device)
    x = tokens(1, device=device)
    for part in ("codes", "scales", "zeros"):
        for modules in (fused, single):  # the second weight is the first half of the first one
            setattr(modules[1], part, getattr(modules[0], part)[:1])
    assert_equal([m(x) for m in fused], [m(x) for m in single])
    assert sum(ROWS) not in calls


@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_of_x_is_seen(device, in_place):
    fused, single = together(device), alone(device)
    x = tokens(2, 3, device=device)
    fused[0](x)
    if in_place:
        x[1, 2, 5] += 1
    else:
        x.data = tokens(2, 3, seed=1, device=device)
    assert_equal([fused[1](x), fused[2](x)], [single[1](x), single[2](x)])


def test_what_waits_is_for_the_stream_or_graph_it_was_computed_on(calls, monkeypatch):
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    fused, x, here = together(), tokens(1), []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(siblings, "_stream", lambda device: tuple(here))
    fused[0](x)
    for place in (("side", False), ("side", True), ("stream", True)):
        here[:] = place
        fused[1](x)
        fused[2](x)
    assert calls == [sum(ROWS)] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_what_it_was_captured_with():
    fused, single = together("cuda", bias=True), alone("cuda", bias=True)
    x = tokens(1, device="cuda")
    for module in fused:
        module(x)
    fused[0](x)  # two wait, and must not be left out of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [m(x) for m in fused[1:]]
    for seed in (1, 2):
        x.copy_(tokens(1, seed=seed, device="cuda"))
        graph.replay()
        assert_equal(found, [m(x) for m in single[1:]])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        fused[0](x)
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_run_together_on_their_own(calls, device, copied):
    fused, single = together(device, bias=True), alone(device, bias=True)
    x = tokens(1, device=device)
    fused[0](x)
    twins = copied(fused)
    assert twins[0].siblings is twins[2].siblings is not fused[0].siblings
    assert storages(twins)[1] == storages(fused)[1]
    for module in fused:
        module.codes.zero_()
    expected = [m(x) for m in single]
    calls.clear()
    assert_equal([m(x) for m in twins], expected)
    assert calls == [sum(ROWS)]
    assert torch.equal(copy.copy(twins[1])(x), expected[1])  # a copy that shares all is no sibling


def test_moves_and_casts_leave_the_results_right(device):
    fused, single = together(device, bias=True), alone(device, bias=True)
    for change in (nn.Module.bfloat16, nn.Module.float, lambda m: m.to("cpu"), lambda m: m.to(device)):
        change(fused), change(single)
        at = fused[0].codes.device
        for x in (tokens(1, device=at), tokens(2, 3, device=at)):
            assert_equal([m(x) for m in fused], [m(x) for m in single])
    assert fused.to("meta")[0](tokens(1).to("meta")).is_meta


def test_a_member_that_is_offloaded_leaves_the_others_right(device):
    """What accelerate does to a module between its calls: its buffers are on meta."""
    fused, single = together(device), alone(device)
    x = tokens(1, device=device)
    fused[0](x)
    codes = fused[1].codes
    fused[1]._buffers["codes"] = codes.to("meta")
    for _ in range(2):
        assert_equal([fused[0](x), fused[2](x)], [single[0](x), single[2](x)])
    fused[1]._buffers["codes"] = codes.clone()
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def test_only_what_fits_together_is_joined(device):
    for others in (
        [linear(64, 1, grid=integer(4, 32, False), device=device)],
        [linear(64, 1, grid=integer(4, 64, True), device=device)],
        [linear(64, 1, grid=integer(3, 64, False), device=device)],
        [linear(64, 1, k=192, device=device)],
        [linear(64, 1, bias=True, device=device)],
        [linear(64, 1, dtype=torch.float16, device=device)],
        [linear(96, 1, device=device), linear(64, 2, device=device)],
        [],
    ):
        modules = [linear(64, device=device), *others]
        before = [module.codes.data_ptr() for module in modules]
        assert not Siblings.join(modules)
        assert all(module.siblings is None for module in modules)
        assert [module.codes.data_ptr() for module in modules] == before
    meta = linear(64, 1, device=device).to("meta")
    assert not Siblings.join([linear(64, device=device), meta])
    stored = QuantLinear(K, 64, Scheme(ASYM), False, torch.bfloat16)
    assert not Siblings.join([linear(64, device=device), stored])


def test_other_types_and_gradients_run_alone(calls, device):
    fused, single = together(device), alone(device)
    x = tokens(2, device=device)
    for given in (x.float(), x.double(), x.half()):
        assert_equal([m(given) for m in fused], [m(given) for m in single])
    needs = x.clone().requires_grad_()
    calls.clear()
    fused[1](needs)
    assert calls == [ROWS[1]]
    with torch.no_grad():
        assert_equal([m(needs) for m in fused], [m(x) for m in single])
    assert calls.count(sum(ROWS)) == 1


def test_whoever_looks_sees_an_op_for_each(device):
    fused, single = together(device), alone(device)
    x = tokens(2, device=device)
    fused[0](x)
    with Ops() as ops:
        found = [m(x) for m in fused]
    assert ops.names == ["quantkit.triton_linear.default"] * 3
    assert_equal(found, [m(x) for m in single])
    traced = torch.compile(lambda t: [m(t) for m in fused], fullgraph=True, backend="aot_eager")
    assert_equal(traced(x), found)


def test_threads_at_once_give_the_serial_results(device):
    fused, single = together(device, bias=True), alone(device, bias=True)
    inputs = [tokens(m, seed=m, device=device) for m in (1, 2, 3, 5, 1, 2)]
    shared = tokens(1, seed=99, device=device)
    serial = [[m(x) for m in single] for x in (*inputs, shared)]
    wrong = []

    def work(i):
        for turn in range(20):
            x, expected = (inputs[i], serial[i]) if turn % 2 else (shared, serial[-1])
            for which in (0, 1, 2) if turn % 2 else (i % 3, (i + 1) % 3, (i + 2) % 3):
                if not torch.equal(fused[which](x), expected[which]):
                    wrong.append((i, which))
            if i == 0 and turn % 5 == 0:
                fused[0].siblings.forget()

    race(work, threads=6)
    assert not wrong
