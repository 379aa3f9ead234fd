"""What the experts of a layer give one after the other is what they give together."""

import copy

import tiny_mixtures
import torch

from quantkit.calibration.experts import ExpertsStage
from quantkit.models.experts import ROLES, Experts, part_of


def stage_of(stacked, total):
    """(the stage of some stacked experts, of which the last ones up to `total` have no weights, the experts alone)."""
    stacked = copy.deepcopy(stacked)
    stacked.total_experts = total
    experts = Experts(stacked, ROLES)
    parts = {}
    for number in range(experts.shape.experts):
        for role, leaf in ROLES.items():
            holder = stacked.down_proj if role == "down" else stacked.gate_up_proj
            parts[f"moe.{number}.{leaf}"] = part_of(holder, number, role, "weight", experts.shape)
    return ExpertsStage("moe", experts, {}, {}, lambda name: (parts[name], None)), experts


def test_experts_without_weights_hand_on_what_they_are_given():
    stacked = next(iter(tiny_mixtures.experts(tiny_mixtures.build("mixtral")).values()))
    stage, experts = stage_of(stacked, total=tiny_mixtures.EXPERTS + 2)
    stage.through()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 64, generator=generator)
    weights, index = torch.rand(9, tiny_mixtures.EXPERTS + 2, generator=generator).topk(3, -1)
    assert (index >= tiny_mixtures.EXPERTS).any()
    together = experts(hidden, index, weights)
    with torch.no_grad():
        own = stacked(
            hidden, index.clamp(max=tiny_mixtures.EXPERTS), weights
        )  # skips what is no expert of its own
        handed = (hidden * (weights * (index >= tiny_mixtures.EXPERTS)).sum(-1, keepdim=True)) + own
    torch.testing.assert_close(together, handed)
    at = (True, 0)
    stage.record(at, lambda: experts(hidden, index, weights))
    routed = stage.recorded(at)
    for expert in range(tiny_mixtures.EXPERTS):
        tokens = routed.tokens(expert)
        routed.add(expert, stage.open(expert, torch.device("cpu"))(routed.inputs(expert, tokens)))
    stage.finish()
    stage.at = at
    torch.testing.assert_close(experts(hidden, index, weights), handed)


def test_nothing_reaches_experts_that_the_block_does_not_call():
    """Those of pictures, where the text has none."""
    stacked = next(iter(tiny_mixtures.experts(tiny_mixtures.build("mixtral")).values()))
    stage, _ = stage_of(stacked, total=tiny_mixtures.EXPERTS)
    stage.record((True, 0), lambda: None)
    routed = stage.recorded((True, 0))
    assert routed.count == 0
    assert routed.inputs(1, routed.tokens(1)).shape == (0, 64)
