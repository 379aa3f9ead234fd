"""From shards to a checkpoint: side files, index, config, verification, manifest."""

from __future__ import annotations

import copy
import datetime
import hashlib
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from quantkit_kernels.cpu import library

from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.companions import copy_companions
from quantkit.checkpoint.loaders import loaders, of_mixture
from quantkit.checkpoint.manifest import MANIFEST, RUN, SCHEMA, read_facts, write_facts, write_manifest
from quantkit.checkpoint.records import (
    REFUSED,
    Calibration,
    Code,
    FileRecord,
    Inputs,
    KVRecord,
    LayerRecord,
    Manifest,
    Origin,
    RunFacts,
    SearchRecord,
    Size,
    TensorRecord,
)
from quantkit.checkpoint.shards import shard_name
from quantkit.checkpoint.verify import verify_checkpoint
from quantkit.device import cpu_name, peak_memory
from quantkit.errors import DataError, VerificationError
from quantkit.files import write_json
from quantkit.formats.registry import codec
from quantkit.models import families
from quantkit.models.companions import Companions, find_companions
from quantkit.models.config import read_config
from quantkit.models.headers import Headers
from quantkit.models.names import ignore_patterns
from quantkit.models.tensors import INDEX
from quantkit.paths import user_path
from quantkit.pipeline.ignored import ignore_list
from quantkit.pipeline.model_free import notes
from quantkit.pipeline.report import RUN_SCHEMA
from quantkit.pipeline.run import Run
from quantkit.pipeline.tracker import expected
from quantkit.plan import starred
from quantkit.preflight.cache import engine_flag
from quantkit.preflight.check import preflight, verdicts
from quantkit.preflight.subject import Subject
from quantkit.scheme import Scheme
from quantkit.validation import subject_of


def publish(
    run: Run, entries: list[dict[str, Any]], found: Sequence[SearchRecord] = (), *, resumed: int
) -> Manifest:
    """Finish the checkpoint in `run.output`, whose shards are journalled in `entries`; returns the manifest.

    found: what was searched before the first block.

    The manifest is written last: a folder that holds it is finished. It has no evaluation yet (`evaluate_published`).
    """
    output, clock = run.output, run.clock
    shards = {e["written"]["file"]: e["written"] for e in entries}
    account = {n: TensorRecord(**a) for e in entries for n, a in e["account"].items()}
    dropped = run.source.dropped
    tensors = run.source.headers.tensors
    account |= {
        part.name: TensorRecord("dropped", reason=reason)
        for name, reason in dropped.items()
        for part in tensors[name].stored
    }
    lost = run.source.headers.stored.keys() - account.keys()
    if lost:
        raise VerificationError(f"source tensors without an account: {sorted(lost)[:8]}")
    with clock("write"):
        companions = find_companions(run.source.path, output)
        side = _side_files(run, shards, companions)
    files = {n: _listed(w) for n, w in shards.items()} | side
    with clock("verify"):
        verify_checkpoint(output, files, account)
    layers = [LayerRecord.from_json(layer) for e in entries for layer in e["layers"]]
    scaling = [s for e in entries for s in e["scaling"]]
    manifest = Manifest(
        schema=SCHEMA,
        identity=run.identity,
        recipe=run.recipe.published(),
        model=Origin(run.source.headers.name, run.source.headers.model_type),
        code=Code(run.identity["code"], source_digest()),
        size=_size(run, account, shards),
        layers=layers,
        scaling=scaling,
        calibration=Calibration(run.windows.notes, run.windows.sources) if run.windows else None,
        tensors=account,
        files=files,
        left_out=companions.left,
        kv_cache=None if run.plan.kv is None else KVRecord.of(run.plan.kv),
        searches=list(found) or None,
        model_free=True if run.skeleton is None else None,
        experts=[each for entry in entries for each in entry.get("experts", [])] or None,
        notes=_notes(run, layers, scaling) + (notes(run, companions.left) if run.skeleton is None else []),
    )
    write_run_facts(run, manifest, resumed)
    write_manifest(output, manifest)
    return manifest


