"""Text that is not ours reaches the terminal as text: no markup, no control characters."""

import ast
from pathlib import Path

import pytest
from rich.table import Table

from quantkit.cli import output
from quantkit.cli.main import run
from quantkit.cli.output import make_console
from quantkit.cli.progress import PlainProgress, TerminalProgress
from quantkit.cli.terminal import say, visible

CLI = Path(output.__file__).parent
HOSTILE = "[/i] [red]re:.*[ab] :smile: \x1b[31mred \x07 \r \x9b2J ‮ \udce9"


def test_ordinary_text_is_not_changed():
    text = "model.layers.0 ± 2 × 3, ß, 中文, 👩‍💻 [x] \\x1b"
    assert visible(text) == text


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\x7f", "\x9b", "\r", "\n", "\u202e", "\u2028", "\ud800"]
)
def test_what_acts_on_a_terminal_is_shown(character):
    shown = visible(f"a{character}b")
    assert character not in shown
    assert shown.isprintable()
    assert ast.literal_eval(f'"{shown}"') == f"a{character}b"


def assert_harmless(text):
    assert not any(c in text for c in "\x1b\x07\r\x9b\u202e\udce9")
    assert "[/i] [red]re:.*[ab] :smile: \\x1b[31mred" in " ".join(text.split())


def test_console_and_messages_show_foreign_text_as_it_is(capsys):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console = make_console()
    console.print(table)
    console.print(HOSTILE)
    say(HOSTILE)
    text = capsys.readouterr().out
    assert_harmless(text)
    assert text.count("[/i]") == 5


@pytest.mark.parametrize("display", [PlainProgress, TerminalProgress])
def test_progress_shows_foreign_text_as_it_is(display, capsys):
    progress = display()
    progress.start(2, HOSTILE)
    progress.block(0, HOSTILE, HOSTILE)
    progress.message(HOSTILE)
    progress.finish()
    assert_harmless(capsys.readouterr().err)


def test_errors_show_foreign_text_as_it_is(capsys):
    assert run(["validate", f"/nowhere/{HOSTILE}"]) == 2
    assert run([f"--{HOSTILE}"]) == 2
    assert run([HOSTILE]) == 2
    assert not any(c in capsys.readouterr().err for c in "\x1b\x07\r\x9b\u202e\udce9")


def test_every_verb_prints_through_one_place():
    """Only terminal.py calls click's echo, and only output.py makes a console."""
    problems = []
    for file in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                allowed = {"terminal.py": {"click.echo"}, "output.py": {"click.echo"}}.get(file.name, set())
                if name in {"print", "click.echo", "click.secho", "Console", "sys.stdout.write"} - allowed:
                    problems.append(f"{file.name}:{node.lineno}: {name}")
    assert problems == []
