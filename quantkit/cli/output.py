"""What the verbs share on their way out: a console, the --json option, sizes people can read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from quantkit.cli.terminal import json_on_stdout, visible
from quantkit.files import output_error, write_atomically

_HEADLESS_WIDTH = 200  # piped output is wide, so that no name is cut


def _json_file(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Refuse a FILE that cannot be written before the work begins, not after; "-" if FILE is what stdout is."""
    if value is None or value == "-":
        return value
    try:
        target = _target(value)
        folder = target.parent
        writable = os.access(target if target.exists() else folder, os.W_OK)
        looped = target.is_symlink() and not target.exists()
        fits = folder.is_dir() and writable and not looped and not target.is_dir()
    except (OSError, ValueError) as error:
        raise click.BadParameter(
            f"cannot write {value!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not fits:
        raise click.BadParameter(f"{value!r} must be a file that can be written, in an existing folder")
    return "-" if _is_stdout(value) else value


def _target(path: str) -> Path:
    """The file behind a path and its links; a link into /proc (a pipe, say) is left as it is."""
    behind = Path(os.path.realpath(path))
    return behind if behind.exists() or not os.path.exists(path) else Path(path)


def _is_stdout(path: str) -> bool:
    """Whether `path` is the file or pipe that standard output goes to, such as /dev/stdout."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there, out = os.stat(path), os.fstat(sys.stdout.fileno())
        return os.path.samestat(there, out) and (stat.S_ISREG(out.st_mode) or stat.S_ISFIFO(out.st_mode))
    return False


def _page_file(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse a page that cannot be written before the work begins."""
    found = _json_file(context, option, value)
    if found == "-":
        raise click.BadParameter("a page is a file; give it a name, such as report.html")
    return found


page_option = click.option(
    "--report",
    "page_file",
    metavar="FILE",
    callback=_page_file,
    help="Draw the results as an HTML page that needs no network (docs/report.md).",
)

json_option = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    callback=_json_file,
    help="Write the report here too; - is standard output, which then holds nothing else.",
)


def write_report(path: str | None, report: dict[str, Any]) -> None:
    """Write `report` as JSON to what `path` is, if one was asked for.

    "-": standard output. A regular file, also one behind a link: in one step, the link and the mode kept. A device or
    a pipe: written through.
    """
    if path is None:
        return
    text = json_text(report)
    if path == "-":
        click.echo(text, nl=False)
        return
    target = _target(path)
    try:
        mode = target.stat().st_mode if target.exists() else None
        if mode is None or stat.S_ISREG(mode):
            write_atomically(target, iter([text.encode()]))
            if mode is not None:
                target.chmod(stat.S_IMODE(mode))
        else:
            with open(target, "w", encoding="utf-8") as through:
                through.write(text)
    except OSError as error:
        raise output_error(target, error) from error


def json_text(value: object) -> str:
    """JSON with sorted keys. NaN and infinity, which JSON does not have, become null; lone surrogates become "?"."""
    text = json.dumps(_finite(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="replace").decode()


def _finite(value: object) -> object:
    """`value` with None in the place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def deliver(path: str | None, report: dict[str, Any], draw: Callable[[], None]) -> None:
    """Write the JSON report, then draw it; if the file cannot be written, the drawing still appears."""
    try:
        write_report(path, report)
    finally:
        draw()


class Screen(Console):
    """A rich console for text that is not ours: no markup, no emoji names, control characters made visible."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every plain string that rich draws, also in the cells and titles of tables, passes through here."""
        return super().render_str(visible(text), **options)


def make_console() -> Screen:
    """On standard output, or on standard error if JSON goes to standard output."""
    stream = sys.stderr if json_on_stdout() else sys.stdout
    return Screen(file=stream, width=None if stream.isatty() else _HEADLESS_WIDTH)


def size(n_bytes: float) -> str:
    """16793976 -> "16.79 MB" (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"