def files_of(run: Run) -> list[str]:
    """The names of all files that a run writes into its output folder."""
    parts = run.plan.n_blocks + 1
    shards = [shard_name(part, parts) for part in range(parts)]
    companions = find_companions(run.source.path, run.output).files
    return [*shards, *companions, INDEX, "config.json", RUN, MANIFEST]


def _listed(written: dict[str, Any]) -> FileRecord:
    """A shard's entry in the manifest's `files`."""
    return FileRecord(written["sha256"], written["nbytes"], written["crc32"])


def _side_files(run: Run, shards: dict[str, dict[str, Any]], companions: Companions) -> dict[str, FileRecord]:
    """Companions, index, and last the config that makes the folder loadable."""
    output, source = run.output, run.source
    copied = copy_companions(companions, output)
    weight_map = {t: file for file, w in shards.items() for t in w["tensors"]}
    total = sum(n for w in shards.values() for n in w["tensors"].values())
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = copy.deepcopy(source.headers.config)
    schemes = {name: layer.scheme for layer in run.plan.layers for name in (layer.name, *layer.modules)}
    kv = run.plan.kv if run.plan.calibrates_cache else None
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    if schemes or kv is not None:
        ignored = _ignored(run, schemes) if schemes else []
        config["quantization_config"] = codec(run.recipe.output.format).config(schemes, ignored, kv)
    write_json(output / "config.json", config)
    written = (INDEX, "config.json")
    return copied | {n: FileRecord(digest_file(output / n), (output / n).stat().st_size) for n in written}


def _ignored(run: Run, schemes: Mapping[str, Scheme]) -> list[str]:
    """What `ignore` of the config says: by the model's linears, or without a model by names."""
    if run.skeleton is None:
        left = (name for name, _ in run.plan.skipped)
        return ignore_patterns(left, schemes, run.plan.blocks_prefix, run.plan.n_blocks)
    return ignore_list(run.model, schemes)


def _size(run: Run, account: dict[str, TensorRecord], shards: dict[str, dict[str, Any]]) -> Size:
    """Bytes of all tensors before and after, and bits per weight counted from the stored bytes."""
    tensors = {n: b for w in shards.values() for n, b in w["tensors"].items()}
    weights = sum(layer.shape[0] * layer.shape[1] for layer in run.plan.layers)
    planned = {name: each for name, each in account.items() if each.how == "quantized"}
    packed = sum(tensors[part] for part in {part for each in planned.values() for part in each.became or ()})
    original, dense = run.source.headers.stored, run.source.headers.tensors
    parameters = sum(math.prod(i.shape) for n, i in dense.items() if n not in run.source.dropped)
    return Size(
        original_linear_bits_per_weight=8 * sum(original[n].nbytes for n in planned) / max(1, weights),
        original_bytes=sum(i.nbytes for i in original.values()),
        quantized_bytes=sum(tensors.values()),
        linear_bits_per_weight=8 * packed / max(1, weights),
        model_bits_per_weight=8 * sum(tensors.values()) / max(1, parameters),
    )


def _of_expert(layer: LayerRecord) -> bool:
    """Whether a linear is one of many alike, so that notes on them are counted."""
    return families.EXPERT_TENSOR.search(layer.name) is not None


def _notes(run: Run, layers: list[LayerRecord], scaling: list[dict[str, Any]]) -> list[str]:
    notes = source_notes(run.source.headers)
    notes += [
        f"{layer.name}: {text}" for layer in layers if not _of_expert(layer) for text in layer.fallbacks or ()
    ]
    together = Counter((starred(x.name), text) for x in layers if _of_expert(x) for text in x.fallbacks or ())
    notes += [f"{count} of {name}: {text}" for (name, text), count in together.items()]
    notes += [f"{s['transform']} on {s['producer']}: {s['note']}" for s in scaling if "note" in s]
    left_out = Counter((s["transform"], name) for s in scaling if "left_out" in s for name in s["consumers"])
    notes += [
        f"{transform} left the input of {name} as it is in {count} blocks (why: `scaling` in {MANIFEST})"
        for (transform, name), count in left_out.items()
    ]
    schemes = {layer.name: layer.scheme for layer in run.plan.layers}
    known = of_mixture(loaders(run.source.headers.text_type, schemes, run.plan.kv), _subject(run))
    notes += [str(loader) for loader in known if not loader.loads or loader.needs]
    notes += engine_notes(run)
    if run.plan.kv is not None:
        flag = engine_flag(run.plan.kv)
        notes.append(
            f"KV cache in vLLM: {flag}" if flag else f"no option of vLLM is the KV cache {run.plan.kv}"
        )
    return notes + (list(run.windows.notes) if run.windows else [])


