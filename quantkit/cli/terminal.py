"""Text on its way to the terminal: characters that would act on a terminal are shown instead of sent.

Names of files, tensors and layers, values of recipes and generated text come from outside. Every verb prints through
`say` or through the console of `output.make_console`, so none of these can move the cursor, set the window's title,
hide a line or be read as markup.
"""

from __future__ import annotations

import re
from typing import IO

import click

# Control characters (C0, DEL, C1), marks that reorder text, line separators, halves of surrogate pairs.
_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every character that acts on a terminal written as an escape: "\x1b[31m" becomes r"\x1b[31m".

    keep: characters left alone, such as the line breaks of a message.
    """
    return _ACTS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def say(text: str = "", err: bool = False, nl: bool = True, file: IO[str] | None = None) -> None:
    """Print a message, line breaks and tabs kept; on standard error if asked, or if JSON goes to standard output.

    file: a stream to print to instead.
    """
    click.echo(visible(text, keep="\n\t"), file=file, err=err or json_on_stdout(), nl=nl)


def json_on_stdout() -> bool:
    """Whether the running verb was given `--json -`; standard output then holds the JSON report and nothing else."""
    context = click.get_current_context(silent=True)
    return context is not None and context.params.get("json_file") == "-"
