"""How a router ranks its experts is found by watching what it computes, and only where its choice follows it."""

import pytest
import tiny_mixtures
import tiny_models
import torch

from quantkit.calibration.ranking import Scores, agreed, explains, rankings
from quantkit.calibration.ranks import ALONE
from quantkit.errors import ModelError

TOKENS, EXPERTS = 24, 8


def test_logits_rank_and_probabilities_do_too():
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    with Scores(TOKENS, EXPERTS) as scores:
        again = logits * 1
        index = again.softmax(-1).topk(2).indices
        again.view(2, -1, EXPERTS).contiguous()  # the same rows in another shape
        torch.zeros(TOKENS, EXPERTS + 1)
    assert len(scores.seen) == 3
    found = rankings(scores.seen, index, 4)
    assert set(found) == {0, 1, 2}
    for ranking in found.values():
        assert torch.equal(ranking.long(), logits.topk(4).indices)


def test_a_correction_is_part_of_the_scores():
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    with Scores(TOKENS, EXPERTS) as scores:
        corrected = logits.sigmoid() + torch.linspace(1, -1, EXPERTS)
        index = corrected.topk(2).indices
    (place,) = rankings(scores.seen, index, 3)
    assert torch.equal(rankings(scores.seen, index, 3)[place].long(), corrected.topk(3).indices)


def test_experts_of_groups_left_out_come_last_by_their_own_scores():
    """As in DeepSeek-V3: the best groups keep their scores, the others get -inf."""
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    with Scores(TOKENS, EXPERTS) as scores:
        own = logits.sigmoid()
        groups = own.view(TOKENS, 2, 4).amin(-1).argmax(-1)
        inside = (torch.arange(EXPERTS) // 4) == groups[:, None]
        masked = own.masked_fill(~inside, -torch.inf)
        index = masked.topk(2).indices
    found = rankings(scores.seen, index, EXPERTS)
    (place,) = found
    ranking = found[place].long()
    assert torch.equal(ranking[:, :4], masked.topk(4).indices)
    assert torch.equal(ranking[:, 4:], own.masked_fill(inside, -torch.inf).topk(4).indices)


def test_a_choice_that_follows_no_scores_has_no_ranking():
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    with Scores(TOKENS, EXPERTS) as scores:
        logits.softmax(-1)
        index = torch.stack((torch.arange(TOKENS) % EXPERTS, (torch.arange(TOKENS) + 3) % EXPERTS), 1)
        torch.zeros(TOKENS, EXPERTS).scatter_(1, index, 1.0)  # says which are chosen and ranks no others
        torch.full((TOKENS, EXPERTS), 0.125)
    assert not rankings(scores.seen, index, 4)
    assert not explains(logits, torch.full((TOKENS, 1), EXPERTS))  # no expert of these
    assert not explains(torch.full((TOKENS, EXPERTS), torch.nan), index)


def test_all_chunks_go_by_the_same_scores():
    assert agreed([[0, 1, 2], [1, 2], [2, 1]], ALONE, "mlp.experts", 4) == 1
    with pytest.raises(ModelError, match=r"mlp\.experts: experts\.calibrate: top:4 .* routed, or all"):
        agreed([[0, 1], [2]], ALONE, "mlp.experts", 4)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in tiny_mixtures.MIXTURES if n != "llama4"])
def test_every_router_shows_its_scores(name):
    """What explains the choice leaves the same experts first, and in the order of the router's own correction."""
    overrides = {}
    if name in ("deepseek_v3", "glm4_moe"):
        overrides = {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1}
    model = tiny_mixtures.build(name, **overrides)
    where, experts = list(tiny_mixtures.experts(model).items())[-1]
    count = experts.num_experts
    seen = []
    experts.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    ids = tiny_models.ids(TOKENS, batch=2)
    with Scores(ids.numel(), count) as scores:
        model(input_ids=ids, use_cache=False)
    found = rankings(scores.seen, seen[-1], count)
    assert found, where
    ranking = found[min(found)].long()
    top = seen[-1].shape[1]
    assert torch.equal(ranking[:, :top].sort(1).values, seen[-1].sort(1).values)
    assert torch.equal(ranking.sort(1).values, torch.arange(count).expand_as(ranking))
