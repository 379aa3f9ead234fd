"""SmoothQuant+ beside AWQ and plain rounding: the curve of strengths, paired differences, and what the search costs.

    python -m quantkit.bench.quality.strength --work DIR --json docs/benchmarks/strength.json
    python -m quantkit.bench.quality.strength --plot docs/benchmarks/strength.json docs/benchmarks/strength.svg
    python -m quantkit.bench.quality.strength --work DIR --cost docs/benchmarks/strength-cost.json

All methods round to nearest on min-max ranges, 4 bits asymmetric in groups of 128, after 128 windows of 512 tokens, on
the embedded model and on its variant with outlier channels (`quantkit.bench.quality.outliers`). The search tries every
strength. The packed models are compared with the original, in fp32, on windows of 512 tokens of the embedded evaluation
text; differences between methods are paired by window, ± is one standard error.

--cost runs the shipped recipe and w4a16-gptq, each in a process of its own on one thread, and evaluates the rounded
model once on the calibration text, with what the original computes kept from an evaluation before: CPU-seconds of the
search and of the evaluation, and the peak memory of both runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import quantkit_eval
import torch
from quantkit_eval.cache import Cache
from quantkit_eval.perplexity import token_nll
from quantkit_eval.text import Text
from quantkit_eval.windows import first_tokens

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.quality.cost import cpu_seconds
from quantkit.bench.quality.outliers import inject
from quantkit.bench.quality.strength_plot import plot
from quantkit.calibration.divergence import token_kl
from quantkit.checkpoint.load import load
from quantkit.checkpoint.manifest import read_facts
from quantkit.checkpoint.records import plain
from quantkit.files import write_atomically, write_json
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize

CONTEXT, WINDOWS, CALIBRATION = 512, 40, 128
WEIGHTS = {"preset": "W4A16_ASYM", "algorithm": {"name": "rtn", "range": "minmax"}}
PLUS = "SmoothQuant+"
METHODS: dict[str, list[Any]] = {
    "RTN": [],
    "AWQ": ["awq"],
    PLUS: [{"name": "smoothquant_plus", "search": "full"}],
}


def measure(work: Path, windows: int) -> list[dict[str, Any]]:
    """One row per model: its searched strengths, each method against the original, and SmoothQuant+ against each."""
    models = {"outliers": work / "outliers", "embedded": assets.default_model()}
    if not models["outliers"].exists():
        inject(models["outliers"], assets.default_model())
    return [_row(name, path, work, windows) for name, path in models.items()]


def _row(name: str, path: Path, work: Path, count: int) -> dict[str, Any]:
    tokens = first_tokens(open_tokenizer(path), Text([assets.evaluation_text()]), count * CONTEXT)
    windows = torch.tensor(tokens).view(-1, CONTEXT)
    original = _logits(load(path, device="cpu"), windows)
    row: dict[str, Any] = {"model": name, "windows": len(windows), "methods": {}, "plus_minus": {}}
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for method, transforms in METHODS.items():
        recipe = {"weights": WEIGHTS, "transforms": transforms}
        label = "plus" if method == PLUS else "".join(filter(str.isalpha, method.lower()))
        result = quantize(recipe, path, work / f"{name}-{label}", evaluate=False, device="cpu")
        found[method] = _compared(original, load(result.output, device="cpu"), windows)
        kl, nll = found[method]
        row["methods"][method] = {"kl": _mean(kl), "nll": _mean(nll)}
        if result.report.searches:
            row["search"] = plain(result.report.searches[0])
        print(name, method, row["methods"][method], flush=True)
    for method, (kl, nll) in found.items():
        if method != PLUS:
            row["plus_minus"][method] = {
                "kl": _mean(found[PLUS][0] - kl),
                "nll": _mean(found[PLUS][1] - nll),
            }
    return row


@torch.no_grad()
def _logits(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """The logits [length - 1, vocabulary] of each window that predict its next tokens."""
    return [model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in windows]


def _compared(
    original: list[torch.Tensor], model: Any, windows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL to the original's logits, how much larger the NLL is), the mean of each window, fp64 [windows]."""
    kl, nll = [], []
    for z, ids in zip(original, windows, strict=True):
        (other,) = _logits(model, ids[None])
        lost = [token_nll(each.log_softmax(-1), ids[1:]).double().mean() for each in (z, other)]
        nll.append(lost[1] - lost[0])
        kl.append(token_kl(z.softmax(-1), z, other).double().mean())
    return torch.stack(kl), torch.stack(nll)


