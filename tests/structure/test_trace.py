"""Which tensor goes where, seen by identity."""

import pytest
import tiny_models
import torch
from torch import nn

from quantkit.structure.trace import trace


@pytest.mark.parametrize(
    ("name", "parents"),
    [
        ("llama", {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}),
        ("gpt2", {"attn": "attn.c_proj", "mlp": "mlp.c_proj"}),
        ("opt", {"self_attn": "self_attn.out_proj"}),
        ("falcon", {"self_attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}),
    ],
)
def test_trace_knows_whose_output_a_submodule_returns(name, parents):
    block, call = tiny_models.block_and_call(name)
    assert trace(block, *call).output_of == parents


def test_trace_orders_siblings_by_execution():
    block, call = tiny_models.block_and_call("falcon")
    seen = trace(block, *call)
    assert seen.siblings == (
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    )
    assert seen.norms == {seen.siblings[0]: "input_layernorm"}


class Toy(nn.Module):
    """Linears a, b of 8 channels and whatever `run` does with them."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    ("run", "siblings"),
    [
        (lambda m, x: m.a(x) + m.b(x), [("a", "b")]),
        (lambda m, x: m.a(x) + m.b(x.view(-1, 8)).view(x.shape), [("a", "b")]),  # the same rows
        (lambda m, x: m.a(x.clone()) + m.b(x.clone()), [("a",), ("b",)]),  # equal, not the same
        (lambda m, x: m.a(x) + m.b(x.mul_(2)), [("a",), ("b",)]),  # the same memory, written in between
    ],
)
def test_trace_shares_by_identity(run, siblings):
    torch.manual_seed(0)
    assert trace(Toy(run), torch.randn(1, 9, 8), (), {}).siblings == tuple(siblings)


def test_trace_does_not_call_a_changed_output_the_linears():
    toy = Toy(lambda m, x: m.inner(x))
    assert trace(toy, torch.ones(1, 3, 8), (), {}).output_of == {"inner": "inner.0"}
    toy.inner.append(nn.ReLU(inplace=True))
    assert trace(toy, torch.ones(1, 3, 8), (), {}).output_of == {}
