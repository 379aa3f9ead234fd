"""`quantkit.json`: no changed byte passes for what was written."""

import json
import random

import pytest

from quantkit.checkpoint.manifest import MANIFEST, OLDER, SCHEMA, inside, read_manifest, seal, write_manifest
from quantkit.errors import ModelError, VerificationError

GOOD = {
    "schema": SCHEMA,
    "identity": {"recipe": {"bits": 4}},
    "files": {"config.json": {"bytes": 4, "sha256": "0" * 64}},
    "tensors": {"a.weight": {"how": "copied", "became": ["a.weight"]}},
    "size": {"model_bits_per_weight": 4.125},
    "layers": [{"name": "a", "weight_error": 0.25}],
    "scaling": [],
    "notes": ["naïve"],
    "evaluation": {"quantized": {"perplexity": 21.125}},
}


def test_what_is_written_comes_back(tmp_path):
    write_manifest(tmp_path, GOOD)
    assert read_manifest(tmp_path) == GOOD


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_is_noticed(tmp_path, seed):
    write_manifest(tmp_path, GOOD)
    file = tmp_path / MANIFEST
    true = file.read_bytes()
    raw = bytearray(true)
    choose = random.Random(seed)
    raw[choose.randrange(len(raw))] ^= 1 << choose.randrange(8)
    file.write_bytes(raw)
    if "".join(raw.decode(errors="replace").split()) == "".join(true.decode().split()):
        assert read_manifest(tmp_path) == GOOD  # white space between two values
        return
    with pytest.raises(VerificationError, match=rf"{MANIFEST}(.|\n)*--no-resume"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"files": {"x": {"bytes": "1", "sha256": ""}}},
        {"files": {"x": 7}},
        {"layers": [7]},
        {"layers": None},
        {"tensors": {"a": []}},
        {"notes": 3},
        {"schema": "other/1"},
        {"size": "large"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sealed", [True, False])
def test_wrong_types_are_refused_whatever_the_checksum_says(tmp_path, change, sealed):
    wrong = GOOD | {"schema": SCHEMA if sealed else OLDER} | change
    (tmp_path / MANIFEST).write_text(json.dumps(wrong | ({"sha256": seal(wrong)} if sealed else {})))
    with pytest.raises(ModelError, match=MANIFEST):
        read_manifest(tmp_path, ModelError)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{", '{"a": NaN}', "[" * 500 + "]" * 500, '{"a": 1, "a": 2}']
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(VerificationError, match="--no-resume"):
        read_manifest(tmp_path)


def test_without_its_checksum_it_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD))
    with pytest.raises(VerificationError, match="no checksum"):
        read_manifest(tmp_path)


def test_names_inside_a_folder():
    assert all(map(inside, ("a", "a/b.json", "a b", "..a", "a..")))
    assert not any(
        map(inside, ("", ".", "..", "/a", "../a", "a/../b", "a//b", "a\0", "a\\b", "./a", 7, None))
    )
