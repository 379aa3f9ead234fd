"""The GPU benchmarks on the CPU: what they do, not how fast."""

import json
import time

import pytest
import torch

from quantkit.bench import gpu_suite
from quantkit.bench.models import gpu_decode
from quantkit.bench.synthetic import Shape
from quantkit.runtime import GraphDecoder, dispatch

TINY = Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)


@pytest.fixture
def _small_roofline(monkeypatch):
    """A bandwidth without measuring, and decoders with captured steps although there is no GPU."""
    monkeypatch.setattr(gpu_decode, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(dispatch, "graphed", GraphDecoder)


@pytest.mark.usefixtures("_small_roofline")
def test_every_engine_is_checked_and_timed():
    arguments = ["--device", "cpu", "--layers", "2", "--bits", "4", "--backend", "reference", "--new", "8"]
    arguments = gpu_decode.parser().parse_args([*arguments, "--prompt", "9", "--rounds", "2"])
    rows = gpu_decode.report(arguments, TINY)["rows"]
    assert [row["engine"] for row in rows] == [
        "bf16 eager",
        "bf16 graph",
        "W4A16 reference eager",
        "W4A16 reference graph",
    ]
    assert all(row["wrong"] is None and row["tokens_per_s"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    dense, packed = rows[0]["bytes_per_step"], rows[2]["bytes_per_step"]
    linears = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)  # weights in the blocks
    assert dense - packed == pytest.approx(linears * (2 - 4.125 / 8), rel=0.01)


@pytest.mark.usefixtures("_small_roofline")
def test_wrong_logits_are_not_timed(monkeypatch):
    model = gpu_decode.dense(TINY, 1, torch.device("cpu"))
    ids = torch.randint(0, 160, (1, 9))
    assert gpu_decode.wrong(model, ids, 8) is None
    monkeypatch.setattr(GraphDecoder, "_steps", lambda self, *rest: self._eager(rest[0], None, True, {}))
    assert "off by" in gpu_decode.wrong(model, ids, 8)
    (row,) = gpu_decode.measure({"graph": (model, True)}, ids, 8, 1)
    assert "tokens_per_s" not in row


CHECKS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(5))
def test_it(i):
    assert i < LIMIT
"""


def test_the_suite_deals_out_tests_and_counts_them(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_suite, "PROCESSES", 2)
    monkeypatch.setattr(gpu_suite, "TESTS", (str(file),))
    file.write_text(CHECKS.replace("LIMIT", "4"))
    found = gpu_suite.tests(tmp_path, time.monotonic() + 600)  # pytest's own limit comes first
    assert (found["collected"], found["tests"], found["failures"], found["ok"]) == (5, 5, 1, False)
    assert len(found["failed"]) == 1
    file.write_text(CHECKS.replace("LIMIT", "5"))
    assert gpu_suite.tests(tmp_path, time.monotonic() + 600)["ok"]


def test_a_step_without_time_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "STEPS", {"one": lambda work, deadline: {"ok": True}, "two": None})
    found = gpu_suite.run(tmp_path, ["one"], 60)
    assert found["one"]["ok"]
    found = gpu_suite.run(tmp_path, ["two"], 0)
    assert found["two"] == {"ok": False, "status": "out of time"}
    assert found["one"]["ok"]  # of the first call
    assert json.loads((tmp_path / "two.json").read_text())["ok"] is False


def test_a_child_that_runs_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    late = gpu_suite._child(tmp_path, time.monotonic() + 1, "slow", "slow")
    assert late == {"ok": False, "status": "out of time", "report": None}
