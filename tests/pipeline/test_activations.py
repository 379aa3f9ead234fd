"""Shipped recipes with quantized inputs, on the embedded model: the report is what `quantkit eval` measures later."""

import json

import pytest

import quantkit
from quantkit import assets
from quantkit.checkpoint.plugin import packed_linears
from quantkit.cli.main import run

SHORT = ["calibration.samples=8", "calibration.sequence_length=256"]
# The largest KL to the original that is accepted: loose, as there is little calibration; a wrong scale gives far more.
RECIPES = {"w8a8-int8-dynamic": 0.005, "w8a8-fp8-static": 0.02}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_report_is_what_eval_measures_with_rounded_inputs(name, tmp_path):
    output = tmp_path / "out"
    report = quantkit.quantize(name, output=output, overrides=SHORT, eval_tokens=1024).report.evaluation
    assert 0 < report.kl_mean < RECIPES[name]
    command = ["eval", str(output), "--baseline", str(assets.default_model()), "--max-tokens", "1024"]
    assert run([*command, "--context", str(report.context), "--json", str(tmp_path / "eval.json")]) == 0
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["kl_mean"] == pytest.approx(report.kl_mean, rel=1e-6)
    assert again["quantized"]["perplexity"] == pytest.approx(report.quantized.perplexity, rel=1e-6)
    layers = [layer for _, layer in packed_linears(quantkit.load(output))]
    assert len(layers) == 56
    assert all(layer.scheme.inputs is not None for layer in layers)
