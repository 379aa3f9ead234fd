"""The gradient of y = x W^T + bias with a packed W, the same for the op of every backend.

    dL/dx = dL/dy W    dL/dbias = sum of dL/dy over the tokens

W is dequantized in the backward pass, one layer at a time, in x's dtype, and not kept afterwards.
Codes and scales get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(op: str, weight: Callable[..., torch.Tensor], bias_at: int) -> None:
    """Give an op its gradient. weight: the op's own arguments -> W [N, K] in x's dtype; bias_at: which one is the bias.

    x is the first argument of the op. Uses only differentiable ops, so that gradients of gradients are right too.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.tensors_at = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.inputs = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors_at))

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inputs = list(ctx.inputs)
        for i, tensor in zip(ctx.tensors_at, ctx.saved_tensors, strict=True):
            inputs[i] = tensor
        found: list[torch.Tensor | None] = [None] * len(inputs)
        x, bias = inputs[0], inputs[bias_at]
        if ctx.needs_input_grad[0]:
            found[0] = grad.to(x.dtype) @ weight(*inputs)
        if bias is not None and ctx.needs_input_grad[bias_at]:
            found[bias_at] = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
        return tuple(found)

    torch.library.register_autograd(op, backward, setup_context=setup)
