import json
from types import SimpleNamespace

import pytest
import torch

from quantkit.bench.kernels import lane, ops, overhead
from quantkit.bench.kernels import table as kernels
from quantkit.bench.kernels.cell import cell
from quantkit.bench.machine import native_available, where
from quantkit.bench.roofline import Roofline, measure

ROOFLINE = Roofline(1e10, {"int8": 1e12, "fp32": 1e11, "bf16": 0.0}, "made up")


def small(given, n=32, k=256, m=2):
    loaded = [lane.Loaded(op, n, k, rotation=1 << 16) for op in given]
    return cell(loaded, n, k, m, ROOFLINE, rounds=3, rotation=1 << 16, burst=0.0)


def test_every_cpu_op_is_right_or_says_why_not():
    measured = small(ops.cpu_ops(), m=1)
    assert measured["refused"] == {}
    assert {ops.BF16, ops.INT4} <= {row["op"] for row in measured["ops"]}
    for row in measured["ops"]:
        assert 0 <= row["relative_rms_error"] < lane.TOLERANCE, row["op"]
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["share_of_read"] == pytest.approx(
            row["weight_bytes"] / (row["us"] * 1e-6) / measured["read_bytes_per_s"]
        )


def test_a_wrong_op_is_not_timed():
    right = ops._dense_op("right", torch.float32, "fp32")
    wrong = right._replace(name="wrong", run=lambda x, weights: 1.1 * (x @ weights["w"].T))
    unfinished = right._replace(name="nan", run=lambda x, weights: x @ weights["w"].T * float("nan"))
    measured = small([right, wrong, unfinished])
    assert [row["op"] for row in measured["ops"]] == ["right"]
    assert "error 0.1" in measured["refused"]["wrong"]
    assert "nan" in measured["refused"]["nan"]


def test_rotation_is_filled_with_memory_of_its_own():
    op = ops._dense_op("dense", torch.float32, "fp32")
    weights = {"w": torch.ones(16, 64), "constant": "kept"}
    rotating = lane.copies(op, weights, 20 * 16 * 64 * 4 - 1)
    assert len(rotating) == 20
    assert {copy["constant"] for copy in rotating} == {"kept"}
    assert len({copy["w"].data_ptr() for copy in rotating}) == 20
    assert lane.weight_bytes(weights) == 16 * 64 * 4


def test_every_weight_of_the_rotation_is_used_in_turn():
    used = []
    op = ops._dense_op("dense", torch.float32, "fp32")._replace(run=lambda x, weights: used.append(weights))
    burst, _ = lane._cpu_burst(op, [{"w": letter} for letter in "abc"], torch.ones(1), 0.0, 0.0)
    used.clear()
    for _ in range(4):
        burst()
    letters = "".join(weights["w"] for weights in used)
    assert letters in "abcabcabc"
    assert len(letters) == 4


def test_weights_are_made_once_for_all_numbers_of_tokens():
    made = []
    dense = ops._dense_op("dense", torch.float32, "fp32")
    op = dense._replace(
        build=lambda source, dtype: made.append(source.stored.spec.bits) or dense.build(source, dtype)
    )
    loaded = lane.Loaded(op, 32, 256, rotation=1 << 16)
    assert not made
    assert all(loaded.lane(m, burst=0.0).error < 1e-5 for m in (1, 5))
    assert made == [8]


