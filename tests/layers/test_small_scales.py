"""fp16 scales below its smallest normal number, which rows of small weights need: no backend flushes them."""

import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import integer

needs_native = pytest.mark.skipif(not library.available(), reason="the native library is not built")


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_subnormal_scales_are_not_flushed(backend, dtype, symmetric):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8, generator=g)
    zero = None if symmetric else torch.randint(0, 16, (64, 4), dtype=torch.uint8, generator=g)
    steps = torch.arange(256).view(64, 4) % 37 + 1
    weight = QuantizedWeight(codes, (steps * 2.0**-24).half(), zero, integer(4, 32, symmetric))
    assert float(weight.scale.max()) < torch.finfo(torch.float16).tiny
    module = QuantLinear.from_quantized(weight, None)
    x = torch.randn(3, 128, generator=g).mul_(1000).to(dtype)
    module.prepare(backend, dtype)
    wanted = x.double() @ weight.dequantize(torch.float64).T
    off = (module(x).double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert off < (1e-5 if dtype == torch.float32 else 2e-2)
