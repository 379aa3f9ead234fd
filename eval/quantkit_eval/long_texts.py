"""What a key-value cache does to long texts: the model writes them with it, and is compared with an exact cache.

An error in a cache stays there for every later token, so perplexity over short windows says too little of it. Each
text is continued by thousands of tokens three times over: with the cache; with an exact cache that is given the very
same tokens, for the KL of the two distributions at every position; and freely with the exact cache and the same random
numbers, to which the repetition is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit_eval.decoding import CacheFactory, described, same_cache
from quantkit_eval.divergence import token_agreement, token_kl
from quantkit_eval.errors import EvalError
from quantkit_eval.loop import decode, model_step
from quantkit_eval.model import check_vocabulary, device_of, inference, longest_context
from quantkit_eval.perplexity import ratio
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.sampler import Sampling
from quantkit_eval.text import Text
from quantkit_eval.windows import cut, first_token, first_tokens

SCHEMA = "quantkit-long-generation/1"
BUCKETS = 10  # points of the curve
GRAM = 4  # tokens of a phrase whose return counts as repetition
_TEXT_TOKENS = 65536  # from which the prompts are taken, evenly spaced
_AT_ONCE = 256  # tokens the exact cache is given at a time


@dataclass(frozen=True)
class Bucket:
    """Means over the new tokens first to last (counted from 1, both included) of all sequences.

    kl_mean: KL(exact cache || cache) per token in nats; kl_mean_se: its standard error over sequences, None for one.
    """

    first: int
    last: int
    kl_mean: float
    kl_mean_se: float | None
    top1_agreement: float


@dataclass(frozen=True)
class LongGeneration:
    """Texts written with a cache, compared with an exact one.

    repetition: seq-rep-4 (Welleck et al. 2020, section 6.1), 1 - distinct / all 4-grams of a text's new tokens, mean
    over texts; repetition_exact: of what the exact cache writes when it chooses freely. first_difference: for each
    text the first new token, from 1, at which the two differ, None: none. KL and agreement compare the distributions
    on the tokens that were written with the cache.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    temperature: float
    seed: int | None
    cache: str
    kl_mean: float
    kl_mean_se: float | None
    kl_max: float
    top1_agreement: float
    repetition: float
    repetition_exact: float
    first_difference: list[int | None]
    curve: list[Bucket]

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-long-generation/1" (docs/evaluation.md)."""
        return {"schema": SCHEMA} | asdict(self)


def long_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    text: str | Path | Iterable[str | Path],
    cache: CacheFactory,
    exact: CacheFactory | None = None,
    new_tokens: int = 2000,
    sequences: int = 4,
    prompt_tokens: int = 32,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LongGeneration:
    """Let a model write long texts with a cache, and compare it with itself on an exact one.

    text: where the prompts come from, as `load_text` takes it; `sequences` pieces of `prompt_tokens` tokens (BOS
    included where there is one), evenly spaced over its beginning. exact: the cache to compare with, default
    transformers' DynamicCache. sampling: default drawn at temperature 1, the first text with seed 0, each next one
    with a seed one higher; with temperature 0 small models soon repeat themselves. End tokens do not end a text.
    progress(done, total): called after each step of a text, with the tokens written so far.

    Raises EvalError for numbers below 1, a text too short, more tokens than the model was made for, a model that
    ignores the cache, and logits that are not finite.
    """
    for name, value in (("new_tokens", new_tokens), ("sequences", sequences)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EvalError(f"{name} must be at least 1, got {value!r}")
    most = longest_context(model)
    if most and prompt_tokens + new_tokens > most:
        raise EvalError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the model's {most}; lower "
            "new_tokens"
        )
    sampling = Sampling(temperature=1.0) if sampling is None else sampling
    prompts = _prompts(model, tokenizer, text, sequences, prompt_tokens)
    exact = exact or _dynamic(model)
    texts = []
    for number, prompt in enumerate(prompts):
        own = sampling if sampling.seed is None else _reseeded(sampling, sampling.seed + number)

        def told(done: int, before: int = number * new_tokens) -> None:
            if progress:
                progress(before + done, sequences * new_tokens)

        texts.append(_written(model, prompt, cache, exact, new_tokens, own, told))
    return _report(texts, len(prompts[0]), sampling, described(cache()))


@dataclass(frozen=True)
class _Written:
    """One text: tokens with the cache and those of the free exact cache; KL and agreement fp64 [new tokens]."""

    tokens: list[int]
    free: list[int]
    kl: torch.Tensor
    agreed: torch.Tensor


def _reseeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)


