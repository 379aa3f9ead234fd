"""Generation token by token, with prompt and decoding timed apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantkit_eval.errors import EvalError


@dataclass(frozen=True)
class Generation:
    """text: the continuation. Decoding counts the tokens after the first one, which the prompt pass gives."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None when nothing was decoded after the first token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


@torch.no_grad()
def generate_stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`; `write` gets each finished piece of text as it comes.

    temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in. Stops at the generation config's end tokens. Uses
    a generator of its own: the global random state is not touched.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not ids.shape[1]:
        raise EvalError("the prompt has no tokens; give some text")
    ends = getattr(model.generation_config, "eos_token_id", None)
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    random = torch.Generator(device=model.device).manual_seed(seed)
    tokens: list[int] = []
    shown = ""
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = _pick(out.logits[0, -1], temperature, top_k, top_p, random)
    prompt_seconds = time.perf_counter() - start
    start = time.perf_counter()
    while token not in stops:
        tokens.append(token)
        shown = _show(tokenizer, tokens, shown, write, last=False)
        if len(tokens) == max_new_tokens:
            break
        step = torch.tensor([[token]], device=model.device)
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        token = _pick(out.logits[0, -1], temperature, top_k, top_p, random)
    decode_seconds = time.perf_counter() - start
    shown = _show(tokenizer, tokens, shown, write, last=True)
    return Generation(shown, ids.shape[1], len(tokens), prompt_seconds, decode_seconds)


def _show(tokenizer: Any, tokens: list[int], shown: str, write: Callable | None, last: bool) -> str:
    """Write what is new; a text that ends inside a UTF-8 character waits for the next token."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if text.endswith("\ufffd") and not last:
        return shown
    if write and len(text) > len(shown):
        write(text[len(shown) :])
    return text


def _pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits.float() / temperature
    values, order = logits.sort(descending=True, stable=True)
    if top_k:
        values, order = values[:top_k], order[:top_k]
    p = values.softmax(-1)
    keep = p.cumsum(-1) - p < top_p  # the first token always stays
    p = torch.where(keep, p, 0.0)
    return int(order[torch.multinomial(p, 1, generator=random)])
