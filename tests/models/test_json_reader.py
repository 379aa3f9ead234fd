"""Every way a JSON file can be out of bounds, and what the error says."""

import json

import pytest

from quantkit.errors import ModelError, VerificationError
from quantkit.models.json_reader import MAX_DEPTH, parse_json, read_json

NESTED = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xff\xfe", "utf-8"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (rb'{"a": "\ud800"}', "UTF-16"),
        (b'{"a": ' + NESTED.encode() + b"}", f"{MAX_DEPTH} levels"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b"[1]", "must hold an object, got a list"),
        (b"7", "must hold an object, got a number"),
        (b"null", "must hold an object, got null"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(tmp_path, raw, fragment):
    file = tmp_path / "some.json"
    file.write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert fragment in str(caught.value)
    assert "fetch it again" in str(caught.value)


def test_what_is_within_bounds_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": "ä\n😀", "c": {}}
    for ascii_only in (True, False):
        raw = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse_json(raw, "x") == value
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert parse_json(f'{{"a": {deep}}}'.encode(), "x")["a"] == json.loads(deep)
    wide = json.dumps([[i] for i in range(1000)])
    assert len(parse_json(wide.encode(), "x", top=list)) == 1000


def test_the_caller_names_error_limit_and_advice(tmp_path):
    file = tmp_path / "quantkit.json"
    file.write_text('{"long": "' + "x" * 100 + '"}')
    with pytest.raises(VerificationError, match="more than the 50 allowed; run it again"):
        read_json(file, VerificationError, limit=50, advice="run it again")
    assert read_json(file, limit=200)
    with pytest.raises(ModelError, match="No such file"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path / "nul\0.json")


def test_infinities_of_older_configs_are_kept_as_transformers_5_writes_them():
    raw = b'{"time_step_limit": [0.0, Infinity]}'
    assert parse_json(raw, "x", tag_infinities=True) == {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    with pytest.raises(ModelError, match="Infinity"):
        parse_json(raw, "x")
