"""The synthetic mixture and what is measured on it, as small as can be."""

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from quantkit.bench import synthetic
from quantkit.bench.models import experts
from quantkit.models.headers import read_checkpoint

TINY = synthetic.Mixture(hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=8192, experts=4, top=2)


def test_synthetic_mixture_is_whole_and_has_the_shape(tmp_path):
    folder = synthetic.make_mixture(tmp_path / "moe", 2, TINY)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    down = model.model.layers[1].mlp.experts.down_proj
    assert down.shape == (4, 64, 96)
    assert 0.018 < down.std() < 0.022
    assert not torch.equal(down[0], down[1])
    assert model(input_ids=tiny_models.ids(8), use_cache=False).logits.isfinite().all()
    again = synthetic.make_mixture(tmp_path / "again", 2, TINY)
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_experts_are_as_large_as_the_dense_mlps_they_are_timed_against(tmp_path):
    shape = synthetic.MIXTURES["moe"]
    dense = synthetic.make(tmp_path, 1, shape=synthetic.Shape(*TINY[:5]))
    shapes = {n: i.shape for n, i in read_checkpoint(dense).tensors.items() if ".mlp." in n}
    assert sorted(shapes.values()) == [(64, 96), (96, 64), (96, 64)]
    assert (
        experts.WINDOWS * shape.top % shape.experts == 0
    )  # whole windows hold an expert's share of the tokens
    assert 2.4e9 < 2 * 3 * shape.hidden * shape.intermediate * shape.experts * experts.FULL_DEPTH < 2.6e9


@pytest.mark.slow
def test_measured_rows_have_peaks_and_ratios(tmp_path):
    tiny = TINY._replace(hidden=128, intermediate=128)
    report = experts.count(tmp_path, (2, 4), tiny)
    assert [row["experts"] for row in report["rows"]] == [2, 4]
    assert min(row["peak_anonymous_bytes"] for row in report["rows"]) > 1e8
    timed = experts.time_per_expert(tmp_path, 1, tiny)
    assert timed["expert"]["both"]["median"] > 0
    assert timed["expert_over_dense"]["median"] > 0
    assert list(tmp_path.iterdir()) == []
