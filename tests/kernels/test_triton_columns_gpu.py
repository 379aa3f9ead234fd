"""GPTQ's column loops on a GPU, against the native ones and a whole solve on the CPU."""

import pytest
import torch
from column_blocks import arguments
from quantkit_kernels.cpu import columns as native
from quantkit_kernels.cpu import library

from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.gptq import quantize, quantize_all
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import integer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)"),
]


@pytest.mark.parametrize(
    "sizes", [{"e": 4, "b": 128, "n": 768}, {"e": 1, "b": 77, "n": 33}, {"b": 1, "n": 1}], ids=str
)
def test_loops_are_those_of_the_cpu(sizes):
    from quantkit_kernels.triton import columns_op

    whole, at, matrix, *grid = arguments(**sizes)
    upper = torch.linalg.cholesky(matrix + torch.eye(len(matrix[0]))).mT
    wanted = [torch.zeros_like(whole) for _ in range(2)]
    native.spread(whole[:, at], upper, *grid, *(each[:, at] for each in wanted))
    found = [torch.zeros_like(whole, device="cuda") for _ in range(2)]
    moved = [each.cuda() for each in grid]
    columns_op.spread(whole.cuda()[:, at], upper.cuda(), *moved, *(each[:, at] for each in found))
    assert (
        found[0].cpu() == wanted[0]
    ).float().mean() > 0.999  # a tie may go the other way, and take others with it
    same = (found[0].cpu() == wanted[0]).all(1, keepdim=True).expand_as(whole)
    torch.testing.assert_close(found[1].cpu()[same], wanted[1][same], atol=1e-4, rtol=1e-4)

    gradient = torch.randn(whole[:, at].shape, generator=torch.Generator().manual_seed(1))
    value, there = whole.clone(), whole.cuda()
    native.descend(value[:, at], gradient, matrix, *grid)
    columns_op.descend(there[:, at], gradient.cuda(), matrix.cuda(), *moved)
    assert ((there.cpu() - value).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("options", [{}, {"groups": "dynamic"}, {"order": "none", "retarget": 0.0}], ids=str)
def test_gptq_is_as_good_as_on_the_cpu(options):
    """One weight, and four as one batch."""
    generator = torch.Generator().manual_seed(0)
    config, grid = GptqConfig(name="gptq", **options), integer(4, 128)
    weights = [torch.randn(300, 512, generator=generator) for _ in range(4)]

    def statistics(seed, device):
        x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(seed))
        h = (x.T @ x / 512).to(device)
        return Statistics(1024, h, 0.01 * h, mean_square=h.diagonal() / 2)

    given = [statistics(seed, "cuda") for seed in range(4)]
    batch = quantize_all([each.cuda() for each in weights], given, grid, torch.bfloat16, config)
    for seed, (w, together) in enumerate(zip(weights, batch, strict=True)):
        wanted = quantize(w, statistics(seed, "cpu"), grid, torch.bfloat16, config)
        alone = quantize(w.cuda(), statistics(seed, "cuda"), grid, torch.bfloat16, config)
        for found in (together, alone):
            assert float(found.error.sum()) == pytest.approx(float(wanted.error.sum()), rel=1e-3)
