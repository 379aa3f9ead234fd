"""Measure decode and prefill speed of a 1.1B Llama, and its memory.

    python -m quantkit.bench.models.decode --work DIR --json FILE

The native path is compared with transformers running bf16 weights, PyTorch's int4 op and our linears. The model has
random weights in W4 g128, head included; batch 1, greedy. All engines run interleaved in one process. A number is the
median over rounds, a ratio the median of the ratios within each round. Memory is measured in a separate process per
engine, as peak anonymous memory minus what the imports use. quantkit.bench.models.llamacpp adds llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from quantkit_eval.loop import decode, model_step
from quantkit_eval.sampler import Sampling

from quantkit.bench.machine import machine, where
from quantkit.bench.rounds import Measured, interleave, ratios
from quantkit.bench.synthetic import MIXTURES, SHAPES, Mixture, Shape, make, make_mixture
from quantkit.files import write_json
from quantkit.pipeline.quantize import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS, PROMPT, NEW = 22, 512, 64
RECIPE = "w4a16-rtn"
ALL: dict[str, Shape | Mixture] = {**SHAPES, **MIXTURES}
HEAD_TOO = 'rules=[{"match": "lm_head", "bits": 4}]'


class Way(NamedTuple):
    """One way to run a checkpoint: natively or inside transformers, with `backend` and `compute` of `quantkit.load`."""

    checkpoint: str
    native: bool = False
    compute: str = "float"
    backend: str | None = None


WAYS: dict[str, Way] = {
    "native W4A8": Way("packed", True, "int8"),
    "native W4A8 per token": Way("packed", True, "int8-token"),
    "native W4A16": Way("packed", True),
    "eager W4A8": Way("packed", compute="int8"),
    "eager W4A16": Way("packed"),
    "eager torch int4": Way("packed", backend="torch"),
    "eager bf16": Way("dense"),
}


class NotHere(Exception):
    """A way that cannot run on this machine or model; the message says why."""


def models(work: Path, layers: int = LAYERS, shape: Shape | Mixture = SHAPES["1.1b"]) -> dict[str, Path]:
    """{"dense": bf16 checkpoint, "packed": the same as W4 g128}; made if they do not exist yet."""
    dense = work / f"{'mixture' if isinstance(shape, Mixture) else 'llama'}-{shape.hidden}-{layers}"
    packed = dense.with_name(dense.name + "-w4")
    if not (dense / "config.json").exists():
        make_mixture(dense, layers, shape) if isinstance(shape, Mixture) else make(dense, layers, shape=shape)
    if not (packed / "quantkit.json").exists():
        quantize(RECIPE, dense, packed, [HEAD_TOO], device="cpu", evaluate=False)
    return {"dense": dense, "packed": packed}


def open_model(path: Path, way: Way) -> PreTrainedModel:
    """The model that a way runs, with bf16 activations; raises NotHere if its backend cannot run it."""
    from quantkit.checkpoint.load import load
    from quantkit.errors import BackendError

    try:
        compute = "float" if way.native else way.compute
        return load(path, device="cpu", dtype=torch.bfloat16, backend=way.backend, compute=compute)
    except BackendError as error:
        raise NotHere(str(error)) from error


def runner(model: PreTrainedModel, way: Way) -> Any:
    """The model or its native decoder, which is called with input_ids and past_key_values."""
    from quantkit.errors import BackendError
    from quantkit.runtime import choose_runner

    try:
        return choose_runner(model, NEW, "native" if way.native else "eager", way.compute).model
    except BackendError as error:
        raise NotHere(str(error)) from error


def measure(run: Any, vocabulary: int, prompt: int, new: int) -> Measured:
    """Tokens per second of a prompt into an empty cache, and of `new` greedy steps after one token."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, prompt), generator=random)
    step = model_step(run)
    start = time.perf_counter()
    step(tokens, None)
    prefill = prompt / (time.perf_counter() - start)
    made = decode(step, tokens[0, :1], new + 1, Sampling().chooser())
    next(made)
    start = time.perf_counter()
    for _ in made:
        pass
    return {"decode": new / (time.perf_counter() - start), "prefill": prefill}


def engines(
    ways: Mapping[str, Way], checkpoints: Mapping[str, Path], prompt: int, new: int
) -> tuple[dict[str, Callable[[], Measured]], dict[str, str]]:
    """({name: function that measures once}, reasons of those that cannot run); models are loaded once and shared."""
    loaded: dict[Way, PreTrainedModel] = {}
    ready: dict[str, Callable[[], Measured]] = {}
    missing: dict[str, str] = {}
    for name, way in ways.items():
        key = Way(way.checkpoint, way.native, "float" if way.native else way.compute, way.backend)
        try:
            if key not in loaded:
                loaded[key] = open_model(checkpoints[way.checkpoint], way)
            run = runner(loaded[key], way)
        except NotHere as reason:
            missing[name] = str(reason)
            continue
        vocabulary = loaded[key].config.vocab_size
        ready[name] = partial(measure, run, vocabulary, prompt, new)
    return ready, missing


