"""Ctrl-C at any moment, and standard streams that are closed, full, or abandoned by their reader."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from quantkit import assets
from quantkit.cli import streams
from quantkit.cli.main import run

QUANTKIT = [sys.executable, "-m", "quantkit"]
RECIPES = [*QUANTKIT, "recipes"]


def shell(command, *arguments):
    """Run `command` in a shell, in which "$@" is the quantkit command line."""
    return subprocess.run(
        ["sh", "-c", command, "sh", *RECIPES[:3], *(arguments or ["recipes"])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        ('"$@" >&-', 0, ""),
        ('"$@" > /dev/full', 1, "cannot write to standard output: No space left on device"),
        ('"$@" 2>&-', 0, ""),
        ('"$@" 2>/dev/full', 0, ""),
        ('"$@" <&- >&- 2>&-', 0, ""),
        ('{ "$@"; echo $? >&3; } 3>&2 | true', 0, "1"),
    ],
)
def test_a_stream_that_takes_nothing_is_no_traceback(redirect, code, says):
    done = shell(redirect)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", ">&-", "<&- >&- 2>&-"])
def test_a_run_whose_messages_go_nowhere_finishes(tmp_path, redirect):
    model, out = str(assets.default_model()), tmp_path / "out"
    done = shell(
        f'"$@" {redirect}', "quantize", "w4a16-rtn", "--model", model, "--output", str(out), "--no-eval"
    )
    assert done.returncode == 0, done.stderr
    assert (out / "quantkit.json").exists()


def test_a_wrong_input_keeps_its_exit_code_when_nobody_can_be_told():
    assert shell('"$@" 2>&-', "validate", "no-such-recipe").returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_encode_are_escaped(tmp_path, encoding):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\xff-\xe4\xb8\xad")
    done = subprocess.run(
        [*QUANTKIT, "validate", name],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_streams_of_the_process_escape_and_drop(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    messages = streams._text(streams._Messages(full, "w", closefd=False), None)
    messages.write("lost")
    messages.flush()
    output = streams._text(streams._Output(full, "w"), None)
    output.write("kept?")
    with pytest.raises(streams.OutputLost, match="No space left"):
        output.flush()
    with pytest.raises(streams.OutputLost):  # closing tries once more
        output.close()


@pytest.mark.parametrize("after", [0.0, 0.03, 0.1, 0.2, 0.4])
def test_ctrl_c_before_the_imports_end_is_exit_code_130(tmp_path, after):
    """The signal is sent as soon as the process runs quantkit's own code, and a little later each time."""
    begun = tmp_path / "begun"
    code = (
        "import pathlib, sys\n"
        "from quantkit.cli import main as entry\n"
        "repair = entry.streams.repair\n"
        f"entry.streams.repair = lambda: (repair(), pathlib.Path({str(begun)!r}).touch())\n"
        "sys.argv[1:] = ['quantize', 'w4a16-gptq', '--output', sys.argv[0] + '-out']\n"
        "entry.main()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    while not begun.exists():
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.endswith("interrupted\n")
    assert "Traceback" not in told


def test_ctrl_c_that_a_library_turns_into_another_error_is_an_interrupt(monkeypatch, capsys):
    from quantkit.cli import main as entry
    from quantkit.cli import quantize as quantize_verb

    def import_interrupted():
        try:
            entry._interrupt(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(entry, "_interrupts", [])
    monkeypatch.setattr(quantize_verb, "make_progress", import_interrupted)
    assert run(["quantize", "w4a16-gptq"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """`nohup`, and a shell's background jobs, start programs with SIGINT ignored."""
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c",
         "import signal, quantkit.cli.main as m; m.run = lambda: int(signal.getsignal(2) != signal.SIG_IGN); m.main()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0


def test_a_terminal_gets_no_raw_escape_from_a_name(tmp_path):
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [*QUANTKIT, "validate", "evil\x1b]0;title\x07[/i]"],
        stdout=secondary,
        stderr=secondary,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
    )
    assert process.wait(60) == 2
    os.close(secondary)
    told = os.read(primary, 1 << 16)
    os.close(primary)
    assert b"\x1b]0" not in told
    assert b"\\x1b]0;title\\x07[/i]" in told
