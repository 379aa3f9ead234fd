"""Siblings run as one give the bits that each gives alone, whatever is called when, and nothing stays behind."""

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from quantkit_kernels.cpu import library
from racing import race
from torch import nn

from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.siblings import Siblings
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme, integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
ASYM = integer(4, 32, False)
ROWS = (48, 16, 32)


def linear(n, seed=0, grid=ASYM, k=64, bias=False, dtype=torch.float32, compute="float"):
    g = torch.Generator().manual_seed(seed)
    groups = k // grid.group(k)
    codes = torch.randint(0, 2**grid.bits, (n, k), dtype=torch.uint8, generator=g)
    zero = torch.randint(0, 2**grid.bits, (n, groups), dtype=torch.uint8, generator=g)
    scale = (torch.rand(n, groups, generator=g) * 0.1).bfloat16()
    weight = QuantizedWeight(codes, scale, None if grid.symmetric else zero, grid)
    shift = torch.randn(n, generator=g).to(dtype) if bias else None
    module = QuantLinear.from_quantized(weight, shift)
    module.prepare("cpu", dtype, compute)
    return module


def placed(modules):
    arena = library.Arena(1 << 20)
    for module in modules:
        module.move_layout(arena.place)
    return nn.ModuleList(modules)


def together(**kind):
    modules = placed([linear(n, seed, **kind) for seed, n in enumerate(ROWS)])
    assert Siblings.join(list(modules))
    return modules


def alone(**kind):
    return [linear(n, seed, **kind) for seed, n in enumerate(ROWS)]


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def waiting(modules):
    return modules[0].siblings._local.slot


