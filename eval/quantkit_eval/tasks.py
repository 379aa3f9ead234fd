"""Tasks of lm-eval, the Language Model Evaluation Harness, for any causal LM: `run_tasks`.

Prompts, metrics and their aggregation are the harness's. What is added: the outcome of every item is kept, so that two
models are compared on the same items, also later and from a file (`task_report`).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from quantkit_eval.decoding import CacheFactory, described
from quantkit_eval.errors import EvalError
from quantkit_eval.model import inference
from quantkit_eval.protocols import CausalLM, Sequences, Tokenizer
from quantkit_eval.task_report import GroupScore, Score, TaskReport, TaskScores, kind_of

INSTALL = "pip install 'quantkit[tasks]'"
_BOOTSTRAP = 1000  # draws for the standard errors of metrics that are no mean
_SHOWN = 5  # names suggested for one that is not known


def run_tasks(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    include_path: str | Path | Iterable[str | Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    decoder: Sequences | None = None,
    cache: CacheFactory | None = None,
    name: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> TaskReport:
    """Ask a causal LM tasks of lm-eval; `report.against(other)` compares two reports item by item.

    model, tokenizer: transformers'. tasks: names of tasks, groups and tags, patterns such as mmlu_*, or YAML files.
    include_path: folders with YAML tasks of one's own, looked through first. limit: only the first so many items of
    each task. fewshot: examples in front of each, None: as the task says; a task that says 0 keeps it. chat_template:
    prompts in the tokenizer's chat template. batch_size: sequences per forward, in transformers. seed: of the examples
    and of sampled answers; the global random states are left as they were. decoder: runs in the model's place, one
    sequence at a time (`quantkit.runtime.native`). cache: makes the key-value caches that the model runs with
    (`decoding`), with the decoder for its name alone. name: what the report calls the model. progress(done, total):
    requests answered, of those of one kind.

    Raises EvalError without lm-eval, for tasks that are not known or cannot be loaded, tasks that run code which the
    model has written, and for what the model or the decoder cannot do.
    """
    for what, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise EvalError(f"{what} must be at least 1, got {value}")
    if fewshot is not None and fewshot < 0:
        raise EvalError(f"fewshot must be 0 or more, got {fewshot}")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise EvalError("the tokenizer has no chat template; leave it out for this model")
    _need_harness()
    folders = _folders(include_path)
    with _quiet(seed), inference(model):
        from lm_eval import __version__, evaluator

        from quantkit_eval.harness import HarnessModel

        loaded = _loaded(tasks, folders)
        _prepare(loaded["tasks"], fewshot, seed)
        asked = HarnessModel(
            model, tokenizer, decoder, None if decoder else cache, batch_size, seed, progress
        )
        found = evaluator.evaluate(
            asked,
            loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    return TaskReport(
        model=name,
        harness=f"lm-eval {__version__}",
        ran="native" if decoder else "transformers",
        cache=described(cache()) if cache else None,
        limit=limit,
        fewshot=fewshot,
        chat_template=chat_template,
        seed=seed,
        tasks=[_scores(task, loaded["tasks"][task], found) for task in found["samples"]],
        groups=list(_groups(loaded.get("groups") or {}, found)),
    )


def check_tasks(tasks: Sequence[str], include_path: str | Path | Iterable[str | Path] = ()) -> None:
    """EvalError without lm-eval and for tasks that are not known; no data set is read."""
    _need_harness()
    with _quiet(0):
        _found(tasks, _folders(include_path))


def _folders(include_path: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    given = (include_path,) if isinstance(include_path, str | Path) else include_path
    return tuple(str(Path(folder).expanduser()) for folder in given)


def _need_harness() -> None:
    try:
        import_module("lm_eval")
    except ImportError:
        raise EvalError(
            f"tasks need lm-eval (EleutherAI's harness), which is not installed; `{INSTALL}`"
        ) from None


@contextlib.contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Seeded random states, put back afterwards; and nothing of what harness and tasks print and log."""
    import numpy as np

    log, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  (tasks draw from it)
    out, err = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    try:
        with torch.random.fork_rng(), out, err:
            log.setLevel(logging.CRITICAL)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@lru_cache(maxsize=4)
def _whole_index(folders: tuple[str, ...]) -> Any:
    """The harness's index of its own tasks, thousands of YAML files, and those in folders."""
    return _index(folders, include_defaults=True)


