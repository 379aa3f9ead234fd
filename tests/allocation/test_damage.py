"""From what was measured to damages, and from a refused attempt to the next."""

import math
from dataclasses import replace

import pytest
from quantkit_eval.report import Fit, Report

from quantkit.allocation.damage import GroupRecord, anchors, damages, from_json
from quantkit.allocation.escalation import LEAST_STEP, next_choice
from quantkit.allocation.gate import judge, quantile
from quantkit.allocation.groups import Allocatable, Group
from quantkit.recipe.target import GatePart
from quantkit.scheme import Scheme, integer

RECORD = GroupRecord(
    name="a",
    errors=[8.0, 4.0, 1.0, 0.5],
    norm=16.0,
    kl={0: 0.32, 2: 0.01},
    kl_se={0: 0.01, 2: None},
    anchor_errors={0: 8.0, 2: 1.0},
)
REPORT = Report(
    tokens=512, windows=20, context=32, stride=32, text=["t"], text_sha256="0",
    quantized=Fit(20.0, 0.4, math.log(20.0), 0.02), original=Fit(19.8, 0.4, math.log(19.8), 0.02),
    delta_nll=0.01, delta_nll_se=0.001, kl_mean=0.009, kl_mean_se=0.0004, kl_median=0.005, kl_p99=0.1,
    kl_p99_se=0.02, kl_max=1.0, kl_windows=20, top1_agreement=0.9, top1_agreement_se=0.01,
)  # fmt: skip


def test_damages_follow_the_error_between_anchors_and_beyond_them():
    (found,) = damages([RECORD], "scaled")
    assert found[0] == pytest.approx(0.32)
    assert found[2] == pytest.approx(0.01)
    assert found[3] == pytest.approx(0.005)  # in proportion below the last anchor
    assert found[1] == pytest.approx(
        0.01 * 32 ** (2 / 3)
    )  # a power law: 4 is two of three doublings from 1 to 8
    assert damages([RECORD], "relative") == [[0.5, 0.25, 0.0625, 0.03125]]
    assert damages([RECORD], "error") == [[8.0, 4.0, 1.0, 0.5]]


def test_a_kl_below_zero_is_noise_and_no_gain():
    (found,) = damages([replace(RECORD, kl={0: -1e-9}, anchor_errors={0: 8.0})], "kl")
    assert found == [0.0, 0.0, 0.0, 0.0]


def test_a_record_outlives_json():
    assert from_json(RECORD.to_json()) == RECORD


def test_the_anchor_is_closest_to_the_bits_aimed_at():
    assert anchors([20, 30, 40, 80], 80, 3.2, "scaled") == [1]
    assert anchors([20, 30, 40, 80], 80, 3.2, "kl") == [0, 1, 2, 3]
    assert anchors([20, 30, 40, 80], 80, 3.2, "error") == []


@pytest.mark.parametrize(("freedom", "exact"), [(5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_the_quantile_is_that_of_students_t(freedom, exact):
    assert quantile(0.95, freedom) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"kl_mean": 0.0099}, True),  # 0.009 + 2.093 * 0.0004 = 0.00984
        ({"kl_mean": 0.0098}, False),
        ({"kl_mean": 0.0099, "confidence": 0.99}, False),
        ({"kl_p99": 0.15}, True),
        ({"kl_p99": 0.13}, False),
        ({"perplexity": "+1.3%"}, True),  # expm1(0.01 + 2.093 * 0.001) = 1.217 %
        ({"perplexity": "+1.2%"}, False),
        ({"perplexity": 21.0}, True),  # 20 * exp(2.093 * 0.02) = 20.85
        ({"perplexity": 20.5}, False),
    ],
)
def test_a_limit_is_kept_if_the_whole_interval_lies_under_it(limits, passed):
    (check,) = judge(GatePart.model_validate(limits), REPORT)
    assert check.passed == passed
    assert check.low < check.value < check.high
    assert (check.excess < 1) == passed


def test_one_window_has_no_interval_and_passes_nothing():
    alone = replace(REPORT, windows=1, kl_windows=1, kl_mean_se=None)
    (check,) = judge(GatePart.model_validate({"kl_mean": 9.0}), alone)
    assert not check.passed
    assert "one window" in str(check)


def space(groups=6):
    """Groups of 1000 weights with 2, 3, 4 and 8 bits."""
    schemes = tuple(Scheme(integer(bits, None)) for bits in (2, 3, 4, 8))
    one = Group("g", 0, (), False, schemes, (250, 375, 500, 1000), 0)
    every = tuple(_Sized(**vars(replace(one, name=f"g{n}"))) for n in range(groups))
    return Allocatable(every, 0, 0, 0)


class _Sized(Group):
    @property
    def weights(self):
        return 1000


def test_the_next_attempt_has_more_where_it_helps_most_and_no_group_less():
    found = space()
    damages_ = [[4.0**-bits * 10.0**-place for bits in (2, 3, 4, 8)] for place in range(6)]
    now = [0, 0, 0, 0, 0, 1]
    following = next_choice(found, damages_, now, 4.0, found.bytes_of([3] * 6))
    assert all(after >= before for before, after in zip(now, following, strict=True))
    assert following[0] > 0
    assert following[4] == 0
    total = [sum(d[n] for d, n in zip(damages_, each, strict=True)) for each in (now, following)]
    assert total[1] <= total[0] / 4


def test_attempts_end_at_the_limit_and_always_grow():
    found, now = space(), [0] * 6
    flat = [[0.0] * 4] * 6
    most = found.bytes_of([2] * 6)
    attempts = 0
    while (following := next_choice(found, flat, now, 2.0, most)) is not None:
        assert found.bytes_of(now) < found.bytes_of(following) <= most
        now, attempts = following, attempts + 1
        assert attempts < 10
    assert found.bytes_of(now) == most
    barely = [[4.0**-bits for bits in (2, 3, 4, 8)]] * 6
    step = found.bytes_of(next_choice(found, barely, [0] * 6, 1.0, most)) - found.bytes_of([0] * 6)
    assert step >= LEAST_STEP * 6000 / 8