@pytest.fixture
def calls(monkeypatch):
    """Rows of the weight of every call of the C function."""
    c, seen = library.load(), []

    class Counting:
        def __getitem__(self, name):
            def call(weight, *args):
                seen.append(weight._obj.n)
                return c[name](weight, *args)

            return call

        def __getattr__(self, name):
            return getattr(c, name)

    counting = Counting()
    monkeypatch.setattr(library, "load", lambda: counting)
    return seen


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("grid", [ASYM, integer(3, 64, True), integer(8, None, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_one_call_gives_the_bits_of_three(calls, grid, dtype, bias, compute):
    kind = {"grid": grid, "bias": bias, "dtype": dtype, "compute": compute}
    fused, single = together(**kind), alone(**kind)
    for shape in ((1, 1), (2, 5), (17,), (), (0,)):
        x = tokens(*shape, dtype=dtype)
        expected = [m(x) for m in single]
        calls.clear()
        assert_equal([m(x) for m in fused], expected)
        assert calls == [sum(ROWS)]
        assert waiting(fused) is None


def test_any_order_serves_and_other_calls_are_computed_again(calls):
    fused, single = together(), alone()
    x, other = tokens(1), tokens(1, seed=1)

    def check(*order):
        calls.clear()
        for which, given in order:
            assert torch.equal(fused[which](given), single[which](given))
        return calls.count(sum(ROWS))

    assert check((2, x), (0, x), (1, x)) == 1
    assert check((0, x), (0, x), (1, x), (2, x)) == 2
    assert check((0, x), (1, other), (2, x)) == 3
    assert check((0, x), (1, x), (2, other)) == 1  # two waited
    assert check((0, other), (1, other.clone()), (2, other)) == 2  # one waited


def test_members_may_be_given_in_any_order(calls):
    first, second, third = placed([linear(n, seed) for seed, n in enumerate(ROWS)])
    assert Siblings.join([third, first, second])
    x = tokens(1)
    expected = [m(x) for m in alone()]
    calls.clear()
    assert_equal([m(x) for m in (first, second, third)], expected)
    assert calls == [sum(ROWS)]


def test_a_sibling_called_alone_is_soon_left_alone(calls):
    fused, single = together(), alone()
    for i in range(10):
        x = tokens(1, seed=i)
        assert torch.equal(fused[1](x), single[1](x))
    assert calls[-2:] == [ROWS[1], ROWS[1]]
    assert waiting(fused) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_change_of_x_in_place_is_seen(mode):
    fused, single = together(), alone()
    x = tokens(2, 3)  # no inference tensor: those have no version
    with mode():
        assert torch.equal(fused[0](x), single[0](x))
        x[1, 2, 5] += 1
        assert_equal([fused[1](x), fused[2](x)], [single[1](x), single[2](x)])


def test_another_view_of_x_and_new_memory_of_x_are_seen():
    fused, single = together(), alone()
    x = tokens(2, 3)
    fused[0](x)
    assert torch.equal(fused[1](x[0]), single[1](x[0]))
    fused[0](x)
    same = x.view(6, 64)
    assert torch.equal(fused[1](same), single[1](same))
    fused = together()
    fused[0](x)
    x.data = tokens(2, 3, seed=1)
    assert torch.equal(fused[1](x), single[1](x))


def test_what_was_computed_in_inference_mode_stays_there():
    fused, x = together(), tokens(1)
    with torch.inference_mode():
        assert fused[0](x).is_inference()
    assert not fused[1](x).is_inference()


def test_a_bias_changed_or_replaced_in_between_is_seen():
    fused, single = together(bias=True), alone(bias=True)
    x = tokens(1)
    fused[0](x)
    for modules in (fused, single):
        modules[1].bias.data = modules[1].bias.data + 1
        modules[2].bias.add_(1)
    assert_equal([fused[1](x), fused[2](x)], [single[1](x), single[2](x)])
    for modules in (fused, single):
        modules[1].bias = None
        modules[2].bias.data.add_(1)
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def test_a_layout_replaced_in_between_is_seen():
    fused, single = together(), alone()
    x = tokens(1)
    fused[0](x)
    other = linear(ROWS[1], seed=7)
    fused[1].move_layout(lambda _: other.units.clone())
    assert torch.equal(fused[1](x), other(x))
    assert_equal([fused[2](x), fused[0](x)], [single[2](x), single[0](x)])
    fused = together()
    fused[0](x)
    fused[2].units = linear(ROWS[2], seed=8).units
    assert torch.equal(fused[2](x), linear(ROWS[2], seed=8)(x))
    assert_equal([fused[1](x), fused[0](x)], [single[1](x), single[0](x)])


def test_compute_changed_in_between_is_seen():
    fused, single, int8 = together(), alone(), alone(compute="int8")
    x = tokens(1)
    fused[0](x)
    fused[1].prepare("cpu", torch.float32, "int8")
    assert_equal([fused[1](x), fused[2](x)], [int8[1](x), single[2](x)])


def test_nothing_stays_when_all_were_called_and_one_x_at_most_otherwise():
    fused = together()
    x, other = tokens(4), tokens(4, seed=1)
    refs = [weakref.ref(x), weakref.ref(other)]
    for module in fused:
        module(x)
    del x
    assert refs[0]() is None
    fused[0](other)
    del other
    assert refs[1]() is not None
    fused[0](tokens(1, seed=2))
    assert refs[1]() is None
    fused.to(torch.bfloat16)
    assert waiting(fused) is None


def test_the_group_does_not_keep_its_members():
    fused = together()
    x = tokens(1)
    refs = [weakref.ref(module) for module in fused]
    units = weakref.ref(fused[0].units)
    fused[0](x)
    gc.collect()
    gc.disable()
    try:
        del fused
        assert [ref() for ref in refs] == [None] * 3
        assert units() is None
    finally:
        gc.enable()


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("called", [False, True])
def test_copies_run_together_on_their_own(calls, copied, called):
    fused, single = together(bias=True), alone(bias=True)
    x = tokens(1)
    if called:
        fused[0](x)
    twins = copied(fused)
    assert twins[0].siblings is twins[2].siblings is not fused[0].siblings
    for module in fused:
        module.units.zero_()
    expected = [m(x) for m in single]
    calls.clear()
    assert_equal([m(x) for m in twins], expected)
    assert calls == [sum(ROWS)]
    assert torch.equal(copy.copy(twins[1])(x), expected[1])  # a copy that shares all is no sibling
    one = copied(twins[1])
    del twins
    gc.collect()
    assert torch.equal(one(x), expected[1])


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.share_memory, nn.Module.float])
def test_moves_of_the_modules_are_seen(change):
    fused, single = together(), alone()
    x = tokens(1)
    expected = [m(x) for m in single]
    fused[0](x)
    change(fused)
    assert_equal([m(x) for m in fused], expected)
    fused[0].units.share_memory_()  # in place, the storage of all
    assert_equal([m(x) for m in fused], expected)


def test_gone_and_replaced_members_leave_the_others_right():
    fused, single = together(), alone()
    x = tokens(1)
    fused[0](x)
    fused[1] = nn.Identity()
    gc.collect()
    for _ in range(6):
        assert_equal([fused[0](x), fused[2](x)], [single[0](x), single[2](x)])
    fused[0].siblings.__init__([fused[0], fused[2]])
    fused[2] = nn.Identity()
    gc.collect()
    assert torch.equal(fused[0](x), single[0](x))
    assert waiting(fused) is None


def test_hooks_see_every_call():
    fused, single, seen = together(), alone(), []
    x = tokens(1)
    fused[1].register_forward_hook(lambda _, args, y: seen.append((args, y)) or y + 1)
    assert_equal([m(x) for m in fused], [single[0](x), single[1](x) + 1, single[2](x)])
    assert seen[0][0] == (x,)


def test_outputs_are_not_views_of_each_other():
    fused, single = together(), alone()
    for x in (tokens(1), tokens(3)):
        first = fused[0](x)
        first.add_(1)
        second = fused[1](x)
        second.zero_()
        assert not first._is_view()
        assert_equal([first, fused[2](x)], [single[0](x) + 1, single[2](x)])


def test_only_what_fits_together_is_joined():
    for others in (
        [linear(16, 1, grid=integer(4, 64, False))],
        [linear(16, 1, grid=integer(4, 32, True))],
        [linear(16, 1, k=128)],
        [linear(16, 1, bias=True)],
        [linear(16, 1, dtype=torch.bfloat16)],
        [linear(24, 1), linear(16, 2)],
        [],
    ):
        modules = list(placed([linear(16), *others]))
        assert not Siblings.join(modules)
        assert all(module.siblings is None for module in modules)
    stored = QuantLinear(64, 16, Scheme(ASYM), False, torch.bfloat16)
    assert not Siblings.join([stored, stored])


def test_bad_input_is_the_same_error_and_leaves_nothing():
    fused, single = together(), alone()
    for module in (fused[0], single[0]):
        with pytest.raises(ValueError, match="x has 32 features, the weight takes 64"):
            module(torch.ones(2, 32))
    assert waiting(fused) is None
    x = tokens(4, 2).transpose(0, 1)
    assert_equal([m(x) for m in fused], [m(x) for m in single])
    x = tokens(3).double()
    assert_equal([m(x) for m in fused], [m(x) for m in single])


def test_what_waits_in_a_thread_is_its_own(calls):
    fused, single = together(), alone()
    x, other = tokens(1), tokens(1, seed=1)
    fused[0](x)
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.map(lambda m: m(other), fused), [m(other) for m in single])
    assert_equal([fused[1](x), fused[2](x)], [single[1](x), single[2](x)])
    assert calls.count(sum(ROWS)) == 2


def test_threads_at_once_give_the_serial_results():
    fused, single = together(bias=True), alone(bias=True)
    inputs = [tokens(m, seed=m) for m in (1, 2, 3, 5, 1, 2, 1, 4)]
    shared = tokens(1, seed=99)
    serial = [[m(x) for m in single] for x in (*inputs, shared)]
    wrong = []

    def work(i):
        for turn in range(60):
            own = turn % 2
            x, expected = (inputs[i], serial[i]) if own else (shared, serial[-1])
            order = (0, 1, 2) if own else (i % 3, (i + 1) % 3, (i + 2) % 3)
            for which in order:
                if not torch.equal(fused[which](x), expected[which]):
                    wrong.append((i, which))
            if i == 0 and turn % 10 == 0:
                fused[0].siblings.forget()

    race(work)
    assert not wrong
