"""--json FILE writes to what FILE is, and - is standard output."""

import json
import os
import stat
import threading

import pytest
from click.testing import CliRunner

from quantkit import assets
from quantkit.cli.main import run
from quantkit.cli.output import write_report
from quantkit.cli.verbs import cli

INSPECT = ["inspect", str(assets.default_model()), "--device", "cpu", "--json"]
WITH_JSON = [name for name, verb in cli.commands.items() if any(p.name == "json_file" for p in verb.params)]


def test_the_verbs_that_measure_have_it():
    assert {"quantize", "eval", "inspect", "kernels", "bench"} <= set(WITH_JSON)


def test_minus_is_standard_output_and_nothing_else_is_on_it(capfd):
    assert run([*INSPECT, "-"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["schema"] == "quantkit-inspect/1"
    assert "weights in memory" in captured.err


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link(tmp_path, dangling):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target.name)
    if not dangling:
        target.write_text("old")
    assert run([*INSPECT, str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["totals"]


def test_a_regular_file_keeps_its_mode_and_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    file.chmod(0o640)
    with open(file) as before:
        assert run([*INSPECT, str(file)]) == 0
        assert before.read() == "old"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert json.loads(file.read_text())["totals"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert run([*INSPECT, str(pipe)]) == 0
    reader.join()
    assert json.loads(read[0])["totals"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_device_stays_a_device(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    assert run([*INSPECT, str(link)]) == 0
    assert link.is_symlink()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "name", ["", "folder", "missing/x.json", "loop", "x" * 300, "a\0b", "loop/x.json", "/dev/null/x"]
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for verb in WITH_JSON:
        arguments = {"bench": [], "kernels": []}.get(verb, ["nothing-here"])
        assert run([verb, *arguments, "--json", name]) == 2
        told = capsys.readouterr().err
        assert "--json" in told
        assert "Traceback" not in told


def test_a_report_that_cannot_be_written_is_still_printed(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantkit.cli.output.write_atomically", full)
    assert run([*INSPECT, str(tmp_path / "x.json")]) == 2
    captured = capsys.readouterr()
    assert "weights in memory" in captured.out
    assert "the disk is full" in captured.err


def test_dashes_work_through_clicks_own_runner():
    assert json.loads(CliRunner().invoke(cli, [*INSPECT, "-"]).stdout)["totals"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    file = tmp_path / "x.json"
    write_report(
        str(file), {"a": [float("nan"), (float("-inf"), 1.5)], "b": {"c": float("inf")}, "d": "\udce9"}
    )
    assert json.loads(file.read_text()) == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "?"}
