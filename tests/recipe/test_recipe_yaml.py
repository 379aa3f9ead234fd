import itertools
import json
import random
import sys

import pytest

from quantkit import assets
from quantkit.errors import RecipeError
from quantkit.recipe.recipe import load_recipe
from quantkit.recipe.yaml import read

MOST_STEPS = (
    20_000_000  # calls and returns of Python and C functions; a list of 100,000 values takes 5.4 million
)
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("weights: [1, 2", "1: not valid YAML", id="syntax"),
        pytest.param("weights: !!python/object/apply:os.system [ls]", "is refused", id="object tag"),
        pytest.param("a: 1\nb: 2\na: 3\n", "3: a: written twice, first in line 1", id="duplicate key"),
        pytest.param("weights: {bits: 3, bits: 4}", "weights.bits: written twice", id="nested duplicate"),
        pytest.param("a: &a [*a]", "expand", id="self alias"),
        pytest.param(LAUGHS, "aliases", id="alias bomb"),
        pytest.param("a: &a 1\nb: [" + "*a, " * 200 + "]", "aliases", id="many aliases"),
        pytest.param("[" * 100_000, "nested deeper", id="deep flow"),
        pytest.param("\n".join("  " * i + "a:" for i in range(400)), "nested deeper", id="deep block"),
        pytest.param("a: [" + "1, " * 100_000 + "]", "values", id="many values"),
        pytest.param("#" + "x" * 1_000_001, "larger than", id="huge"),
        pytest.param("a: " + "9" * 10_000, "digits", id="huge number"),
        pytest.param("1: 2", "plain text", id="number key"),
        pytest.param("? [a]\n: 1", "plain text", id="list key"),
        pytest.param("a: 1\n---\nb: 2", "not valid YAML", id="two documents"),
        pytest.param("a: \x00", "not valid YAML", id="control character"),
    ],
)
def test_malicious_yaml_is_one_clear_error(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    steps = itertools.count()

    def counted(*_):
        assert next(steps) < MOST_STEPS, "the work is not bounded"

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        with pytest.raises(RecipeError, match=message):
            load_recipe(file)
    finally:
        sys.setprofile(before)


def test_not_utf8(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(file)


def test_plain_aliases_still_work(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("weights: {algorithm: &a gptq}\nrules: [{match: x, algorithm: *a}]\n")
    assert load_recipe(file).rules[0].algorithm.name == "gptq"


@pytest.mark.parametrize(
    "scalar",
    [
        "!!int ''",
        "!!int x",
        "!!float ''",
        "!!float x",
        "!!bool x",
        "!!bool ''",
        "!!null x",
        "!!timestamp x",
        "!!timestamp 2026-11-28",
        "!!binary '\u00e9'",
        "!!binary x",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!map x",
        "!!seq x",
        "!!str [a]",
        "!!python/name:os.system x",
        "!mine x",
        '"\\ud83d"',
        '"a\\0b"',
        '"a\\udc00"',
    ],
)
@pytest.mark.parametrize(
    "place", ["weights: {{bits: {}}}", "model: {}", "{}: 1", "rules: [{{match: {}}}]", "{}"]
)
def test_a_value_that_is_not_what_it_says_is_an_error_with_its_line(tmp_path, scalar, place):
    file = tmp_path / "r.yaml"
    file.write_text("# a comment\n" + place.format(scalar) + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert f"{file}:" in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("scalar", ["!!int ''", '"\\ud83d"', "!!bool x", "*a", "[", "\0"])
def test_the_same_in_an_override(scalar):
    with pytest.raises(RecipeError, match="--set model="):
        load_recipe("w4a16-rtn", [f"model={scalar}"])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "!!float .nan"])
@pytest.mark.parametrize(
    "key", ["weights.algorithm.damping", "weights.bits", "calibration.samples", "weights.group_size", "model"]
)
def test_no_number_is_infinite(key, value):
    with pytest.raises(RecipeError, match=key):
        load_recipe("w4a16-gptq", [f"{key}={value}"])


def test_dates_and_equals_are_text():
    assert read("a: 2026-11-28\nb: =\n2026-11-28: 1", "x").data == {
        "a": "2026-11-28",
        "b": "=",
        "2026-11-28": 1,
    }


def test_json_is_a_recipe_too():
    data = {"model": "\U0001f600 \u00e9", "weights": {"algorithm": "rtn"}}
    assert read(json.dumps(data), "x").data == data


def test_a_path_of_an_override_is_bounded():
    with pytest.raises(RecipeError, match="more than 20 parts"):
        load_recipe("w4a16-rtn", ["a." * 5000 + "b=1"])


def test_a_key_cannot_forge_a_line_of_the_message(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text('weights: {algorithm: rtn}\n"evil\\nr.yaml:1: fine": 1\n"\\e[31m": 2\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "\x1b" not in str(caught.value)


PIECES = (
    "!!int ''", "!!float x", "!!bool", "!!timestamp x", "&a", "*a", "<<: *a", "? ", "- ", ": ", "|\n", ">\n", "'", '"',
    "[", "]", "{", "}", "#", "\n", "  ", "\t", "~", "null", ".nan", "-.inf", "1e999", "0x_", "0o9", "1:30", "9" * 400,
    "2026-13-45", '"\\ud800"', '"\\0"', "\u2028", "\ufeff", "é", "\U0001f600", "---\n", "...\n", "%YAML 9.9\n", "yes",
    "weights: ", "rules: ", "algorithm: gptq", "bits: ", "data: ", "transforms: [awq]",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_any_text_is_a_recipe_or_an_error_of_ours(tmp_path, seed):
    """Seeded: shipped recipes with pieces of YAML put in, taken out and repeated, and values of `--set` likewise."""
    draw = random.Random(f"recipes {seed}")
    texts = [assets.recipe_path(name).read_text() for name in assets.recipe_names()]
    file = tmp_path / "r.yaml"
    for _ in range(250):
        text = draw.choice(texts)
        for _ in range(draw.randint(1, 6)):
            at, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
            kind = draw.randrange(4)
            if kind == 0:
                text = text[:at] + text[end:]
            elif kind == 1:
                text = text[:end] + text[at:]
            else:
                text = text[:at] + draw.choice(PIECES) + text[at:]
        raw = bytearray(text.encode())
        if draw.random() < 0.2 and raw:
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        file.write_bytes(raw)
        keys = ("weights.bits", "rules.0.match", "calibration.data", "transforms.0.grid", "model", "a..b", "")
        overrides = [
            f"{draw.choice(keys)}={''.join(draw.choices(PIECES, k=draw.randint(0, 4)))}"
            for _ in range(draw.randint(0, 2))
        ]
        try:
            recipe = load_recipe(file, overrides)
        except RecipeError as error:
            str(error).encode()
        else:
            json.dumps(recipe.resolved(), allow_nan=False).encode()
            json.dumps(recipe.published(), allow_nan=False).encode()
