import time

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe import load_recipe

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
    began = time.monotonic()
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)
    assert time.monotonic() - began < 5


def test_not_utf8(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(file)


def test_plain_aliases_still_work(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("weights: {algorithm: &a gptq}\nrules: [{match: x, algorithm: *a}]\n")
    assert load_recipe(file).rules[0].algorithm.name == "gptq"
