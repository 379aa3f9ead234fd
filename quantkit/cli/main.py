"""The `quantkit` command: one group, one file per verb, errors as one message and an exit code.

0 done, 1 the run or its verification failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from quantkit import __version__
from quantkit.cli import bench, generate, inspect, kernels, quantize, recipes, validate
from quantkit.cli import eval as eval_verb
from quantkit.errors import QuantkitError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Quantize Hugging Face causal LMs: one recipe, one command, a measured and verified checkpoint."""


for verb in (
    quantize.command,
    eval_verb.command,
    generate.command,
    inspect.command,
    validate.command,
    recipes.command,
    kernels.command,
    bench.command,
):
    cli.add_command(verb)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Errors raised on purpose are printed without a traceback."""
    try:
        code = cli.main(args=arguments, prog_name="quantkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except QuantkitError as error:
        click.echo(f"quantkit: {error}", err=True)
        return error.exit_code
    except ValueError as error:
        if not _from_evaluation(error):
            raise
        click.echo(f"quantkit: {error}", err=True)
        return error.exit_code


def _from_evaluation(error: ValueError) -> bool:
    """quantkit_eval knows nothing of quantkit's errors; its own ones carry an exit code, too."""
    return type(error).__module__.partition(".")[0] == "quantkit_eval"


def main() -> None:
    sys.exit(run())
