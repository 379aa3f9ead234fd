"""With outlier channels, 8 bits for all inputs of a layer break the model, and SmoothQuant repairs it."""

import pytest
import quantkit_eval
import torch

import quantkit
from quantkit import assets
from quantkit.bench.quality.outliers import inject
from quantkit.checkpoint.load import load
from quantkit.models.tokenizer import open_tokenizer

STATIC = {
    "weights": {"preset": "W8A8_STATIC", "algorithm": "rtn"},
    "calibration": {"samples": 16, "sequence_length": 256},
}


@pytest.mark.slow
def test_static_inputs_collapse_and_smoothquant_rescues_them(tmp_path):
    inject(tmp_path / "outliers", assets.default_model())
    over = {}
    for name, transforms in (("plain", []), ("smoothed", ["smoothquant"])):
        recipe = STATIC | {"transforms": transforms}
        quantkit.quantize(recipe, tmp_path / "outliers", tmp_path / name, evaluate=False, device="cpu")
        report = quantkit_eval.evaluate(
            load(tmp_path / name, device="cpu", dtype=torch.float32),
            open_tokenizer(assets.default_model()),
            assets.evaluation_text(),
            baseline=load(assets.default_model(), device="cpu"),
            context=256,
            max_tokens=4096,
        )
        assert report.original is not None
        over[name] = report.quantized.perplexity / report.original.perplexity - 1
    assert over["plain"] > 0.5
    assert abs(over["smoothed"]) < 0.01
