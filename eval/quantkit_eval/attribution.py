"""Why a model differs from its baseline: the tokens with the largest KL, and what removes it when it is restored.

`explain` takes the KL of every token that an evaluation has measured. It shows the worst tokens in their context, with
what both models expected there. Given `units`, parts of the model that can be put back to the baseline's for a while,
it runs the worst windows once more per unit. What the KL there falls by is the exact effect of that unit, no estimate
from gradients. Effects need not add up to the whole KL, since layers act on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from quantkit_eval.decoding import CacheFactory, Decoding
from quantkit_eval.divergence import log_probabilities, rank, token_kl
from quantkit_eval.errors import EvalError
from quantkit_eval.explanation import Explanation, Guess, Restored, WorstToken
from quantkit_eval.model import inference, run
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.windows import Window, chunks

Restore = Callable[[], AbstractContextManager[None]]
"""Gives a context in which a part of the model is the baseline's."""

TOKENS = 12  # worst tokens that are shown
WINDOWS = 4  # windows that are run again for every unit
GUESSES = 3  # likeliest next tokens shown of each model
CACHE = "key-value cache"  # the unit that is the model's cache
_BEFORE, _AFTER = 40, 12  # tokens of context shown
_LOW, _HIGH, _BINS = -7, 1.5, 34  # powers of ten that the histogram covers, and its bins


@dataclass(frozen=True)
class Seen:
    """What an evaluation has measured: its windows, and the KL of the scored tokens of each, fp32 [scored]."""

    windows: list[Window] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)

    def take(self, windows: Sequence[Window], kl: Sequence[torch.Tensor]) -> None:
        """Keep the windows that were compared."""
        self.windows.extend(windows[: len(kl)])
        self.kl.extend(kl)


