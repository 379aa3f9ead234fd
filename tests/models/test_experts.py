"""Experts as linears of their own compute what transformers' stacked ones do, or are refused."""

import pytest
import tiny_mixtures
import torch
from torch import nn

from quantkit.errors import ModelError
from quantkit.models.experts import ROLES, Experts, SlottedExperts, chosen, shape_of
from quantkit.models.experts_proof import prove


def test_the_chosen_experts_of_every_token():
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])
    found = {e: (token.tolist(), slot.tolist()) for e, token, slot in chosen(index, 3)}
    assert found == {0: ([0, 1], [1, 0]), 2: ([0, 2], [0, 0])}  # 3 is no expert: a token that goes nowhere


@pytest.mark.parametrize("name", tiny_mixtures.MIXTURES)
def test_taken_apart_they_compute_the_same(name):
    stacked = next(iter(tiny_mixtures.experts(tiny_mixtures.build(name)).values()))
    prove(stacked, SlottedExperts if name == "llama4" else Experts, ROLES)


def test_what_a_module_says_of_itself():
    found = shape_of(next(iter(tiny_mixtures.experts(tiny_mixtures.build("gpt_oss")).values())))
    assert (found.experts, found.hidden, found.width) == (4, 64, 96)
    assert found.transposed == {"gate", "up", "down"}
    assert found.interleaved
    assert found.gated
    assert found.bias


def test_what_is_taken_apart_in_another_way_is_refused():
    stacked = next(iter(tiny_mixtures.experts(tiny_mixtures.build("mixtral")).values()))

    class Doubled(Experts):
        def behind(self, out):
            return 2 * out

    with pytest.raises(ModelError, match=r"MixtralExperts: its experts, taken apart, give another output"):
        prove(stacked, Doubled, ROLES)


def test_a_norm_behind_every_expert_comes_along():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(3, 8, 6))
            self.down_proj = nn.Parameter(torch.empty(3, 6, 4))
            self.post_expert_norm = nn.RMSNorm(6)
            self.act_fn = nn.SiLU()

        def forward(self, hidden, index, weights):
            out = torch.zeros_like(hidden)
            for token, (experts, shares) in enumerate(zip(index, weights, strict=True)):
                for e, share in zip(experts, shares, strict=True):
                    gate, up = (self.gate_up_proj[e] @ hidden[token]).chunk(2)
                    out[token] += share * self.post_expert_norm(self.down_proj[e] @ (self.act_fn(gate) * up))
            return out

    stacked = Normed()
    prove(stacked, Experts, ROLES)
    assert Experts(stacked, ROLES).get_submodule("post_expert_norm") is stacked.post_expert_norm
    assert Experts(stacked, ROLES).with_weights(stacked).post_expert_norm is stacked.post_expert_norm


def test_a_module_that_does_not_run_is_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(2, 8, 6))
            self.down_proj = nn.Parameter(torch.empty(2, 6, 4))

        def forward(self, hidden, index, weights):
            raise RuntimeError("no")

    with pytest.raises(ModelError, match=r"Odd does not run with experts taken apart: RuntimeError: no"):
        prove(Odd(), Experts, ROLES)
