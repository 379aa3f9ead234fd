"""The experts of a mixture in one native call: the bits of the linear op expert by expert, on every path."""

from dataclasses import replace

import pytest
import torch
from cpu_paths import DTYPES
from packed_weights import packed_weight
from quantkit_kernels import Backend, InputRange, backend
from quantkit_kernels.cpu import grouped, layout, library, ops

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

EXPERTS, K = 5, 256
# How many slots each expert has: some none, some few, one enough for tiles.
TOKENS = {"decode": (1, [0, 1, 0, 1, 1]), "few": (6, [3, 0, 7, 1, 0]), "prompt": (24, [2, 0, 24, 9, 12])}


def slots(tokens, counts, seed=0):
    """(rows, offsets): different tokens in every expert."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(max(tokens, count), generator=generator)[:count] % tokens for count in counts]
    return torch.cat(rows), torch.tensor([0, *counts]).cumsum(0)


def weights(bits, group, symmetric, n, number=None, scale_dtype=torch.float16):
    count = EXPERTS * 2
    if number:
        generator = torch.Generator().manual_seed(1)
        most = 256 if number == "fp8_e4m3" else 16
        codes = torch.randint(0, most, (count, n, K), dtype=torch.uint8, generator=generator)
        codes[codes == 0x7F] = codes[codes == 0xFF] = 0  # FP8's NaN
        scale = torch.rand(count, n, K // group, generator=generator)
        return [layout.pack_codes(c, s.half(), number) for c, s in zip(codes, scale, strict=True)]
    made = [packed_weight(bits, n, K, group or K, symmetric, scale_dtype, seed)[0] for seed in range(count)]
    return [layout.pack(each) for each in made]


def one_by_one(packed, bias, each, x, rows, offsets, compute):
    """What the linear op gives for the slots of every expert."""
    out = torch.empty(len(rows), each * packed[0].spec.n, dtype=x.dtype)
    for e in range(len(packed) // each):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        parts = [
            ops.linear(packed[e * each + r], x[rows[mine]], bias[e * each + r], compute) for r in range(each)
        ]
        out[mine] = torch.cat(parts, -1)
    return out


KINDS = {
    **{f"int{bits}": (bits, 128, bits == 8) for bits in layout.BITS},
    "small groups": (4, 32, False),
    "channel": (4, 0, True),
    "nf4": (4, 64, True, "nf4"),
    "fp8": (8, 128, True, "fp8_e4m3"),
    "fp4": (4, 32, True, "fp4_e2m1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_is_the_linear_op_expert_by_expert(path, kind):
    bits, group, symmetric, *number = KINDS[kind]
    packed = weights(bits, group, symmetric, 40, *number)
    computes = (ops.FLOAT,) if number else (ops.FLOAT, ops.INT8_GROUP, ops.INT8_TOKEN)
    generator = torch.Generator().manual_seed(2)
    for (tokens, counts), dtype in zip(TOKENS.values(), DTYPES, strict=True):
        rows, offsets = slots(tokens, counts)
        x = torch.randn(tokens, K, generator=generator).to(dtype)
        for compute in computes:
            for each, of in ((2, packed), (1, packed[:EXPERTS])):
                bias = [torch.randn(40, generator=generator) if each == 2 else None for _ in of]
                wanted = one_by_one(of, bias, each, x, rows, offsets, compute)
                call = grouped.bind([layout.layout_of(w) for w in of], bias.__getitem__, each, compute)
                past, op = (
                    call(x, rows, offsets),
                    grouped.grouped_linear(of, bias, each, compute, x, rows, offsets),
                )
                assert torch.equal(past, wanted), (
                    f"{path} {kind} {tokens} tokens, compute {compute}, {each} each"
                )
                assert torch.equal(op, wanted)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads):
    """Large enough to be shared out: every output is computed whole by one thread."""
    made = [layout.pack(packed_weight(4, 200, 512, 128, False, seed=seed)[0]) for seed in range(8)]
    before, found = torch.get_num_threads(), []
    for tokens, counts in ((1, [1] * 8), (7, [7, 0, 3, 0, 0, 5, 1, 2])):
        rows, offsets = slots(tokens, counts)
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(3))
        call = grouped.bind([layout.layout_of(w) for w in made], lambda _: None, 1, ops.INT8_GROUP)
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(call(x, rows, offsets))
        torch.set_num_threads(before)
        assert torch.equal(found[-1], found[-2])


def test_only_the_experts_that_have_tokens_are_read():
    packed = weights(4, 128, True, 40)
    rows, offsets = slots(1, [0, 1, 0, 1, 0])
    x = torch.randn(1, K, generator=torch.Generator().manual_seed(4))
    wanted = one_by_one(packed, [None] * 10, 2, x, rows, offsets, ops.FLOAT)
    for e in (0, 2, 4):
        for weight in packed[2 * e : 2 * e + 2]:
            weight.units.fill_(0xFF)  # scales become NaN
    call = grouped.bind([layout.layout_of(w) for w in packed], lambda _: None, 2, ops.FLOAT)
    assert torch.equal(call(x, rows, offsets), wanted)


def test_weights_that_were_replaced_are_used():
    packed = weights(4, 128, True, 40)
    layouts = [layout.layout_of(w) for w in packed]
    rows, offsets = slots(6, [2, 1, 0, 3, 1])
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(5))
    call = grouped.bind(layouts, lambda _: None, 2, ops.FLOAT)
    call(x, rows, offsets)
    layouts[3].tensors["units"] = packed[0].units.clone()
    moved = [*packed[:3], packed[3]._replace(units=layouts[3].tensors["units"]), *packed[4:]]
    assert torch.equal(call(x, rows, offsets), one_by_one(moved, [None] * 10, 2, x, rows, offsets, ops.FLOAT))


def test_backend_equals_its_own_loop_and_differentiates():
    """The method of every backend that calls expert by expert, against the native one."""
    cpu, stored = backend("cpu"), [packed_weight(4, 40, K, 128, False, seed=seed)[0] for seed in range(10)]
    layouts = [cpu.prepare(each, torch.float32) for each in stored]
    biases = [None, *(torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(9))]
    rows, offsets = slots(6, [2, 1, 0, 3, 1])
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(6))
    native = cpu.bind_grouped(layouts, biases.__getitem__, 2, torch.float32)
    loop = Backend.bind_grouped(cpu, layouts, biases.__getitem__, 2, torch.float32)
    assert torch.equal(native(x, rows, offsets), loop(x, rows, offsets))
    grads = []
    for call in (native, loop):
        wanted = x.clone().requires_grad_()
        call(wanted, rows, offsets).square().sum().backward()
        grads.append(wanted.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


def test_a_stored_range_of_the_inputs_is_shifted_as_the_linear_does():
    cpu, made = backend("cpu"), []
    for seed in range(4):
        one = packed_weight(8, 40, K, K, True, seed=seed)[0]
        one = replace(one, spec=one.spec.with_inputs("int8-range"), inputs=InputRange(0.02 + seed / 100, 3))
        made.append(cpu.prepare(one, torch.float32))
    rows, offsets = slots(6, [2, 1, 0, 4])
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(7))
    native = cpu.bind_grouped(made, lambda _: None, 1, torch.float32)
    loop = Backend.bind_grouped(cpu, made, lambda _: None, 1, torch.float32)
    assert torch.equal(native(x, rows, offsets), loop(x, rows, offsets))
