"""The time that is left, on times that are given: no test here reads a clock."""

from types import SimpleNamespace

import made_up_rates
import pytest

from quantkit import assets
from quantkit.cost.rates import keep_rates
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.estimate import Estimate
from quantkit.pipeline.evaluation import EvaluationRequest
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.tracker import STOPS_AT, Tracker, expected


@pytest.fixture(autouse=True)
def unmeasured(tmp_path_factory, monkeypatch):
    """No test sees what was measured of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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


def test_predicted_blocks_are_known_from_the_start_and_corrected():
    estimate = Estimate([10.0, 20.0, 20.0], predicted=True)
    assert estimate.left == 50
    estimate.block(0, 15.0)
    assert estimate.left == pytest.approx(60.0)
    estimate.block(1, 24.0)
    assert estimate.left == pytest.approx(26.0)


def test_a_run_on_a_measured_machine_knows_its_time_before_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = {"weights": {"preset": "W4A16", "algorithm": "gptq"}}
    asked = (None, None)
    run = prepared(recipe, assets.default_model(), tmp_path / "out", (), "cpu", asked, Silent())
    assert Tracker(run, 0).estimate.left is None
    keep_rates(made_up_rates.rates())
    monkeypatch.setattr("quantkit.pipeline.tracker._hashing", lambda now: 1e-9)
    found = expected(run)
    tracker = Tracker(run, 0)
    ahead = sum(found.parts) + found.phases["evaluate"]
    assert ahead < tracker.estimate.left < ahead + 1  # to verify
    assert Tracker(run, 6).estimate.left < tracker.estimate.left / 2 + found.phases["evaluate"]


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


@pytest.mark.parametrize("tokens", [None, 65536])
def test_an_evaluation_is_expected_to_go_on_at_its_latest_pace(tokens):
    """Reading the models is no part of the pace; where it may stop early, a little more is always expected."""
    told = Told()
    tracker = Tracker(without_parts(EvaluationRequest(tokens), told), done=None)
    assert tracker.estimate.left is None  # nothing has shown how long an evaluation takes
    reports = ((8, 100.0), (16, 108.0), (24, 116.0), (128, 220.0))  # 92 s of reading, then 1 s each
    for done, seconds in reports:
        tracker.evaluated(done, 128, seconds)
    left = [told_left for _, _, told_left in told.phases]
    wanted = [120 * 12.5, 112, 104, 0] if tokens else [(STOPS_AT - 8) * 12.5, 4, 6, 0]
    assert left == pytest.approx(wanted, abs=0.1)


def without_parts(request, progress):
    """A run that is finished but for its evaluation."""
    return SimpleNamespace(
        clock=Clock(),
        plan=SimpleNamespace(n_blocks=0),
        parts=[{}],
        recipe=SimpleNamespace(budget=None),
        needed=None,
        plans=lambda part: [],
        request=request,
        progress=progress,
    )


def test_what_is_finished_is_not_expected_again():
    assert Tracker(without_parts(None, Told()), done=None).estimate.left == 0


def test_no_time_is_told_while_a_phase_is_unknown():
    estimate = Estimate([1.0, 1.0])
    estimate.expect("evaluate", None)
    estimate.block(0, 2.0)
    assert estimate.left is None
    estimate.expect("evaluate", 5.0)
    assert estimate.left == 7.0
