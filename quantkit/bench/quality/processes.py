"""How much faster several processes calibrate, and how far their result is from that of one process.

    python -m quantkit.bench.quality.processes --work DIR --json docs/benchmarks/processes.json [--model PATH]

The embedded model, W4 g128 by GPTQ on 128 x 512 tokens: once in one process and once in `--processes` of them on this
machine, one thread each, interleaved, without evaluation. "calibration" is the wall time of the phases calibrate,
transform and quantize of the first process, which waits for the others there; "whole" is that of the whole run without
imports. A ratio is the median of the ratios within each round. The files of the last round are then compared with the
original: mean KL of both, and by how much they differ.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.rounds import ratio, spread
from quantkit.checkpoint.manifest import read_facts
from quantkit.files import write_json

PHASES = ("calibrate", "transform", "quantize")
ONE, SEVERAL = "one process", "several processes"


def run(command: Sequence[str], processes: int, work: Path) -> None:
    """Run `quantkit COMMAND` in so many processes of one thread; RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    running = []
    for rank in range(processes):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(work / f"rank-{rank}.log", "w") as log:
            full = [sys.executable, "-m", "quantkit", *command]
            running.append(subprocess.Popen(full, cwd=work, env=own, stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    if any(codes):
        said = "\n".join((work / f"rank-{rank}.log").read_text()[-1000:] for rank in range(processes))
        raise RuntimeError(
            f"quantkit {' '.join(command)} in {processes} processes ended with {codes}: {said}"
        )


def timed(recipe: str, overrides: Sequence[str], model: Path, processes: int, work: Path) -> dict[str, float]:
    """{"calibration", "whole"} in wall seconds of one `quantkit quantize`, whose files stay in WORK."""
    out = work / f"out-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        "quantize",
        recipe,
        "--model",
        str(model),
        "--output",
        str(out),
        "--no-eval",
        "--device",
        "cpu",
    ]
    run([*command, *(f"--set={each}" for each in overrides)], processes, work)
    seconds = read_facts(out).seconds
    return {"calibration": sum(seconds.get(phase, 0.0) for phase in PHASES), "whole": seconds["total"]}


def divergence(model: Path, quantized: Path, tokens: int) -> dict[str, float]:
    """Mean KL(model || quantized) and its standard error."""
    from quantkit_eval import evaluate

    from quantkit.checkpoint.load import load
    from quantkit.models.tokenizer import open_tokenizer

    report = evaluate(
        load(quantized),
        open_tokenizer(model),
        text=[str(assets.evaluation_text())],
        baseline=load(model),
        max_tokens=tokens,
    )
    assert report.kl_mean is not None
    return {"kl_mean": report.kl_mean, "kl_mean_se": report.kl_mean_se or 0.0}


def measure(
    work: Path,
    model: Path | None = None,
    recipe: str = "w4a16-gptq",
    processes: int = 2,
    rounds: int = 3,
    tokens: int = 65536,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The report."""
    work, model = work.resolve(), model or assets.default_model()
    work.mkdir(parents=True, exist_ok=True)
    seen: dict[str, list[dict[str, float]]] = {ONE: [], SEVERAL: []}
    for number in range(1, rounds + 1):
        for name, count in ((ONE, 1), (SEVERAL, processes)):
            found = timed(recipe, overrides, model, count, work)
            seen[name].append(found)
            said = ", ".join(f"{kind} {value:.1f} s" for kind, value in found.items())
            print(f"round {number}  {name:18} {said}", flush=True)
    engines = {
        name: {kind: spread([each[kind] for each in found]) for kind in found[0]}
        for name, found in seen.items()
    }
    report: dict[str, Any] = {
        "schema": "quantkit-processes/1",
        "machine": machine() | {"threads": 1},
        "recipe": recipe,
        "processes": processes,
        "rounds": rounds,
        "engines": engines,
    }
    report["faster"] = {kind: ratio(report, kind, ONE, SEVERAL) for kind in ("calibration", "whole")}
    report["kl"] = {
        name: divergence(model, work / f"out-{count}", tokens)
        for name, count in ((ONE, 1), (SEVERAL, processes))
    }
    report["kl_ratio"] = report["kl"][SEVERAL]["kl_mean"] / report["kl"][ONE]["kl_mean"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--model", type=Path, help="default: the embedded one")
    parser.add_argument("--recipe", default="w4a16-gptq")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536, help="of the comparison")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = measure(
        given.work, given.model, given.recipe, given.processes, given.rounds, given.tokens, given.overrides
    )
    faster, kl = report["faster"], report["kl"]
    print(
        f"{given.processes} processes: calibration {faster['calibration']:.2f} times as fast, the whole run "
        f"{faster['whole']:.2f} times\nmean KL {kl[ONE]['kl_mean']:.6f} in one process, {kl[SEVERAL]['kl_mean']:.6f} "
        f"in {given.processes}: {report['kl_ratio'] - 1:+.2%}"
    )
    if given.json:
        write_json(given.json, report)


if __name__ == "__main__":
    main()
