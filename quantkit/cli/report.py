"""`quantkit report`: one HTML page about finished results."""

from __future__ import annotations

import click

from quantkit.cli.terminal import say


@click.command("report")
@click.argument("results", metavar="RESULT...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", default="report.html", show_default=True, help="The page.")
@click.option("--png", metavar="DIR", help="Write the plots here as PNG files too.")
@click.option("--title", metavar="TEXT", help="Default: what the results are about.")
def command(results: tuple[str, ...], output: str, png: str | None, title: str | None) -> None:
    """Draw RESULTs (checkpoint folders and JSON reports) as one HTML page that needs no network.

    JSON reports are those of quantize, eval (with --explain: the worst tokens and what each layer costs), sweep, bench
    and plan (the roofline).
    """
    from quantkit.report.page import write_page

    written = write_page(results, output, png, title)
    say(f"{written[0]}" + (f", {len(written) - 1} plots in {png}" if png else ""))