def table(report: Mapping[str, Any]) -> str:
    """The result as text: medians with their range."""
    lines = [f"{'engine':28}{'decode tok/s':>14}{'(range)':>18}{'prefill tok/s':>16}{'(range)':>18}"]
    for name, row in report["engines"].items():
        lines.append(
            f"{name:28}"
            + "".join(
                f"{row[kind]['median']:{width}.1f}" + f"{row[kind]['min']:10.1f}-{row[kind]['max']:<7.1f}"
                for kind, width in (("decode", 14), ("prefill", 16))
            )
        )
    lines += [f"{name}: not run, {reason}" for name, reason in report.get("missing", {}).items()]
    return "\n".join(lines)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@contextmanager
def peak() -> Iterator[list[int]]:
    """Polls anonymous memory every 5 ms; the list holds its largest value, up to date when the block ends."""
    highest, done = [anonymous()], threading.Event()

    def poll() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()
        highest[0] = max(highest[0], anonymous())


def memory(checkpoint: Path, way: Way, new: int = NEW) -> dict[str, Any]:
    """Memory that this process uses to load a checkpoint and generate `new` tokens. Call it in a fresh process."""
    import transformers  # noqa: F401  part of what imports take

    import quantkit.checkpoint.load
    import quantkit.runtime  # noqa: F401

    imports = anonymous()
    with peak() as loading:
        model = open_model(checkpoint, way)
        run = runner(model, way)
    with peak() as running:
        measure(run, model.config.vocab_size, 1, new)
    packed, weights = packed_bytes(model)
    config = model.config
    # keys and values of `new` + 1 tokens; the native cache is fp32 by default, transformers' has the model's type
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = token * (new + 1) * (4 if way.native else 2)
    return {
        "imports": imports,
        "load_peak": loading[0] - imports,
        "run_peak": running[0] - imports,
        "packed_bytes": packed,
        "bits_per_packed_weight": 8 * packed / weights if weights else None,
        "cache_bytes": cache,
        "limit": 1.15 * packed + cache + 150e6 if packed else None,
    }


def packed_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """(bytes of the packed linears as they are in memory, their weights), each tensor counted once."""
    from quantkit.layers.quant_linear import QuantLinear

    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    tensors = {b.data_ptr(): b.nbytes for m in linears for b in m.buffers()}
    return sum(tensors.values()), sum(m.in_features * m.out_features for m in linears)


def memory_apart(checkpoint: Path, name: str, new: int) -> dict[str, Any]:
    """`memory` in a separate process."""
    command = [sys.executable, "-m", "quantkit.bench.models.decode", "--memory-of", str(checkpoint), name]
    done = subprocess.run(
        [*command, "--new", str(new)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    work: Path,
    layers: int = LAYERS,
    shape: Shape | Mixture = SHAPES["1.1b"],
    ways: Mapping[str, Way] = WAYS,
    rounds: int = 5,
    prompt: int = PROMPT,
    new: int = NEW,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Measure the speed of every way, then the memory of each that ran."""
    checkpoints = models(work, layers, shape)
    ready, missing = engines(ways, checkpoints, prompt, new)
    report = {
        "schema": "quantkit-decode/1",
        "machine": machine() | where("cpu"),
        "model": shape._asdict() | {"layers": layers, "scheme": "W4 g128 sym, head too"},
        "prompt_tokens": prompt,
        "new_tokens": new,
        **interleave(ready, rounds),
        "missing": missing,
    }
    report["times_faster"] = {name: ratios(report, name, ways) for name in ready}
    if with_memory:
        report["memory"] = {
            name: memory_apart(checkpoints[ways[name].checkpoint], name, new) for name in ready
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch folder with 3 GB free")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--shape", choices=ALL, default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("CHECKPOINT", "NAME"), help="only memory, of one way"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        checkpoint, name = arguments.memory_of
        print(json.dumps(memory(Path(checkpoint), WAYS[name], arguments.new)))
        return
    if arguments.work is None:
        parser.error("--work is needed")
    ways = {name: WAYS[name] for name in arguments.ways}
    report = run(
        arguments.work,
        arguments.layers,
        ALL[arguments.shape],
        ways,
        arguments.rounds,
        arguments.prompt,
        arguments.new,
    )
    print(table(report))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
