"""Random safetensors headers and indexes: refused with the folder's name, or read as the library reads them."""

import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from wrong_values import damaged

from quantkit.errors import ModelError
from quantkit.models.headers import read_checkpoint
from quantkit.models.tensors import INDEX, SINGLE

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
HEADER = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.norm.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    "lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write(file, header):
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(range(32)))


def read(folder):
    """The tensors that are found, None if they are refused with the folder's name."""
    try:
        return read_checkpoint(folder).tensors
    except ModelError as error:
        told = str(error)
    assert str(folder) in told
    return None


def test_any_header_is_refused_or_read_as_the_library_reads_it(folder):
    draw, accepted = random.Random("headers"), 0
    for _ in range(300):
        header = damaged(HEADER, draw, draw.choice([1, 1, 2]))
        write(folder / SINGLE, header)
        found = read(folder)
        if found is None:
            continue
        accepted += 1
        names = set(header)
        assert {info.name for info in found.values()} <= names
        for info in found.values():
            assert list(info.shape) == header[info.name]["shape"], header
            assert info.offset + info.nbytes <= (folder / SINGLE).stat().st_size
        with safe_open(folder / SINGLE, "pt") as file:
            for info in found.values():
                tensor = file.get_tensor(info.name)
                raw = (folder / SINGLE).read_bytes()[info.offset : info.offset + info.nbytes]
                own = tensor.contiguous().flatten()
                assert (own.view(torch.uint8).numpy().tobytes() if own.numel() else b"") == raw
    assert 0 < accepted < 200


def test_any_index_is_refused_or_names_files_of_the_folder(folder):
    draw, index = (
        random.Random("indexes"),
        {"weight_map": {name: "a.safetensors" for name in HEADER if name != "__metadata__"}},
    )
    write(folder / "a.safetensors", HEADER)
    for _ in range(300):
        (folder / INDEX).write_text(json.dumps(damaged(index, draw, draw.choice([1, 1, 2]))))
        found = read(folder) or {}
        assert {info.file for info in found.values()} <= {folder / "a.safetensors"}
