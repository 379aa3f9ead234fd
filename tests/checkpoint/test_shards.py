"""Shards: what is written is what the safetensors library reads, and a failed write leaves nothing."""

import errno
import hashlib
import os
import random
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import files
from quantkit.checkpoint.shards import Streamed, shard_name, write_shard
from quantkit.errors import ModelError, NumericalError, OutputError
from quantkit.files import check_numbers, write_atomically, write_json
from quantkit.models.tensors import SINGLE, read_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool]


def source(folder, tensors):
    """The tensors in a model folder, to be copied from there."""
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / SINGLE)
    return read_tensors(folder / "model")[1]


def tensors(seed):
    """Some tensors of random types and shapes; empty ones, scalars and transposed ones among them."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    found = {}
    for number in range(draw.randrange(1, 9)):
        shape = [draw.randrange(5) for _ in range(draw.randrange(4))]
        tensor = torch.randint(0, 2, shape, generator=g).to(draw.choice(DTYPES))
        found[draw.choice(["a.", "ü.", "z/"]) + str(number)] = tensor.T if tensor.dim() == 2 else tensor
    return found


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_comes_back_with_its_sums(tmp_path, seed):
    given = tensors(seed)
    written = write_shard(tmp_path / "s.safetensors", given)
    raw = (tmp_path / "s.safetensors").read_bytes()
    assert (written.nbytes, written.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    found = load_file(tmp_path / "s.safetensors")
    assert found.keys() == given.keys() == written.tensors.keys() == written.crc32.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
        own = tensor.contiguous().flatten()
        data = own.view(torch.uint8).numpy().tobytes() if own.numel() else b""
        assert (written.tensors[name], written.crc32[name]) == (tensor.nbytes, f"{zlib.crc32(data):08x}")


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_copied_and_held_tensors_make_the_same_file(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("quantkit.checkpoint.shards._PIECE", 8 * piece)
    given = {"a": torch.arange(50.0).view(5, 10), "b": torch.arange(7), "c": torch.ones(3).half()}
    infos = source(tmp_path, given)
    held = write_shard(tmp_path / "s.safetensors", given)
    mixed = write_shard(tmp_path / "s.safetensors", infos | {"a": given["a"]})
    assert write_shard(tmp_path / "s.safetensors", infos) == held == mixed


def test_numbers_that_are_none_are_named_whether_held_or_copied(tmp_path):
    bad = {"good": torch.ones(4), "bad": torch.tensor([1.0, float("inf")])}
    infos = source(tmp_path, bad)
    with pytest.raises(NumericalError, match=r"s\.safetensors: bad became NaN or infinite"):
        write_shard(tmp_path / "s.safetensors", bad)
    with pytest.raises(ModelError, match="tensor bad holds NaN or infinity"):
        write_shard(tmp_path / "s.safetensors", infos)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_source_that_shrinks_during_the_run_is_named(tmp_path):
    infos = source(tmp_path, {"a": torch.ones(100)})
    os.truncate(tmp_path / "model" / SINGLE, 200)
    with pytest.raises(ModelError, match=r"ended inside tensor a: the file changed during the run"):
        write_shard(tmp_path / "s.safetensors", infos)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def fail(error):
    yield b"half"
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "broken")])
def test_a_write_that_fails_keeps_the_old_file_and_no_temporary_one(tmp_path, error):
    file = tmp_path / "f"
    file.write_bytes(b"old")
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write_atomically(file, fail(error))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"f": b"old"}


def test_what_the_writing_thread_meets_comes_out(tmp_path, monkeypatch):
    def full(self, file):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(files._Writeback, "__call__", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_shard(tmp_path / "s.safetensors", {"a": torch.ones(4)})
    assert not list(tmp_path.iterdir())


def test_few_bytes_wait_to_be_written(tmp_path, monkeypatch):
    """Pieces are made while others are written, but never so many that memory grows with the file."""
    monkeypatch.setattr(files, "_AHEAD", 3000)
    crc32, written, ahead = zlib.crc32, [0], []

    def counted(piece, crc):
        written[0] += len(piece)
        return crc32(piece, crc)

    def pieces():
        for made in range(40):
            ahead.append(made * 1000 - written[0])
            yield torch.full((1000,), made, dtype=torch.uint8)

    monkeypatch.setattr(files.zlib, "crc32", counted)
    write_shard(tmp_path / "s.safetensors", {"a": Streamed("U8", (40_000,), pieces)})
    assert max(ahead) <= 3000
    wanted = bytes(n for n in range(40) for _ in range(1000))
    assert load_file(tmp_path / "s.safetensors")["a"].numpy().tobytes() == wanted


def test_the_disk_begins_before_the_end(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(files, "_BEGUN", 4000)
    monkeypatch.setattr(files, "_sync_file_range", lambda: lambda fd, *range: begun.append(range))
    write_atomically(tmp_path / "f", (b"x" * 1500 for _ in range(7)))
    assert begun == [(0, 4500, 2), (4500, 4500, 2)]


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "--output")])
def test_what_the_disk_refuses_is_told_with_what_to_do(tmp_path, number, told):
    with pytest.raises(OutputError, match=f"cannot write .*f: .*{told}"):
        write_atomically(tmp_path / "f", fail(OSError(number, os.strerror(number))))


def test_a_file_gets_the_permissions_of_its_source_and_no_more(tmp_path):
    (tmp_path / "f.tmp").touch(0o666)  # left by a kill
    write_atomically(tmp_path / "f", iter([b"x"]), mode=0o600)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_json_holds_no_number_that_is_none(tmp_path):
    value = {"layers": [{"name": "a.b", "error": [1.0, float("nan")]}]}
    with pytest.raises(NumericalError, match=r"x\.json: layers: a\.b: error: 1 became nan"):
        write_json(tmp_path / "x.json", value)
    assert not list(tmp_path.iterdir())
    check_numbers({"a": [1, 2.0, None, "nan", True]}, "x")


def test_shards_sort_by_their_part():
    names = [shard_name(part, 12000) for part in range(0, 12000, 97)]
    assert names == sorted(names)
