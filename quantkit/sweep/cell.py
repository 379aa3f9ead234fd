"""One cell of a sweep: quantize its weights, unless another cell did, then measure the packed checkpoint."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import quantkit_eval
from quantkit_eval.errors import BrokenModel
from quantkit_eval.paired import WindowScores

from quantkit import assets
from quantkit.bench.models.decode import measure
from quantkit.bench.rounds import spread
from quantkit.checkpoint.load import load
from quantkit.checkpoint.manifest import MANIFEST, read_facts, read_manifest, write_sealed
from quantkit.checkpoint.records import Manifest, Size, plain
from quantkit.errors import NumericalError, QuantkitError, why
from quantkit.layers.kv_cache import cache_of
from quantkit.models.tensors import read_tensors
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.cache import evaluation_cache
from quantkit.pipeline.quantize import quantize
from quantkit.recipe.recipe import parse_recipe
from quantkit.runtime import choose_runner
from quantkit.scheme import KVScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ".safetensors"
SCHEMA = "quantkit-sweep-cell/2"
PROMPT, NEW, ROUNDS = 256, 64, 5
ORIGINAL_NEW = 16  # tokens that the original decodes: it is slower, and both should take about as long


@dataclass(frozen=True)
class Job:
    """What a process needs to make one cell. Plain data, so that it can be sent.

    id, key: the cell's name and what decides its result. recipe: that which gives the weights, `source`'s. kv: how the
    cell's cache runs, None: exact. own: whether `source` is this cell. folder: of the source's checkpoint. result: the
    file to write. digest: of the model's files. tokens, window, text: what is evaluated.
    statistics: folder of kept ones that may serve.
    """

    id: str
    key: str
    recipe: Mapping[str, Any]
    kv: KVScheme | None
    source: str
    model: str
    folder: str
    result: str
    device: str
    digest: str
    tokens: int
    window: int
    text: tuple[str, ...]
    speed: bool
    statistics: str | None = None


def run_cell(job: Job) -> None:
    """Make a cell and write its file. A layer that collapses is a result too: the cell is then recorded as failed."""
    begin = time.perf_counter()
    try:
        found = {"status": "finished", "reason": None} | _made(job)
    except (NumericalError, BrokenModel) as error:
        found = {"status": "failed", "reason": why(error)}
    found.setdefault("seconds", {})["total"] = time.perf_counter() - begin
    found["peak_rss_measured_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_sealed(Path(job.result), {"schema": SCHEMA, "id": job.id, "key": job.key} | found)


def run_alone(job: Job) -> None:
    """`run_cell` in a process of its own, which ends with the one that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        run_cell(job)
    except KeyboardInterrupt:
        os._exit(130)
    except QuantkitError as error:
        sys.stderr.write(f"cell {job.id}: {why(error)}\n")
        os._exit(error.exit_code)


def _end_with(parent: Any) -> None:
    """End this process when the one that started it is gone."""
    parent.join()
    os._exit(1)


def _made(job: Job) -> dict[str, Any]:
    """Everything that was found out about a cell."""
    folder = Path(job.folder)
    if not (folder / MANIFEST).exists():
        quantize(
            parse_recipe(job.recipe),
            job.model,
            folder,
            device=job.device,
            evaluate=False,
            statistics=job.statistics,
        )
    manifest, facts = read_manifest(folder), read_facts(folder)
    measured = _measured(job, folder)
    seconds = {"quantize": facts.seconds["total"]} | measured.pop("seconds")
    files = {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if name.endswith(WEIGHTS)}
    return measured | {
        "size": plain(_size(manifest, folder, job.kv)),
        "peak_rss_bytes": facts.peak_rss_bytes,
        "seconds": seconds,
        "steps": facts.seconds,
        "weights_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "notes": manifest.notes,
        "host": facts.host,
        "versions": facts.versions,
        "threads": facts.threads,
    }


def _size(manifest: Manifest, folder: Path, kv: KVScheme | None) -> Size:
    """The size of a checkpoint that runs with another cache, without the scales of the one it was made for."""
    if kv is not None and not kv.dynamic:
        return manifest.size
    _, tensors = read_tensors(folder)
    scales = sum(tensors[name].nbytes for name, each in manifest.tensors.items() if each.how == "added")
    size, left = manifest.size, manifest.size.quantized_bytes - scales
    return replace(
        size,
        quantized_bytes=left,
        model_bits_per_weight=size.model_bits_per_weight * left / size.quantized_bytes,
    )


def _measured(job: Job, folder: Path) -> dict[str, Any]:
    """The packed checkpoint beside the original on the same windows, and how fast it runs."""
    begin = time.perf_counter()
    kept: list[WindowScores] = []
    original = load(job.model, device=job.device, kv_cache="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cache is another one than the checkpoint's on purpose
        model = load(folder, device=job.device, kv_cache=job.kv or "exact")
    report = quantkit_eval.evaluate(
        model,
        open_tokenizer(Path(job.model)),
        text=list(job.text) or [str(assets.evaluation_text())],
        baseline=original,
        max_tokens=job.tokens,
        context=job.window,
        baseline_cache=evaluation_cache(job.digest),
        cache=cache_of(model),
        per_window=kept.append,
    )
    found: dict[str, Any] = {"evaluation": report.to_json(), "per_window": kept[0].to_json()}
    found["seconds"] = {"evaluate": time.perf_counter() - begin}
    begin = time.perf_counter()
    found["speed"] = _speed(model, original, job.window) if job.speed else None
    found["seconds"]["speed"] = time.perf_counter() - begin
    return found


def _speed(model: PreTrainedModel, original: PreTrainedModel, window: int) -> dict[str, Any]:
    """Tokens per second of a prompt and of decoding behind one token, batch 1, each model the fastest way there is.

    The cells of a sweep run minutes apart on a machine that drifts, so the original runs in turn with each of them:
    cells are compared by how many times faster than it they are.
    """
    prompt, new = min(PROMPT, window // 2), min(NEW, window // 2)
    vocabulary = model.config.get_text_config().vocab_size
    base, own = choose_runner(original, new), choose_runner(model, new)
    pair = ((base.model, min(ORIGINAL_NEW, new)), (own.model, new))
    for runner, _ in pair:  # the first call builds tables and caches
        measure(runner, vocabulary, prompt, min(4, new))
    rounds = [[measure(runner, vocabulary, prompt, length) for runner, length in pair] for _ in range(ROUNDS)]
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "rounds": ROUNDS,
        "way": own.way,
        "original_way": base.way,
    }
    for phase in ("prefill", "decode"):
        times = spread([ours[phase] / theirs[phase] for theirs, ours in rounds])
        found[f"{phase}_tokens_per_s"] = median(ours[phase] for _, ours in rounds)
        found[f"{phase}_times_original"] = times["median"]
        found[f"{phase}_times_original_mad"] = times["mad"]
    return found
