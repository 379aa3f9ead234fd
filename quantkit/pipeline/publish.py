"""From shards to a checkpoint: side files, index, config, verification, evaluation, manifest."""

from __future__ import annotations

import datetime
import hashlib
import math
import platform
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from quantkit.checkpoint.inspect import ASYMMETRIC, READS_WEIGHT, loaders
from quantkit.checkpoint.journal import CARRIED
from quantkit.checkpoint.shards import write_atomically, write_json
from quantkit.checkpoint.verify import AGAIN, MANIFEST, digest_file, verify_checkpoint
from quantkit.device import cpu_name
from quantkit.errors import VerificationError
from quantkit.formats.registry import codec
from quantkit.models.json_reader import read_json
from quantkit.models.tensors import INDEX
from quantkit.pipeline.evaluation import EvaluationRequest, evaluate_pair
from quantkit.pipeline.produce import Producer
from quantkit.structure.trace import is_linear

RUN = "quantkit.run.json"


def publish(
    producer: Producer, tokenizer: Any, identity: dict, *, request: EvaluationRequest | None, resumed: int
) -> tuple[dict, dict]:
    """Finish the checkpoint in `producer.output`; returns (manifest, report). The manifest is written last."""
    output, entries, clock = producer.output, producer.journal.entries, producer.clock
    shards = {e["written"]["file"]: e["written"] for e in entries}
    account = {n: a for e in entries for n, a in e["account"].items()}
    dropped = producer.source.headers.dropped
    account |= {n: {"how": "dropped", "reason": reason} for n, reason in dropped.items()}
    lost = producer.source.headers.tensors.keys() - account.keys()
    if lost:
        raise VerificationError(f"source tensors without an account: {sorted(lost)[:8]}")
    with clock("write"):
        side = _side_files(producer, shards)
    files = {n: {"sha256": w["sha256"], "bytes": w["nbytes"]} for n, w in shards.items()} | side
    with clock("verify"):
        verify_checkpoint(output, files, account)
    evaluation = None
    notes = _notes(producer)
    if request:
        producer.progress.message("evaluating original and quantized model")
        with clock("evaluate"):
            length = producer.recipe.calibration.sequence_length
            evaluation, refused = evaluate_pair(
                output, producer.source.headers, tokenizer, producer.device, length, request
            )
        notes += refused
    manifest = {
        "schema": "quantkit/1",
        "identity": identity,
        "recipe": producer.recipe.published(),
        "model": {"name": producer.source.path.resolve().name, "type": producer.source.headers.model_type},
        "code": {"quantkit": identity["code"], "source": _source_digest()},
        "size": _size(producer, entries, shards),
        "layers": [layer for e in entries for layer in e["layers"]],
        "scaling": [s for e in entries for s in e["scaling"]],
        "calibration": {"notes": list(producer.windows.notes)} if producer.windows else None,
        "tensors": account,
        "files": files,
        "evaluation": evaluation,
        "notes": notes,
    }
    write_json(output / RUN, _run_facts(producer, resumed))
    write_json(output / MANIFEST, manifest)
    return manifest, report_of(output, manifest)


def _side_files(producer: Producer, shards: dict[str, dict]) -> dict[str, dict]:
    """Tokenizer, generation config, index, and last the config that makes the folder loadable."""
    output, source = producer.output, producer.source
    names = sorted({f.name for pattern in CARRIED for f in source.path.glob(pattern) if f.is_file()})
    for name in names:
        write_atomically(output / name, iter([(source.path / name).read_bytes()]))
    weight_map = {t: file for file, w in shards.items() for t in w["tensors"]}
    total = sum(n for w in shards.values() for n in w["tensors"].values())
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = dict(source.headers.config)
    schemes = {layer.name: layer.scheme for layer in producer.plan.layers}
    linears = {n for n, module in producer.model.named_modules() if is_linear(module)}
    config["quantization_config"] = codec(producer.recipe.output.format).config(
        schemes, sorted(linears - schemes.keys())
    )
    write_json(output / "config.json", config)
    names += [INDEX, "config.json"]
    return {n: {"sha256": digest_file(output / n), "bytes": (output / n).stat().st_size} for n in names}


