"""`HeldLinear`: the original runs on inputs as they are, the codes on rounded ones."""

import torch
from torch.nn.functional import linear

from quantkit.algorithms.rtn import rtn
from quantkit.calibration.held import HeldLinear
from quantkit.numerics.inputs import input_scale, round_inputs
from quantkit.scheme import INT8_TOKEN, NUMBERS, Grid, integer


def test_only_codes_see_rounded_inputs():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    held = HeldLinear(w, None, INT8_TOKEN)
    assert torch.equal(held(x), linear(x, w))
    held.quantized = rtn(w, integer(4, 16), torch.float32)
    dense = held.quantized.dequantize()
    assert torch.equal(held(x), linear(round_inputs(x, INT8_TOKEN), dense))
    held.override = w
    assert torch.equal(held(x), linear(x, w))
    held.override, held.active = None, False
    assert torch.equal(held(x), linear(x, w))


def test_static_inputs_are_rounded_to_their_range():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    grid = Grid(NUMBERS["int8"], "tensor")
    held = HeldLinear(w, None, grid)
    held.quantized = rtn(w, integer(4, 16), torch.float32)
    held.input_scale = input_scale(torch.tensor([-1.0]), torch.tensor([1.0]), grid)
    assert float(held.rounded(x).amax()) < 1
    assert torch.equal(held(x), linear(held.rounded(x), held.quantized.dequantize()))
