"""`quantkit eval --tasks`: tasks of lm-eval, and the same items asked of a baseline."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from quantkit.cli.evaluation import plus_minus
from quantkit.cli.opening import Opening
from quantkit.cli.output import Screen, deliver, make_console
from quantkit.cli.terminal import say
from quantkit.errors import UserError

if TYPE_CHECKING:
    from quantkit_eval.task_report import Comparison, TaskReport

TASK_BATCH = 8
_EVERY = 10.0  # seconds between two lines of progress


def _names(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """ "a,b" and a second --tasks c -> ("a", "b", "c")."""
    names = tuple(name for value in values for name in value.split(",") if name)
    if values and not names:
        raise click.BadParameter(f"no task is named in {','.join(values)!r}; give names separated by commas")
    return names


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of --tasks."""
    stack = (
        click.option(
            "--tasks",
            metavar="NAME,...",
            multiple=True,
            callback=_names,
            help="Instead, ask tasks of lm-eval: names, groups, patterns or YAML files; repeatable.",
        ),
        click.option(
            "--include-path", metavar="DIR", multiple=True, help="A folder with YAML tasks; repeatable."
        ),
        click.option("--limit", type=click.IntRange(1), help="Only the first so many items of each task."),
        click.option(
            "--fewshot", type=click.IntRange(0), help="Examples before each item. Default: the task's."
        ),
        click.option("--chat", is_flag=True, help="Ask tasks in the tokenizer's chat template."),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help=f"Of --tasks in transformers. Default: {TASK_BATCH}.",
        ),
    )
    for option in reversed(stack):
        command = option(command)
    return command


def ask_tasks(
    model: str,
    baseline: str | None,
    asked: dict[str, Any],
    opening: Opening,
    run_in: str,
    json_file: str | None,
) -> None:
    """Run the tasks on MODEL and, if there is one, on the baseline; asked: options of `run_tasks`."""
    from quantkit_eval.tasks import check_tasks

    check_tasks(asked["tasks"], asked["include_path"])  # before the models are loaded
    before = _earlier(baseline)
    report = _answers(model, asked, opening, run_in)
    if baseline is not None:
        report = report.against(before or _answers(baseline, asked, opening.exact(same=False), run_in))
    deliver(json_file, report.to_json(), lambda: print_tasks(report, make_console()))


def _answers(path_or_id: str, asked: dict[str, Any], opening: Opening, run_in: str) -> TaskReport:
    from quantkit_eval.tasks import run_tasks

    from quantkit.layers.kv_cache import cache_of
    from quantkit.runtime import NativeDecoder

    model, tokenizer, runner = opening.run(path_or_id, 1, run_in)
    name = Path(path_or_id).name or path_or_id
    decoder = runner.model if isinstance(runner.model, NativeDecoder) else None
    return run_tasks(
        model, tokenizer, decoder=decoder, cache=cache_of(model), name=name, progress=_told(name), **asked
    )


def _earlier(baseline: str | None) -> TaskReport | None:
    """The report in a file that was named as the baseline; None if that is no file."""
    from quantkit_eval.task_report import TaskReport

    if baseline is None or not Path(baseline).expanduser().is_file():
        return None
    try:
        data = json.loads(Path(baseline).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{baseline} is no JSON ({error}); --baseline takes a model or a report of tasks"
        ) from None
    return TaskReport.from_json(data)


def _told(name: str) -> Callable[[int, int], None]:
    """A line every few seconds; standard error is the one of now, whatever the harness does to it."""
    stream, said = sys.stderr, time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            say(f"{name}: {done:,} of {total:,} requests", file=stream)

    return progress


def print_tasks(report: TaskReport, console: Screen) -> None:
    """A row for each metric of each task and group; with a baseline the paired comparison."""
    compared = {(c.task, c.metric, c.filter): c for c in report.comparisons}
    base = {
        (name, s.metric, s.filter): s for name, s in _values(report.baseline) if report.baseline is not None
    }
    columns = ["task", "metric", "items", *(["baseline"] if report.baseline else []), "model"]
    table = Table(*columns, *(["difference", "won / lost", "p (mid-p)"] if report.baseline else []))
    for column in table.columns[2:]:
        column.justify = "right"
    counts = {task.name: len(task.items) for task in report.tasks}
    counts |= {group.name: sum(counts[task] for task in group.tasks) for group in report.groups}
    for name, score in _values(report):
        key = (name, score.metric, score.filter)
        label = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        row = [name, label, f"{counts[name]:,}"]
        if report.baseline:
            other = base.get(key)
            row.append("" if other is None else plus_minus(other.value, other.value_se, 4))
        row.append(plus_minus(score.value, score.value_se, 4))
        table.add_row(*row, *(_cells(compared.get(key)) if report.baseline else []))
    console.print(table)
    console.print(_footer(report))


def _values(report: TaskReport | None) -> list[tuple[str, Any]]:
    """(name, score) of every metric of every task, then of every group."""
    if report is None:
        return []
    tasks = [(task.name, score) for task in report.tasks for score in task.scores]
    return [*tasks, *((group.name, group) for group in report.groups)]


def _cells(found: Comparison | None) -> list[str]:
    if found is None or found.difference is None:
        return ["", "", ""]
    difference = f"{found.difference:+.4f}" + (
        "" if found.difference_se is None else f" ± {found.difference_se:.4f}"
    )
    if found.p_mid is None:
        return [difference, "", ""]
    return [difference, f"{found.gained} / {found.lost}", f"{found.p_mid:.3g}"]


def _footer(report: TaskReport) -> str:
    parts = [report.harness, f"run in {report.ran}" if report.ran == "transformers" else "run natively"]
    if report.cache:
        parts.append(report.cache)
    if report.limit:
        parts.append(f"the first {report.limit:,} items of each task")
    parts.append("± is one standard error, over items")
    if report.baseline:
        parts.append("difference: model minus baseline on the same items; p: McNemar's test, two-sided")
    return "; ".join(parts)
