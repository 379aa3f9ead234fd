"""The Triton kernel of experts, interpreted on the CPU, against the reference; run by `test_triton_interpreter.py`."""

import pytest
import torch
import triton_mended
from packed_weights import exact_weight, integers
from quantkit_kernels import Backend, Layout, Spec, Stored, pack_bits, unpack_bits
from quantkit_kernels.reference.wna16_linear import dequantize
from quantkit_kernels.triton import grouped_op, layout
from quantkit_kernels.triton.backend import TritonBackend
from wrong_arguments import refusals

assert triton_mended
EXPERTS = 5
SLOTS = [("decode", 1, [0, 1, 0, 1, 1]), ("prompt", 40, [18, 0, 35, 1, 4])]  # one full tile of 16, one ragged


def slots(tokens, counts):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(max(tokens, count), generator=generator)[:count] % tokens for count in counts]
    return torch.cat(rows), torch.tensor([0, *counts]).cumsum(0)


def weights(bits, n, k, group, symmetric, count=EXPERTS):
    """Different ones: the rows of one, turned by a few more for each expert."""
    found = []
    for e in range(count):
        stored = exact_weight(bits, n + e, k, group, symmetric)
        w = dequantize(stored, torch.float64)[e:]
        built = exact_weight(bits, n, k, group, symmetric) if e == 0 else None
        found.append((built or cut(stored, e, n), w))
    return found


def cut(stored, first, n):
    spec, zero = stored.spec, None
    if stored.zero_packed is not None:
        zeros = unpack_bits(stored.zero_packed.T, spec.bits, spec.n)[:, first:]
        zero = pack_bits(zeros.contiguous(), spec.bits).T.contiguous()
    return Stored(stored.packed[first:], stored.scale[first:], zero, spec.with_rows(n))


def layouts(made):
    names = ("codes", "scales", "zeros")
    found = []
    for stored, _ in made:
        built = layout.build(stored)
        tensors = {name: t for name, t in zip(names, built, strict=True) if t is not None}
        found.append(Layout(tensors, stored.spec, {}))
    return found


@pytest.mark.parametrize(
    ("bits", "n", "k", "group"),
    [(4, 70, 256, 128), (4, 64, 100, 100), (3, 64, 256, 32), (2, 65, 128, 64), (8, 10, 64, 32)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_equal_the_reference(bits, n, k, group, symmetric):
    made = weights(bits, n, k, group, symmetric)
    stacked = grouped_op.stack(layouts(made), 1)
    codes, scales, zeros = (*stacked, None)[:3]
    bias = integers(EXPERTS, n, seed=1)
    for _, tokens, counts in SLOTS:
        rows, offsets = slots(tokens, counts)
        x = integers(tokens, k)
        y = grouped_op.triton_grouped_linear(x, rows, offsets, codes, scales, zeros, bias, bits, group, n, k)
        expert = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
        w = torch.stack([each for _, each in made])[expert]
        truth = torch.einsum("sk,snk->sn", x[rows].double(), w) + bias.double()[expert]
        assert torch.equal(y.double(), truth)


def test_gate_and_up_of_an_expert_are_one_weight_and_nothing_is_kept_twice():
    made = layouts(weights(4, 64, 128, 32, False, 2 * EXPERTS))
    rows, offsets = slots(*SLOTS[1][1:])
    x, biases = integers(40, 128), [integers(64, seed=i) if i != 3 else None for i in range(2 * EXPERTS)]
    call = TritonBackend().bind_grouped(made, biases.__getitem__, 2, torch.float32)
    loop = Backend.bind_grouped(TritonBackend(), made, biases.__getitem__, 2, torch.float32)
    assert torch.equal(call(x, rows, offsets), loop(x, rows, offsets))
    memory = {each.tensors["codes"].untyped_storage().data_ptr() for each in made}
    assert len(memory) == 1


def test_what_does_not_fit_goes_one_by_one():
    """Rows that 64 does not divide; tokens enough to write W out; a gradient."""
    made = layouts(weights(4, 20, 64, 32, True, 4))
    rows, offsets = slots(6, [2, 1])
    x = integers(6, 64)
    call = TritonBackend().bind_grouped(made, lambda _: None, 2, torch.float32)
    assert call(x, rows, offsets).shape == (3, 40)
    call = TritonBackend().bind_grouped(made[:2], lambda _: None, 1, torch.float32)
    wanted = x.clone().requires_grad_()
    call(wanted, rows, offsets).square().sum().backward()
    assert wanted.grad.abs().max() > 0


def test_fp8_experts():
    code = torch.arange(2 * 64 * 64).view(2, 64, 64) % 119
    weight, scale = code.to(torch.uint8).view(torch.float8_e4m3fn), torch.ones(2, 64, 2)
    built = [layout.build_fp8(w, s) for w, s in zip(weight, scale, strict=True)]
    spec = Spec("fp8_e4m3", 8, 32, True, 64, 64)
    found = [Layout({"codes": codes, "scales": scales}, spec, {}) for codes, scales in built]
    rows, offsets = slots(3, [1, 2])
    x = integers(3, 64)
    y = TritonBackend().bind_grouped(found, lambda _: None, 1, torch.float32)(x, rows, offsets)
    w = weight.double()[torch.tensor([0, 1, 1])]
    assert torch.equal(y.double(), torch.einsum("sk,snk->sn", x[rows].double(), w))


def test_wrong_arguments_are_refused():
    stacked = grouped_op.stack(layouts(weights(4, 20, 64, 32, False)), 1)
    rows, offsets = slots(1, SLOTS[0][2])

    def arguments():
        parts = [part.clone() for part in stacked]
        return [integers(1, 64), rows, offsets, *parts, integers(5, 20), 4, 32, 20, 64]

    assert refusals(grouped_op.triton_grouped_linear, arguments, 60, "grouped") > 20
