"""`RunReport`: what a run measured, for the table, for `quantize --json` and for Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit_eval.report import Report

from quantkit.checkpoint.manifest import RUN, read_facts
from quantkit.checkpoint.records import Manifest, RunFacts, SearchRecord, Size, plain

RUN_SCHEMA = "quantkit-run/1"


@dataclass(frozen=True)
class RunReport:
    """What a finished checkpoint cost, and how good it is.

    evaluation: None if none was asked for, or it failed. seconds, cpu_seconds: by phase, of the run that made the
    checkpoint; calibrating, transforming and quantizing are one, `calibrate_quantize`. Both are empty, and
    peak_rss_bytes None, where the folder has lost `quantkit.run.json`. searches: settings that were searched for the
    whole model. peak_bytes, predicted_bytes, budget: see `RunFacts`.
    """

    output: Path
    size: Size
    evaluation: Report | None
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    peak_rss_bytes: int | None
    notes: list[str]
    resumed_blocks: int
    searches: list[SearchRecord]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    predicted_bytes: dict[str, int] = field(default_factory=dict)
    budget: dict[str, int] | None = None

    @classmethod
    def of(cls, output: Path, manifest: Manifest) -> RunReport:
        """The report of a finished checkpoint, from its manifest and the facts of the run that made it."""
        facts = read_facts(output) if (output / RUN).exists() else RunFacts()
        return cls(
            output=output,
            size=manifest.size,
            evaluation=manifest.evaluation,
            seconds=_phases(facts.seconds),
            cpu_seconds=_phases(facts.cpu_seconds),
            peak_rss_bytes=facts.peak_rss_bytes,
            notes=manifest.notes,
            resumed_blocks=facts.resumed_blocks,
            searches=manifest.searches or [],
            peak_bytes=facts.peak_bytes,
            predicted_bytes=facts.predicted_bytes,
            budget=facts.budget,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-run/1" (docs/checkpoint.md)."""
        values = {name: plain(value) for name, value in vars(self).items()}
        return {"schema": RUN_SCHEMA} | values | {"output": str(self.output)}


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """The phases of a clock as the report names them; `calibrate_quantize` is all the work on weights."""
    work = ("calibrate", "transform", "quantize")
    return {"calibrate_quantize": sum(seconds.get(p, 0.0) for p in work)} | {
        p: s for p, s in seconds.items() if p not in work
    }
