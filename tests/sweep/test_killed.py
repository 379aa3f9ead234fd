"""A sweep that is killed ten times ends with the same table as one that is not."""

import json
import os
import signal

import interrupt
import pytest
import tiny_models
import torch

from quantkit import assets
from quantkit.sweep.run import sweep

FACTS = ("seconds", "steps", "peak_rss_bytes", "peak_rss_measured_bytes", "speed")


@pytest.fixture
def arguments(tmp_path):
    tiny_models.save(
        tiny_models.FAMILIES["llama"](num_hidden_layers=2), tmp_path / "model", dtype=torch.bfloat16
    )
    (tmp_path / "text").write_text(assets.calibration_text().read_text()[:8000])
    asked = {
        "recipe": {
            "weights": {"group_size": 32},
            "calibration": {"data": [str(tmp_path / "text")], "samples": 2, "sequence_length": 32},
        },
        "grid": {
            "methods": ["rtn", {"name": "original", "algorithm": {"name": "gptq", "stream": "original"}}],
            "bits": [4, 3],
            "kv_cache": ["none", "INT8"],
        },
        "evaluation": {"tokens": 128, "text": [str(tmp_path / "text")]},
        "speed": False,
    }
    return asked, tmp_path / "model"


def killed(arguments, output, moment):
    """Whether a sweep was killed at its `moment`-th write, fsync, rename or removal; else it ended."""
    child = os.fork()
    if not child:
        count = 0

        def tick(what, name):
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        torch.set_num_threads(1)
        with interrupt.watching(tick):
            sweep(*arguments, output)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def table(output):
    result = json.loads((output / "sweep.json").read_text())
    for key in ("seconds", "date", "statistics"):
        del result[key]
    for cell in result["cells"]:
        for key in FACTS:
            cell.pop(key)
    return result


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_with_the_same_table(arguments, tmp_path):
    """Each run is killed at its 45th write or rename: a cell that quantizes takes about two of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert not killed(arguments, tmp_path / "whole", -1)
        for number in range(10):
            assert killed(arguments, tmp_path / "parts", 45), (
                f"it had ended before it was killed, at {number}"
            )
        assert not killed(arguments, tmp_path / "parts", -1)
    finally:
        torch.set_num_threads(before)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert not list((tmp_path / "parts" / "cells").glob("*.tmp"))
