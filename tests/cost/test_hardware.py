"""Published devices, and this machine as it was measured."""

import json

import pytest

from quantkit.cost.hardware import Hardware, find_hardware, keep, known, measured_file
from quantkit.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", known())
def test_every_device_has_figures_and_their_source(name):
    found = find_hardware(name.upper())
    assert found.name == name
    assert found.bandwidth > 1e11
    assert found.source
    assert set(found.peak) <= {"fp32", "fp16", "int8", "fp8", "fp4"}
    assert all(peak > 1e12 for peak in found.peak.values())


def test_a_kind_without_instructions_computes_in_the_next_wider_one():
    a100, cpu = find_hardware("a100"), find_hardware("epyc-7702p")
    assert a100.fastest("fp8") == a100.fastest("fp4") == a100.peak["fp16"]
    assert cpu.fastest("int8") == cpu.peak["fp32"]
    assert a100.fastest("fp32") == a100.peak["int8"]  # no figure for it: a bound all the same


def test_the_roofline_has_its_ridge_where_both_limits_meet():
    device = Hardware("x", "x", None, 100.0, {"fp16": 1000.0}, "made up")
    assert device.attainable(5, 1, "fp16") == 500
    assert device.attainable(10, 1, "fp16") == device.attainable(20, 1, "fp16") == 1000
    assert device.seconds(20, 1, "fp16") == 0.02
    assert device.seconds(5, 1, "fp16") == 0.01


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no hardware 'h300'; known are auto, a100, .*epyc"):
        find_hardware("h300")


def test_this_machine_is_what_was_measured():
    with pytest.raises(UserError, match=r"not been measured; run `python -m quantkit.bench.roofline --keep`"):
        find_hardware("auto")
    here = Hardware("auto", "a CPU", 16e9, 50e9, {"fp32": 1e11, "int8": 4e11}, "native probe")
    assert keep(here) == measured_file()
    assert find_hardware("auto") == here


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "auto"}'])
def test_a_damaged_measurement_is_refused(text):
    measured_file().parent.mkdir()
    measured_file().write_text(text)
    with pytest.raises(UserError, match="again"):
        find_hardware("auto")


@pytest.mark.parametrize(
    "change", [{"bandwidth": 0}, {"bandwidth": "fast"}, {"peak": {}}, {"peak": {"fp16": -1}}]
)
def test_a_measurement_without_figures_is_refused(change):
    here = Hardware("auto", "a CPU", 16e9, 50e9, {"fp32": 1e11}, "native probe")
    keep(here)
    measured_file().write_text(json.dumps(here.report() | change))
    with pytest.raises(UserError, match="no positive bandwidth"):
        find_hardware("auto")
