"""Measure how fast this machine does the parts of a quantization, for `quantkit plan` and for the time left of a run.

    python -m quantkit.bench.rates            # about half a minute; kept in the user's cache
    python -m quantkit.bench.rates --show     # what is kept

Every rate is the time of the code that a run executes (`quantkit/cost/rates.py` names the units), at three widths of a
layer, the faster of two calls after one that warms up. All of it is done three times and the median kept, as other
users of the machine may slow one of them. The imports come first, in a process that has imported nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from quantkit import assets
from quantkit.cost.rates import UNITS, Rates, keep_rates, known_rates
from quantkit.device import cpu_name

WIDTHS = (256, 1024, 2048)
ROWS = 1024  # of a weight at most
PASSES = 3
TOKENS = 512
LENGTH = 512
_BYTES = 32 << 20
_GROUP = 128
_VOCABULARY = 8192
Clock = Callable[[], float]


def measure(now: Clock = time.perf_counter) -> Rates:
    """Measure all rates. now: a clock in seconds; time.process_time where other processes are busy."""
    seconds = _start(now)
    import torch

    with torch.no_grad():
        passes = [_pass(now) for _ in range(PASSES)]
    for name, width in passes[0]:
        seconds.setdefault(name, {})[width] = median(found[name, width] for found in passes)
    assert seconds.keys() == UNITS.keys(), seconds.keys() ^ UNITS.keys()
    return Rates(cpu_name(), torch.get_num_threads(), seconds)


def _pass(now: Clock) -> dict[tuple[str, str], float]:
    """(rate, width) -> seconds, of all but the start of a process."""
    found = {(name, "1"): value for name, value in (_files(now) | _fixed(now)).items()}
    for width in WIDTHS:
        wide = _forward(width, now) | _statistics(width, now) | _solving(width, now)
        found |= {(name, str(width)): value for name, value in wide.items()}
    return found


def _start(now: Clock) -> dict[str, dict[str, float]]:
    """Seconds until a process can run, and until a run of the embedded model has all that it needs."""
    begin = now()
    from quantkit.pipeline.progress import Silent
    from quantkit.pipeline.quantize import prepared

    imported = now()
    with tempfile.TemporaryDirectory() as folder:
        prepared("w4a16-gptq", assets.default_model(), Path(folder) / "out", (), "cpu", None, Silent())
    return {"start": {"1": imported - begin}, "open": {"1": now() - imported}}


def _least(call: Callable[[], Any], now: Clock, rounds: int = 2) -> float:
    """Seconds of one call."""
    call()
    taken = []
    for _ in range(rounds):
        begin = now()
        call()
        taken.append(now() - begin)
    return max(1e-9, min(taken))


def _files(now: Clock) -> dict[str, float]:
    """Bytes hashed, read and written."""
    import torch

    from quantkit.checkpoint.shards import write_shard
    from quantkit.models.headers import Headers
    from quantkit.models.source import Source
    from quantkit.models.tensors import read_header

    data = bytes(_BYTES)
    hashing = _least(lambda: hashlib.sha256(data).digest(), now) / _BYTES
    values = torch.randn(_BYTES // 4)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        writing = _least(lambda: write_shard(file, {"x": values}), now) / _BYTES
        source = Source(Headers(file.parent, {}, read_header(file), [file], model_free=True))
        reading = _least(lambda: source.tensor("x", torch.bfloat16), now) / _BYTES
    return {"hash": hashing, "write": writing, "read": reading}


def _fixed(now: Clock) -> dict[str, float]:
    """What does not depend on the width of a layer."""
    import torch

    from quantkit.pipeline.tracker import _compare

    logits = torch.randn(64, _VOCABULARY)
    tiny = _weight(64, 64)
    block, hidden, call = _block(64, LENGTH)
    return {
        "logits": _least(lambda: _compare(logits), now) / logits.numel(),
        "solve": _least(lambda: _gptq(tiny, 64, refine=4), now),
        "call": _least(lambda: block(hidden[:, :8], **call(8)), now),
    }


def _block(width: int, length: int) -> tuple[Any, Any, Callable[[int], dict[str, Any]]]:
    """A decoder block of a Llama, hidden states of a window, and what the block is called with for so many tokens."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        num_hidden_layers=1,
        **options,
    )
    block = LlamaDecoderLayer(config, 0).eval()
    rotary = LlamaRotaryEmbedding(config)
    hidden = torch.randn(1, length, width)

    def call(tokens: int) -> dict[str, Any]:
        positions = torch.arange(tokens)[None]
        return {"position_embeddings": rotary(hidden[:, :tokens], positions), "position_ids": positions}

    return block, hidden, call


