"""The time that is left, on times that are given: no test here reads a clock."""

import pytest

from quantkit.pipeline.estimate import Estimate
from quantkit.pipeline.progress import Silent

CASES = {
    "equal blocks": ([1.0] * 8, [5.0] * 8),
    "one big block at the end": ([1.0, 1, 1, 10], [2.0, 2, 2, 20]),
    "a small one first": ([1.0, 4, 4, 4], [1.0, 4.4, 3.7, 4.1]),
}


@pytest.mark.parametrize("name", CASES)
def test_after_the_first_block_the_rest_is_known_within_a_quarter(name):
    costs, seconds = CASES[name]
    estimate = Estimate(costs)
    assert estimate.left is None
    estimate.expect("verify", 3.0)
    estimate.expect("evaluate", 40.0)
    for index, taken in enumerate(seconds):
        estimate.block(index, taken)
        wanted = sum(seconds[index + 1 :]) + 43
        assert estimate.left == pytest.approx(wanted, rel=0.25)
        assert estimate.left > 0


def test_what_is_done_once_is_not_expected_again():
    estimate = Estimate([1.0] * 5)
    estimate.block(0, 12.0, once=10.0)
    assert estimate.left == pytest.approx(8.0)


def test_blocks_of_an_earlier_run_say_nothing_about_the_pace():
    estimate = Estimate([1.0] * 10, done=6)
    assert estimate.left is None
    estimate.block(6, 2.0)
    assert estimate.left == pytest.approx(6.0)


def test_a_phase_goes_on_at_its_own_pace():
    estimate = Estimate([1.0])
    estimate.block(0, 1.0)
    estimate.expect("evaluate", 100.0)
    estimate.progressed("evaluate", 0.0, 0.0)
    assert estimate.left == 100
    estimate.progressed("evaluate", 0.25, 10.0)
    assert estimate.left == pytest.approx(30.0)
    estimate.progressed("evaluate", 1.0, 40.0)
    assert estimate.left == 0


class Told(Silent):
    def __init__(self):
        self.blocks, self.phases = [], []

    def block(self, index, name, note="", left=None):
        self.blocks.append((index, name, left))

    def phase(self, name, share, left=None):
        self.phases.append((name, share, left))


@pytest.mark.parametrize("name", ["rtn", "awq"])
def test_blocks_are_told_when_they_are_finished_with_the_time_that_is_left(
    arguments, tmp_path, monkeypatch, name
):
    import quantkit

    told, finished = Told(), []
    block = told.block

    def counted(*args, **options):
        finished.append(len(list((tmp_path / "out").glob("model-*.safetensors"))))
        block(*args, **options)

    monkeypatch.setattr(told, "block", counted)
    quantkit.quantize(**arguments(name, tmp_path / "out", evaluate=True), progress=told)
    assert [index for index, _, _ in told.blocks] == list(range(5))
    assert finished == [1, 2, 3, 4, 5]  # each is written before it is told
    assert told.blocks[-1][1] == "outside the blocks"
    assert all(left > 0 for _, _, left in told.blocks)  # the evaluation is still to come
    shares = [share for phase, share, _ in told.phases if phase == "evaluating"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert {phase for phase, _, _ in told.phases} >= {"verifying the checkpoint", "evaluating"}
