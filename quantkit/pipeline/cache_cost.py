"""What a quantized KV cache costs by itself: the KL of the original model with it, read from text token by token."""

from __future__ import annotations

import quantkit_eval

from quantkit import assets
from quantkit.allocation.targets import cache_scheme
from quantkit.pipeline.run import Run
from quantkit.scheme import Grid, KVScheme


def cache_damage(run: Run, name: str, windows: int) -> float:
    """Mean KL in nats, on the embedded calibration text. The whole model is loaded, as for an evaluation.

    A calibrated cache is looked at with scales of its own entries: its floating-point numbers lose as much with any
    scale that does not cut them off.
    """
    from quantkit.checkpoint.load import load  # here: these import models, which most of a run does not need
    from quantkit.layers.kv_cache import cache_of

    scheme = cache_scheme(name)
    assert scheme is not None
    if not scheme.dynamic:
        own = Grid(scheme.keys.number, "token", dynamic=True)
        scheme = KVScheme(own, own)
    path, length = run.source.headers.path, run.recipe.calibration.sequence_length
    quantized = load(path, device=run.device, kv_cache=scheme)
    report = quantkit_eval.evaluate(
        quantized,
        run.tokenizer,
        text=[str(assets.calibration_text())],
        baseline=load(path, device=run.device, kv_cache="exact"),
        max_tokens=windows * length,
        context=length,
        cache=cache_of(quantized),
    )
    assert report.kl_mean is not None
    return report.kl_mean
