"""What becomes of long texts: a model and a baseline write them, and are compared at every position.

An error in weights or in a key-value cache acts on every later token, so perplexity over short windows says too little
of it. After each prompt the baseline writes a text, once greedily and once drawn, and three things are measured:

- the divergence of the model from the baseline at every token of the *baseline's* text, which both are given, so that
  each position compares two distributions after the same tokens;
- where the model's own text, written with the same random numbers, leaves the baseline's;
- how much both texts repeat themselves, and whether they end in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit_eval.decoding import CacheFactory, chunk_of, described, same_cache
from quantkit_eval.divergence import token_agreement, token_kl
from quantkit_eval.errors import EvalError
from quantkit_eval.long_report import LongReport, Text, writing
from quantkit_eval.loop import decode, model_step
from quantkit_eval.model import check_vocabulary, device_of, inference, longest_context
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.sampler import Sampling, seeds
from quantkit_eval.text import Text as Source
from quantkit_eval.text import source_name
from quantkit_eval.windows import cut, first_token, first_tokens

WAYS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0)}
_TEXT_TOKENS = 65536  # from which the prompts are taken, evenly spaced
_AT_ONCE = 256  # tokens of a text that are given at a time


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    model: gives the distributions. cache: makes the key-value caches it runs with, None: its own. writer: runs in the
    model's place while it writes (a captured graph, say), with a cache of its own. description: what the cache is, in
    words, for the report.
    """

    model: CausalLM
    cache: CacheFactory | None = None
    writer: CausalLM | None = None
    description: str | None = None

    def write(self, prompt: torch.Tensor, new: int, sampling: Sampling) -> Iterator[int]:
        """So many new tokens after a prompt [tokens]."""
        step = model_step(self.writer) if self.writer is not None else model_step(self.model, self.cache)
        return (token.id for token in decode(step, prompt, new, sampling.chooser()))

    def chunk(self) -> int:
        """Tokens that may be given at once for what one at a time gives."""
        return min(_AT_ONCE, (chunk_of(self.cache(), None) if self.cache else None) or _AT_ONCE)


def long_generation(
    model: Side | CausalLM,
    tokenizer: Tokenizer,
    text: str | Path | Iterable[str | Path],
    baseline: Side | CausalLM,
    new_tokens: int = 2000,
    sequences: int = 4,
    prompt_tokens: int = 32,
    ways: dict[str, Sampling] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LongReport:
    """Compare the long texts of a model with those of a baseline of the same vocabulary.

    For what a key-value cache costs, both are the same model, `Side(model, cache)` and
    `Side(model, exact_cache(model))`. text: where the prompts come from, as `load_text` takes it; `sequences` pieces of
    `prompt_tokens` tokens (BOS included where there is one), evenly spaced over its beginning. ways: how texts are
    written, by name, default greedily and drawn at temperature 1; the first text has the seed, each next one a seed one
    higher. End tokens do not end a text. progress(done, total): tokens written so far, by both.

    Raises EvalError for numbers below 1, a text too short, more tokens than a model was made for, vocabularies that
    differ, a model that ignores its cache, and logits that are not finite.
    """
    for name, value in (("new_tokens", new_tokens), ("sequences", sequences)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EvalError(f"{name} must be at least 1, got {value!r}")
    ours, theirs = (side if isinstance(side, Side) else Side(side) for side in (model, baseline))
    known = [most for most in (longest_context(side.model) for side in (ours, theirs)) if most]
    if known and prompt_tokens + new_tokens > min(known):
        raise EvalError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the model's {min(known)}; "
            "use fewer"
        )
    sizes = [side.model.config.get_text_config().vocab_size for side in (ours, theirs)]
    if len(set(sizes)) > 1:
        raise EvalError(
            f"the vocabularies differ: {sizes[0]} tokens in the model, {sizes[1]} in the baseline; a comparison needs "
            "one vocabulary"
        )
    source = Source(text)
    prompts = _prompts((ours, theirs), tokenizer, source, sequences, prompt_tokens)
    ways = WAYS if ways is None else ways
    total, done, written = 2 * len(ways) * sequences * new_tokens, 0, []

    def counted(tokens: Iterator[int]) -> Iterator[int]:
        nonlocal done
        for token in tokens:
            done += 1
            if progress:
                progress(done, total)
            yield token

    for name, sampling in ways.items():
        texts = []
        for prompt, seed in zip(prompts, seeds(sampling.seed, sequences), strict=True):
            own = replace(sampling, seed=seed)
            base = list(counted(theirs.write(prompt, new_tokens, own)))
            kl, agreed = _compared(
                ours, theirs, torch.cat([prompt, torch.tensor(base[:-1], dtype=torch.int64)]), new_tokens
            )
            texts.append(Text(list(counted(ours.write(prompt, new_tokens, own))), base, kl, agreed))
        written.append(writing(name, sampling, texts))
    return LongReport(
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        text=[source_name(each) for each in source.sources],
        cache=described(ours.cache()) if ours.cache else ours.description,
        written=written,
    )


def exact_cache(model: CausalLM) -> CacheFactory:
    """transformers' cache that keeps keys and values as they are."""
    from transformers import DynamicCache

    return lambda: DynamicCache(config=model.config.get_text_config())


def _prompts(
    sides: tuple[Side, Side], tokenizer: Tokenizer, text: Source, sequences: int, length: int
) -> list[torch.Tensor]:
    """`sequences` prompts, int64 [length], evenly spaced over the beginning of the text."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise EvalError(f"prompt_tokens must be at least 2, got {length!r}")
    ids = first_tokens(tokenizer, text, _TEXT_TOKENS)
    for side in sides:
        check_vocabulary(side.model, ids)
    windows = cut(ids, length, bos=first_token(tokenizer))
    if len(windows) < sequences:
        raise EvalError(
            f"the text has {len(windows)} prompts of {length} tokens, {sequences} are needed; give more text or "
            "fewer sequences"
        )
    return [windows[number * len(windows) // sequences].ids for number in range(sequences)]


def _compared(ours: Side, theirs: Side, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(baseline || model) and agreement, fp64 [new], of the distributions after each of the last `new` of ids."""
    states: list[Any] = [side.cache() if side.cache else None for side in (ours, theirs)]
    kl, agreed, left = [], [], len(ids) - new  # positions in front, which are not compared
    with inference(ours.model, theirs.model):
        for part in ids[None].split(min(ours.chunk(), theirs.chunk()), dim=1):
            log_p = []
            for number, side in enumerate((ours, theirs)):
                out = side.model(
                    input_ids=part.to(device_of(side.model)), past_key_values=states[number], use_cache=True
                )
                if side.cache:
                    same_cache(out.past_key_values, states[number])
                states[number] = out.past_key_values
                log_p.append(out.logits[0, left:].float().log_softmax(-1))
            left = max(0, left - part.shape[1])
            if not len(log_p[0]):
                continue
            base = log_p[1]
            kl.append(token_kl(base, log_p[0].to(base.device)).double().cpu())
            agreed.append(token_agreement(base, log_p[0].to(base.device)).double().cpu())
    return torch.cat(kl), torch.cat(agreed)
