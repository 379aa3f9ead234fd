"""What was measured of this machine: kept, found again, refused when it cannot be of it."""

import json

import made_up_rates
import pytest

from quantkit.cost.rates import UNITS, Rates, keep_rates, known_rates, rates_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_kept_is_found():
    assert known_rates() is None
    rates = made_up_rates.rates()
    assert keep_rates(rates) == rates_file()
    assert known_rates() == rates


def test_a_damaged_file_and_another_processor_are_not_taken():
    found = made_up_rates.rates().report()
    rates_file().parent.mkdir()
    fewer = found | {"seconds": {name: found["seconds"][name] for name in list(UNITS)[1:]}}
    others = [
        found | {"cpu": "a CPU of tomorrow"},
        found | {"schema": "quantkit-rates/9"},
        fewer,
        [],
        {"cpu": 1},
    ]
    for text in ("{", *map(json.dumps, others)):
        rates_file().write_text(text)
        assert known_rates() is None


def test_between_two_widths_a_rate_follows_a_power_law():
    rates = Rates("a CPU", 1, {"linear": {"100": 8.0, "10000": 2.0}})
    assert [rates.at("linear", width) for width in (1, 100, 1000, 10000, 10**6)] == pytest.approx(
        [8, 8, 4, 2, 2]
    )
    with pytest.raises(AssertionError, match="linear depends on the width"):
        rates.at("linear")


@pytest.mark.slow
def test_this_machine_can_be_measured():
    from quantkit.bench.rates import measure

    found = measure()
    assert found.seconds.keys() == UNITS.keys()
    assert all(value > 0 for each in found.seconds.values() for value in each.values())
    assert 1e-12 < found.at("linear", 1024) < 1e-8  # 2 GFLOP/s to 2 TFLOP/s