def _index(folders: tuple[str, ...], include_defaults: bool = False) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


def _found(tasks: Sequence[str], folders: tuple[str, ...]) -> tuple[Any, list[str]]:
    """An index of tasks, and the names in it that were asked for. EvalError for what is not known."""
    if not tasks:
        raise EvalError("no task was named; `--tasks NAME,...` takes names of lm-eval's tasks and YAML files")
    for folder in folders:
        if not Path(folder).is_dir():
            raise EvalError(
                f"no folder {folder} to look for tasks in; `--include-path` takes a folder with YAML files"
            )
    index = _index(folders)
    if not all(_known(index, task) for task in tasks):
        index = _whole_index(folders)
    names = [name for task in tasks for name in _known(index, task) or _unknown(index, task)]
    return index, list(dict.fromkeys(names))


def _loaded(tasks: Sequence[str], folders: tuple[str, ...]) -> Any:
    """The harness's tasks and groups of these names, with their data. EvalError for what cannot be loaded or run."""
    index, names = _found(tasks, folders)
    try:
        try:
            loaded = index.load(names)
        except KeyError:  # a group of one's own may name tasks of the harness
            loaded = _whole_index(folders).load(names)
    except Exception as error:  # data sets and the tasks' own code raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise EvalError(
            f"{', '.join(tasks)} cannot be loaded: {reason}; check the task's file, its data set and the network"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvalError(f"{name} runs code that the model writes, which quantkit does not; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise EvalError(f"{name} asks about pictures or sound; only tasks of text are run")
    return loaded


def _known(index: Any, task: str) -> list[str]:
    """The names that a task, a pattern or a YAML file stands for; [] if there are none."""
    if task.endswith((".yaml", ".yml")):
        path = Path(task).expanduser()
        return [str(path)] if path.is_file() else []
    return [task] if task in index.task_index else sorted(index.match_tasks([task]))


def _unknown(index: Any, task: str) -> list[str]:
    if task.endswith((".yaml", ".yml")):
        raise EvalError(f"no task file {task}; name one that exists, or a task of lm-eval")
    near = difflib.get_close_matches(task, index.all_tasks, _SHOWN)
    hint = f"did you mean {', '.join(near)}" if near else "nothing known is called like it"
    raise EvalError(
        f"unknown task {task!r}: {hint}; lm-eval knows {len(index.all_tasks):,} names, `lm-eval ls tasks` lists them"
    )


def _prepare(tasks: dict[str, Any], fewshot: int | None, seed: int) -> None:
    """Examples in front of the questions, as the harness's own command sets them."""
    for task in tasks.values():
        given = task.get_config("num_fewshot")
        if fewshot is not None and given != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def _scores(name: str, task: Any, found: Any) -> TaskScores:
    """What the harness found for a task; its samples are one for each item and filter."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in found["samples"][name]:
        samples.setdefault(sample["filter"], []).append(sample)
    first = next(iter(samples.values()), [])
    scores = []
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.rpartition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        number = _number(value)
        kind, outcomes = kind_of([sample.get(metric) for sample in samples.get(filtered, [])], number)
        error = _number(found["results"][name].get(f"{metric}_stderr,{filtered}"))
        better = found["higher_is_better"].get(name, {}).get(metric)
        scores.append(Score(metric, filtered, kind, better, number, error, outcomes))
    return TaskScores(
        name=name,
        version=str(found["versions"].get(name, "")),
        output_type=str(task.OUTPUT_TYPE),
        fewshot=int(found["n-shot"].get(name) or 0),
        documents=int(found["n-samples"][name]["original"]),
        items=[_item(sample) for sample in first],
        scores=scores,
    )


def _item(sample: dict[str, Any]) -> str:
    """A digest of an item's document, prompt and target: 16 hex digits."""
    told = " ".join(str(sample[part]) for part in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _number(value: Any) -> float | None:
    """A float, or None for what the harness writes where it has none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _groups(groups: dict[str, Any], found: Any) -> Iterator[GroupScore]:
    for name, results in (found.get("groups") or {}).items():
        members = [task.task_name for task in groups[name].get_all_tasks()]
        for key, value in results.items():
            metric, comma, filtered = key.rpartition(",")
            if comma and not metric.endswith("_stderr"):
                error = _number(results.get(f"{metric}_stderr,{filtered}"))
                yield GroupScore(name, members, metric, filtered, _number(value), error)