def _dynamic(model: CausalLM) -> CacheFactory:
    """transformers' cache that keeps keys and values as they are."""
    from transformers import DynamicCache

    return lambda: DynamicCache(config=model.config.get_text_config())


def _prompts(
    model: CausalLM,
    tokenizer: Tokenizer,
    text: str | Path | Iterable[str | Path],
    sequences: int,
    length: int,
) -> list[torch.Tensor]:
    """`sequences` prompts, int64 [length], evenly spaced over the beginning of the text."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise EvalError(f"prompt_tokens must be at least 2, got {length!r}")
    ids = first_tokens(tokenizer, Text(text), _TEXT_TOKENS)
    check_vocabulary(model, ids)
    windows = cut(ids, length, bos=first_token(tokenizer))
    if len(windows) < sequences:
        raise EvalError(
            f"the text has {len(windows)} prompts of {length} tokens, {sequences} are needed; give more text or "
            "fewer sequences"
        )
    return [windows[number * len(windows) // sequences].ids for number in range(sequences)]


def _written(
    model: CausalLM,
    prompt: torch.Tensor,
    cache: CacheFactory,
    exact: CacheFactory,
    new: int,
    sampling: Sampling,
    told: Callable[[int], None],
) -> _Written:
    """One text: written with the cache and followed by the exact one, then written with the exact one alone."""
    ours, logits, tokens = model_step(model, cache), list[torch.Tensor](), list[int]()

    def step(given: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        found, state = ours(given, state)
        logits.append(found)
        return found, state

    for token in decode(step, prompt, new, sampling.chooser()):
        tokens.append(token.id)
        told(len(tokens))
    kl, agreed = _compared(model, exact, torch.cat([prompt, torch.tensor(tokens[:-1])]), logits)
    free = [token.id for token in decode(model_step(model, exact), prompt, new, sampling.chooser())]
    return _Written(tokens, free, kl, agreed)


def _compared(
    model: CausalLM, exact: CacheFactory, ids: torch.Tensor, logits: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement, fp64 [new tokens], of the logits after the last tokens of `ids` and the exact cache's."""
    state, device, at = exact(), device_of(model), len(logits) - len(ids)
    kl, agreed = [], []
    with inference(model):
        for part in ids[None].to(device).split(_AT_ONCE, dim=1):
            out = model(input_ids=part, past_key_values=state, use_cache=True)
            same_cache(out.past_key_values, state)
            skipped, at = max(0, -at), at + part.shape[1]
            if at <= 0:
                continue
            base = out.logits[0, skipped:].float().log_softmax(-1)
            log_p = torch.stack(logits[at - len(base) : at]).float().log_softmax(-1)
            kl.append(token_kl(base, log_p).double().cpu())
            agreed.append(token_agreement(base, log_p).double().cpu())
    return torch.cat(kl), torch.cat(agreed)


def _report(texts: list[_Written], prompt_tokens: int, sampling: Sampling, cache: str) -> LongGeneration:
    kl = torch.stack([text.kl for text in texts])  # [sequences, new tokens]
    agreed = torch.stack([text.agreed for text in texts])
    mean, error = _mean(kl)
    return LongGeneration(
        sequences=len(texts),
        prompt_tokens=prompt_tokens,
        new_tokens=kl.shape[1],
        temperature=sampling.temperature,
        seed=sampling.seed,
        cache=cache,
        kl_mean=mean,
        kl_mean_se=error,
        kl_max=float(kl.max()),
        top1_agreement=float(agreed.mean()),
        repetition=sum(repetition(text.tokens) for text in texts) / len(texts),
        repetition_exact=sum(repetition(text.free) for text in texts) / len(texts),
        first_difference=[_difference(text.tokens, text.free) for text in texts],
        curve=list(_curve(kl, agreed)),
    )


def _mean(kl: torch.Tensor) -> tuple[float, float | None]:
    """Mean of [sequences, tokens] and its standard error over sequences."""
    return ratio(kl.sum(1), torch.full((len(kl),), float(kl.shape[1]), dtype=torch.float64))


def _curve(kl: torch.Tensor, agreed: torch.Tensor) -> Iterator[Bucket]:
    """Buckets of equal length over the new tokens, BUCKETS of them where there are as many tokens."""
    size = -(-kl.shape[1] // BUCKETS)
    for start in range(0, kl.shape[1], size):
        part = kl[:, start : start + size]
        mean, error = _mean(part)
        share = float(agreed[:, start : start + size].mean())
        yield Bucket(start + 1, start + part.shape[1], mean, error, share)


def repetition(tokens: list[int]) -> float:
    """Share of the GRAM-grams of a text that are no new ones: 0 if all differ, near 1 for a loop."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first place, from 1, where two texts differ."""
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b), None)
