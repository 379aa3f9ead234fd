"""The Triton kernels of GPTQ's column loops, interpreted on the CPU; run by `test_triton_interpreter.py`."""

import pytest
import torch
import triton_mended
from quantkit_kernels.triton.columns import descend, spread

assert triton_mended


def problem(b, n, experts=2, groups=3):
    g = torch.Generator().manual_seed(b + n)
    w = torch.randn(experts, b, n + 3, generator=g)[..., 2:-1]
    x = torch.randn(experts, 4 * b, b, generator=g)
    h = x.mT @ x / (4 * b)
    scale = 0.2 + torch.rand(experts, groups, n, generator=g) / 5
    zero = torch.randint(5, 11, scale.shape, generator=g).float()
    return w, h, scale, -zero, 15 - zero, torch.randint(0, groups, (experts, b), generator=g).int()


@pytest.mark.parametrize(("b", "n"), [(8, 5), (13, 40), (32, 33)])
def test_spread_is_the_loop(b, n):
    w, h, scale, low, high, groups = problem(b, n)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    ours, levels, errors = w.clone(), *torch.full((2, *w.shape), float("nan"))
    spread(ours, upper, scale, low, high, groups, levels, errors)
    for e in range(len(w)):
        for j in range(b):
            g = groups[e, j]
            level = (w[e, j] / scale[e, g]).round().clamp(low[e, g], high[e, g])
            error = (w[e, j] - level * scale[e, g]) / upper[e, j, j]
            w[e, j + 1 :] -= upper[e, j, j + 1 :, None] * error
            assert torch.equal(levels[e, j], level)
            torch.testing.assert_close(errors[e, j], error, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("b", "n"), [(8, 5), (13, 40), (32, 33)])
def test_descend_is_the_loop(b, n):
    w, h, scale, low, high, groups = problem(b, n)
    value = torch.zeros_like(w)
    gradient = h @ w
    ours, slope = value.clone(), gradient.clone()
    descend(ours, slope, h, scale, low, high, groups)
    for e in range(len(w)):
        for j in range(b):
            s, g = scale[e, groups[e, j]], groups[e, j]
            old = value[e, j].clone()
            new = ((old + gradient[e, j] * (1 / h[e, j, j])) / s).round().clamp(low[e, g], high[e, g]) * s
            gradient[e, j + 1 :] += h[e, j, j + 1 :, None] * (old - new)
            value[e, j] = new
    torch.testing.assert_close(ours, value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope, gradient, atol=1e-5, rtol=1e-5)