def test_long_calls_have_fewer_rounds_and_ratios_are_of_the_rounds_they_share():
    calls = []

    def counting(name, seconds, *taken):
        left = iter(taken)
        return lane.Lane(name, "fp32", 1, None, lambda: calls.append(name) or next(left), seconds)

    lanes = [
        counting("long", lane.LONG * 1.01, 6.0, 20.0, 100.0),
        counting(ops.BF16, lane.LONG, *(x for timed in range(1, 6) for x in (0.0, timed))),  # warm, timed
    ]
    found = cell([], 32, 256, 512, ROOFLINE, rounds=5, rotation=1 << 16, peers=lambda *_: lanes)
    long, bf16 = found["ops"]
    assert (long["rounds"], bf16["rounds"]) == (3, 5)
    assert calls == ["long", ops.BF16, ops.BF16] * 3 + [ops.BF16] * 4
    assert (long["us"], bf16["us"]) == (20e6, 3e6)
    assert long["times_faster_than"] == {ops.BF16: pytest.approx(0.1)}  # of 1/6, 2/20 and 3/100


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(lane, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_an_op_runs_out_of_patience_before_its_long_call_is_made(clock):
    tokens = []

    def run(x, weights):
        tokens.append(len(x))
        clock.seconds += 0.05 * len(x)
        return x @ weights["w"].T

    patient = ops._dense_op("patient", torch.float32, "fp32")._replace(run=run)
    impatient = patient._replace(patience=5.0)
    with pytest.raises(ops.Refused, match=r"would take 10\.0 s, more than 5"):
        lane.Loaded(impatient, 32, 256, rotation=1 << 16).lane(200)
    assert max(tokens) == lane.TOKENS_TRIED
    assert lane.Loaded(impatient, 32, 256, rotation=1 << 16).lane(90).seconds == pytest.approx(4.5)
    long = lane.Loaded(patient, 32, 256, rotation=1 << 16).lane(200)
    assert long.long
    assert max(tokens) == lane.TOKENS_TRIED  # none was needed to see how long it takes
    assert long.burst() == pytest.approx(10.0)
    assert tokens.count(200) == 1
    tokens.clear()
    assert lane.Loaded(patient, 32, 256, rotation=1 << 16).lane(30).long
    assert tokens == [16, 30, 30, 30]  # checked, tried twice, measured once


def test_only_ops_that_no_ratio_is_against_run_out_of_patience():
    impatient = {op.name for op in ops.cpu_ops() if op.patience is not None}
    assert impatient == {"torch fp32", "torch int8 channel", "torch int8 products only"}


def test_schemes_that_do_not_fit_are_refused_by_reason():
    int4 = [op for op in ops.cpu_ops() if op.name == ops.INT4]
    assert "divisible by 128" in small(int4, k=192)["refused"][ops.INT4]
    assert "N divisible by 16" in small(int4, n=24)["refused"][ops.INT4]


def test_shapes_are_names_or_literals():
    assert kernels.shapes(["4096x11008", "llama-3-8b"])[:2] == [(4096, 11008), (4096, 4096)]
    with pytest.raises(ValueError, match="unknown shape"):
        kernels.shapes(["70b"])


def test_run_saves_after_every_cell(capsys):
    saved = []
    report = kernels.run(
        ["32x256"],
        [1, 3],
        only=["nothing else"],
        rounds=1,
        rotation=1 << 20,
        save=lambda report: saved.append(len(report["cells"])),
    )
    assert saved == [1, 2]
    assert {row["op"] for row in report["cells"][0]["ops"]} == {ops.BF16, ops.INT4}
    assert {"cpu", "torch", "commit", "threads", "isa"} <= report["machine"].keys()
    json.dumps(report)
    assert "M=3" in capsys.readouterr().out


def test_roofline_takes_the_larger_bound():
    assert ROOFLINE.seconds(1e10, 1e10, "int8") == 1.0
    assert ROOFLINE.seconds(1e9, 2e12, "int8") == 2.0
    assert ROOFLINE.seconds(0, 1e11, "bf16") == 1.0  # no bf16 instruction: fp32 bounds it


def test_roofline_measures_something():
    found = measure(threads=1, buffer=1 << 21, rounds=1)
    assert found.read > 1e8
    assert found.peak["fp32"] > 0 or where("cpu")["isa"] == "portable"  # whose peak no instruction tells


@pytest.mark.skipif(not native_available(), reason="the native CPU library is not built")
def test_call_overhead_times_every_way_of_calling():
    found = overhead.call_overhead(calls=3, rounds=1)
    assert found.keys() == {"ctypes", "forward", "layer", "run", "op"}
    assert all(us > 0 for us in found.values())
