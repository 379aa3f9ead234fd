"""Evaluation: a text is cut in windows, both models run on the same batches of them, their losses make a report.

Only one batch of logits per model is in memory, and it is turned into fp32 log-probabilities a few tokens at a time:
with a vocabulary of 128k, those of one window of 2048 tokens would take a gigabyte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit_eval.attribution import Seen
from quantkit_eval.baseline import KeptBaseline
from quantkit_eval.cache import Cache
from quantkit_eval.decoding import CacheFactory, Decoding
from quantkit_eval.divergence import log_probabilities, summary, token_agreement, token_kl
from quantkit_eval.errors import BrokenModel, EvalError
from quantkit_eval.model import check_vocabulary, inference, run
from quantkit_eval.paired import WindowScores
from quantkit_eval.perplexity import fit, ratio, token_nll
from quantkit_eval.protocols import CausalLM, Group, Tokenizer
from quantkit_eval.report import Report
from quantkit_eval.text import Text, source_name
from quantkit_eval.windows import Window, chunks, context_of, cut, first_token, first_tokens

Run = Callable[
    [torch.Tensor], torch.Tensor
]  # ids [windows, context] -> logits [windows, context, vocabulary]
LEAST_WINDOWS = 16  # before the spread of the KL over windows is trusted to end an evaluation
_BATCH_TOKENS = 4096
_BATCH_LOGITS = 1 << 28  # elements of one model's logits per batch, one window at least


@dataclass
class _Sums:
    """What is kept of the windows seen: one entry each, fp64 but for the KL of every token."""

    model: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)

    def add(self, others: _Sums) -> None:
        """Append what was kept of the windows that follow."""
        self.model += others.model
        self.baseline += others.baseline
        self.agreed += others.agreed
        self.kl += others.kl

    def scores(self, windows: list[Window]) -> WindowScores:
        """The same by window."""
        return WindowScores(
            tokens=tuple(window.scored for window in windows),
            nll=tuple(self.model),
            original_nll=tuple(self.baseline),
            kl=tuple(float(each.double().sum()) for each in self.kl),
            agreed=tuple(self.agreed),
        )


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    text: str | Path | Iterable[str | Path],
    baseline: CausalLM | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    kl_windows: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    baseline_tokenizer: Tokenizer | None = None,
    kl_error: float | None = None,
    baseline_cache: Cache | None = None,
    cache: CacheFactory | None = None,
    cache_step: int | None = None,
    group: Group | None = None,
    seen: Seen | None = None,
    per_window: Callable[[WindowScores], None] | None = None,
) -> Report:
    """Evaluate a causal LM, and with a baseline how far it is from it on the same tokens.

    model, baseline: transformers causal LMs with one vocabulary, each on its own device and in its own dtype; logits
    are compared in fp32. text: sources as `load_text` takes them. context, stride, max_tokens: see `windows.cut`;
    context defaults to min(2048, the model's), stride to the context. kl_windows: windows used for KL and agreement
    (default all). batch_size: windows per forward. progress(done, total) is called after each batch.
    baseline_tokenizer: given, it must give the same tokens. kl_error: stop before the end of the text once the standard
    error of the mean KL is at most this share of it, after LEAST_WINDOWS windows at the earliest; the report says so.
    baseline_cache: keeps what the baseline computed for later evaluations on the same windows; results are the same bit
    for bit with and without it. cache: makes the key-value caches that the model, not the baseline, runs with: each
    token sees the earlier ones as the cache holds them. cache_step: tokens per forward then; default what the cache
    says is exact (`decoding`). group: processes that all make this call and share the windows; the report is the same
    in all of them, and that of one process. seen, per_window: take what each window gave, for `explain` and for
    comparisons with other models (`paired`).

    Raises EvalError for text that is too short, tokenizers that differ, a model that ignores the cache, and logits that
    are not finite.
    """
    _refuse_wrong(kl_error, kl_windows=kl_windows, batch_size=batch_size, max_tokens=max_tokens)
    read = Text(text)
    models = [model] if baseline is None else [model, baseline]
    context = context_of(models, context)
    ids, bos = _tokens(read, tokenizer, baseline_tokenizer, max_tokens)
    digest = read.sha256()  # reads to the end: damage there is an error before the work, not after
    _check_vocabularies(models, ids)
    windows = cut(ids, context, stride, bos, max_tokens)
    compared, size = min(kl_windows or len(windows), len(windows)), batch_size or _batch_size(model, context)
    decoding = None if cache is None else Decoding(model, cache, cache_step)
    with inference(*models):
        runs = _runs(models, decoding, baseline_cache)
        sums = _score(runs, windows, compared, size, progress, kl_error, group)
    planned, windows = len(windows), windows[: len(sums.model)]
    report = Report(
        tokens=sum(window.scored for window in windows),
        windows=len(windows),
        context=context,
        stride=stride or context,
        text=[source_name(source) for source in read.sources],
        text_sha256=digest,
        max_tokens=max_tokens,
        stopped_early=len(windows) < planned,
        **_of_cache(decoding),
        **_figures(sums, windows),
    )
    _check_finite(report.to_json())
    if seen is not None:
        seen.take(windows, sums.kl)
    if per_window is not None:
        per_window(sums.scores(windows))
    return report


def _of_cache(decoding: Decoding | None) -> dict[str, Any]:
    """The fields of a report about the key-value cache."""
    return {} if decoding is None else {"cache": decoding.description, "cache_step": decoding.step}


def _refuse_wrong(kl_error: float | None, **counts: int | None) -> None:
    """EvalError for an argument that makes no sense."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise EvalError(f"{name} must be at least 1, got {value}")
    if kl_error is not None and not kl_error > 0:
        raise EvalError(f"kl_error must be above 0, got {kl_error}")


def _check_vocabularies(models: list[CausalLM], ids: list[int]) -> None:
    """EvalError for tokens that a model does not have."""
    for each in models:
        check_vocabulary(each, ids)


def _runs(models: list[CausalLM], decoding: Decoding | None, kept: Cache | None) -> list[Run]:
    """What gives the logits of the model, through its cache if it has one, and of the baseline if there is one."""
    runs: list[Run] = [partial(run, each) for each in models]
    if decoding is not None:
        runs[0] = decoding.logits
    if len(models) > 1 and kept is not None:
        runs[1] = KeptBaseline(models[1], kept).logits
    return runs


def _check_finite(numbers: dict[str, Any], of: str = "") -> None:
    """BrokenModel for a number that JSON has no word for."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            _check_finite(value, f" of {name}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise BrokenModel(
                f"{name}{of} is {value}: finite logits gave no finite result, so a model is broken, or its dtype too "
                "narrow (try float32)"
            )


def _tokens(
    text: Text, tokenizer: Tokenizer, other: Tokenizer | None, most: int | None
) -> tuple[list[int], int | None]:
    """The first `most` ids of the text, and the BOS to put before each window, if any. other: must agree, or None."""
    ids, bos = first_tokens(tokenizer, text, most), first_token(tokenizer)
    if other is not None and (first_tokens(other, text, most) != ids or first_token(other) != bos):
        raise EvalError(
            "model and baseline tokenize the text differently; their losses are of different tokens"
        )
    return ids, bos


def _batch_size(model: CausalLM, context: int) -> int:
    """Windows per forward pass; at least one."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, min(_BATCH_TOKENS, _BATCH_LOGITS // vocabulary) // context)


def _score(
    runs: list[Run],
    windows: list[Window],
    compared: int,
    size: int,
    progress: Callable[[int, int], None] | None,
    kl_error: float | None,
    group: Group | None = None,
) -> _Sums:
    """Run the models (ids to logits) on the windows, `size` at a time; the first `compared` give KL and agreement.

    With kl_error it ends as soon as the KL is known that well. The processes of a group take a batch each, and what
    they found is added in the order of the batches, so that all of them end where one process would.
    """
    sums, rank, processes = _Sums(), group.rank if group else 0, group.size if group else 1
    starts = range(0, len(windows), size)
    for turn in range(0, len(starts), processes):
        own = _Sums()
        for start in starts[turn + rank : turn + rank + 1]:
            _score_batch(own, runs, windows[start : start + size], start, compared)
        for start, found in zip(starts[turn:], group.gather(own) if group else [own], strict=False):
            sums.add(found)
            if progress:
                progress(min(start + size, len(windows)), len(windows))
            if kl_error is not None and _known(sums, windows, kl_error):
                return sums
    return sums


def _known(sums: _Sums, windows: list[Window], share: float) -> bool:
    """Whether the standard error of the mean KL is at most `share` of it; fewer windows say too little about it."""
    if len(sums.kl) < LEAST_WINDOWS:
        return False
    mean, error = ratio(
        torch.stack([window.double().sum() for window in sums.kl]), _counts(windows[: len(sums.kl)])
    )
    return error is not None and error <= share * mean


def _counts(windows: list[Window]) -> torch.Tensor:
    """Scored tokens of each window, fp64 [windows]."""
    return torch.tensor([float(window.scored) for window in windows], dtype=torch.float64)


def _score_batch(sums: _Sums, runs: list[Run], batch: list[Window], start: int, compared: int) -> None:
    """Run the batch, whose first window has number `start`; its logits are freed on return."""
    ids = torch.stack([window.ids for window in batch])
    logits = [each(ids) for each in runs]
    vocabularies = [one.shape[-1] for one in logits]  # each [windows, context, vocabulary]
    if len(set(vocabularies)) > 1:
        raise EvalError(
            f"the vocabularies differ: {vocabularies[0]} tokens in the model, {vocabularies[1]} in the baseline; "
            "a paired comparison needs one vocabulary"
        )
    for row, window in enumerate(batch):
        _score_window(sums, [one[row] for one in logits], window, start + row, compared)


def _score_window(
    sums: _Sums, logits: list[torch.Tensor], window: Window, number: int, compared: int
) -> None:
    """Add one window; logits: the model's [context, vocabulary], then the baseline's if there is one."""
    losses = [0.0] * len(logits)
    kl: list[torch.Tensor] = []
    agreed = 0
    for rows, targets in chunks(window, logits[0].shape[-1]):
        log_p = [log_probabilities(one[rows], number, which) for which, one in enumerate(logits)]
        for which, one in enumerate(log_p):
            losses[which] += float(token_nll(one, targets).double().sum())
        if len(logits) > 1 and number < compared:
            ours, base = log_p[0].to(log_p[1].device), log_p[1]
            kl.append(token_kl(base, ours).cpu())
            agreed += int(token_agreement(base, ours).sum())
    sums.model.append(losses[0])
    sums.baseline += losses[1:]
    if kl:
        sums.kl.append(torch.cat(kl))
        sums.agreed.append(float(agreed))


def _figures(sums: _Sums, windows: list[Window]) -> dict[str, Any]:
    """What the report says of the losses; of the model alone if there was no baseline."""
    counts = _counts(windows)
    nll = torch.tensor(sums.model, dtype=torch.float64)
    figures: dict[str, Any] = {"quantized": fit(nll, counts)}
    if not sums.baseline:
        return figures
    base = torch.tensor(sums.baseline, dtype=torch.float64)
    delta, delta_se = ratio(nll - base, counts)
    agreed = torch.tensor(sums.agreed, dtype=torch.float64)
    figures |= {"original": fit(base, counts), "delta_nll": delta, "delta_nll_se": delta_se}
    return figures | summary(sums.kl, agreed, counts[: len(sums.kl)])
