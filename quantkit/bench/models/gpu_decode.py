"""Time whole decode steps on a GPU: a Llama-3-8B with random weights, bf16 and packed, with and without CUDA graphs.

    python -m quantkit.bench.models.gpu_decode --json gpu-decode.json [--bits 4 8] [--layers 32]

All engines are in memory at once and run interleaved. A number is the median over rounds, a ratio the median of the
ratios within each round. tokens_per_s includes greedy sampling and everything that Python does between steps; step_ms
is the device's time for one step. The speed of an engine whose logits are wrong is not reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quantkit_eval.loop import decode, model_step
from quantkit_eval.sampler import Sampling
from torch import nn
from transformers import PreTrainedModel

from quantkit.bench.machine import machine
from quantkit.bench.roofline import read_bandwidth
from quantkit.bench.synthetic import Shape
from quantkit.files import write_json
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.runtime import choose_runner
from quantkit.scheme import Scheme, integer

LLAMA_3_8B = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128256)
CLOSE = 0.03  # of logits in bf16 that went over buffers of another length, relative
Engines = dict[str, tuple[PreTrainedModel, bool]]  # name -> (model, whether its step is captured)


def dense(shape: Shape, layers: int, device: torch.device) -> PreTrainedModel:
    """A bf16 Llama with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with device, torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    found: PreTrainedModel = model.eval().requires_grad_(False)
    return found


@torch.no_grad()
def packed(shape: Shape, layers: int, device: torch.device, scheme: Scheme, backend: str) -> PreTrainedModel:
    """The same with random codes in the linears of its blocks."""
    model = dense(shape, layers, device)
    generator = torch.Generator(device).manual_seed(1)
    for block in model.model.layers:
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                linear = _random(module, scheme, generator)
                linear.prepare(backend, torch.bfloat16)
                setattr(block.get_submodule(parent), leaf, linear)
    return model


def _random(module: nn.Linear, scheme: Scheme, generator: torch.Generator) -> QuantLinear:
    """Uniform codes whose weights have the standard deviation 0.02."""
    n, k, device, grid = module.out_features, module.in_features, module.weight.device, scheme.weights
    codes = torch.randint(0, 2**grid.bits, (n, k), dtype=torch.uint8, generator=generator, device=device)
    spread = 2**grid.bits / 12**0.5
    scale = torch.full((n, k // grid.group(k)), 0.02 / spread, dtype=torch.bfloat16, device=device)
    return QuantLinear.from_quantized(QuantizedWeight(codes, scale, None, grid), None)


def run(
    model: PreTrainedModel, captured: bool, ids: torch.Tensor, new: int, given: list[int] | None = None
) -> Any:
    """(seconds after the second step, logits [new, vocabulary], the state) of one sequence of `new` tokens.

    given: tokens to feed back instead of the most likely ones; only then are logits kept.
    """
    found = choose_runner(model, new, "graph" if captured else "eager")
    inner, logits, last = model_step(found.model), [], [None]

    def step(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        out, last[0] = inner(tokens, state)
        if given is not None:
            logits.append(out.float().clone())
        return out, last[0]

    forced = iter(given or ())
    choose = Sampling().chooser() if given is None else lambda _: next(forced)
    made = decode(step, ids[0], new, choose)
    next(made)
    next(made)  # the prompt, and the step that may be captured
    start = _now(ids.device)
    for _ in made:
        pass
    seconds = _now(ids.device) - start
    if captured and found.ran == "eager":
        raise SystemExit(f"the step was not captured: {getattr(found.model, 'why_eager', None)}")
    return seconds, logits, last[0]


def wrong(model: PreTrainedModel, ids: torch.Tensor, new: int) -> str | None:
    """How the captured step differs from the step with a dynamic cache or from itself, or None."""
    given = torch.randint(
        0, model.config.vocab_size, (new,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    eager, graph = (torch.stack(run(model, captured, ids, new, given)[1]) for captured in (False, True))
    again = torch.stack(run(model, True, ids, new, given)[1])
    off = ((graph - eager).norm() / eager.norm()).item()
    if not off < CLOSE:
        return f"captured logits are off by {off:.3g}"
    return None if torch.equal(graph, again) else "captured logits differ from run to run"


def step_ms(model: PreTrainedModel, ids: torch.Tensor, new: int, repeats: int = 50) -> float:
    """Milliseconds of one captured step on the device."""
    cache = run(model, True, ids, new)[2]
    start = _now(ids.device)
    with torch.no_grad():
        for _ in range(repeats):
            cache.buffers.replay()
    return (_now(ids.device) - start) * 1000 / repeats


def step_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that a step has to read: every weight but the embedding, and the cache."""
    embedding = model.get_input_embeddings().get_parameter("weight")
    weights = (*model.parameters(), *model.buffers())
    config = model.config
    cache: int = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    return sum(t.nbytes for t in weights if t is not embedding) + cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(engines: Engines, ids: torch.Tensor, new: int, rounds: int) -> list[dict[str, Any]]:
    """One row per engine; the first engine is the baseline."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    refused: dict[str, str] = {}
    for name, (model, captured) in engines.items():
        problem = wrong(model, ids, new) if captured else None
        if problem:
            refused[name] = problem
    for _ in range(rounds):
        for name, (model, captured) in engines.items():
            if name not in refused:
                seconds, _, _ = run(model, captured, ids, new)
                rates[name].append((new - 2) / seconds)
    read = read_bandwidth(ids.device.type)
    rows = []
    for name, (model, captured) in engines.items():
        row: dict[str, Any] = {"engine": name, "captured": captured, "wrong": refused.get(name)}
        if name not in refused:
            first = rates[next(iter(engines))]
            needed = step_bytes(model, ids.shape[1] + new)
            row |= {
                "tokens_per_s": statistics.median(rates[name]),
                "spread": [min(rates[name]), max(rates[name])],
                "ratio": statistics.median(a / b for a, b in zip(rates[name], first, strict=True)),
                "bytes_per_step": needed,
                "most_tokens_per_s": read / needed,
                "step_ms": step_ms(model, ids, new) if captured else None,
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def build(
    shape: Shape, layers: int, device: torch.device, bits: list[int], group: int, backend: str
) -> Engines:
    """The engines, bf16 first, each model with and without graphs."""
    made = {"bf16": dense(shape, layers, device)}
    for each in bits:
        made[f"W{each}A16 {backend}"] = packed(shape, layers, device, Scheme(integer(each, group)), backend)
    return {
        f"{name} {'graph' if captured else 'eager'}": (model, captured)
        for name, model in made.items()
        for captured in (False, True)
    }


def report(arguments: argparse.Namespace, shape: Shape = LLAMA_3_8B) -> dict[str, Any]:
    device = torch.device(arguments.device)
    engines = build(shape, arguments.layers, device, arguments.bits, arguments.group, arguments.backend)
    ids = torch.randint(0, shape.vocabulary, (1, arguments.prompt), device=device)
    rows = measure(engines, ids, arguments.new, arguments.rounds)
    return {"machine": machine(), "layers": arguments.layers, "prompt": arguments.prompt, "rows": rows}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path)
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    made.add_argument("--group", type=int, default=128)
    made.add_argument("--backend", default="triton")
    made.add_argument("--device", default="cuda")
    made.add_argument("--prompt", type=int, default=128)
    made.add_argument("--new", type=int, default=64)
    made.add_argument("--rounds", type=int, default=5)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device")
    found = report(arguments)
    if arguments.json:
        write_json(arguments.json, found)
    sys.exit(any(row["wrong"] for row in found["rows"]))


if __name__ == "__main__":
    main()
