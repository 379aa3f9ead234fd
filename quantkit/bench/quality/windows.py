"""Models compared on windows of the embedded evaluation text: KL and NLL of each, so that differences are paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from quantkit_eval.perplexity import token_nll
from quantkit_eval.text import Text
from quantkit_eval.windows import first_tokens

from quantkit import assets
from quantkit.calibration.divergence import token_kl
from quantkit.checkpoint.load import load
from quantkit.models.tokenizer import open_tokenizer

CONTEXT = 512


class Compared:
    """An original model and windows of text, `windows` of CONTEXT tokens; other models are compared with it on them."""

    def __init__(self, path: Path, windows: int) -> None:
        tokens = first_tokens(open_tokenizer(path), Text([assets.evaluation_text()]), windows * CONTEXT)
        self.ids = torch.tensor(tokens).view(-1, CONTEXT)
        model = load(path, device="cpu")
        self._logits = [self._of(model, ids) for ids in self.ids]
        self._nll = [_nll(logits, ids) for logits, ids in zip(self._logits, self.ids, strict=True)]

    @torch.no_grad()
    def _of(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits

    def __call__(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL to the original, how much larger the NLL is), the mean of each window in nats, fp64 [windows]."""
        kl, nll = [], []
        for base, before, ids in zip(self._logits, self._nll, self.ids, strict=True):
            logits = self._of(model, ids)
            nll.append(_nll(logits, ids) - before)
            kl.append(token_kl(base.softmax(-1), base, logits).double().mean())
        return torch.stack(kl), torch.stack(nll)


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return token_nll(logits.log_softmax(-1), ids[1:]).double().mean()


def mean(values: torch.Tensor) -> list[float]:
    """[mean, its standard error] over windows."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]
