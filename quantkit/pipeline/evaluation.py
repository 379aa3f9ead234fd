"""The closing evaluation of a run: original and quantized model on the same text, with the packed weights running."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import quantkit_eval
import torch
from quantkit_eval.model import longest_context
from quantkit_eval.protocols import Tokenizer
from quantkit_eval.text import Text, check_sources

from quantkit import assets
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.device import launch
from quantkit.errors import DataError
from quantkit.models.headers import Headers
from quantkit.pipeline.cache import cache_limit, evaluation_cache
from quantkit.predict.sizes import WINDOW, evaluation_bytes

TOKENS = 65536  # at most, unless the user says how many
CONTEXT = WINDOW  # at most; the recipe's calibration length says what the model is used for
KL_ERROR = 0.02  # the evaluation may stop once the standard error of the mean KL is this share of it


@dataclass(frozen=True)
class EvaluationRequest:
    """What the closing evaluation measures.

    tokens: use exactly so many tokens of the text (whole windows of them); None: up to TOKENS, and fewer if the KL
    is known to KL_ERROR before. text: files, dataset folders or `hf:` names; empty: the embedded text.
    """

    tokens: int | None = None
    text: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, tokens: int | None, text: str | Path | Iterable[str | Path] | None, sequence_length: int
    ) -> EvaluationRequest:
        """The request, checked before a run begins.

        DataError for a text that is missing, and for fewer tokens than a window, which is as long as the recipe's
        calibration sequences (sequence_length) but at most CONTEXT.
        """
        several = () if text is None else (text,) if isinstance(text, str | Path) else tuple(text)
        try:
            check_sources(several or (assets.evaluation_text(),))
        except quantkit_eval.EvalError as error:
            raise DataError(str(error)) from None
        cache_limit()
        window = min(sequence_length, CONTEXT)
        if tokens is not None and (
            isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < window
        ):
            raise DataError(
                f"the evaluation needs at least one window of {window} tokens (calibration.sequence_length), got "
                f"{tokens!r}; raise the number of evaluation tokens or leave the evaluation out"
            )
        return cls(tokens, tuple(str(source) for source in several))

    @property
    def explicit(self) -> bool:
        """Whether the user asked for something other than the default."""
        return self.tokens is not None or bool(self.text)

    @property
    def sources(self) -> list[str]:
        return list(self.text) or [str(assets.evaluation_text())]

    def answered_by(self, evaluation: quantkit_eval.Report | None) -> bool:
        """Whether a stored report is what this request would give; the default request takes any report."""
        if evaluation is None:
            return False
        if not self.explicit:
            return True
        whole = self.tokens is None or not evaluation.stopped_early
        if not whole or evaluation.max_tokens != (self.tokens or TOKENS):
            return False
        return bool(evaluation.text_sha256 == Text(self.sources).sha256())


def evaluate_pair(
    output: Path,
    headers: Headers,
    tokenizer: Tokenizer,
    device: torch.device,
    sequence_length: int,
    request: EvaluationRequest,
    digest: str,
    message: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[quantkit_eval.Report | None, list[str]]:
    """(report, notes); no report, and a note why, if the original does not fit in memory.

    The context is the calibration length, but at most CONTEXT and what the model was made for. digest: of the
    original's files; what the original computes is kept under it for later runs. message: prints a line.
    progress(done, total): called after every batch of windows. ranks: the processes that share the windows.
    """
    from quantkit.checkpoint.load import load  # here: these import models, which most of a run does not need
    from quantkit.layers.kv_cache import cache_of

    needed = evaluation_bytes(headers, sequence_length)
    needed *= launch().beside if ranks.size > 1 else 1
    if device.type == "cpu" and not all(ranks.gather(needed <= _available())):
        return None, [
            f"not evaluated: the original in fp32 and logits need {needed / 2**30:.1f} GiB, more than this machine has "
            "free; run `quantkit eval` where it fits"
        ]
    cache = evaluation_cache(digest)
    original = load(headers.path, device=device, kv_cache="exact")
    longest = longest_context(original) or CONTEXT
    quantized = load(output, device=device)
    report = quantkit_eval.evaluate(
        quantized,
        tokenizer,
        text=request.sources,
        baseline=original,
        max_tokens=request.tokens or TOKENS,
        context=min(sequence_length, longest, CONTEXT),
        kl_error=KL_ERROR if request.tokens is None else None,
        baseline_cache=cache,
        progress=progress,
        cache=cache_of(quantized),
        group=ranks if ranks.size > 1 else None,
    )
    if cache and cache.found:
        message(
            f"the original was evaluated before: {cache.found} of {cache.found + cache.missed} batches came from "
            f"{cache.folder}"
        )
    return report, []


def _available() -> float:
    """Bytes that can be used without swapping; unlimited where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf
