"""GPTQ's loops over a block of columns as one call: native on the CPU, one Triton kernel on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantkit_kernels.cpu import columns as cpu_columns
from quantkit_kernels.cpu import library

MOST_COLUMNS = cpu_columns.MOST_COLUMNS  # of a block


class Loops(NamedTuple):
    """The two loops; their arguments are those of quantkit_kernels.cpu.columns."""

    spread: Callable[..., None]
    descend: Callable[..., None]


def loops_for(weight: torch.Tensor) -> Loops | None:
    """The loops for weights like this one, which round to integers; None if there are none: run torch's ops."""
    if weight.dtype != torch.float32:
        return None
    if weight.is_cpu and library.available():
        return Loops(cpu_columns.spread, cpu_columns.descend)
    if weight.is_cuda and torch.version.cuda and importlib.util.find_spec("triton"):
        from quantkit_kernels.triton import columns_op

        return Loops(columns_op.spread, columns_op.descend)
    return None
