"""Random values in the JSON files of a finished checkpoint: an error that names the folder, or the right tensors."""

import json
import random
from dataclasses import replace

import pytest
import torch
from manifests import FULL
from wrong_values import damaged

import quantkit
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import MANIFEST, RUN, write_sealed
from quantkit.checkpoint.records import FileRecord, LayerRecord
from quantkit.errors import UserError
from quantkit.scheme import Scheme, integer


@pytest.fixture
def checkpoint(packed_llama):
    """(folder, its manifest, its config)."""
    folder, _ = packed_llama(Scheme(integer(4, 32)))
    names = ("config.json", "model.safetensors")
    files = {n: FileRecord(digest_file(folder / n), (folder / n).stat().st_size) for n in names}
    layer = LayerRecord("model.layers.0.mlp.up_proj", "W4A16 g32 sym", weight_error=0.01)
    return (
        folder,
        replace(FULL, files=files, layers=[layer]).to_json(),
        json.loads((folder / "config.json").read_text()),
    )


def tried(use, folder):
    """Whether it works; False if it is refused with the name of the folder."""
    try:
        use(folder)
    except UserError as error:
        told = str(error)
    else:
        return True
    assert str(folder) in told, told
    return False


def test_any_value_in_a_manifest_is_read_or_refused_by_name(checkpoint):
    folder, manifest, _ = checkpoint
    draw, worked = random.Random("manifest"), set()
    for _ in range(60):
        write_sealed(folder / MANIFEST, damaged(manifest, draw))
        worked.add(tried(inspect_checkpoint, folder))
    write_sealed(folder / MANIFEST, manifest)
    for _ in range(20):
        run = damaged({"seconds": {"total": 1.5}, "peak_rss_bytes": 7, "host": {"cpu": "x"}}, draw)
        (folder / RUN).write_text(json.dumps(run))
        worked.add(tried(inspect_checkpoint, folder))
    assert worked == {True, False}


def test_any_value_in_a_quantization_config_is_refused_or_gives_the_same_weights(checkpoint):
    folder, _, config = checkpoint
    draw, wanted, worked = random.Random("config"), quantkit.load(folder).state_dict(), 0
    for number in range(60):
        changed = damaged(config["quantization_config"], draw, draw.choice([1, 2]))
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        looked = tried(inspect_checkpoint, folder)
        if looked and number % 3 == 0 and tried(quantkit.load, folder):
            worked += 1
            found = quantkit.load(folder).state_dict()
            assert all(torch.equal(found[n], t) for n, t in wanted.items() if "packed" in n and n in found)
    assert worked
