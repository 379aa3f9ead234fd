"""What a page is drawn from, as values: checkpoints, evaluations, sweeps, benchmarks and rooflines.

The fields are those of the JSON files (docs/report.md names them); keys that are not listed here are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit_eval.explanation import Explanation
from quantkit_eval.report import Report

from quantkit.checkpoint.records import Manifest, RunFacts


@dataclass(frozen=True)
class Source:
    """A file that was read: its name as given, its schema, and the sha256 of its bytes."""

    name: str
    schema: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint. facts: None where `quantkit.run.json` is missing."""

    name: str
    manifest: Manifest
    facts: RunFacts | None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation in a file of its own. model, baseline: as they were named on the command line, if they were."""

    name: str
    report: Report
    explanation: Explanation | None
    model: str | None
    baseline: str | None


@dataclass(frozen=True, kw_only=True)
class SweepSpeed:
    """times_original: how many times faster than the original model, run in turn with it; mad: of the rounds."""

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_times_original: float | None = None
    prefill_times_original_mad: float | None = None
    decode_times_original: float | None = None
    decode_times_original_mad: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepSize:
    quantized_bytes: int | None = None
    original_bytes: int | None = None
    linear_bits_per_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One recipe of a sweep. status: "finished", or why not in `reason`."""

    id: str
    status: str
    reason: str | None = None
    factors: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    size: SweepSize | None = None
    memory_bytes: float | None = None
    evaluation: Report | None = None
    speed: SweepSpeed | None = None
    peak_rss_bytes: int | None = None
    seconds: dict[str, float] | None = None
    notes: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether `a` is better than `b`. difference: of the metric, a - b; p_corrected: after Holm's correction."""

    a: str
    b: str
    metric: str
    difference: float | None = None
    se: float | None = None
    p_corrected: float | None = None
    better: str


@dataclass(frozen=True, kw_only=True)
class Decisions:
    alpha: float | None = None
    correction: str | None = None
    pairs: list[Decision] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Schema quantkit-sweep/1. seconds: of all cells ("cells"), and what separate runs would take ("separate")."""

    name: str
    model: str
    model_digest: str | None = None
    cells: list[SweepCell]
    decisions: Decisions | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    host: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    threads: int | None = None
    date: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over rounds. mad: the median distance from the median."""

    median: float
    mad: float | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Prefill or decode of one benchmark row. parts_s: seconds of one decode step by part."""

    tokens_per_s: Spread
    ceiling_tokens_per_s: float | None = None
    roofline_share: float | None = None
    first_token_s: Spread | None = None
    step_s: dict[str, float | None] | None = None
    parts_s: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    batch: int
    context: int
    prefill: Phase | None = None
    decode: Phase | None = None


@dataclass(frozen=True, kw_only=True)
class BenchMemory:
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    name: str
    way: str | None = None
    reason: str | None = None
    weight_bytes: int | None = None
    memory: BenchMemory | None = None
    rows: list[BenchRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Schema quantkit-bench/1."""

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: list[BenchModel] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator of a planned model on a device. operations and bytes of one of `count`, seconds of all of them."""

    name: str
    count: int
    operations: float
    bytes: float
    intensity: float | None = None
    kind: str
    bound: str
    attainable_operations_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    operators: list[Operator]
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Device:
    title: str
    bandwidth: float
    peak: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    hardware: Device
    prefill: Step
    decode: Step


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Schema quantkit-plan/1: the rooflines in it."""

    name: str = ""
    context: int
    batch: int
    roofline: list[Roofline] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One measured configuration, whatever file it comes from. n_bytes: of all tensors. group: what it is coloured by.

    bits: per weight of the quantized linears; None where none is quantized. seconds: to quantize. memory: bytes of
    weights and KV cache at the context of a sweep. faster: times the original's tokens/s of decoding, and its noise.
    """

    name: str
    group: str
    bits: float | None
    n_bytes: int | None
    original_bytes: int | None
    evaluation: Report | None
    decode: float | None = None
    faster: tuple[float, float | None] | None = None
    prefill: float | None = None
    peak: int | None = None
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Results:
    """Everything that was read."""

    sources: list[Source] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    plans: list[Planned] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """Every configuration with a size or an evaluation: cells of sweeps, then checkpoints.

        Cells of several sweeps are told apart by the name of the sweep.
        """
        several = len(self.sweeps) > 1
        cells = [
            _of_cell(cell, f"{sweep.name}: {cell.id}" if several else cell.id)
            for sweep in self.sweeps
            for cell in sweep.cells
            if cell.status == "finished"
        ]
        return [*cells, *(self._of_checkpoint(each) for each in self.checkpoints)]

    def evaluation_of(self, checkpoint: Checkpoint) -> Report | None:
        """Its evaluation: one in a file of its own that names it, else the closing one."""
        own = [each.report for each in self.evaluations if self.belongs(each, checkpoint)]
        return own[-1] if own else checkpoint.manifest.evaluation

    def belongs(self, evaluation: Evaluation, checkpoint: Checkpoint) -> bool:
        """Whether an evaluation is of a checkpoint: by the folder's name, or since there is one of each."""
        alone = len(self.checkpoints) == len(self.evaluations) == 1
        if evaluation.model is None:
            return alone
        return Path(evaluation.model).name == Path(checkpoint.name).name

    def _of_checkpoint(self, each: Checkpoint) -> Point:
        manifest, facts = each.manifest, each.facts
        return Point(
            name=each.name,
            group=method(manifest.recipe or {}),
            bits=manifest.size.linear_bits_per_weight or None,
            n_bytes=manifest.size.quantized_bytes,
            original_bytes=manifest.size.original_bytes,
            evaluation=self.evaluation_of(each),
            peak=facts.peak_rss_bytes if facts else None,
            seconds=facts.seconds.get("total") if facts else None,
        )


def method(recipe: dict[str, Any]) -> str:
    """The transforms and the algorithm of a recipe, as "awq+gptq"."""
    names = [each.get("name") if isinstance(each, dict) else each for each in recipe.get("transforms") or ()]
    weights = recipe.get("weights")
    algorithm = weights.get("algorithm") if isinstance(weights, dict) else None
    names.append(algorithm.get("name") if isinstance(algorithm, dict) else algorithm)
    return "+".join(str(name) for name in names if name) or "none"


def _faster(speed: SweepSpeed) -> tuple[float, float | None] | None:
    times = speed.decode_times_original
    return None if times is None else (times, speed.decode_times_original_mad)


def _of_cell(cell: SweepCell, name: str) -> Point:
    size, speed = cell.size or SweepSize(), cell.speed or SweepSpeed()
    return Point(
        name=name,
        group=str(cell.factors.get("method") or method(cell.recipe)),
        bits=size.linear_bits_per_weight or None,
        n_bytes=size.quantized_bytes,
        original_bytes=size.original_bytes,
        evaluation=cell.evaluation,
        decode=speed.decode_tokens_per_s,
        faster=_faster(speed),
        prefill=speed.prefill_tokens_per_s,
        peak=cell.peak_rss_bytes,
        seconds=(cell.seconds or {}).get("total"),
        memory=cell.memory_bytes,
    )
