"""Copies of modules, for the tests of what survives one."""

import io

import torch


def pickled(module: torch.nn.Module) -> torch.nn.Module:
    """The module written by `torch.save` and read again."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
