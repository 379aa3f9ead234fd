"""Perplexity, paired difference and KL, with standard errors over windows.

Tokens of one window are correlated, windows nearly not: every standard error is that of a ratio of window sums,
se = sqrt(n / (n - 1) sum (s_w - r t_w)^2) / sum t_w for window sums s_w over t_w tokens and r = sum s / sum t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.report import Fit, Report
from quantkit_eval.text import load_text
from quantkit_eval.windows import Window, context_of, cut, first_token, tokenize

_BATCH_TOKENS = 4096
_LOGIT_ELEMENTS = 1 << 23  # fp32 log-probabilities held at a time, per model


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    text: str | Path | Iterable[str | Path],
    baseline: Any = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    kl_windows: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate a causal LM, and with a baseline how far it is from it on the same tokens.

    model, baseline: transformers causal LMs with one vocabulary, each on its own device and in its own dtype; logits
    are compared in fp32. text: sources as `load_text` takes them. context, stride, max_tokens: see `windows.cut`;
    context defaults to min(2048, the model's), stride to the context. kl_windows: windows used for KL and agreement
    (default all). batch_size: windows per forward. progress(done, total) is called after each batch.

    Raises EvalError for text that is too short, vocabularies that differ, and logits that are not finite.
    """
    sources = [str(text)] if isinstance(text, str | Path) else [str(s) for s in text]
    context = context_of(model, context)
    bos = first_token(tokenizer)
    windows = cut(tokenize(tokenizer, load_text(sources)), context, stride, bos, max_tokens)
    size = batch_size or max(1, _BATCH_TOKENS // context)
    compared = len(windows) if kl_windows is None else min(kl_windows, len(windows))
    sums: dict[str, list[torch.Tensor]] = {"model": [], "baseline": [], "kl": [], "same": []}
    kl_tokens: list[torch.Tensor] = []
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        ids = torch.stack([w.ids for w in batch])
        ours = _logits(model, ids)
        theirs = None if baseline is None else _logits(baseline, ids)
        if theirs is not None and theirs.shape != ours.shape:
            raise EvalError(f"the vocabularies differ: {theirs.shape[-1]} and {ours.shape[-1]} tokens")
        for row, window in enumerate(batch):
            number = start + row
            with_kl = theirs is not None and number < compared
            found = _score(window, ours[row], None if theirs is None else theirs[row], with_kl, number)
            for key, value in found.items():
                if key == "kl_tokens":
                    kl_tokens.append(value)
                else:
                    sums[key].append(value)
        if progress:
            progress(min(start + size, len(windows)), len(windows))
    counts = torch.tensor([w.scored for w in windows], dtype=torch.float64)
    nll = torch.stack(sums["model"])
    common = {
        "tokens": int(counts.sum()),
        "windows": len(windows),
        "context": context,
        "stride": stride or context,
        "text": sources,
        "quantized": _fit(nll, counts),
    }
    if baseline is None:
        return Report(**common)
    base = torch.stack(sums["baseline"])
    delta, delta_se = ratio(nll - base, counts)
    kl, kl_se = ratio(torch.stack(sums["kl"]), counts[:compared])
    every = torch.cat(kl_tokens)
    return Report(
        **common,
        original=_fit(base, counts),
        delta_nll=delta,
        delta_nll_se=delta_se,
        kl_mean=kl,
        kl_mean_se=kl_se,
        kl_median=float(every.median()),
        kl_p99=float(every.kthvalue(max(1, math.ceil(0.99 * every.numel()))).values),
        kl_max=float(every.max()),
        kl_windows=compared,
        top1_agreement=float(torch.stack(sums["same"]).sum() / counts[:compared].sum()),
    )


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[windows, length, vocabulary] in the model's dtype, on its device."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits


def _score(
    window: Window, ours: torch.Tensor, theirs: torch.Tensor | None, with_kl: bool, number: int
) -> dict[str, torch.Tensor]:
    """Sums over the scored tokens of one window, fp64."""
    targets = window.ids[-window.scored :]
    out: dict[str, torch.Tensor] = {"model": torch.zeros((), dtype=torch.float64)}
    if theirs is not None:
        out["baseline"] = torch.zeros((), dtype=torch.float64)
    kl: list[torch.Tensor] = []
    same = 0
    for ours_c, theirs_c, wanted in _chunks(ours, theirs, targets):
        log_p = ours_c.float().log_softmax(-1)
        index = wanted.to(log_p.device)[:, None]
        out["model"] -= log_p.gather(1, index).double().sum().cpu()
        if theirs_c is not None:
            log_q = theirs_c.float().log_softmax(-1)
            out["baseline"] -= log_q.gather(1, index.to(log_q.device)).double().sum().cpu()
            if with_kl:
                log_p = log_p.to(log_q.device)
                kl.append((log_q.exp() * (log_q - log_p)).sum(-1).cpu())
                same += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    if not all(bool(torch.isfinite(v)) for v in out.values()):
        raise EvalError(f"non-finite logits in window {number}; the model is broken or its dtype too narrow")
    if with_kl:
        out["kl_tokens"] = torch.cat(kl)
        out["kl"] = out["kl_tokens"].double().sum()
        out["same"] = torch.tensor(float(same), dtype=torch.float64)
    return out


def _chunks(
    ours: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Logits that predict the targets, a few tokens at a time."""
    scored = len(targets)
    step = max(1, _LOGIT_ELEMENTS // ours.shape[-1])
    first = ours.shape[0] - 1 - scored
    for a in range(0, scored, step):
        b = min(a + step, scored)
        rows = slice(first + a, first + b)
        yield ours[rows], None if theirs is None else theirs[rows], targets[a:b]


def ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error over windows (None for a single window)."""
    value = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(value), None
    off = (sums - value * counts).square().sum()
    return float(value), float((n / (n - 1) * off).sqrt() / counts.sum())


def _fit(sums: torch.Tensor, counts: torch.Tensor) -> Fit:
    nll, se = ratio(sums, counts)
    perplexity = math.exp(nll) if nll < 700 else math.inf
    if math.isinf(perplexity):
        raise EvalError(f"the mean NLL is {nll:.4g} nats per token: the model is broken")
    return Fit(perplexity, None if se is None else perplexity * se, nll, se)
