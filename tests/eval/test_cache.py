"""Tensors come back bit for bit or not at all, and the folder never holds more than its limit."""

import os

import pytest
import torch
from quantkit_eval import cache as module
from quantkit_eval.cache import Cache
from racing import race

BIG = 1 << 30


def some(seed=0, size=100, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files(folder):
    return sorted(folder.glob("*.tensor"))


def size_of(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_missing_folder_is_a_miss(tmp_path):
    assert Cache(tmp_path / "none" / "yet", BIG, "m").get("a") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), (1,)])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype, shape):
    wanted = (100 * some(size=24)[: torch.Size(shape).numel()]).reshape(shape).to(dtype)
    Cache(tmp_path, BIG, "m").put("a", wanted)
    found = Cache(tmp_path, BIG, "m").get("a")
    assert found.dtype == dtype
    assert torch.equal(found, wanted)


def test_a_view_is_kept_as_what_it_shows(tmp_path):
    cache = Cache(tmp_path, BIG, "m")
    cache.put("a", some(size=12).reshape(3, 4).T[1:])
    assert torch.equal(cache.get("a"), some(size=12).reshape(3, 4).T[1:])


def test_names_and_subjects_are_apart(tmp_path):
    cache = Cache(tmp_path, BIG, "m")
    cache.put("a", some())
    assert cache.get("b") is None
    assert Cache(tmp_path, BIG, "another model").get("a") is None
    assert (cache.found, cache.missed) == (0, 1)


def test_damage_anywhere_is_a_miss(tmp_path):
    cache = Cache(tmp_path, BIG, "m")
    cache.put("a", some(size=4))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get("a") is None, place
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert cache.get("a") is None, length
    cache.put("a", some(size=4))
    assert torch.equal(cache.get("a"), some(size=4))


def test_another_entrys_file_is_a_miss(tmp_path):
    cache = Cache(tmp_path, BIG, "m")
    cache.put("a", some())
    (first,) = files(tmp_path)
    cache.put("b", some(1))
    (second,) = set(files(tmp_path)) - {first}
    os.replace(first, second)
    assert cache.get("b") is None


def entry_bytes(folder):
    Cache(folder / "probe", BIG, "m").put("n0", some())
    return size_of(folder / "probe")


def test_the_limit_holds_and_the_least_recently_used_goes_first(tmp_path):
    one = entry_bytes(tmp_path)
    folder = tmp_path / "cache"
    for number in range(3):
        Cache(folder, 3 * one, "m").put(f"n{number}", some(number))
        newest = max(files(folder), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (1000 + number, 1000 + number))
    assert Cache(folder, 3 * one, "m").get("n0") is not None  # used now, so n1 is the oldest
    Cache(folder, 3 * one, "m").put("n3", some(3))
    assert size_of(folder) <= 3 * one
    left = {n for n in range(4) if Cache(folder, 3 * one, "m").get(f"n{n}") is not None}
    assert left == {0, 2, 3}


def test_a_run_larger_than_the_limit_keeps_its_first_part(tmp_path):
    """If it dropped its own oldest entries for the next ones, the next run would find none of them."""
    one = entry_bytes(tmp_path)
    folder = tmp_path / "cache"
    cache = Cache(folder, 3 * one, "m")
    for number in range(10):
        cache.put(f"n{number}", some(number))
    assert size_of(folder) <= 3 * one
    later = Cache(folder, 3 * one, "m")
    assert [later.get(f"n{number}") is not None for number in range(10)] == [True] * 3 + [False] * 7


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path):
    Cache(tmp_path, 100, "m").put("a", some())
    assert files(tmp_path) == []


def test_what_a_killed_process_left_goes_when_there_is_need(tmp_path):
    one = entry_bytes(tmp_path)
    folder = tmp_path / "cache"
    folder.mkdir()
    part = folder / "x.1.part"
    part.write_bytes(b"0" * one)
    os.utime(part, (1000, 1000))
    Cache(folder, one, "m").put("a", some())
    assert not part.exists()
    assert len(files(folder)) == 1


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FREE", 1 << 62)
    Cache(tmp_path, BIG, "m").put("a", some())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "under", BIG, "m")
    cache.put("a", some())
    assert cache.get("a") is None


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    Cache(tmp_path, BIG, "m").put("a", some())
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_find_whole_entries_or_none(tmp_path):
    one = entry_bytes(tmp_path)
    folder, wrong = tmp_path / "cache", []

    def work(seed):
        cache = Cache(folder, 3 * one, "m")
        for step in range(60):
            name = (seed + step) % 5
            found = cache.get(f"n{name}")
            if found is None:
                cache.put(f"n{name}", some(name))
            elif not torch.equal(found, some(name)):
                wrong.append(name)

    race(work, threads=4)
    assert wrong == []
