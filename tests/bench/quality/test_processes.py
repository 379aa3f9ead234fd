import pytest
import tiny_models
import torch

from quantkit.bench.quality import processes

SMALL = ("weights.group_size=64", "calibration.samples=4", "calibration.sequence_length=16")


@pytest.mark.slow
def test_rounds_compare_one_process_with_two(tmp_path, capsys):
    model = tiny_models.save(tiny_models.build("llama"), tmp_path / "tiny", torch.bfloat16)
    report = processes.measure(tmp_path / "work", model, processes=2, rounds=1, tokens=256, overrides=SMALL)
    one, two = report["engines"][processes.ONE], report["engines"][processes.SEVERAL]
    for kind in ("calibration", "whole"):
        assert report["faster"][kind] == one[kind]["median"] / two[kind]["median"]
        assert one["calibration"]["median"] < one["whole"]["median"]
    assert all(each["kl_mean"] > 0 for each in report["kl"].values())
    assert "several processes" in capsys.readouterr().out


def test_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with \[2\].*No such command"):
        processes.run(["nothing"], 1, tmp_path)
