"""How many model types quantkit takes: a tiny random model of each is quantized, loaded and compared with itself.

    python -m quantkit.bench.coverage --json coverage.json
    python -m quantkit.bench.coverage --json coverage.json --types bamba zamba2 --recipes w4-gptq
    python -m quantkit.bench.coverage --json coverage.json --docs docs/architectures.md

The types are those that the installed transformers lists as causal LMs or image-text-to-text models. Each runs in a
process of its own, forked from this one, with a time limit. Its outcome by every recipe is "accepted" (with the
relative error of the logits), "refused" (with the reason), or "wrong": a crash, a result that does not load, logits
that are too far away, calibration on other hidden states than the model's own, or decoding with a cache that gives
other tokens. A type of which no tiny model can be built here says why. With --json the run can be continued: types that
the file has are not run again, and each says with which commit it ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from quantkit.bench.coverage_outside import LEAST_SHARE, why_outside
from quantkit.bench.machine import commit, machine

SCHEMA = "quantkit-coverage/1"
SECONDS = 180.0  # a type may take
OUT_OF_TIME = f"more than {SECONDS:.0f} s, twice"
PACKAGES = {
    "PIL": "pillow",
    "scipy": "scipy",
    "timm": "timm",
    "torchvision": "torchvision",
}  # that some types need
VERDICTS = ("accepted", "partly", "outside", "refused", "wrong", "not buildable")
FAMILIES = ("dense", "hybrid", "wrapper", "mixture", "other")
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"


def types() -> dict[str, str]:
    """Every model type of the two mappings and the class its checkpoint names; the wrapper where there are two."""
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return dict(
        sorted((dict(texts) | dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)).items())
    )


def run(
    chosen: dict[str, str], recipes: list[str], jobs: int, kept: dict[str, Any], file: Path | None
) -> None:
    """Fill `kept` (type -> what became of it), and write it to `file` after each one."""
    _preload()
    context = multiprocessing.get_context("fork")
    waiting = [each for each in chosen.items() if each[0] not in kept]
    again: set[str] = set()  # what ran out of time once: another program may have had the processor
    running: dict[str, tuple[Any, Connection, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type, architecture = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(model_type, architecture, recipes, theirs))
            child.start()
            theirs.close()
            running[model_type] = (child, ours, time.monotonic() + SECONDS)
        for model_type, (child, ours, deadline) in list(running.items()):
            found = _answer(child, ours, deadline)
            if found is None:
                continue
            del running[model_type]
            if found["built"] == OUT_OF_TIME and model_type not in again:
                again.add(model_type)
                waiting.append((model_type, chosen[model_type]))
                continue
            kept[model_type] = found | {"architecture": chosen[model_type], "commit": commit()}
            print(f"{model_type}: {line(kept[model_type])}", flush=True)
            if file is not None:
                write(file, kept, recipes)
        time.sleep(0.02)


def _answer(child: Any, pipe: Connection, deadline: float) -> dict[str, Any] | None:
    """What a child has found; None while it runs."""
    if pipe.poll():
        try:
            found: dict[str, Any] = pipe.recv()
        except EOFError:
            child.join()
            found = {
                "family": "other",
                "built": f"the process ended with status {child.exitcode}",
                "outcomes": {},
            }
        child.join()
        return found
    if time.monotonic() > deadline:
        child.kill()
        child.join()
        return {"family": "other", "built": OUT_OF_TIME, "outcomes": {}}
    return None


def _child(model_type: str, architecture: str, recipes: list[str], pipe: Connection) -> None:
    from quantkit.bench.coverage_case import run_case

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    pipe.send(run_case(model_type, architecture, recipes).to_json())
    pipe.close()


def _preload() -> None:
    """Import what every child needs, on one thread, so that forking is safe and cheap."""
    import torch
    import transformers

    from quantkit.bench import coverage_case, coverage_judge
    from quantkit.checkpoint import plugin
    from quantkit.pipeline import quantize

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for module in (coverage_case, coverage_judge, plugin, quantize):
        assert module.__doc__
    for name in ("LlamaForCausalLM", "LlavaForConditionalGeneration", "BertModel", "AutoProcessor"):
        getattr(transformers, name)


def line(found: dict[str, Any]) -> str:
    """One type in one line."""
    if found["built"]:
        return f"{found['family']}, not buildable: {found['built'][:160]}"
    told = []
    for recipe, each in found["outcomes"].items():
        detail = each.get("reason") or (
            f"error {each['error']:.2%}, by noise {each['noise']:.2%}, {each['share']:.0%} of the matrices"
        )
        told.append(f"{recipe} {each['outcome']} ({detail[:160]})")
    return f"{found['family']}: {'; '.join(told)}"


def verdict(found: dict[str, Any]) -> str:
    """The outcome of a type over all recipes.

    The worst of wrong, refused and accepted, "partly" for some of both or for a small share of the matrices;
    "not buildable"; or "outside": it is no model that reads and writes text by a decoder alone.
    """
    reasons = reasons_of(found)
    if reasons and all(why_outside(found["model_type"], reason) for reason in reasons):
        seen = {each["outcome"] for each in found["outcomes"].values()}
        return "partly" if "accepted" in seen else "outside"
    if found["built"]:
        return "not buildable"
    seen = {each["outcome"] for each in found["outcomes"].values()}
    if "wrong" in seen:
        return "wrong"
    if seen == {"accepted"}:
        return "accepted" if share_of(found) >= LEAST_SHARE else "partly"
    return "partly" if "accepted" in seen else "refused"


def reasons_of(found: dict[str, Any]) -> list[str]:
    """Why a type is not accepted, without repetition."""
    bad = (each.get("reason", "") for each in found["outcomes"].values() if each["outcome"] != "accepted")
    return list(dict.fromkeys([found["built"]] if found["built"] else bad))


def share_of(found: dict[str, Any]) -> float:
    """How much of the matrices is quantized by the recipe that quantizes least; 1 where nothing was measured."""
    return min((each["share"] for each in found["outcomes"].values() if "share" in each), default=1.0)


def counts(cases: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Family -> verdict -> number of types."""
    table = {family: dict.fromkeys(VERDICTS, 0) for family in FAMILIES}
    for case in cases:
        table[case["family"]][verdict(case)] += 1
    return table


