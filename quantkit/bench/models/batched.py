"""Compare llama.cpp with the native path when several sequences decode together.

    python -m quantkit.bench.models.batched --work DIR --batch 4 16 --json FILE

The model is that of quantkit.bench.models.llamacpp, which also builds llama.cpp. `llama-batched-bench` gives each
sequence a prompt of its own (as `-np` of its server does) and decodes one token of each per step; so does
`quantkit.generate`. Both engines run interleaved, every batch in every round; speeds are those of all sequences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.bench.machine import machine, where
from quantkit.bench.models import decode, lanes, llamacpp
from quantkit.bench.rounds import Measured, interleave, ratio
from quantkit.errors import BackendError
from quantkit.files import write_json
from quantkit.runtime import choose_runner

NATIVE = [name for name, way in decode.WAYS.items() if way.native]


def theirs(program: Path, file: Path, threads: int, batch: int, prompt: int, new: int) -> Measured:
    """One run of llama-batched-bench: tokens per second of all sequences together."""
    room = batch * (prompt + new)
    command = [program, "-m", file, "-c", room, "-b", 2048, "-ub", 512, "-npp", prompt, "-ntg", new]
    command += ["-npl", batch, "-t", threads, "-tb", threads, "--output-format", "jsonl"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return read_batched(f"{done.stdout}\n{done.stderr}", batch)


def read_batched(text: str, batch: int) -> Measured:
    """The line of JSON of llama-batched-bench; ValueError if it is not there."""
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            if row["pl"] == batch:
                return {"decode": row["speed_tg"], "prefill": row["speed_pp"]}
    raise ValueError(f"llama-batched-bench said nothing of {batch} sequences: {text[-2000:]}")


def ours(model: Any, way: decode.Way, batch: int, prompt: int, new: int) -> Callable[[], Measured]:
    """A function that runs a batch once, as `quantkit.generate` would."""
    runner = choose_runner(model, new, "native", way.compute)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator)
    lane = lanes.make_lane(runner, tokens, 0)

    def once() -> Measured:
        sample = lanes.measure(lane, new)
        return {"decode": batch * new / sum(sample.steps), "prefill": batch * prompt / sample.prompt}

    return once


def run(arguments: argparse.Namespace, built: llamacpp.Built) -> dict[str, Any]:
    """Every engine with every batch, and the ratios within each round."""
    prompt, new, batches = arguments.prompt, arguments.new, arguments.batch
    shape = decode.ALL[arguments.shape]
    checkpoints = decode.models(arguments.work.resolve(), arguments.layers, shape)
    files = llamacpp.files(built, checkpoints["dense"], arguments.formats)
    model = decode.open_model(checkpoints["packed"], decode.WAYS[NATIVE[0]])
    engines: dict[str, Callable[[], Measured]] = {}
    missing: dict[str, str] = {}
    for batch in batches:
        for name in arguments.ways:
            try:
                engines[f"{name}, batch {batch}"] = ours(model, decode.WAYS[name], batch, prompt, new)
            except BackendError as reason:
                missing[name] = str(reason)
        for kind, file in files.items():
            asked = (built.batched, file, arguments.threads, batch, prompt, new)
            engines[f"llama.cpp {kind}, batch {batch}"] = partial(theirs, *asked)
    report: dict[str, Any] = {
        "schema": "quantkit-batched/1",
        "machine": machine() | where("cpu"),
        "llama.cpp": {
            "source": built.version,
            "patched": built.patched,
            "options": llamacpp.OPTIONS,
        },
        "bytes": {kind: file.stat().st_size for kind, file in files.items()},
        "model": shape._asdict() | {"layers": arguments.layers},
        "prompt_tokens": prompt,
        "new_tokens": new,
        "batch": batches,
        **interleave(engines, arguments.rounds),
        "missing": missing,
    }
    report["times_faster"] = [
        {"batch": batch, "engine": name, "than": f"llama.cpp {kind}"}
        | {
            speed: ratio(report, speed, f"{name}, batch {batch}", f"llama.cpp {kind}, batch {batch}")
            for speed in ("decode", "prefill")
        }
        for batch in batches
        for name in arguments.ways
        if name not in missing
        for kind in files
    ]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 7 GB free")
    parser.add_argument("--layers", type=int, default=decode.LAYERS)
    parser.add_argument("--shape", choices=decode.ALL, default="1.1b")
    parser.add_argument("--formats", nargs="+", choices=llamacpp.FORMATS, default=["Q4_0"])
    parser.add_argument("--ways", nargs="+", choices=NATIVE, default=NATIVE, metavar="NAME")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=decode.NEW)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=int, default=1, help="of the build")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    built = llamacpp.build(work, arguments.jobs)
    torch.set_num_threads(arguments.threads)
    report = run(arguments, built)
    print(decode.table(report))
    for row in report["times_faster"]:
        print(
            f"batch {row['batch']}: {row['engine']} / {row['than']}: decode {row['decode']:.2f}x, "
            f"prefill {row['prefill']:.2f}x"
        )
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