def engine_notes(run: Run) -> list[str]:
    """What the recipe's target would refuse of the files as they were written; without one, each engine in a line."""
    subject = _subject(run)
    asked = None if run.recipe.target is None else run.recipe.target.asked
    if asked is not None:
        return [f"{REFUSED}{asked}: {finding}" for finding in preflight(subject, asked)]
    return [f"{REFUSED}{said}" for runs, said in verdicts(subject) if not runs]


def _subject(run: Run) -> Subject:
    """The checkpoint as it was written, for the rules about engines."""
    return subject_of(run.plan, run.source.headers, read_config(run.output).get("quantization_config"))


def source_notes(headers: Headers) -> list[str]:
    """What a report says of a source that was quantized already."""
    if headers.encoding is None:
        return []
    dense = headers.encoding.dense
    linears = [name.removesuffix(dense) for name, info in headers.tensors.items() if info.decoded]
    schemes = sorted({str(headers.encoding.scheme(name)) for name in linears})
    if not linears:
        return ["source: only its KV cache is quantized, whose scales are left out"]
    said = f"source: {headers.encoding.config.get('quant_method')}, {'; '.join(schemes)} ({len(linears)} weights)"
    notes = [f"{said}; errors are against its decoded weights"]
    if headers.encoding.rounds_inputs(linears):
        notes.append("source: it rounds inputs of linears too, which its decoded weights do not")
    return notes


def _predicted(run: Run) -> dict[str, int]:
    """What the run was expected to take, in bytes."""
    needed = run.needed
    if needed is None:
        return {}
    found = {
        "quantize": needed.memory,
        "evaluate": max(needed.memory, needed.evaluation),
        "disk": needed.disk,
    }
    return found | ({"vram": needed.vram} if run.device.type == "cuda" else {})


def write_run_facts(run: Run, manifest: Manifest, resumed: int, evaluated: bool = False) -> None:
    """Write `quantkit.run.json`, the only file that may differ between two runs of the same inputs.

    evaluated: called once more, after the evaluation. The file also names those of the checkpoint, should its manifest
    be damaged.
    """
    before = read_facts(run.output).peak_bytes if evaluated and (run.output / RUN).exists() else {}
    peaks = before | {"evaluate" if evaluated else "quantize": peak_memory()}
    facts = RunFacts(
        schema=RUN_SCHEMA,
        seconds=run.clock.wall | {"total": run.clock.total},
        cpu_seconds=run.clock.cpu,
        peak_rss_bytes=max(peaks.values()),
        resumed_blocks=resumed,
        threads=torch.get_num_threads(),
        host=host(),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files={name: entry.sha256 for name, entry in manifest.files.items()},
        peak_bytes=peaks,
        predicted_bytes=_predicted(run),
        predicted_seconds=dict(seconds.phases) if (seconds := expected(run)) else {},
        budget=None if run.recipe.budget is None else run.recipe.budget.model_dump(exclude_none=True),
        blocks=run.clock.blocks or None,
        inputs=Inputs(
            str(run.source.path.resolve()), [_place(x.source) for x in run.recipe.calibration.data]
        ),
    )
    write_facts(run.output, facts)


def host() -> dict[str, str]:
    """The machine, as far as it may change the last bits of a result."""
    kernels = "none"
    with suppress(RuntimeError):  # QUANTKIT_ISA names what this machine has not
        kernels = library.isa() if library.available() else "none"
    return {
        "cpu": cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "kernels": kernels,
    }


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def _place(source: str) -> str:
    """A calibration text by its whole path; one of the hub by its name."""
    path = user_path(source, DataError)
    return str(path.resolve()) if path.exists() else source


def source_digest() -> str:
    """sha256 over the Python sources of the package."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return total.hexdigest()
