"""Results of every kind as files, small and made up; a name goes wherever a user or a model can put text."""

import json
from dataclasses import replace
from pathlib import Path

import manifests
from quantkit_eval.explanation import Explanation, Guess, Restored, WorstToken
from quantkit_eval.paired import Comparison
from quantkit_eval.report import Fit, Report

from quantkit.checkpoint.manifest import write_facts, write_manifest
from quantkit.checkpoint.records import BlockFacts, LayerRecord, RunFacts

HOSTILE = "</title><script>alert(1)</script>\"'&$x$<img src=x onerror=alert(2)>"
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")


def evaluation(kl=0.01, perplexity=21.5, text="text"):
    return Report(
        512, 2, 256, 256, [text], "4" * 64, Fit(perplexity, 0.5, 3.0, 0.25), Fit(21.0, 0.4, 3.0, 0.2),
        delta_nll=0.02, delta_nll_se=0.001, kl_mean=kl, kl_mean_se=kl / 20, kl_median=kl / 2, kl_p99=9 * kl,
        kl_max=30 * kl, kl_windows=2, top1_agreement=0.9, top1_agreement_se=0.01,
    )  # fmt: skip


def explanation(name=""):
    worst = WorstToken(
        1, 7, 2.5, f"Call me {name}", f"Ish{name}", f"mael {name}", [Guess(f"a{name}", 0.75), Guess("b", 0.125)],
        [Guess("c", 0.5)], 3.25, 0.5, f"model.layers.0.{KINDS[0]}", 0.5,
    )  # fmt: skip
    other = replace(worst, window=0, unit=None, kl_restored=None, kl=1.5)
    units = [Restored(f"model.layers.{i}.{kind}", 0.1, 0.02 - 0.01 * i) for i in (0, 1) for kind in KINDS[:2]]
    return Explanation(
        100, [1e-4, 1e-2, 1, 10], [60, 39, 1], {"0.5": 0.004, "0.99": 0.8, "0.999": 2.5, "1.0": 2.5}, [worst, other],
        [1], 0.12, 0.0, f"layer{name}", units,
    )  # fmt: skip


def write(file: Path, value) -> Path:
    file.write_text(json.dumps(value))
    return file


def checkpoint(folder: Path, name: str = "") -> Path:
    folder.mkdir()
    layers = [
        LayerRecord(
            f"model.layers.{b}.{kind}",
            "W4A16",
            "gptq",
            0.25,
            0.01 * (b + 1),
            0.5,
            {},
            [name] if name else None,
        )
        for b in (0, 1)
        for kind in KINDS
    ]
    manifest = replace(
        manifests.FULL,
        layers=layers,
        evaluation=evaluation(text=f"text{name}"),
        notes=[f"note {name}"],
        experts=[
            {"name": f"model.layers.{b}.mlp.experts", "tokens": [90, 10 + b], "unseen": 0} for b in (0, 1)
        ],
        recipe={"weights": {"bits": 4, "algorithm": {"name": f"gptq{name}"}}},
    )
    write_manifest(folder, manifest)
    blocks = [
        BlockFacts(name=f"model.layers.{b}", seconds=b + 1.0, cpu_seconds=1.5, rss_bytes=2 * 10**8)
        for b in (0, 1)
    ]
    facts = RunFacts(
        schema="quantkit-run/1", seconds={"quantize": 2.0, "load": 1.0, "total": 3.5}, blocks=blocks,
        peak_rss_bytes=3 * 10**8, host={"cpu": f"cpu {name}"}, date="2026-11-29", threads=2,
    )  # fmt: skip
    write_facts(folder, facts)
    return folder


