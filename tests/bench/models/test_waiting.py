import json

import pytest

from quantkit.bench import synthetic
from quantkit.bench.machine import native_available
from quantkit.bench.models import decode, waiting
from quantkit.device import SPIN, WAIT_SETTINGS


def test_each_policy_is_the_only_setting_of_its_process(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for settings in waiting.POLICIES.values():
        made = waiting.environment_of(settings, threads=2)
        assert {k: v for k, v in made.items() if k in WAIT_SETTINGS} == dict(settings)
        assert made["OMP_NUM_THREADS"] == "2"
    assert waiting.environment_of({}, None)["OMP_NUM_THREADS"] == "7"
    assert waiting.POLICIES["quantkit"] == SPIN


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="the native library is not built")
def test_report_compares_every_policy_with_the_defaults(tmp_path):
    tiny = synthetic.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)
    packed = decode.models(tmp_path, 1, tiny)["packed"]
    two = {name: waiting.POLICIES[name] for name in ("defaults of the runtime", "quantkit")}
    report = waiting.run(packed, two, rounds=1, threads=1, prompt=4, new=2)
    assert report["times_faster_than_defaults"].keys() == {"quantkit"}
    assert report["times_faster_than_defaults"]["quantkit"]["decode"] > 0
    assert report["machine"]["threads"] == 1
    json.dumps(report)
