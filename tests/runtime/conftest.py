"""Captured decode steps without a GPU."""

import pytest
from taped import record

from quantkit.runtime import buffers


@pytest.fixture
def tape(monkeypatch):
    """Captures are recorded; the list of them."""
    captured = []

    def capture(step, device):
        captured.append(record(step, device))
        return captured[-1]

    monkeypatch.setattr(buffers, "capture", capture)
    return captured
