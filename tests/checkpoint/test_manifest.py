"""`quantkit.json`: no changed byte passes for what was written."""

import json
import random

import pytest
from manifests import EMPTY, FULL

from quantkit.checkpoint.manifest import (
    MANIFEST,
    OLDER,
    RUN,
    SCHEMA,
    inside,
    read_facts,
    read_manifest,
    seal,
    write_facts,
    write_manifest,
    write_sealed,
)
from quantkit.checkpoint.records import RunFacts
from quantkit.errors import ModelError, VerificationError

GOOD = FULL.to_json()
KEYS = {"number": "int4", "granularity": "channel", "group_size": 32, "symmetric": False, "dynamic": True}


@pytest.mark.parametrize("manifest", [EMPTY, FULL], ids=["empty", "full"])
def test_what_is_written_comes_back(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    before = (tmp_path / MANIFEST).read_bytes()
    assert read_manifest(tmp_path) == manifest
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_the_file_has_the_keys_that_its_readers_know(tmp_path):
    """Optional facts are left out, not null; an algorithm's details stand beside a layer's other keys."""
    write_manifest(tmp_path, FULL)
    found = json.loads((tmp_path / MANIFEST).read_text())
    assert found["layers"][0] == {
        "name": "a",
        "scheme": "W4A16 g32 sym",
        "algorithm": "gptq",
        "weight_error": 0.25,
        "relative_error": 0.125,
        "worst_row_error": 0.5,
        "damping": 0.01,
        "dead_columns": 2,
        "fallbacks": ["why"],
    }
    assert "fallbacks" not in found["layers"][1]
    assert found["tensors"]["mask"] == {"how": "dropped", "reason": "not used"}
    assert found["files"]["config.json"] == {"sha256": "1" * 64, "bytes": 4}
    assert found["evaluation"]["schema"] == "quantkit-eval/1"
    assert found["evaluation"]["original"]["perplexity_se"] is None
    assert EMPTY.to_json()["evaluation"] is EMPTY.to_json()["calibration"] is None


def test_an_older_manifest_is_read(tmp_path):
    """It has no checksum, and neither CRCs nor `left_out`."""
    files = {name: {key: each[key] for key in ("sha256", "bytes")} for name, each in GOOD["files"].items()}
    older = {key: value for key, value in GOOD.items() if key != "left_out"} | {
        "schema": OLDER,
        "files": files,
    }
    (tmp_path / MANIFEST).write_text(json.dumps(older))
    found = read_manifest(tmp_path)
    assert found.to_json() == older
    assert found.files["model.safetensors"].tensors is None


def test_a_cache_of_keys_per_channel_is_read(tmp_path):
    good = GOOD | {"schema": OLDER, "kv_cache": {"keys": KEYS, "values": KEYS, "residual": 64}}
    (tmp_path / MANIFEST).write_text(json.dumps(good))
    record = read_manifest(tmp_path).kv_cache
    assert record is not None
    assert record.scheme.residual == 64


def test_keys_that_a_newer_version_added_are_ignored(tmp_path):
    newer = GOOD | {"more": 1, "size": GOOD["size"] | {"more": 1}}
    write_sealed(tmp_path / MANIFEST, newer)
    assert read_manifest(tmp_path) == FULL


def test_the_facts_of_a_run_come_back(tmp_path):
    facts = RunFacts(schema="quantkit-run/1", seconds={"load": 1.5}, peak_rss_bytes=7, files={"a": ""})
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts


@pytest.mark.parametrize("wrong", [{"seconds": []}, {"seconds": {"load": "1"}}, {"resumed_blocks": None}])
def test_facts_of_another_type_are_refused(tmp_path, wrong):
    write_sealed(tmp_path / RUN, wrong)
    with pytest.raises(VerificationError, match=f"{RUN} has no proper entry for {next(iter(wrong))}"):
        read_facts(tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_is_noticed(tmp_path, seed):
    write_manifest(tmp_path, FULL)
    file = tmp_path / MANIFEST
    true = file.read_bytes()
    raw = bytearray(true)
    choose = random.Random(seed)
    raw[choose.randrange(len(raw))] ^= 1 << choose.randrange(8)
    file.write_bytes(raw)
    if "".join(raw.decode(errors="replace").split()) == "".join(true.decode().split()):
        assert read_manifest(tmp_path) == FULL  # white space between two values
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
        {"files": {"x": {"bytes": -1, "sha256": ""}}},
        {"layers": [7]},
        {"layers": [{"weight_error": 0.5}]},
        {"layers": [{"name": "a", "weight_error": "0.5"}]},
        {"layers": None},
        {"tensors": {"a": []}},
        {"notes": 3},
        {"schema": "other/1"},
        {"size": "large"},
        {"size": {"original_bytes": 1}},
        {"evaluation": 7},
        {"evaluation": {"quantized": {"perplexity": "low"}}},
        {"model": {"name": "a"}},
        {"kv_cache": {"keys": KEYS, "values": KEYS, "residual": 100}},
        {"kv_cache": {"keys": KEYS | {"number": "int9"}, "values": KEYS, "residual": 32}},
        {"kv_cache": {"keys": KEYS | {"granularity": "group", "group_size": None}, "values": KEYS}},
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
