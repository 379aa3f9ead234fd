"""What a model scored in tasks, item by item, and how that compares with another model on the same items."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.mcnemar import mcnemar
from quantkit_eval.perplexity import ratio

SCHEMA = "quantkit-tasks/1"
Outcome = float | list[float] | None
_SETTINGS = ("limit", "fewshot", "chat_template", "seed")  # must agree where two reports are compared


@dataclass(frozen=True)
class Score:
    """One metric of a task, as the harness aggregates it, and what each item gave.

    kind: "binary" (every item 0 or 1), "number" (a number each), "rate" (a log-likelihood and the units it is of, as
    words), "corpus" (only all items together have a value; outcomes is None then). An outcome is None for an item that
    the metric does not score. value_se: standard error over items; None where the harness knows none.
    """

    metric: str
    filter: str
    kind: str
    higher_is_better: bool | None
    value: float | None
    value_se: float | None
    outcomes: list[Outcome] | None


@dataclass(frozen=True)
class TaskScores:
    """items: for each a digest of its document, prompt and target, in the order of the outcomes. documents: in all."""

    name: str
    version: str
    output_type: str
    fewshot: int
    documents: int
    items: list[str]
    scores: list[Score]


@dataclass(frozen=True)
class GroupScore:
    """What the harness aggregates over the tasks of a group."""

    name: str
    tasks: list[str]
    metric: str
    filter: str
    value: float | None
    value_se: float | None


@dataclass(frozen=True)
class Comparison:
    """The model against the baseline on the same items, for one metric of a task (or of a group: its items together).

    difference: mean over items of model minus baseline, for a rate in nats per unit; difference_se: its standard error
    over items. gained, lost, p_exact, p_mid: McNemar's test, for metrics of kind "binary". note: why there is none.
    """

    task: str
    metric: str
    filter: str
    items: int
    difference: float | None = None
    difference_se: float | None = None
    gained: int | None = None
    lost: int | None = None
    p_exact: float | None = None
    p_mid: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class TaskReport:
    """Scores of a model, and with a baseline its scores and the paired comparison.

    model: what was asked, in words. harness: lm-eval and its version. ran: "native" or "transformers". cache: the
    quantized key-value cache, None: an exact one. limit: items per task that were asked for, None: all. fewshot:
    examples before each item, None: as each task says.
    """

    model: str
    harness: str
    ran: str
    cache: str | None
    limit: int | None
    fewshot: int | None
    chat_template: bool
    seed: int
    tasks: list[TaskScores]
    groups: list[GroupScore] = field(default_factory=list)
    baseline: TaskReport | None = None
    comparisons: list[Comparison] = field(default_factory=list)

    def against(self, baseline: TaskReport) -> TaskReport:
        """This report with the paired comparison. EvalError if the two did not answer the same items."""
        other = {name: getattr(baseline, name) for name in _SETTINGS}
        mine = {name: getattr(self, name) for name in _SETTINGS}
        if other != mine:
            told = ", ".join(
                f"{name} {mine[name]} and {other[name]}" for name in mine if mine[name] != other[name]
            )
            raise EvalError(f"model and baseline were asked differently: {told}; ask both in the same way")
        pairs = {name: (ours, _same(ours, baseline)) for ours in self.tasks for name in [ours.name]}
        found = [
            _compared(ours.name, [pair], one)
            for pair in pairs.values()
            for ours in pair[:1]
            for one in ours.scores
        ]
        for group in self.groups:
            members = [pairs[name] for name in group.tasks]
            like = next((s for s in members[0][0].scores if _key(s) == (group.metric, group.filter)), None)
            if like is not None:
                found.append(_compared(group.name, members, like))
        return replace(self, baseline=replace(baseline, baseline=None, comparisons=[]), comparisons=found)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-tasks/1" (docs/evaluation.md)."""
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> TaskReport:
        """The report that `to_json` made. EvalError for anything else."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise EvalError(f"no report of tasks: its schema is {found!r}, expected {SCHEMA!r}")
        return _report({name: value for name, value in data.items() if name != "schema"})


def _report(data: dict[str, Any]) -> TaskReport:
    try:
        return TaskReport(
            **data
            | {
                "tasks": [
                    TaskScores(**t | {"scores": [Score(**s) for s in t["scores"]]}) for t in data["tasks"]
                ],
                "groups": [GroupScore(**group) for group in data["groups"]],
                "comparisons": [Comparison(**one) for one in data["comparisons"]],
                "baseline": None if data["baseline"] is None else _report(data["baseline"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise EvalError(f"a damaged report of tasks: {error}; run the evaluation again") from None


def kind_of(outcomes: list[Any], value: float | None) -> tuple[str, list[Outcome] | None]:
    """(kind, plain outcomes) of what a metric gave for each item; see `Score`."""
    present = [one for one in outcomes if one is not None]
    if not present:
        return "corpus", None
    if all(isinstance(one, bool | int | float) for one in present):
        numbers = [None if one is None else float(one) for one in outcomes]
        binary = all(one in (0, 1) for one in present)
        mean = sum(map(float, present)) / len(present)
        right = value is not None and math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12)
        return ("binary" if binary and right else "number"), list(numbers)
    if all(
        isinstance(one, tuple | list) and len(one) == 2 and all(isinstance(part, int | float) for part in one)
        for one in present
    ) and _is_rate(present, value):
        return "rate", [None if one is None else [float(one[0]), float(one[1])] for one in outcomes]
    return "corpus", None


def _is_rate(pairs: list[Any], value: float | None) -> bool:
    """Whether `value` is a perplexity, or bits per unit, of (log-likelihood, units); other metrics have pairs too."""
    units = float(sum(pair[1] for pair in pairs))
    if value is None or not math.isfinite(value) or not units > 0:
        return False
    nll = -float(sum(pair[0] for pair in pairs)) / units
    perplexity = value > 0 and math.isclose(math.log(value), nll, rel_tol=0, abs_tol=1e-6)
    return nll > 0 and (perplexity or math.isclose(value, nll / math.log(2), rel_tol=1e-6))


def _key(score: Score) -> tuple[str, str]:
    return score.metric, score.filter


def _same(ours: TaskScores, baseline: TaskReport) -> TaskScores:
    """The baseline's scores of the same task on the same items."""
    theirs = next((task for task in baseline.tasks if task.name == ours.name), None)
    if theirs is None:
        known = ", ".join(task.name for task in baseline.tasks)
        raise EvalError(f"the baseline was not asked {ours.name}, but {known}; run it on the same tasks")
    if theirs.items != ours.items:
        common = len(set(theirs.items) & set(ours.items))
        raise EvalError(
            f"model and baseline did not answer the same items of {ours.name}: of {len(ours.items)} and "
            f"{len(theirs.items)}, {common} have the same document, prompt and target; use the same task files, "
            "number of items and examples, and models with one chat template"
        )
    return theirs


