"""The switch between joined and apart, and the report, on a tiny model."""

import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit.bench.models import siblings
from quantkit.bench.models.decode import Way, models, open_model
from quantkit.bench.synthetic import Shape

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")
TINY = Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=8192)


def test_joined_and_apart_are_measured_in_turns_and_give_the_same_tokens(tmp_path):
    report = siblings.run(tmp_path, 1, TINY, rounds=1, new=2)
    assert report["engines"].keys() == {"float, joined", "float, apart", "int8, joined", "int8, apart"}
    assert all(ratio > 0 for found in report["joined_over_apart"].values() for ratio in found.values())
    model = open_model(models(tmp_path, 1, TINY)["packed"], Way("packed", backend="cpu"))
    joined, ids = siblings.switch(model), torch.arange(5)[None]
    assert any(getattr(module, "siblings", None) for module in model.modules())
    with torch.inference_mode():
        together = model(ids).logits
        joined(False)
        assert not any(getattr(module, "siblings", None) for module in model.modules())
        assert torch.equal(model(ids).logits, together)
        joined(True)
        assert any(getattr(module, "siblings", None) for module in model.modules())
        assert torch.equal(model(ids).logits, together)