def cell(number, method, bits, kl, name=""):
    return {
        "id": f"w{bits}-{method}{name}",
        "status": "finished",
        "factors": {"method": f"{method}{name}", "bits": bits, "kv_cache": "none"},
        "memory_bytes": 10.0**6 * bits + 5e5,
        "recipe": {"weights": {"bits": bits}},
        "size": {
            "quantized_bytes": 10**6 * bits,
            "original_bytes": 16 * 10**6,
            "linear_bits_per_weight": bits + 0.125,
        },
        "evaluation": evaluation(kl, 20 + 5 * kl).to_json(),
        "speed": {
            "decode_tokens_per_s": 100.0 + number,
            "prefill_tokens_per_s": 1000.0,
            "decode_times_original": 2.0 + number / 10,
            "decode_times_original_mad": 0.05,
        },
        "seconds": {"total": 12.5, "quantize": 10.0, "evaluate": 2.5},
        "notes": ["refused by an engine: no kernel", f"note of a cell {name}"],
    }


def sweep(name=""):
    grid = [("rtn", 2, 0.5), ("rtn", 4, 0.02), ("gptq", 2, 0.2), ("gptq", 4, 0.01), ("gptq", 8, 0.0001)]
    cells = [cell(i, *each, name) for i, each in enumerate(grid)]
    failed = {
        "id": f"w2-bad{name}",
        "status": "failed",
        "reason": f"collapsed {name}",
        "seconds": None,
        "notes": None,
    }
    pair = Comparison("w4-gptq", f"w4-rtn{name}", "kl", -0.01, 0.001, 1e-11, 1e-9, "yes").to_json()
    return {
        "schema": "quantkit-sweep/1", "name": f"grid{name}", "model": f"tiny{name}", "cells": [*cells, failed],
        "decisions": {"alpha": 0.05, "correction": "holm", "pairs": [pair]},
        "seconds": {"call": 9.0, "cells": 60.0, "separate": 90.0}, "host": {"cpu": name},
    }  # fmt: skip


def bench(name=""):
    spread = {"median": 60.0, "mad": 0.5}
    decode = {
        "tokens_per_s": spread, "ceiling_tokens_per_s": 80.0, "roofline_share": 0.75, "bound": "memory",
        "step_s": {"median": 0.016, "p95": 0.018}, "parts_s": {"linears": 0.012, "head": 0.003, name or "rest": 0.001},
    }  # fmt: skip
    prefill = {"tokens_per_s": spread, "ceiling_tokens_per_s": None, "first_token_s": spread}
    row = {"batch": 1, "context": 0, "prefill": prefill, "decode": decode}
    model = {"name": f"tiny{name}", "way": "native", "weight_bytes": 10**6, "rows": [row]}
    return {"schema": "quantkit-bench/1", "machine": {"cpu": f"cpu{name}"}, "models": [model]}


def plan(name=""):
    device = {"title": f"GPU {name}", "bandwidth": 1e12, "peak": {"fp16": 1e14}}
    operator = {
        "count": 2,
        "operations": 1e9,
        "kind": "fp16",
        "bound": "memory",
        "attainable_operations_per_s": 1e12,
    }
    operators = [
        operator | {"name": f"q{name}", "bytes": 1e9, "intensity": 1.0, "seconds": 2e-3},
        operator | {"name": "softmax", "bytes": 0.0, "intensity": None, "seconds": 1e-5},
    ]
    step = {"operators": operators, "seconds": 2.01e-3, "tokens_per_s": 497.5}
    roofline = [{"hardware": device, "prefill": step, "decode": step}]
    return {"schema": "quantkit-plan/1", "context": 512, "batch": 1, "roofline": roofline}


def explained(name="", model="ckpt"):
    told = evaluation().to_json() | {"model": model, "baseline": f"base{name}"}
    return told | {"explanation": explanation(name).to_json()}


def everything(root: Path, name=""):
    """One file or folder of each kind: sweep, bench, plan, evaluation, checkpoint."""
    kinds = {"sweep": sweep, "bench": bench, "plan": plan, "eval": explained}
    files = [write(root / f"{kind}.json", of(name)) for kind, of in kinds.items()]
    return [*files, checkpoint(root / "ckpt", name)]
