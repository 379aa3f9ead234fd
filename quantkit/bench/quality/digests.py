"""Whether a change of the code changes what the shipped recipes produce.

    python -m quantkit.bench.quality.digests --work DIR --json after.json [--against before.json]

Quantizes the embedded model by every shipped recipe, on one thread, and keeps the sha256 of every weight shard and of
config.json, and the numbers of the report. With --against, the file of an earlier commit on the same machine, it prints
every recipe that differs and ends with exit code 1 if any does. Across processors the last bits may differ, so files of
two machines say nothing. Run as a file, the same script reads an older commit's package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENS = 4096  # of the evaluation


def digests(recipe: str, work: Path) -> dict[str, Any]:
    """What one recipe makes of the embedded model: {"files": {name: sha256}, "report": {name: number}}."""
    import quantkit_eval

    from quantkit import assets
    from quantkit.checkpoint.load import load
    from quantkit.models.tokenizer import open_tokenizer
    from quantkit.pipeline.quantize import quantize

    output, model = work / recipe, assets.default_model()
    result = quantize(recipe, output=output, device="cpu", resume=False, evaluate=False)
    files = [output / "config.json", *sorted(output.glob("model-*.safetensors"))]
    manifest = json.loads((result.output / "quantkit.json").read_text())  # older commits return dictionaries
    report = dict(manifest["size"])
    for layer in manifest["layers"]:
        report |= {f"{layer['name']}.{k}": layer[k] for k in ("weight_error", "relative_error") if k in layer}
    measured = quantkit_eval.evaluate(
        load(output, device="cpu"),
        open_tokenizer(model),
        text=[str(assets.evaluation_text())],
        baseline=load(model, device="cpu"),
        max_tokens=TOKENS,
        context=512,
    ).to_json()
    report |= {f"{key}": measured[key] for key in ("delta_nll", "kl_mean", "kl_max", "top1_agreement")}
    return {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "report": report,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per recipe and part that is not the same in both; a recipe only one has is not compared."""
    lines = []
    for recipe in before.keys() & after.keys():
        old, new = before[recipe], after[recipe]
        changed = sorted(n for n in old["files"] if old["files"][n] != new["files"].get(n))
        changed += sorted(new["files"].keys() - old["files"].keys())
        if changed:
            lines.append(f"{recipe}: files differ: {', '.join(changed)}")
        lines += [f"{recipe}: report.{k}" for k in old["report"] if old["report"][k] != new["report"].get(k)]
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--recipes", nargs="+")
    arguments = parser.parse_args()
    import torch

    from quantkit import assets

    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found = {}
    for recipe in arguments.recipes or assets.recipe_names():
        found[recipe] = digests(recipe, arguments.work)
        print(recipe, found[recipe]["files"]["model-00001-of-00009.safetensors"][:12], flush=True)
        whole = {"commit": commit.stdout.strip(), "torch": torch.__version__, "recipes": found}
        arguments.json.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    if arguments.against:
        lines = differences(json.loads(arguments.against.read_text())["recipes"], found)
        print("\n".join(lines) or "no difference")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
