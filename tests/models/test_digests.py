"""sha256 of several files at once."""

import hashlib

import pytest

from quantkit.models import digests as module
from quantkit.models.digests import digests


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 1000)
    for number in range(9):
        (tmp_path / str(number)).write_bytes(bytes([number]) * (number * 777))
    return sorted(tmp_path.iterdir())


def test_digests_come_in_the_order_of_the_files(files):
    assert digests(files) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert digests([]) == []


def test_a_file_that_cannot_be_read_is_an_error(files, tmp_path):
    with pytest.raises(FileNotFoundError):
        digests([*files, tmp_path / "none"])


def test_an_interrupt_ends_the_reading_of_all(files, monkeypatch):
    """The display is told by a reading thread; what it raises comes out, and no file is read to its end for nothing."""
    read = []
    pieces = module._pieces

    def counted(path):
        for piece in pieces(path):
            read.append(len(piece))
            yield piece

    def interrupted(share):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pieces", counted)
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    seconds = iter(range(0, 10_000, 2))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    with pytest.raises(KeyboardInterrupt):
        digests(files, interrupted)
    assert sum(read) < sum(file.stat().st_size for file in files)
