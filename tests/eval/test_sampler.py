"""Picks follow the distribution they claim."""

import pytest
import torch
from quantkit_eval import EvalError
from quantkit_eval.sampler import pick

P = torch.tensor([0.05, 0.5, 0.15, 0.3])


def frequencies(draws=4000, temperature=1.0, top_k=0, top_p=1.0):
    generator = torch.Generator().manual_seed(0)
    picks = [pick(P.log(), temperature, top_k, top_p, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(picks), minlength=4) / draws


def test_temperature_0_is_greedy():
    assert pick(P.log(), 0, 0, 1.0, torch.Generator()) == 1


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, torch.tensor([0, 0.5, 0, 0.3]) / 0.8),
        ({"top_p": 0.75}, torch.tensor([0, 0.5, 0, 0.3]) / 0.8),
        ({"top_p": 0.85}, torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95),
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0])),
        ({"top_k": 99}, P),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0])),
    ],
)
def test_draws_follow_the_kept_distribution(keywords, expected):
    found = frequencies(**keywords)
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_the_smallest_temperature_is_greedy_and_does_not_overflow():
    assert pick(1e4 * P, 1e-40, 0, 1.0, torch.Generator()) == 1


def test_masked_tokens_are_never_drawn():
    logits = torch.tensor([0.0, -float("inf"), 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {pick(logits, 1.0, 0, 1.0, generator) for _ in range(200)} == {0, 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad):
    with pytest.raises(EvalError, match="non-finite"):
        pick(torch.tensor([0.0, bad]), 0, 0, 1.0, torch.Generator())


def test_models_that_differ_little_draw_the_same_tokens():
    """Of 4,000 tokens nearly as likely as each other; their order by probability is another one."""
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 1e-3
    moved = logits + 1e-4 * torch.randn(4000, generator=torch.Generator().manual_seed(2))
    draws = [
        [pick(x, 1.0, 0, 1.0, torch.Generator().manual_seed(s)) for s in range(100)] for x in (logits, moved)
    ]
    assert sum(a != b for a, b in zip(*draws, strict=True)) < 5
    assert len(set(draws[0])) > 90
