"""`Ranks`: the processes that share one calibration, and what each of them does of it.

Every process holds the same block and some of the calibration windows. Statistics are summed over the processes, so all
of them know the same and decide the same; work that needs no windows is dealt out, and its results go to all. `ALONE`
is a run in one process, in which none of this does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Ranks:
    """This process (`rank`, from 0) among `size`. All of them must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    # what the processes tell each other ---------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over the processes."""

    def max(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the largest of each element."""

    def min(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the smallest of each element."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Tensors in them must be on the CPU."""
        return [value]

    def failed(self, message: str) -> None:
        """Tell the others that this process will not come any more, although it goes on by itself."""

    # what follows from that ---------------------------------------------------------------------------------------

    def first(self, value: T) -> T:
        """The value of the first process, in all of them: what must be the same to the bit, or to the choice."""
        return self.gather(value)[0] if self.size > 1 else value

    def sent(self, value: T | None) -> T:
        """What the first process has; the others give None."""
        found = self.first(value)
        assert found is not None
        return found

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over the processes."""
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers, dtype=torch.float64)
        self.sum(found)
        return tuple(found.tolist())

    def does(self, number: int) -> bool:
        """Whether `share` gives this process the piece of work of that number."""
        return number % self.size == self.rank

    def share(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """Do each piece of work in one of the processes; the results, in the order of the work, in all of them."""
        own = [each() for each in work[self.rank :: self.size]]
        if self.size == 1:
            return own
        found = self.gather(own)
        return [found[number % self.size][number // self.size] for number in range(len(work))]

    # which windows are whose --------------------------------------------------------------------------------------

    def chunk(self, windows: int, batch: int) -> int:
        """How many of `windows` run at once: at most `batch`, and so few that every process has some."""
        return max(1, min(batch, windows // self.size))

    def numbers(self, windows: int, batch: int) -> torch.Tensor:
        """Which of the first `windows` windows are this process's, rising: chunks of `batch`, dealt out in turn."""
        return (torch.arange(windows) // batch % self.size == self.rank).nonzero().flatten()

    def own(self, windows: torch.Tensor, batch: int) -> torch.Tensor:
        """This process's of all windows [windows, ...]."""
        return windows if self.size == 1 else windows[self.numbers(len(windows), batch)]

    def number(self, start: int, batch: int) -> int:
        """The number among all windows of the one at `start`, where a chunk of this process begins."""
        return start if self.size == 1 else (start // batch * self.size + self.rank) * batch

    def together(self, values: torch.Tensor, windows: int, batch: int) -> torch.Tensor:
        """Values [..., own windows] of every process -> [..., windows], in the order of the windows."""
        if self.size == 1:
            return values
        whole = values.new_zeros((*values.shape[:-1], windows), device="cpu")
        for numbers, own in self.gather((self.numbers(windows, batch), values.cpu())):
            whole[..., numbers] = own
        return whole


ALONE = Ranks()
