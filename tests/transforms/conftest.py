"""A block of a tiny model as a transform is given it, for the tests of transforms."""

import pytest
import tiny_models
import torch

from quantkit.calibration.walk import Wanted, walk
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe

RECIPE = {"weights": {"algorithm": "rtn", "preset": "W8A16"}, "calibration": {"sequence_length": 24}}


@pytest.fixture
def opened(tmp_path):
    """opened(family, rules, change) -> the first block of a tiny model, full stream of four windows."""
    walks = []

    def make(family, rules=(), change=lambda model: None, dtype=torch.float32):
        model = tiny_models.build(family)
        change(model)
        source = Source(read_checkpoint(tiny_models.save(model, tmp_path / family, dtype=dtype)))
        plan = build_plan(parse_recipe(RECIPE | {"rules": list(rules)}), source.headers)
        windows = tiny_models.ids(24, batch=4, vocabulary=100)
        walks.append(walk(skeleton.build(source), source, plan, windows, Wanted(4, False)))
        return next(walks[-1])

    yield make
    for each in walks:
        each.close()
