"""What the processes of a run share, played by threads: every one of them must end with what one process would have."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantkit.calibration.collect import COLLECTORS, SAMPLE_ROWS, Gatherers, extremes, sample
from quantkit.calibration.ranks import ALONE, Ranks

CPU = torch.device("cpu")


class Threads(Ranks):
    """One of several threads that meet at a barrier."""

    def __init__(self, rank, size, table, barrier):
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier

    def gather(self, value):
        self._table[self.rank] = value
        self._barrier.wait(10)
        found = list(self._table)
        self._barrier.wait(10)
        return found

    def sum(self, tensor):
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def max(self, tensor):
        tensor.copy_(torch.stack(self.gather(tensor.clone())).amax(0))

    def min(self, tensor):
        tensor.copy_(torch.stack(self.gather(tensor.clone())).amin(0))


def together(size, work):
    """work(ranks) in `size` threads; their results."""
    table, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(work, Threads(rank, size, table, barrier)) for rank in range(size)]
        return [job.result() for job in jobs]


@pytest.mark.parametrize(("windows", "batch", "size"), [(128, 2, 2), (9, 2, 4), (7, 3, 2), (5, 1, 5)])
def test_every_window_is_dealt_once_and_every_process_has_some(windows, batch, size):
    each = [Threads(rank, size, None, None) for rank in range(size)]
    batch = each[0].chunk(windows, batch)
    numbers = [ranks.numbers(windows, batch) for ranks in each]
    assert sorted(torch.cat(numbers).tolist()) == list(range(windows))
    assert all(len(own) for own in numbers)
    for ranks, own in zip(each, numbers, strict=True):
        starts = range(0, len(own), batch)
        assert [ranks.number(start, batch) for start in starts] == own[::batch].tolist()
        some = ranks.numbers(windows // 2, batch)  # the first windows of all are the first of each process
        assert torch.equal(some, own[: len(some)])


def test_values_by_window_come_back_in_the_order_of_the_windows():
    values = torch.arange(14.0).view(2, 7)
    found = together(3, lambda ranks: ranks.together(values[:, ranks.numbers(7, 2)], 7, 2))
    assert all(torch.equal(each, values) for each in found)


def test_work_is_done_once_and_its_results_go_to_all():
    done = []

    def piece(number):
        def work():
            done.append(number)
            return number * number

        return work

    found = together(3, lambda ranks: ranks.share([piece(number) for number in range(7)]))
    assert found == [[0, 1, 4, 9, 16, 25, 36]] * 3
    assert sorted(done) == list(range(7))
    assert ALONE.share([piece(8)]) == [64]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, 6, generator=generator)
    return x, x + 0.1 * torch.randn(8, 50, 6, generator=generator)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_the_same_to_the_bit_whichever_process_has_which_chunk(size):
    """Also of chunks that are ten orders of magnitude apart, seen in another order, in more than one panel."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 40, 300, generator=generator) * torch.logspace(-5, 5, 9)[:, None, None]
    full, fields = (
        x + torch.randn(9, 40, 300, generator=generator),
        ("hessian", "drift", "mean_abs", "mean_square"),
    )

    def statistics(ranks, chunks):
        gatherers = Gatherers(CPU)
        for number in chunks:
            gatherers.update("a", frozenset(fields), x[number], full[number])
        return gatherers.finish(ranks)["a"]

    alone = statistics(ALONE, range(9))
    for shared in together(size, lambda ranks: statistics(ranks, range(8 - ranks.rank, -1, -size))):
        for field in fields:
            assert torch.equal(getattr(shared, field), getattr(alone, field)), field


@pytest.mark.parametrize("size", [2, 3])
def test_statistics_are_those_of_one_process(inputs, size):
    """Every field; the full stream reaches the first half of the windows only, and one process may have none of it."""
    x, full = inputs

    def statistics(ranks):
        gatherers = Gatherers(CPU)
        for number in ranks.numbers(len(x), 2).tolist():
            gatherers.update(
                "a", frozenset(COLLECTORS) - {"range"}, x[number], full[number] if number < 2 else None
            )
            if number < 2:
                gatherers.update("seen by one", frozenset({"mean_abs"}), x[number])
        return gatherers.finish(ranks)

    alone, shared = statistics(ALONE), together(size, statistics)
    for found in shared:
        assert found.keys() == alone.keys()
        for key, wanted in alone.items():
            assert found[key].tokens == wanted.tokens
            for field in ("hessian", "drift", "amax", "mean_abs", "mean_square"):
                ours, theirs = getattr(found[key], field), getattr(wanted, field)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
                    assert torch.equal(ours, getattr(shared[0][key], field))  # all processes know the same
        assert torch.equal(found["a"].fired, alone["a"].fired)
        assert torch.equal(found["a"].range.counts, alone["a"].range.counts)
        assert torch.equal(found["a"].range.low, alone["a"].range.low)


@pytest.mark.parametrize("size", [2, 3])
def test_a_sample_is_that_of_one_process(size):
    x = torch.arange(8 * 200.0).view(8, 200, 1)
    flat = x.view(-1, 1)
    wanted = flat[:: len(flat) // SAMPLE_ROWS][:SAMPLE_ROWS]
    assert torch.equal(sample(list(x), CPU, ALONE), wanted)

    def own(ranks):
        return sample([x[number] for number in ranks.numbers(8, 1).tolist()], CPU, ranks)

    assert all(torch.equal(each, wanted) for each in together(size, own))
    assert together(2, lambda ranks: sample([], CPU, ranks)) == [None, None]


def test_extremes_are_of_all_processes_also_of_one_without_inputs(inputs):
    x, _ = inputs
    found = together(3, lambda ranks: extremes([x] if ranks.rank == 1 else [], 6, CPU, ranks))
    for low, high in found:
        assert torch.equal(low, x.flatten(0, 1).amin(0))
        assert torch.equal(high, x.flatten(0, 1).amax(0))