def summary(cases: Iterable[dict[str, Any]]) -> list[str]:
    """The table of counts, as lines of Markdown."""
    table = counts(cases)
    columns = list(VERDICTS)
    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for family, row in table.items():
        lines.append(f"| {family} | {' | '.join(str(row[c]) for c in columns)} |")
    total = {c: sum(row[c] for row in table.values()) for c in columns}
    lines.append(f"| all | {' | '.join(str(total[c]) for c in columns)} |")
    return lines


def details(cases: dict[str, dict[str, Any]]) -> list[str]:
    """What is accepted by name, and every other type with its reason, as lines of Markdown."""
    lines = []
    for family in FAMILIES:
        names = [n for n, c in cases.items() if c["family"] == family and verdict(c) == "accepted"]
        if names:
            told = (
                f"`{n}`" + (f" ({share_of(cases[n]):.0%})" if share_of(cases[n]) < 0.95 else "")
                for n in names
            )
            lines.append(f"- **{family}, accepted**: {', '.join(told)}")
    lines += ["", "| type | family | outcome | reason |", "|---|---|---|---|"]
    for name, case in cases.items():
        outcome = verdict(case)
        if outcome == "accepted":
            continue
        lines.append(f"| `{name}` | {case['family']} | {outcome} | {_cell(_told(case))} |")
    return lines


def _told(case: dict[str, Any]) -> str:
    """Why a type is not accepted, in one line."""
    reasons = reasons_of(case)
    outside = [why_outside(case["model_type"], reason) for reason in reasons]
    if outside and all(outside):
        return "; ".join(dict.fromkeys(map(str, outside)))
    if case["built"]:
        return str(case["built"])
    by_recipe = {
        recipe: each.get("reason", "")
        for recipe, each in case["outcomes"].items()
        if each["outcome"] != "accepted"
    }
    told = [
        f"{' and '.join(r for r, why in by_recipe.items() if why == reason)}: {reason}" for reason in reasons
    ]
    small = [] if share_of(case) >= LEAST_SHARE else [f"{share_of(case):.0%} of the matrices are quantized"]
    return "; ".join([*told, *small])


def _cell(reason: str) -> str:
    return reason.replace("|", "\\|").replace("\n", " ")[:200]


def write(file: Path, cases: dict[str, Any], recipes: list[str]) -> None:
    """The report: machine, versions, commit; counts; every type."""
    from quantkit.files import write_json

    ordered = dict(sorted(cases.items()))
    report = {"schema": SCHEMA, "machine": machine(), "recipes": recipes, "counts": counts(ordered.values())}
    report |= {"missing_packages": missing_packages()}
    write_json(file, report | {"types": ordered})


def document(page: Path, cases: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    head = f"{len(cases)} types of transformers {facts['transformers']}, commit {facts['commit']}:"
    body = "\n".join([BEGIN, head, "", *summary(cases.values()), "", *details(cases), END])
    page.write_text(before + body + after)


def missing_packages() -> list[str]:
    """The packages, by their names in the index, that some types need and that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def main() -> None:
    from quantkit.bench.coverage_case import RECIPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", help="only these, run again even if the report has them")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="the report; types it holds are not run again")
    parser.add_argument("--docs", type=Path, help="a page whose table is written from the report")
    options = parser.parse_args()
    known = types()
    unknown = set(options.types or ()) - known.keys()
    if unknown:
        parser.error(f"unknown types: {', '.join(sorted(unknown))}")
    kept: dict[str, Any] = {}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text())["types"]
    for name in options.types or ():
        kept.pop(name, None)
    chosen = {name: known[name] for name in options.types or known}
    if missing := missing_packages():
        print(
            f"not installed, and needed by some types: {', '.join(missing)}; pip install 'quantkit[coverage]'"
        )
    run(chosen, options.recipes, options.jobs, kept, options.json)
    print("\n".join(summary(kept.values())))
    if options.docs:
        document(options.docs, dict(sorted(kept.items())), machine())


if __name__ == "__main__":
    main()
