"""What the verbs share on their way out: a console, the --json option, sizes people can read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console


def _folder_exists(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Known before the work begins, not after."""
    if value is not None and (not Path(value).parent.is_dir() or Path(value).is_dir()):
        raise click.BadParameter(f"{value!r} is no file in an existing folder")
    return value


json_option = click.option(
    "--json", "json_file", metavar="FILE", callback=_folder_exists, help="Write the report here too."
)


def write_report(path: str | None, report: dict[str, Any]) -> None:
    """Write `report` to `path`, in one step, if one was asked for."""
    if path is not None:
        from quantkit.checkpoint.shards import write_json

        write_json(Path(path), report)


def make_console() -> Console:
    """On stdout; piped output is wide, so that no name is cut."""
    return Console(width=None if sys.stdout.isatty() else 200)


def size(n_bytes: float) -> str:
    """16793976 -> "16.79 MB" (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"
