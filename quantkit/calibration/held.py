"""`HeldLinear`: a planned linear while its block is being calibrated.

It keeps the weight in the checkpoint's dtype (the cast to the compute dtype happens per call, so a block costs its
stored size, not its fp32 size) and, once quantized, the codes. `active` chooses which of the two runs, so that the
full-precision and the quantized stream share one block. With the codes the inputs are rounded too.
"""

from __future__ import annotations

import torch
from torch import nn

from quantkit.numerics.inputs import InputScale, round_inputs
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid


class HeldLinear(nn.Module):
    """weight: [out, in] in any float dtype (Conv1D weights are held transposed); bias [out] or None.

    inputs: the grid its inputs are rounded to once it is quantized; input_scale: their range, if the grid is static.
    """

    is_linear = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Grid | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.quantized: QuantizedWeight | None = None
        self.inputs = inputs
        self.input_scale: InputScale | None = None
        self.override: torch.Tensor | None = None
        self.active = True

    def forget(self) -> None:
        """Drop the original weight: only the codes will run from now on."""
        self.weight.data = self.weight.data.new_empty(0)

    def effective(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight this call uses, [out, in] in `dtype`."""
        if self.override is not None:
            return self.override.to(dtype)
        if self._runs_codes and self.quantized is not None:
            return self.quantized.dequantize(dtype)
        return self.weight.to(dtype)

    @property
    def _runs_codes(self) -> bool:
        return self.active and self.quantized is not None and self.override is None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [..., K] as the quantized layer sees them."""
        return x if self.inputs is None else round_inputs(x, self.inputs, self.input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.inputs is not None and self._runs_codes:
            x = self.rounded(x)
        return nn.functional.linear(x, self.effective(x.dtype), bias)
