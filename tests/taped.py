"""A tape in the place of a CUDA graph, and greedy decoding by any model.

Like a graph the tape records the operations of one step once and repeats them on the same memory, so whatever a model
decides in Python stays as it was in the recorded step, and waiting for the device is an error.
"""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


class Tape(TorchDispatchMode):
    """The operations that ran under it; `replay` runs them again, into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step, device):
    step()
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True), Tape() as tape:
        out = step()

    def replay():
        tape.replay()
        return out

    return replay


@torch.no_grad()
def decode(model, ids, steps):
    """Greedy tokens and the logits they came from, [steps, vocabulary]."""
    tokens, logits, cache = [], [], None
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].clone())
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logits)
