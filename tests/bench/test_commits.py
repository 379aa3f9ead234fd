"""The comparison of two commits: each is measured in its own interpreter, and the newer one's gain is the ratio."""

import itertools
import json
import sys

import pytest

from quantkit.bench import commits, synthetic
from quantkit.bench.machine import native_available
from quantkit.bench.models import decode


def test_a_ratio_above_one_means_that_the_newer_commit_is_faster(capsys):
    speeds = {"old": itertools.repeat(2.0), "new": itertools.repeat(3.0)}
    found = commits.compare({"x": lambda python: {"runs": next(speeds[python])}}, "old", "new", rounds=2)
    assert found["x"]["times_faster"] == {"runs": 1.5}
    assert "round 2  after" in capsys.readouterr().out


def test_an_interpreter_without_the_package_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match="No module named 'quantkit'"):
        commits._finished([sys.executable, "-I", "-S", "-c", "import quantkit"])


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="the native library is not built")
def test_generation_runs_on_the_public_interface_alone(tmp_path):
    tiny = synthetic.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)
    packed = decode.models(tmp_path, 1, tiny)["packed"]
    found = commits.generation(sys.executable, packed, "float", prompt=16, new=2)
    assert found.keys() == {"decode", "prefill"}
    assert min(found.values()) > 0
    json.dumps(found)
