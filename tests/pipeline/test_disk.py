"""The predicted output must fit on the disk before anything is computed."""

from collections import namedtuple

import pytest

import quantkit
from quantkit.errors import OutputError
from quantkit.pipeline.disk import check_disk

pytestmark = pytest.mark.usefixtures("steady")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so much is free from now on."""

    def set_to(count):
        monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**15, 0, count))

    return set_to


def test_a_disk_that_is_too_small_is_refused_before_the_source_is_hashed(
    arguments, tmp_path, free, monkeypatch
):
    free(50_000)
    monkeypatch.setattr("quantkit.models.source.Source.digest", lambda *rest: pytest.fail("hashed already"))
    with pytest.raises(OutputError, match=r"out needs about .* GB .* are free there; free some") as caught:
        quantkit.quantize(**arguments("gptq", tmp_path / "out"))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_what_is_predicted_is_enough(arguments, tmp_path, free, monkeypatch):
    needs = []
    monkeypatch.setattr("quantkit.pipeline.quantize.check_disk", lambda output, needed: needs.append(needed))
    quantkit.quantize(**arguments("rtn", tmp_path / "out"))
    written = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert 0.9 * written < needs[0] < 1.5 * written


def test_files_of_an_interrupted_run_count_as_free(tmp_path, free):
    free(1000)
    (tmp_path / "shard").write_bytes(bytes(3000))
    check_disk(tmp_path, 4000)
    with pytest.raises(OutputError):
        check_disk(tmp_path, 4001)
    with pytest.raises(OutputError):
        check_disk(tmp_path / "new" / "folder", 1001)


def test_nothing_is_refused_where_the_system_does_not_say(tmp_path, monkeypatch):
    def unknown(place):
        raise OSError("not supported")

    monkeypatch.setattr("shutil.disk_usage", unknown)
    check_disk(tmp_path, 10**18)
