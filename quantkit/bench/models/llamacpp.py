"""Compare llama.cpp with the native path on the same model.

    python -m quantkit.bench.models.llamacpp --work DIR --json FILE
    python -m quantkit.bench.models.llamacpp --work DIR --shape 1b-active --layers 16 --formats Q4_0
    python -m quantkit.bench.models.llamacpp --work DIR --ops --shapes 1.1b --m 1 4 16 512 --json ops.json

llama.cpp is built once, in minutes, from the source package of llama-cpp-python, in a separate environment under DIR.
The synthetic Llama of quantkit.bench.models.decode is written as a dense GGUF, from which llama.cpp's own quantizer
makes Q4_0 (pure: head and embedding too) and Q8_0; of a mixture of experts (--shape 1b-active, llama.cpp's qwen3moe),
gguf's own quantizer makes them, without a dense file between. Both engines then run interleaved: prefill of one
prompt, and greedy decode from an empty cache. --ops times matrix products alone, among the ops of
quantkit.bench.kernels.ops.

On a processor with AMX one line is added to llama.cpp before the build: gcc 12's `_tile_loadconfig` declares that it
reads 8 of its 64 bytes, so the compiler drops the other stores, and every quantized model crashes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit.bench.kernels import table as kernels
from quantkit.bench.kernels.lane import BURST, Lane
from quantkit.bench.machine import machine, where
from quantkit.bench.models import decode, gguf_file
from quantkit.bench.rounds import Measured, interleave, ratios
from quantkit.files import write_json
from quantkit.models.config import read_config

PACKAGE = "llama-cpp-python"
FORMATS = {"Q4_0": ["--pure"], "Q8_0": []}
TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize")
BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}  # of 32 weights
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
}
TILES = "ggml/src/ggml-cpu/amx/mmq.cpp"
CALL = "    _tile_loadconfig(&tc);\n"
GUARD = '    asm volatile("" :: "r"(&tc) : "memory");\n'


class Built(NamedTuple):
    """A built llama.cpp. bench, batched, quantize, ops: programs; python: of its environment."""

    bench: Path
    batched: Path
    quantize: Path
    ops: Path
    python: Path
    version: str
    patched: bool


def build(work: Path, jobs: int = 1) -> Built:
    """llama.cpp in `work`; built if it is not there yet."""
    environment, tree = work / "environment", work / "build"
    python = environment / "bin" / "python"
    programs = [tree / "bin" / name for name in TARGETS]
    if not python.exists():
        _run(sys.executable, "-m", "venv", environment)
        _run(python, "-m", "pip", "install", "-q", "gguf")
    if not list(work.glob("llama_cpp_python-*.tar.gz")):
        _run(python, "-m", "pip", "download", "-q", PACKAGE, "--no-binary", PACKAGE, "--no-deps", "-d", work)
    archive = max(work.glob("llama_cpp_python-*.tar.gz"))
    folder = work / archive.name.removesuffix(".tar.gz")
    if not folder.exists():
        with tarfile.open(archive) as opened:
            opened.extractall(work, filter="data")
    source = folder / "vendor" / "llama.cpp"
    patched = guard_tiles(source) if has_amx() else False
    if not all(program.exists() for program in programs):
        cmake = _cmake(environment, python)
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        _run(cmake, "-S", source, "-B", tree, *options)
        _run(cmake, "--build", tree, "-j", jobs, "--target", *TARGETS)
    ops = _build_ops(work / "ggml_ops", source / "ggml" / "include", tree / "ggml" / "src")
    version = folder.name.removeprefix("llama_cpp_python-")
    bench, batched, quantize = programs
    return Built(bench, batched, quantize, ops, python, f"{PACKAGE} {version}", patched)


def _build_ops(program: Path, include: Path, libraries: Path) -> Path:
    source = Path(__file__).with_name("ggml_ops.cpp")
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        archives = [libraries / f"libggml{part}.a" for part in ("", "-cpu", "-base")]
        system = ["-fopenmp", "-lpthread", "-ldl", "-lm"]
        _run("c++", "-O2", "-std=c++17", f"-I{include}", source, *archives, *system, "-o", program)
    return program


def _cmake(environment: Path, python: Path) -> Path:
    found = shutil.which("cmake")
    if found:
        return Path(found)
    _run(python, "-m", "pip", "install", "-q", "cmake")
    return environment / "bin" / "cmake"


def has_amx() -> bool:
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def guard_tiles(source: Path) -> bool:
    """Add the line that keeps the tile configuration's stores; True if it is there afterwards."""
    file = source / TILES
    text = file.read_text()
    if GUARD not in text:
        text = text.replace(CALL, GUARD + CALL)
        file.write_text(text)
    return GUARD in text


def files(built: Built, dense: Path, kinds: Collection[str] = tuple(FORMATS)) -> dict[str, Path]:
    """{format: GGUF file} of a dense checkpoint, in the same folder; made if they do not exist yet."""
    whole = dense.with_name(f"{dense.name}-bf16.gguf")
    made = {kind: dense.with_name(f"{dense.name}-{kind}.gguf") for kind in kinds}
    missing = {kind: file for kind, file in made.items() if not file.exists()}
    if "num_experts" in read_config(dense):
        for kind, file in missing.items():
            _run(built.python, gguf_file.__file__, dense, file.with_suffix(".part"), kind)
            file.with_suffix(".part").rename(file)
        return made
    if not missing:
        return made
    if not whole.exists():
        part = whole.with_suffix(".part")
        _run(built.python, gguf_file.__file__, dense, part)
        part.rename(whole)
    for kind in missing:
        _run(built.quantize, *FORMATS[kind], whole, made[kind].with_suffix(".part"), kind, 1)
        made[kind].with_suffix(".part").rename(made[kind])
    return made


