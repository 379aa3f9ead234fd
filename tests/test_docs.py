"""What the documents point to: every relative link leads somewhere, every quoted command can be typed."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from quantkit.cli.verbs import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
HISTORY = {"LOG.md", "CHANGELOG.md"}  # name commands as they were
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    .*$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
COMMAND = re.compile(r"^(?:\$ |# |.*/)?(?:quantkit (.*)|python3? -m (quantkit[\w.]*) ?(.*))$")


class Taken(Exception):
    """A program has parsed its arguments without a complaint."""


def anchors(page: Path) -> set[str]:
    """The names that headings get on a rendered page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    text = INLINE.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    return broken


def commands(text: str) -> list[tuple[str | None, list[str]]]:
    """(module or None for `quantkit`, arguments) of every command in the code of a page."""
    prose = INDENTED.sub("", FENCED.sub("", text))
    pieces = [" ".join(code.split()) for code in INLINE.findall(prose)]
    pieces += [line for block in FENCED.findall(text) + INDENTED.findall(text) for line in block.splitlines()]
    found = []
    for part in (part for piece in pieces for part in piece.split("&&")):
        match = COMMAND.match(part.strip())
        if match and "..." not in (match[2] or ""):
            typed = match[1] if match[1] is not None else match[3]
            found.append((match[2], shlex.split(typed.replace("[", "").replace("]", ""), comments=True)))
    return found


def complaint(module: str | None, arguments: list[str], monkeypatch) -> str | None:
    """Why this cannot be typed, or None. A command without arguments is only a name."""
    if module in (None, "quantkit"):
        verb = arguments[0] if arguments else "--help"
        if verb.startswith("--") or verb == "VERB":
            return None
        if verb not in cli.commands:
            return f"no verb {verb}"
        try:
            cli.commands[verb].make_context(verb, arguments[1:])
        except click.BadParameter:  # a placeholder such as N for a value, or an argument that is left out
            return None
        except click.UsageError as error:
            return error.format_message()
        return None
    program = importlib.import_module(module)
    parse = argparse.ArgumentParser.parse_args

    def typed(parser, *_):
        parse(parser, arguments)
        raise Taken

    if not arguments:
        return None if callable(getattr(program, "main", None)) else f"{module} has no main"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", typed)
    try:
        program.main()
    except Taken:
        return None
    except SystemExit:
        return f"{module} does not take {arguments}"
    finally:
        monkeypatch.undo()
    raise AssertionError(f"{module} parsed nothing")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda page: page.name)
def test_every_quoted_command_can_be_typed(page, monkeypatch):
    typed = commands(page.read_text(encoding="utf-8"))
    complaints = [complaint(module, arguments, monkeypatch) for module, arguments in typed]
    assert [c for c in complaints if c] == []


def test_a_broken_link_and_a_wrong_command_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[x](#a-b) [y](#c) [z](gone.md) [w](https://x.org)\n`quantkit inspect\nX --depth 3`\n"
    )
    assert broken_links(page) == ["#c", "gone.md"]
    assert commands(page.read_text()) == [(None, ["inspect", "X", "--depth", "3"])]
    assert "--depth" in complaint(None, ["inspect", "X", "--depth", "3"], monkeypatch)
    assert complaint(None, ["measure"], monkeypatch) == "no verb measure"
    assert complaint("quantkit.bench.roofline", ["--cores", "2"], monkeypatch)
