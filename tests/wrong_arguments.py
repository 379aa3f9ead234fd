"""Arguments that are wrong in one way, for the tests that attack functions called directly."""

import random
from collections.abc import Callable

import torch

ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError, IndexError, OverflowError)


def wrong_tensors(t: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """Another tensor than the one that is wanted; sometimes one that happens to do."""
    other = [d for d in (torch.float32, torch.float16, torch.uint8, torch.int32, torch.int64) if d != t.dtype]
    rows = max(1, len(t) - dice.randint(1, 3)) if t.dim() else 1
    return dice.choice(
        [
            lambda: t[:rows] if t.dim() else t[None],
            lambda: t[..., ::2] if t.dim() else t[None],
            lambda: torch.zeros(0, dtype=t.dtype),
            lambda: t.flatten()[:1],
            lambda: t[None],
            lambda: t.to("meta"),
            lambda: t.to(dice.choice(other)),
            lambda: t.T if t.dim() == 2 else t[None, None],
            lambda: torch.as_strided(t, t.shape, (0,) * t.dim()),
            lambda: torch.tensor(0, dtype=t.dtype),
        ]
    )()


def wrong(value, dice: random.Random):
    if isinstance(value, torch.Tensor):
        return wrong_tensors(value, dice)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice([0, 1, -1, value + 1, value - 1, 2 * value, value // 2, 99, 2**31, -(2**33)])
    if isinstance(value, float):
        return dice.choice([0.0, -1.0, float("nan"), float("inf")])
    if value is None:
        return torch.zeros(dice.choice([1, 3, 20]), dtype=dice.choice([torch.float32, torch.int32]))
    return value


def refusals(call: Callable, arguments: Callable[[], list], cases: int, seed: str) -> int:
    """How many of `cases` calls raise one of `ERRORS`, each with one or two arguments of a right call made wrong.

    What is not refused must be right after all; any other error fails the test.
    """
    dice, refused = random.Random(seed), 0
    torch.manual_seed(0)
    call(*arguments())  # is right
    for _ in range(cases):
        given = arguments()
        for at in dice.sample(range(len(given)), dice.choice([1, 1, 1, min(2, len(given))])):
            given[at] = wrong(given[at], dice)
        try:
            call(*given)
        except ERRORS:
            refused += 1
    return refused