def bench(program: Path, file: Path, threads: int, prompt: int, new: int) -> Measured:
    """One run of llama-bench: tokens per second of prefill and decode."""
    command = [program, "-m", file, "-p", prompt, "-n", new, "-r", 1, "-t", threads, "-o", "json"]
    return read_bench(_run(*command))


def bench_depth(program: Path, file: Path, threads: int, depth: int, new: int, kind: str) -> Measured:
    """One run of llama-bench behind a context: tokens per second of decode. kind: of its keys and values."""
    command = [
        program,
        "-m",
        file,
        "-p",
        0,
        "-n",
        new,
        "-d",
        depth,
        "-ctk",
        kind,
        "-ctv",
        kind,
        "-fa",
        1,
        "-r",
        1,
    ]
    found = json.loads(_run(*command, "-t", threads, "-o", "json"))
    return {"decode": found[0]["avg_ts"]}


def read_bench(text: str) -> Measured:
    """llama-bench's JSON: a test has either prompt tokens or generated ones."""
    found = {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(text)}
    return {kind: found[kind] for kind in ("decode", "prefill")}


class Products:
    """ggml_ops.cpp as a process that waits for commands: products with weights of one format."""

    def __init__(self, program: Path, kind: str, threads: int) -> None:
        self.kind = kind
        process = subprocess.Popen(
            [str(program), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    def ask(self, command: str) -> str:
        print(command, file=self._stdin, flush=True)
        answer = self._stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"llama.cpp's products ended at {command!r}")
        return answer

    def close(self) -> None:
        self._stdin.close()
        self._stdout.close()
        self._process.wait()

    def lane(self, n: int, k: int, m: int, rotation: int) -> Lane:
        """The op prepared for timing, with enough products in one graph to make its barriers negligible."""
        n_bytes = n * k // 32 * BLOCK_BYTES[self.kind]
        per = 32 if m <= 4 else 8 if m <= 64 else 2
        self.ask(f"open {self.kind} {n} {k} {m} {max(2, -(-rotation // n_bytes))} {per}")
        seconds = float(self.ask(f"run {per}"))
        calls = max(1, int(BURST / seconds))
        return Lane(
            f"llama.cpp {self.kind}", "int8", n_bytes, None, lambda: float(self.ask(f"run {calls}")), seconds
        )


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def _products(arguments: argparse.Namespace, built: Built) -> None:
    """`--ops`: the kernels' benchmark with llama.cpp's products among the ops."""
    engines = [Products(built.ops, kind, arguments.threads) for kind in FORMATS]

    def save(report: dict[str, Any]) -> None:
        if arguments.json:
            write_json(arguments.json, report)

    try:
        kernels.run(
            arguments.shapes,
            arguments.m,
            only=arguments.only,
            rounds=arguments.rounds,
            save=save,
            peers=lambda *cell: [engine.lane(*cell) for engine in engines],
        )
    finally:
        for engine in engines:
            engine.close()


def _models(arguments: argparse.Namespace, built: Built) -> None:
    """Whole models: prefill and decode of both engines."""
    threads, prompt, new = arguments.threads, arguments.prompt, arguments.new
    checkpoints = decode.models(arguments.work.resolve(), arguments.layers, decode.ALL[arguments.shape])
    theirs = files(built, checkpoints["dense"], arguments.formats)
    names = arguments.ways or [name for name, way in decode.WAYS.items() if way.native]
    ways = {name: decode.WAYS[name] for name in names}
    ours, missing = decode.engines(ways, checkpoints, prompt, new)
    everyone: dict[str, Callable[[], Measured]] = dict(ours)
    for kind, file in theirs.items():
        everyone[f"llama.cpp {kind}"] = partial(bench, built.bench, file, threads, prompt, new)
    report = {
        "schema": "quantkit-llamacpp/1",
        "machine": machine() | where("cpu"),
        "llama.cpp": {"source": built.version, "patched": built.patched, "options": OPTIONS},
        "bytes": {kind: file.stat().st_size for kind, file in theirs.items()},
        "model": decode.ALL[arguments.shape]._asdict() | {"layers": arguments.layers},
        "prompt_tokens": prompt,
        "new_tokens": new,
        **interleave(everyone, arguments.rounds),
        "missing": missing,
    }
    report["times_faster"] = {
        name: ratios(report, name, [f"llama.cpp {kind}" for kind in theirs]) for name in ours
    }
    print(decode.table(report))
    for name, against in report["times_faster"].items():
        for other, found in against.items():
            print(f"{name} / {other}: decode {found['decode']:.2f}x, prefill {found['prefill']:.2f}x")
    if arguments.json:
        write_json(arguments.json, report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 7 GB free")
    parser.add_argument("--layers", type=int, default=decode.LAYERS)
    parser.add_argument("--shape", choices=decode.ALL, default="1.1b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="llama.cpp's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=decode.PROMPT)
    parser.add_argument("--new", type=int, default=decode.NEW)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=int, default=1, help="of the build")
    parser.add_argument(
        "--ways", nargs="+", choices=decode.WAYS, metavar="NAME", help="ours; default: native"
    )
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--ops", action="store_true", help="matrix products instead of whole models")
    parser.add_argument(
        "--shapes", nargs="+", default=list(kernels.SHAPES), metavar="NAME|NxK", help="with --ops"
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 16, 512], help="with --ops: tokens")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="with --ops: our ops named so")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    built = build(work, arguments.jobs)
    print(f"{built.version}: {built.bench}", flush=True)
    if arguments.build_only:
        return
    torch.set_num_threads(arguments.threads)
    if arguments.ops:
        _products(arguments, built)
    else:
        _models(arguments, built)


if __name__ == "__main__":
    main()