def explain(
    model: CausalLM,
    baseline: CausalLM,
    tokenizer: Tokenizer,
    seen: Seen,
    units: Mapping[str, Restore] | None = None,
    by: str | None = None,
    cache: CacheFactory | None = None,
    cache_step: int | None = None,
    tokens: int = TOKENS,
    windows: int = WINDOWS,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Explain what an evaluation has `seen` (`evaluate(..., seen=...)`) of a model and its baseline.

    units: name -> what restores that part. by: what they are, in words. cache, cache_step: as `evaluate` was given
    them; a cache is one more unit. tokens, windows: how many of the worst to look at.
    progress(done, total): after each unit. EvalError if nothing was seen, or a model's logits are not finite.
    """
    if not seen.kl:
        raise EvalError("nothing to explain: evaluate with a baseline and seen=")
    flat = torch.cat(seen.kl)
    places = [(w, i) for w, each in enumerate(seen.kl) for i in range(len(each))]
    order = [places[int(i)] for i in flat.argsort(descending=True)[:tokens]]
    chosen = list(dict.fromkeys(w for w, _ in order))[:windows]
    with inference(model, baseline):
        runs = (_runner(model, cache, cache_step), partial(run, baseline))
        worst = [_described(runs, tokenizer, seen, w, i) for w, i in order]
        explained = Explanation(len(flat), *_histogram(flat), _quantiles(flat), worst)
        if not units and cache is None:
            return explained
        found = _restore(model, baseline, seen, chosen, units or {}, cache, cache_step, progress)
    return replace(explained, by=by, windows=chosen, **_effects(found, seen, chosen, worst))


def _runner(model: CausalLM, cache: CacheFactory | None, step: int | None) -> Callable[..., torch.Tensor]:
    return partial(run, model) if cache is None else Decoding(model, cache, step).logits


def _histogram(kl: torch.Tensor) -> tuple[list[float], list[int]]:
    """Edges, evenly spaced by logarithm, and tokens between them."""
    step = (_HIGH - _LOW) / _BINS
    powers = kl.double().clamp_min(10.0**_LOW).log10()
    bins = ((powers - _LOW) / step).floor().clamp(0, _BINS - 1).long()
    edges = [10 ** (_LOW + step * i) for i in range(_BINS + 1)]
    return edges, torch.bincount(bins, minlength=_BINS).tolist()


def _quantiles(kl: torch.Tensor) -> dict[str, float]:
    ordered = kl.sort().values
    return {str(q): rank(ordered, q) for q in (0.5, 0.9, 0.99, 0.999, 1.0)}


def _described(
    runs: Sequence[Callable[..., torch.Tensor]], tokenizer: Tokenizer, seen: Seen, w: int, i: int
) -> WorstToken:
    """The scored token number i of window w."""
    window = seen.windows[w]
    place = len(window.ids) - window.scored + i  # of the token that was predicted
    target = int(window.ids[place])
    ids: list[int] = window.ids.tolist()
    context = ids[max(0, place - _BEFORE) : place]
    log_p = [each(window.ids[None])[0, place - 1].float().log_softmax(-1).cpu() for each in runs]
    guesses = [
        [Guess(_added(tokenizer, context, [int(t)]), float(one[t].exp())) for t in one.topk(GUESSES).indices]
        for one in log_p
    ]
    return WorstToken(
        window=w,
        position=place,
        kl=float(seen.kl[w][i]),
        before=str(tokenizer.decode(context)),
        text=_added(tokenizer, context, [target]),
        after=_added(tokenizer, [*context, target], ids[place + 1 : place + 1 + _AFTER]),
        model=guesses[0],
        baseline=guesses[1],
        loss=-float(log_p[0][target]),
        baseline_loss=-float(log_p[1][target]),
    )


def _added(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """The text that `ids` add behind `before`; alone they may lose the space in front."""
    start, whole = str(tokenizer.decode(before)), str(tokenizer.decode([*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else str(tokenizer.decode(ids))


def _restore(
    model: CausalLM,
    baseline: CausalLM,
    seen: Seen,
    chosen: Sequence[int],
    units: Mapping[str, Restore],
    cache: CacheFactory | None,
    step: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str | None, list[torch.Tensor]]:
    """unit -> KL of the tokens of each chosen window while it is restored; None: with all of them restored.

    One window's distributions of the baseline are in memory at a time.
    """
    names: list[str | None] = [*units, *([] if cache is None else [CACHE]), None]
    # Made before the first run: small tensors that stay, made between large ones that go, would split what those leave.
    found: dict[str | None, list[torch.Tensor]] = {
        name: [torch.empty(seen.windows[w].scored) for w in chosen] for name in names
    }
    done, total = 0, len(names) * len(chosen)
    for turn, w in enumerate(chosen):
        window = seen.windows[w]
        base = run(baseline, window.ids[None])[0]
        for name in names:
            held = list(units.values()) if name is None else [units[name]] if name in units else []
            own = None if name in (CACHE, None) else cache
            _kl(found[name][turn], w, window, _restored(_runner(model, own, step), window, held), base)
            done += 1
            if progress:
                progress(done, total)
    return found


def _restored(forward: Callable[..., torch.Tensor], window: Window, held: Sequence[Restore]) -> torch.Tensor:
    """Logits [context, V] of the window with some parts restored."""
    with ExitStack() as stack:
        for restore in held:
            stack.enter_context(restore())
        return forward(window.ids[None])[0]


def _kl(into: torch.Tensor, number: int, window: Window, logits: torch.Tensor, base: torch.Tensor) -> None:
    """Put the KL of each scored token into fp32 [scored]; logits, base: [context, V] of the model and the baseline."""
    first = len(window.ids) - 1 - window.scored
    for rows, _ in chunks(window, logits.shape[-1]):
        ours, theirs = (log_probabilities(one[rows], number, i) for i, one in enumerate((logits, base)))
        into[rows.start - first : rows.stop - first] = token_kl(theirs, ours.to(theirs.device))


def _effects(
    found: Mapping[str | None, list[torch.Tensor]],
    seen: Seen,
    chosen: Sequence[int],
    worst: Sequence[WorstToken],
) -> dict[str, Any]:
    """The fields of an `Explanation` that the restored runs give."""
    before = float(torch.cat([seen.kl[w] for w in chosen]).double().mean())
    means = {name: float(torch.cat(each).double().mean()) for name, each in found.items()}
    named = {name: each for name, each in found.items() if name is not None}
    restored = [Restored(name, means[name], before - means[name]) for name in named]
    tokens = []
    for each in worst:
        if each.window in chosen and named:
            turn, window = chosen.index(each.window), seen.windows[each.window]
            i = each.position - (len(window.ids) - window.scored)
            best = min(named, key=lambda name: float(named[name][turn][i]))
            each = replace(each, unit=best, kl_restored=float(named[best][turn][i]))
        tokens.append(each)
    return {
        "kl_mean": before,
        "kl_all_restored": means[None],
        "restored": sorted(restored, key=lambda one: -one.removed),
        "worst": tokens,
    }


__all__ = ["CACHE", "Restore", "Seen", "explain"]
