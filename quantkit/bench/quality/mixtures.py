"""Compare the quantization methods on the embedded mixture of experts, bookworm-moe-6m, at equal bits.

    python -m quantkit.bench.quality.mixtures --work DIR --json docs/benchmarks/mixtures.json [--rival PYTHON]

Calibration, verification and evaluation are those of quantkit.bench.quality.methods: 128 windows of 512 tokens, the
packed weights in fp32, every number paired with the original model on the same tokens. "routed" calibrates an expert on
the tokens that the router sends to it, "top:4" on those whose router ranks it among its first four, "all" on every
token of its layer; rows of the last two are also evaluated against the checkpoint of "routed". PYTHON is the
interpreter of an environment that has llm-compressor: its GPTQ with its default options, where every expert sees every
token, is then run on the same windows, and what it saves is loaded and evaluated in the same way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import assets
from quantkit.bench.machine import commit, machine
from quantkit.bench.quality import oneshot
from quantkit.bench.quality.methods import Measured, finished, keep, plus_minus
from quantkit.calibration.text import token_windows
from quantkit.files import write_json
from quantkit.recipe.recipe import parse_recipe

BITS = ((4, 128), (3, 128), (2, 64))
RTN = {"name": "rtn", "range": "minmax"}
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"weights": {"algorithm": RTN}},
    "GPTQ, routed": {"weights": {"algorithm": "gptq"}, "experts": {"calibrate": "routed"}},
    "GPTQ, top:4": {"weights": {"algorithm": "gptq"}, "experts": {"calibrate": "top:4"}},
    "GPTQ, all": {"weights": {"algorithm": "gptq"}, "experts": {"calibrate": "all"}},
    "AWQ + GPTQ, routed": {
        "weights": {"algorithm": "gptq"},
        "transforms": ["awq"],
        "experts": {"calibrate": "routed"},
    },
}
RIVAL = "llm-compressor GPTQ"


def folder_name(method: str, bits: int) -> str:
    """The folder of a checkpoint inside the scratch folder."""
    return f"{method}-{bits}".replace(" ", "").replace(",", "-").replace("+", "-")


def ours(measured: Measured, method: str, bits: int, group: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """One row. overrides: parts of the recipe in place of those of `METHODS`."""
    recipe = METHODS[method] | overrides
    recipe |= {"weights": recipe["weights"] | {"bits": bits, "group_size": group, "symmetric": True}}
    row = measured(recipe, folder_name(method, bits))
    if method in ("GPTQ, top:4", "GPTQ, all"):
        routed = measured.work / folder_name("GPTQ, routed", bits)
        row["against_routed"] = measured.evaluated(measured.work / folder_name(method, bits), routed)
    return row


def theirs(
    measured: Measured, python: str, bits: int, group: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The rival's row, on the windows that a recipe of ours is calibrated on."""
    calibration = parse_recipe(METHODS["GPTQ, all"] | overrides).calibration
    ids = token_windows(calibration, measured.tokenizer, assets.calibration_text()).ids
    file, out = measured.work / "windows.json", measured.work / folder_name(RIVAL, bits)
    file.write_text(json.dumps(ids.tolist()))
    script = str(Path(oneshot.__file__).resolve())
    command = [python, "-I", script, str(measured.model), str(file), "gptq", str(out), str(bits), str(group)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=measured.work)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "commit": commit(),
        "bits_per_weight": None,
        "cpu_seconds": found["cpu_seconds"],
        "versions": found["versions"],
        "evaluation": measured.evaluated(out),
    }


def measure(
    work: Path,
    methods: Sequence[str] = tuple(METHODS),
    rival: str | None = None,
    model: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """All rows; those that an earlier run left in `work` are not measured again."""
    work.mkdir(parents=True, exist_ok=True)
    done = finished(work / "rows.jsonl")
    known = {(row["method"], row["bits"]) for row in done}
    measured = Measured(work, model or assets.mixture_model())
    for bits, group in BITS:
        for method in (*methods, *([RIVAL] if rival else ())):
            if (method, bits) in known:
                continue
            if method == RIVAL:
                found = theirs(measured, str(rival), bits, group, overrides or {})
            else:
                found = ours(measured, method, bits, group, overrides or {})
            row = {"method": method, "bits": bits, "group": group} | found
            keep(work / "rows.jsonl", row, done)
            print(line(row), flush=True)
    return done


def line(row: dict[str, Any]) -> str:
    """One row as a line of a table."""
    e = row["evaluation"]
    text = (
        f"| W{row['bits']} g{row['group']} | {row['method']} | {plus_minus(e['quantized'])} "
        f"| {e['delta_nll']:+.4f} ± {e['delta_nll_se']:.4f} | {1e3 * e['kl_mean']:.2f} ± {1e3 * e['kl_mean_se']:.2f} "
        f"| {1 - e['top1_agreement']:.1%} | {row['cpu_seconds']:.0f} |"
    )
    if other := row.get("against_routed"):
        text += f" against routed: {other['delta_nll']:+.4f} ± {other['delta_nll_se']:.4f}"
    return text


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The part of docs/results.md about the mixture."""
    order = [bits for bits, _ in BITS]
    rows = sorted(rows, key=lambda row: order.index(row["bits"]))
    base = plus_minus(rows[0]["evaluation"]["original"])
    table = "\n".join(line({k: v for k, v in row.items() if k != "against_routed"}) for row in rows)
    pairs = "; ".join(
        f"{row['method']} W{row['bits']} {e['delta_nll']:+.4f} ± {e['delta_nll_se']:.4f}"
        for row in rows
        if (e := row.get("against_routed"))
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        "## A mixture of experts\n\n"
        "bookworm-moe-6m: 4 blocks of 8 experts, 2 per token; symmetric weights, routers as they are. "
        "Runs and evaluation are those of the first tables. An expert is calibrated on the tokens that the router "
        "sends to it (routed), on those whose router ranks it among its first four (top:4), or on every token of its "
        "layer (all). The rival's GPTQ, if it was run, has its default options and the same windows, every expert sees "
        "every token, and its checkpoint is evaluated in the same way."
        "\n\n"
        f"Made by `python -m quantkit.bench.quality.mixtures` on {where['cpu']}, torch {where['torch']}, "
        f"{where['threads']} thread(s), commit {commits}, {where['date'][:10]}.\n\n"
        "| scheme | method | perplexity | paired ΔNLL | KL x 1e-3 | top-1 flips | CPU-s |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| bf16 | original, run in fp32 | {base} | | | | |\n{table}\n"
        + (f"\nPaired ΔNLL against routed tokens: {pairs}.\n" if pairs else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder; a stopped run continues there"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rival", metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.work.resolve(), arguments.methods, arguments.rival)
    where = machine() | {"threads": arguments.threads}
    if arguments.json:
        write_json(arguments.json, {"schema": "quantkit-mixtures/1", "machine": where, "rows": rows})


if __name__ == "__main__":
    main()