def _mean(values: torch.Tensor) -> list[float]:
    """[mean, its standard error] over windows."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/smoothquant-plus.md."""
    lines = []
    for row in rows:
        strength = row["search"].get("strength")
        chosen = "none" if strength is None else f"{strength:g}"
        lines += [
            f"| {row['model']}, strength {chosen} | KL | ΔNLL | SmoothQuant+ minus it: KL | ΔNLL |",
            "|---|---|---|---|---|",
        ]
        for method, values in row["methods"].items():
            pairs = row["plus_minus"].get(method, {})
            cells = [_cell(values["kl"]), _cell(values["nll"])]
            cells += [_cell(pairs[key]) if pairs else "" for key in ("kl", "nll")]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: list[float]) -> str:
    return f"{1e3 * value[0]:.3f} ± {1e3 * value[1]:.3f}"


# what the search costs -----------------------------------------------------------------------------------------------


def cost(work: Path) -> dict[str, Any]:
    """CPU-seconds of the search and of one evaluation of the rounded model on the calibration text; peak memory."""
    found: dict[str, Any] = {}
    for name, recipe in (("plus", "w4a16-smoothquant-plus"), ("gptq", "w4a16-gptq")):
        out = work / f"cost-{name}"
        command = [sys.executable, "-m", "quantkit", "quantize", recipe, "--output", str(out.resolve())]
        cpu_seconds([*command, "--no-eval", "--no-resume", "--device", "cpu"], work)
        facts = read_facts(out)
        found[name] = {"cpu_seconds": facts.cpu_seconds, "peak_rss_bytes": facts.peak_rss_bytes}
    model = assets.default_model()
    rounded = quantize(
        {"weights": WEIGHTS}, model, work / "embedded-rtn", evaluate=False, device="cpu"
    ).output
    original, cache = load(model, device="cpu"), Cache(work / "calibration-baseline", 1 << 33, "embedded")
    seconds = []
    for _ in range(2):  # the first one keeps what the original computes
        begin = time.process_time()
        quantkit_eval.evaluate(
            load(rounded, device="cpu"),
            open_tokenizer(model),
            assets.calibration_text(),
            baseline=original,
            context=CONTEXT,
            max_tokens=CONTEXT * CALIBRATION,
            baseline_cache=cache,
        )
        seconds.append(time.process_time() - begin)
    search = found["plus"]["cpu_seconds"]["search"]
    return found | {"rtn_evaluation_cpu_seconds": seconds[-1], "search_over_evaluation": search / seconds[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch folder; a stopped run continues there")
    parser.add_argument("--json", type=Path, help="measure the methods and write this file")
    parser.add_argument("--cost", type=Path, help="measure what the search costs and write this file")
    parser.add_argument(
        "--plot", type=Path, nargs=2, metavar=("JSON", "SVG"), help="draw the curves of a file"
    )
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of the evaluation text")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine() | {"threads": arguments.threads}
    if (arguments.json or arguments.cost) and arguments.work is None:
        parser.error("--work is needed to measure")
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        rows = measure(arguments.work, arguments.windows)
        write_json(arguments.json, {"schema": "quantkit-strength/1", "machine": where, "rows": rows})
        print(markdown(rows))
    if arguments.cost:
        measured = cost(arguments.work)
        write_json(arguments.cost, {"schema": "quantkit-strength-cost/1", "machine": where, **measured})
        print(json.dumps(measured, indent=2))
    if arguments.plot:
        source, target = arguments.plot
        rows = json.loads(source.read_text(encoding="utf-8"))["rows"]
        write_atomically(target, iter([plot(rows).encode()]))


if __name__ == "__main__":
    main()
