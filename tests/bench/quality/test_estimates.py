"""The command that compares the time left that a run shows with the time that it took."""

import pytest
import tiny_models
import torch

from quantkit.bench.quality import estimates
from quantkit.pipeline.clock import Clock

SMALL = ("weights.group_size=32", "calibration.samples=2", "calibration.sequence_length=16")


@pytest.mark.slow
def test_each_part_has_its_estimate_and_the_truth(tmp_path, capsys):
    model = tiny_models.build("llama")
    folder = tiny_models.save(model, tmp_path / "tiny", torch.bfloat16)
    (row,) = estimates.measure(["w4a16-rtn"], str(folder), SMALL, eval_tokens=256, cpu=True)
    assert (row["recipe"], row["eval_tokens"]) == ("w4a16-rtn", 16 * 15)  # the first of 16 is not predicted
    parts = [after["part"] for after in row["after"]]
    assert parts == [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)] + [
        "outside the blocks"
    ]
    truth = [after["truth"] for after in row["after"]]
    assert truth == sorted(truth, reverse=True)
    assert row["seconds"] > truth[0] > 0
    for after in row["after"]:
        assert after["estimate"] > 0  # with the evaluation in it, from the first block on
        assert after["error_percent"] == pytest.approx(100 * (after["estimate"] / after["truth"] - 1))
    assert capsys.readouterr().out == estimates.line(row) + "\n"


def test_the_line_names_the_first_block_and_the_largest_error():
    rows = [estimates._row("a", 12.0, 10.0), estimates._row("b", 2.0, 4.0), estimates._row("c", None, 1.0)]
    told = estimates.line({"recipe": "r", "after": rows, "eval_tokens": 7})
    assert "estimate 12.0 s, truth 10.0 s, error +20.0 %; largest error -50.0 %; 7 tokens" in told
    assert "no estimate" in estimates.line({"recipe": "r", "after": rows[2:], "eval_tokens": None})


def test_the_clock_comes_back(tmp_path):
    before = Clock.now
    with pytest.raises(Exception, match="nowhere"):
        estimates.follow("w4a16-rtn", str(tmp_path / "nowhere"), str(tmp_path / "out"), cpu=True)
    assert Clock.now is before
