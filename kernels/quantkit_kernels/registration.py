"""Defines torch ops of the library `quantkit`, each once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def define(
    name: str, schema: str, kernels: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> bool:
    """Define the op `quantkit::name` with a kernel per dispatch key and the shapes of its result.

    schema: argument list and result, as `torch.library.define` takes them. fake: the op on tensors without data.
    Returns False, and does nothing, if the op is defined already: a second copy of the module on the path may not
    define it again, because torch refuses that.
    """
    if hasattr(torch.ops.quantkit, name):
        return False
    op = f"quantkit::{name}"
    torch.library.define(op, schema)
    for key, kernel in kernels.items():
        torch.library.impl(op, key)(kernel)
    torch.library.register_fake(op)(fake)
    return True
