"""A causal LM as a model of lm-eval, the Language Model Evaluation Harness (package `lm_eval`, imported here).

Tokenization, windows, batches and stop strings are the harness's own (`HFLM`). With a decoder, which runs one sequence
and can forget its end, requests run in it instead of in transformers: they are sorted, so that neighbours begin alike,
and what a request shares with the one before is not computed again. Answers to one question, and questions with the
same examples in front, then cost little more than what differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from quantkit_eval.decoding import CacheFactory, Decoding
from quantkit_eval.errors import BrokenModel, EvalError
from quantkit_eval.loop import decode, model_step
from quantkit_eval.model import device_of, run
from quantkit_eval.protocols import CausalLM, Sequences, Tokenizer
from quantkit_eval.sampler import Sampling

Request = tuple[Any, list[int], list[int]]  # what was asked, tokens before, tokens to score
_TAIL = 16  # tokens beyond a stop string's characters that are looked at for it


class _Count(CacheHook):  # the harness reports each answer to its cache
    def __init__(self, told: Callable[[int, int], None] | None) -> None:
        super().__init__(None)
        self.done = self.total = 0
        self._told = told

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        self.done += 1
        if self._told:
            self._told(self.done, self.total)


class HarnessModel(HFLM):
    """model: for its config, its device and its forward; decoder: runs in its place. tokenizer: not changed.

    cache: makes the key-value caches that every token of the model reads the earlier ones from (`decoding`), None: as
    the model is called without. progress(done, total): requests of one kind that have been answered.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        decoder: Sequences | None = None,
        cache: CacheFactory | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        config = copy.copy(model.config)
        if hasattr(config, "quantization_config"):  # the harness would look for the quantizer
            del config.quantization_config
        given = SimpleNamespace(
            config=config, device=device_of(model)
        )  # not a module: its weights stay as they are
        super().__init__(
            pretrained=given,
            tokenizer=copy.deepcopy(tokenizer),  # a pad token may be added
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self._model, self._decoder, self._seed = model, decoder, seed
        self._logits = partial(run, model) if cache is None else Decoding(model, cache).logits
        self._count = _Count(progress)
        self.set_cache_hook(self._count)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.total += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens], padded at the right."""
        logits = self._logits(inps)
        if not bool(torch.isfinite(logits).all()):
            raise BrokenModel(
                "the model gives non-finite logits; it is broken, or its dtype too narrow (try float32)"
            )
        return logits

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each request's last tokens."""
        if self._decoder is None:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs))
        inputs = [(before + scored)[-(self.max_length + 1) : -1] for _, before, scored in requests]
        answers: dict[int, tuple[float, bool]] = {}
        state, held = self._decoder.start(), list[int]()
        for number in sorted(range(len(requests)), key=inputs.__getitem__):
            asked, _, scored = requests[number]
            given = inputs[number]
            if len(scored) > len(given):
                raise EvalError(
                    f"an answer of {len(scored)} tokens is longer than the model's {self.max_length} tokens"
                )
            keep = min(_common(held, given), len(given) - len(scored))
            if keep:
                state.truncate(keep)
            elif held:
                state = self._decoder.start()
            logits = state.append(torch.tensor(given[keep:]), keep=len(scored))
            held, answers[number] = given, _answer(logits, scored)
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answers[number])
        return [answers[number] for number in range(len(requests))]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Ids [batch, at most max_length]: the context [batch, tokens], padded at the left, and what follows."""
        if self._decoder is None:
            return torch.as_tensor(super()._model_generate(context, max_length, stop, **options))
        mask = options.pop("attention_mask")
        sampling = _sampling(options, self._seed)
        room = max_length - context.shape[1]
        rows = [
            self._continued(row[kept.bool()].cpu(), room, stop, sampling)
            for row, kept in zip(context, mask, strict=True)
        ]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        new = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=context.dtype)
        return torch.cat([context.cpu(), new], dim=1)

    def _continued(self, prompt: torch.Tensor, room: int, stop: list[str], sampling: Sampling) -> list[int]:
        """New tokens after a prompt [tokens], until the end token, a stop string or so many."""
        tokens: list[int] = []
        tail = max((len(each.encode()) for each in stop), default=0) + _TAIL
        assert self._decoder is not None
        for token in decode(model_step(self._decoder), prompt, room, sampling.chooser(), {self.eot_token_id}):
            tokens.append(token.id)
            text = self.tokenizer.decode(tokens[-tail:])
            if any(each and each in text for each in stop):
                break
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the hub."""
        return {}


def _common(one: list[int], other: list[int]) -> int:
    """Tokens at the start that two lists share."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _answer(logits: torch.Tensor, scored: list[int]) -> tuple[float, bool]:
    """logits [tokens, vocabulary] of the positions before `scored`."""
    if not bool(torch.isfinite(logits).all()):
        raise BrokenModel(
            "the model gives non-finite logits; it is broken, or its dtype too narrow (try float32)"
        )
    wanted = torch.tensor(scored)
    log_p = logits.float().log_softmax(-1)
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def _sampling(options: dict[str, Any], seed: int) -> Sampling:
    """The sampler for a task's generation options; EvalError for those that it does not have."""
    drawn = bool(options.pop("do_sample", False))
    temperature, top_k, top_p = (options.pop(name, none) for name, none in _PLAIN.items())
    if options:
        raise EvalError(
            f"a task asks for generation with {', '.join(sorted(options))}, which only transformers has; "
            "add --run-in transformers"
        )
    if not drawn:
        return Sampling()
    return Sampling(float(temperature or 1.0), int(top_k or 0), float(top_p or 1.0), seed)


_PLAIN = {"temperature": None, "top_k": 0, "top_p": 1.0}