def _size(producer: Producer, entries: list[dict], shards: dict[str, dict]) -> dict[str, Any]:
    """Bytes of all tensors before and after, and bits per weight counted from the stored bytes."""
    tensors = {n: b for w in shards.values() for n, b in w["tensors"].items()}
    weights = sum(layer.shape[0] * layer.shape[1] for layer in producer.plan.layers)
    parts = {
        t for e in entries for a in e["account"].values() if a["how"] == "quantized" for t in a["became"]
    }
    packed = sum(tensors[t] for t in parts)
    original = {i.name: i for i in producer.source.headers.tensors.values()}
    parameters = sum(
        math.prod(i.shape) for n, i in original.items() if n not in producer.source.headers.dropped
    )
    planned = {n for e in entries for n, a in e["account"].items() if a["how"] == "quantized"}
    return {
        "original_linear_bits_per_weight": 8 * sum(original[n].nbytes for n in planned) / max(1, weights),
        "original_bytes": sum(i.nbytes for i in original.values()),
        "quantized_bytes": sum(tensors.values()),
        "linear_bits_per_weight": 8 * packed / max(1, weights),
        "model_bits_per_weight": 8 * sum(tensors.values()) / max(1, parameters),
    }


def _notes(producer: Producer) -> list[str]:
    notes = [
        f"{layer['name']}: {text}"
        for e in producer.journal.entries
        for layer in e["layers"]
        for text in layer.get("fallbacks", [])
    ]
    left_out = Counter(
        name
        for e in producer.journal.entries
        for s in e["scaling"]
        if "left_out" in s
        for name in s["consumers"]
    )
    notes += [
        f"awq left the input of {name} as it is in {count} blocks (why: `scaling` in {MANIFEST})"
        for name, count in left_out.items()
    ]
    quantized = [
        {
            "name": p.name,
            "bits": p.scheme.weights.bits,
            "group_size": p.scheme.weights.group_size,
            "symmetric": p.scheme.weights.symmetric,
        }
        for p in producer.plan.layers
    ]
    for loader in loaders(producer.source.headers.model_type, quantized):
        if not loader["loads"] or loader["how"].startswith((ASYMMETRIC, READS_WEIGHT)):
            notes.append(f"{loader['name']}: {loader['how']}")
    return notes + (list(producer.windows.notes) if producer.windows else [])


def _run_facts(producer: Producer, resumed: int) -> dict[str, Any]:
    """What this run happened to have; the only file that may differ between two runs."""
    return {
        "schema": "quantkit-run/1",
        "seconds": producer.clock.wall | {"total": producer.clock.total},
        "cpu_seconds": producer.clock.cpu,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "resumed_blocks": resumed,
        "threads": torch.get_num_threads(),
        "host": {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _source_digest() -> str:
    """sha256 over the Python sources of the package."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return total.hexdigest()


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """The phases of a clock as the report names them; `calibrate_quantize` is all the work on weights."""
    work = ("calibrate", "transform", "quantize")
    return {"calibrate_quantize": sum(seconds.get(p, 0.0) for p in work)} | {
        p: s for p, s in seconds.items() if p not in work
    }


def report_of(output: Path, manifest: dict) -> dict[str, Any]:
    """The report of a finished checkpoint, from its manifest and the facts of the run that made it."""
    facts = output / RUN
    run = read_json(facts, VerificationError, advice=AGAIN) if facts.exists() else {}
    return {
        "schema": "quantkit-run/1",
        "output": str(output),
        "size": manifest["size"],
        "evaluation": manifest["evaluation"],
        "seconds": _phases(run.get("seconds", {})),
        "cpu_seconds": _phases(run.get("cpu_seconds", {})),
        "peak_rss_bytes": run.get("peak_rss_bytes"),
        "notes": manifest["notes"],
        "resumed_blocks": run.get("resumed_blocks", 0),
    }