def _compared(name: str, members: list[tuple[TaskScores, TaskScores]], like: Score) -> Comparison:
    """One metric over the items of all members: the model's scores and the baseline's of each."""
    pairs: list[tuple[Outcome, Outcome]] = []
    kinds: set[str] = set()
    for both in members:
        found = [next((s for s in task.scores if _key(s) == _key(like)), None) for task in both]
        kinds |= {"corpus" if score is None else score.kind for score in found}
        ours, theirs = ([] if s is None or s.outcomes is None else s.outcomes for s in found)
        pairs += zip(ours, theirs, strict=False)
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    told = Comparison(name, like.metric, like.filter, len(pairs))
    if not pairs or not (kinds <= {"binary", "number"} or kinds == {"rate"}):
        return replace(told, note="this metric has no value for a single item")
    if kinds == {"rate"}:
        difference, error = _rate(pairs)
        return replace(told, difference=difference, difference_se=error)
    a, b = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    difference, error = ratio(a - b, torch.ones(len(pairs), dtype=torch.float64))
    told = replace(told, difference=difference, difference_se=error)
    if kinds != {"binary"}:
        return told
    test = mcnemar(int((a > b).sum()), int((a < b).sum()))
    return replace(told, **asdict(test))


def _rate(pairs: list[tuple[Outcome, Outcome]]) -> tuple[float, float | None]:
    """Difference of the negative log-likelihood per unit, model minus baseline, and its standard error."""
    rows = [[*a, *b] for a, b in pairs if isinstance(a, list) and isinstance(b, list)]
    sums = torch.tensor(rows, dtype=torch.float64)  # (items, 4)
    return ratio(sums[:, 2] - sums[:, 0], sums[:, 1])
