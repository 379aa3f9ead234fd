"""FP4 weights with the scales that files store: FP8 over a divisor (NVFP4) and powers of two (MXFP4)."""

from dataclasses import replace

import pytest
import torch
from cpu_paths import DTYPES, assert_close
from packed_weights import same
from quantkit_kernels import Spec, Stored, backend, pack_bits, select
from quantkit_kernels.backends import ENVIRONMENT
from quantkit_kernels.cpu import layout, library, ops
from quantkit_kernels.reference.wna16_linear import dequantize

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

GROUPS = {"nvfp4": 16, "mxfp4": 32}


def fp4_weight(kind, n, k):
    """A weight as a checkpoint of this kind gives it: all codes, negative zero too, and scales over many powers."""
    g = torch.Generator().manual_seed(n + k)
    groups = k // GROUPS[kind]
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    spec = Spec("fp4_e2m1", 4, GROUPS[kind], True, n, k)
    if kind == "mxfp4":
        scale, divisor = torch.randint(-20, -6, (n, groups), generator=g).float().exp2(), None
    else:
        stored = torch.randint(1, 0x7F, (n, groups), dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
        divisor = torch.tensor([2356.6])
        scale = stored.float() / divisor
    return Stored(pack_bits(codes, 4), scale, None, spec, divisor=divisor)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(37, 256), (18, 224), (16, 96)])
def test_every_path_is_close_to_fp64_with_the_bits_of_the_portable_one(path, kind, n, k):
    stored = fp4_weight(kind, n, k)
    weight, w = layout.pack(stored), dequantize(stored, torch.float64)
    assert weight.scale_type == layout.F8
    tokens = torch.randn(20, k, generator=torch.Generator().manual_seed(k))
    for m in (1, 2, 3, 4, 7, 9, 20):
        for dtype in DTYPES:
            x = tokens[:m].to(dtype)
            y = ops.linear(weight, x)
            limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
            assert_close(f"{path} {kind} m={m} {dtype}", y, x.double() @ w.T, limit)
            library.set_isa("portable")
            assert torch.equal(ops.linear(weight, x), y)
            library.set_isa(path.removeprefix("emulated-"))


@pytest.mark.parametrize("kind", GROUPS)
def test_the_layout_gives_back_what_is_stored_in_the_bits_of_the_file(kind):
    for n, k in ((32, 512), (37, 224), (3, 32), (16, 16 * 3 * 2)):
        stored = fp4_weight(kind, n, k)
        weight = layout.pack(stored)
        assert same(layout.unpack(weight), stored)
    weight = layout.pack(fp4_weight(kind, 64, 1024))
    assert weight.units.numel() * 8 / (64 * 1024) == 4 + 8 / GROUPS[kind]


def test_scales_that_are_no_fp8_numbers_are_kept_in_a_wider_type():
    stored = fp4_weight("nvfp4", 32, 256)
    for scale, kind in (
        (torch.rand_like(stored.scale), layout.F32),
        (torch.rand_like(stored.scale).half().float(), layout.F16),
        (-stored.scale, layout.F32),
        (stored.scale * (1 + 2**-20), layout.F32),
        (torch.zeros_like(stored.scale), layout.F8),
    ):
        other = replace(stored, scale=scale)
        weight = layout.pack(other)
        assert weight.scale_type == kind
        assert same(layout.unpack(weight), other)
        y = ops.linear(weight, torch.eye(256)).T
        torch.testing.assert_close(y, dequantize(other, torch.float32), rtol=1e-6, atol=0)


def test_auto_takes_the_native_kernels_and_the_reference_keeps_the_divisor(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT)
    stored = fp4_weight("nvfp4", 32, 256)
    assert select(stored.spec, "cpu", dtype=torch.float32).name == "cpu"
    assert "not 16" in layout.refuses(Spec("nf4", 4, 16, True, 32, 256))
    reference = backend("reference")
    assert same(reference.restore(reference.prepare(stored, torch.float32)), stored)


def test_an_infinite_input_and_a_nan_reach_their_own_token_only(path):
    weight = layout.pack(fp4_weight("nvfp4", 32, 256))
    for bad in (torch.nan, torch.inf):
        x = torch.ones(3, 256)
        x[1, 130] = bad
        finite = ops.linear(weight, x).isfinite()
        assert finite[[0, 2]].all()
        assert not finite[1].all()
