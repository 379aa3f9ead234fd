"""The group of all verbs; each verb is one file."""

from __future__ import annotations

import click

from quantkit import __version__
from quantkit.cli import (
    bench,
    calibration,
    diff,
    generate,
    inspect,
    kernels,
    plan,
    quantize,
    recipes,
    report,
    sweep,
    validate,
    verify,
)
from quantkit.cli import eval as eval_verb


class Verbs(click.Group):
    """A group whose list of verbs shows the whole first sentence of each, wrapped instead of cut."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(context):
            summary = (self.commands[name].help or "").partition("\n\n")[0]
            rows.append((name, " ".join(summary.split())))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Quantize Hugging Face causal LMs: one recipe, one command, a measured and verified checkpoint."""


for verb in (
    quantize.command,
    eval_verb.command,
    generate.command,
    inspect.command,
    validate.command,
    plan.command,
    report.command,
    sweep.command,
    calibration.command,
    recipes.command,
    kernels.command,
    bench.command,
    diff.command,
    verify.command,
):
    cli.add_command(verb)
