import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from quantkit_eval import Fit, Report

from quantkit.checkpoint.records import Size
from quantkit.cli.output import Screen, size
from quantkit.cli.progress import PlainProgress, TerminalProgress, make_progress
from quantkit.cli.quantize import print_report
from quantkit.pipeline.report import RunReport

REPORT = RunReport(
    searches=[],
    output=Path("out/m-r"),
    size=Size(
        original_bytes=16_000_000,
        quantized_bytes=8_000_000,
        linear_bits_per_weight=4.125,
        model_bits_per_weight=8.0,
    ),
    evaluation=Report(
        tokens=20_480,
        windows=40,
        context=512,
        stride=512,
        text=["text"],
        text_sha256="",
        quantized=Fit(31.0, 0.26, 3.43, 0.01),
        original=Fit(30.5, 0.25, 3.41, 0.01),
        delta_nll=0.0163,
        delta_nll_se=0.0021,
        kl_mean=0.0051,
        kl_mean_se=0.0002,
        kl_median=0.003,
        kl_p99=0.04,
        kl_max=0.9,
        top1_agreement=0.955,
    ),
    seconds={"calibrate_quantize": 20.0, "verify": 1.0, "evaluate": 9.0, "total": 33.0},
    cpu_seconds={"calibrate_quantize": 21.0},
    peak_rss_bytes=900_000_000,
    notes=["one [fallback] in layer x"],
    resumed_blocks=0,
)


def shown(report):
    text = io.StringIO()
    print_report(report, Screen(file=text, width=110))
    return text.getvalue()


def test_table_tells_everything():
    text = shown(REPORT)
    for part in (
        "16.00 MB", "8.00 MB (50.0%)", "4.125", "16.00", "30.5000 ± 0.2500", "31.0000 ± 0.2600",
        "0.0163 ± 0.0021",
        "0.00510 ± 0.00020",
        "0.003 / 0.04 / 0.9", "95.50%", "20,480 tokens in windows of 512", "33.0 s",
        "900.00 MB", "note: one [fallback] in layer x", "files: out/m-r",
    ):  # fmt: skip
        assert part in text, part
    assert "already done" not in text


def test_table_without_evaluation():
    text = shown(replace(REPORT, evaluation=None, resumed_blocks=3))
    assert "not evaluated" in text
    assert "3 blocks were already done" in text


def test_the_report_as_json_keeps_its_keys_in_order():
    told = REPORT.to_json()
    assert list(told) == [
        "schema", "output", "size", "evaluation", "seconds", "cpu_seconds", "peak_rss_bytes", "notes", "resumed_blocks",
        "searches", "peak_bytes", "predicted_bytes", "budget",
    ]  # fmt: skip
    assert (told["schema"], told["output"]) == ("quantkit-run/1", "out/m-r")
    assert told["evaluation"]["quantized"]["perplexity"] == 31.0
    assert replace(REPORT, evaluation=None).to_json()["evaluation"] is None


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (16_793_976, "16.79 MB"), (3e13, "30.00 TB")]
)
def test_size(n, text):
    assert size(n) == text


def test_plain_progress_writes_a_line_per_finished_block_and_per_phase(capsys):
    progress = make_progress()
    assert isinstance(progress, PlainProgress)
    progress.phase("reading the source", 0.0)
    progress.phase("reading the source", 0.5, left=9.0)
    progress.start(3, "quantize")
    progress.block(0, "model.layers.0")
    progress.block(1, "model.layers.1", "note", left=75.2)
    progress.block(3, "outside the blocks", left=3675.0)
    progress.phase("verifying", 0.0, left=12.0)
    progress.message("done")
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[0] if "MiB" in line else line for line in lines] == [
        "reading the source 0%",  # half a second later the same phase is not worth a line
        "quantize: 3 blocks",
        "quantize 1/3 model.layers.0",  # nothing is known yet, so no time is shown, least of all 0 s
        "quantize 2/3 model.layers.1, note, 1:15 left",
        "quantize 3/3 outside the blocks, 1:01:15 left",
        "verifying 0%, 0:12 left",
        "done",
    ]


def test_terminal_progress_shows_finished_blocks_and_the_time_left(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = TerminalProgress()
    bar = progress._bar

    def drawn():
        with bar.console.capture() as captured:
            bar.console.print(bar.get_renderable())
        return captured.get()

    bar.console.width = 160
    progress.start(4, "quantize [x]")
    assert "quantize [x]" in drawn()
    assert "0/4" in drawn()
    assert "time left unknown" in drawn()
    progress.block(0, "model.layers.0", left=300.0)
    assert "1/4 model.layers.0" in drawn()
    assert "5:00 left" in drawn()
    now[0] = 60.0  # a block that takes long: the display counts down meanwhile
    assert "4:00 left" in drawn()
    progress.phase("evaluate", 0.25, left=30.0)
    assert "25%" in drawn()
    assert "0:30 left" in drawn()
    progress.finish()


def test_terminal_progress_can_be_finished_at_any_time(capsys):
    progress = TerminalProgress()
    progress.finish()
    for title in ("quantize", "evaluate"):
        progress.start(2, title)
        progress.block(0, "model.layers.0", "")
    progress.finish()
    progress.finish()
    progress.message("[done]")
    assert "[done]" in capsys.readouterr().err