def _forward(width: int, now: Clock) -> dict[str, float]:
    """Forwards of linears as they are held, of attention, and of the rest of a block."""
    import torch

    from quantkit.calibration.held import HeldLinear

    weight = _weight(width, width)
    held = HeldLinear(weight.bfloat16(), None)
    x = torch.randn(TOKENS, width)
    plain = torch.nn.functional.linear
    linear = _least(lambda: plain(x, weight), now)
    cast = _least(lambda: held.effective(torch.float32), now)
    held.quantized = _rtn(weight, "minmax")
    decode = _least(lambda: held.effective(torch.float32), now)
    heads = max(1, width // 64)
    q = torch.randn(1, heads, LENGTH, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    scores = _least(lambda: attend(q, q, q, is_causal=True), now)
    found = {
        "linear": linear / (TOKENS * width**2),
        "cast": cast / width**2,
        "decode": decode / width**2,
        "scores": scores / (LENGTH**2 * width),
    }
    if width > WIDTHS[0]:  # what is left of a wide block is noise
        return found
    block, hidden, call = _block(width, LENGTH)
    given = call(LENGTH)
    whole = _least(lambda: block(hidden, **given), now)
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    rest = whole - scores - weights / width**2 * linear
    return found | {"vector": max(rest, 0.02 * whole) / (LENGTH * width)}


def _statistics(width: int, now: Clock) -> dict[str, float]:
    """Sums of the squares of an input."""
    import torch

    from quantkit.calibration.collect import COLLECTORS

    x = torch.randn(TOKENS, width)
    found = {}
    for name in ("hessian", "drift"):
        collector = COLLECTORS[name](width, torch.device("cpu"))
        found[name] = _least(lambda one=collector: one.update(x, x + 1), now) / (TOKENS * width**2)  # type: ignore[misc]
    return found


def _solving(width: int, now: Clock) -> dict[str, float]:
    """GPTQ's parts, rounding, packing and verifying of a weight [N, width]."""
    import torch

    from quantkit.checkpoint.shards import write_shard
    from quantkit.checkpoint.verify import verify_shard
    from quantkit.formats.registry import DEFAULT, codec
    from quantkit.scheme import Scheme

    rows = min(width, ROWS)
    weight, elements = _weight(rows, width), rows * width
    plain = _least(lambda: _gptq(weight, width), now, 1)
    swept = _least(lambda: _gptq(weight, width, refine=4), now, 1)
    factored = _least(lambda: _factored(width), now)
    rounding = _least(lambda: _rtn(weight, "minmax"), now)
    searching = _least(lambda: _rtn(weight, "mse"), now)
    quantized, form = _rtn(weight, "minmax"), codec(DEFAULT)
    scheme = Scheme(quantized.grid, None)
    packing = _least(lambda: form.pack_scheme(quantized, scheme, None), now)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        leaves: dict[str, torch.Tensor] = form.pack_scheme(quantized, scheme, None)
        write_shard(file, {f"x.{leaf}": tensor for leaf, tensor in leaves.items()})
        verifying = _least(lambda: verify_shard(file, {"x": quantized}, form), now)
    columns = plain - factored - rounding
    return {
        "factor": factored / width**3,
        "columns": max(columns, 0.1 * plain) / (elements * width),
        "sweep": max(swept - plain, 0.01 * plain) / (4 * elements * width),
        "round": rounding / elements,
        "search": searching / elements,
        "pack": packing / elements,
        "verify": verifying / elements,
    }


def _weight(n: int, k: int) -> Any:
    import torch

    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02


def _grid(k: int) -> Any:
    from quantkit.scheme import integer

    return integer(4, min(_GROUP, k), True)


def _rtn(weight: Any, method: str) -> Any:
    import torch

    from quantkit.algorithms.rtn import rtn

    return rtn(weight, _grid(weight.shape[1]), torch.bfloat16, method)


@cache
def _hessian(width: int) -> Any:
    """One of random inputs, made once."""
    import torch

    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    return x.T @ x / len(x)


def _factored(width: int) -> Any:
    from quantkit.algorithms.gptq import damped, inverse_factor

    return inverse_factor(damped(_hessian(width), 0.01))


def _gptq(weight: Any, width: int, refine: int = 0) -> Any:
    """A weight quantized by GPTQ, without what is measured apart."""
    import torch

    from quantkit.algorithms.catalog import algorithm
    from quantkit.algorithms.config import GptqConfig
    from quantkit.numerics.statistics import Statistics

    config = GptqConfig(name="gptq", refine=refine, retarget=0.0, range="minmax")  # type: ignore[call-arg]
    statistics = Statistics(hessian=_hessian(width).clone(), tokens=2 * width)
    return algorithm("gptq").quantize(weight, statistics, _grid(width), torch.bfloat16, config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="print what is kept, measure nothing")
    arguments = parser.parse_args()
    found = known_rates() if arguments.show else measure()
    if found is None:
        parser.exit(2, "nothing is kept of this machine; leave out --show\n")
    print(f"{found.cpu}, {found.threads} thread(s)" + ("" if arguments.show else f": {keep_rates(found)}"))
    for name, unit in UNITS.items():
        values = ", ".join(f"{value:.3g}" for value in found.seconds[name].values())
        print(f"{name:8} {values} s: {unit}")


if __name__ == "__main__":
    main()
