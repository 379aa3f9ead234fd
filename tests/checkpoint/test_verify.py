"""Verification: any damage between what was computed and what is on disk is found and named."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.algorithms.rtn import rtn
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.records import FileRecord, TensorRecord
from quantkit.checkpoint.shards import write_shard
from quantkit.checkpoint.verify import verify_checkpoint, verify_shard
from quantkit.errors import VerificationError
from quantkit.formats.registry import codec
from quantkit.models.tensors import INDEX
from quantkit.scheme import integer

GRIDS = [integer(4, 32, True), integer(4, 32, False), integer(3, None, True), integer(8, 64, False)]
SHARD = "model-00001-of-00001.safetensors"


def weight(grid, seed=0, dtype=torch.bfloat16):
    return rtn(torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)), grid, dtype)


@pytest.fixture(params=GRIDS, ids=str)
def shard(request, tmp_path):
    """(file, the two weights in it by name); a plain tensor and a bias lie beside them."""
    weights = {name: weight(request.param, seed) for seed, name in enumerate(("a.b", "a.bc"))}
    tensors = {f"{n}.{leaf}": t for n, w in weights.items() for leaf, t in codec().pack(w).items()}
    write_shard(tmp_path / SHARD, tensors | {"a.b.bias": torch.ones(16), "norm.weight": torch.ones(4)})
    return tmp_path / SHARD, weights


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_passes(tmp_path, dtype):
    weights = {"x": weight(GRIDS[1], dtype=dtype)}
    write_shard(tmp_path / SHARD, {f"x.{k}": t for k, t in codec().pack(weights["x"]).items()})
    verify_shard(tmp_path / SHARD, weights, codec())


@pytest.mark.parametrize("seed", range(4))
def test_one_changed_value_of_any_tensor_is_named(shard, seed):
    file, weights = shard
    verify_shard(file, weights, codec())
    draw = random.Random(seed)
    for name in sorted(n for n in load_file(file) if n.startswith("a.bc.")):
        before = file.read_bytes()

        def change(tensors, name=name):
            raw = tensors[name].view(-1).view(torch.uint8)
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)

        rewrite(file, change)
        with pytest.raises(VerificationError, match=r"a\.bc(?![\w])"):
            verify_shard(file, weights, codec())
        file.write_bytes(before)


def test_a_missing_tensor_and_swapped_layers_are_named(shard):
    file, weights = shard
    before = file.read_bytes()
    rewrite(file, lambda tensors: tensors.pop("a.b.weight_packed"))
    with pytest.raises(VerificationError, match=r"a\.b: "):
        verify_shard(file, weights, codec())
    file.write_bytes(before)
    with pytest.raises(VerificationError, match="what was read back for"):
        verify_shard(file, {"a.b": weights["a.bc"], "a.bc": weights["a.b"]}, codec())
    file.write_bytes(before[:-4])
    with pytest.raises(VerificationError, match="cannot be opened again"):
        verify_shard(file, weights, codec())


def test_a_backend_that_computes_something_else_is_named(shard, monkeypatch):
    from quantkit.layers.quant_linear import QuantLinear

    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(VerificationError, match=r"a\.b: on backend '\w+' the packed product differs"):
        verify_shard(*shard, codec())


@pytest.fixture
def checkpoint(tmp_path):
    """(folder, files, account) of a checkpoint of one shard that passes."""
    written = write_shard(tmp_path / SHARD, {"a": torch.ones(8), "b": torch.zeros(3)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": SHARD}}))
    files = {f.name: FileRecord(digest_file(f), f.stat().st_size) for f in tmp_path.iterdir()}
    files[SHARD] = replace(files[SHARD], tensors=written.crc32)
    account = {"x": TensorRecord("copied", ["a"]), "y": TensorRecord("rescaled", ["b"])}
    verify_checkpoint(tmp_path, files, account | {"z": TensorRecord("dropped", reason="a mask")})
    return tmp_path, files, account


def test_damaged_missing_and_stray_files_are_named(checkpoint):
    folder, files, account = checkpoint
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-1] + b"\1")
    with pytest.raises(VerificationError, match=f"{SHARD} is not the file that was written in b"):
        verify_checkpoint(folder, files, account)
    (folder / SHARD).write_bytes(raw)
    (folder / "stray.safetensors").touch()
    with pytest.raises(VerificationError, match=r"another origin: stray.safetensors; remove"):
        verify_checkpoint(folder, files, account)
    (folder / "stray.safetensors").unlink()
    (folder / SHARD).unlink()
    with pytest.raises(VerificationError, match=f"{SHARD} is missing"):
        verify_checkpoint(folder, files, account)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": SHARD}}, "the index and the shards disagree.*'b'"),
        ({"weight_map": {"a": SHARD, "b": SHARD, "c": SHARD}}, "the index and the shards disagree.*'c'"),
        ({"weight_map": {"a": "gone.safetensors", "b": SHARD}}, "gone.safetensors cannot be opened"),
        ({"weight_map": 3}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_refused(checkpoint, index, told):
    folder, files, account = checkpoint
    (folder / INDEX).write_text(json.dumps(index))
    files = {name: entry for name, entry in files.items() if name != INDEX}
    with pytest.raises(VerificationError, match=told):
        verify_checkpoint(folder, files, account)


def test_every_tensor_needs_an_account(checkpoint):
    folder, files, account = checkpoint
    for wrong in ({"x": account["x"]}, account | {"w": TensorRecord("copied", ["c"])}):
        with pytest.raises(VerificationError, match="tensors without an account"):
            verify_checkpoint(folder, files, wrong)
