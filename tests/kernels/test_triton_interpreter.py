"""The interpreted kernels in child processes: TRITON_INTERPRET must be set before kernels are imported, and not be set
where they are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "name",
    [
        "triton_interpreted.py",
        pytest.param("triton_interpreted_8bit.py", marks=pytest.mark.slow),
        pytest.param("triton_interpreted_grouped.py", marks=pytest.mark.slow),
        "triton_interpreted_columns.py",
    ],
)
def test_interpreted_kernels_equal_the_reference(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
