"""Commands that a text quotes, and whether they can be typed."""

import argparse
import importlib
import re
import shlex

import click

from quantkit.cli.verbs import cli

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    .*$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"^(?:\$ |# |.*/)?(?:quantkit (.*)|python3? -m (quantkit[\w.]*) ?(.*))$")


class Taken(Exception):
    """A program has parsed its arguments without a complaint."""


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
