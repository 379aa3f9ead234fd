import contextlib
import os
import random
from pathlib import Path

import pytest

import quantkit
from quantkit import assets
from quantkit.errors import DataError, ModelError, OutputError, RecipeError, UserError
from quantkit.models.headers import resolve_model
from quantkit.paths import user_path, weights_path
from quantkit.recipe.recipe import load_recipe

IMPOSSIBLE = {
    "unknown user": ("~nosuchuser/x", "no user"),
    "NUL": ("a\0b", "NUL"),
    "lone surrogate": ("a\ud800b", "not valid text"),
    "long name": ("x" * 5000, "too long"),
    "long part": (f"./{'y' * 300}.txt", "too long"),
}


@pytest.mark.parametrize(("text", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_path_that_cannot_be_is_an_error_of_ours(text, said):
    with pytest.raises(DataError, match=said) as caught:
        user_path(text, DataError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", [text for text, _ in IMPOSSIBLE.values()], ids=IMPOSSIBLE)
def test_recipes_models_and_outputs_say_so(text):
    with pytest.raises(RecipeError):
        load_recipe(text)
    with pytest.raises(ModelError):
        resolve_model(text, assets.default_model())
    with pytest.raises(OutputError):
        quantkit.quantize("w4a16-rtn", output=text, evaluate=False)


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(RecipeError, match="cannot be read"):
        user_path(tmp_path / "a", RecipeError)


def test_what_exists_and_what_could_exist_pass(tmp_path):
    assert user_path(str(tmp_path), DataError) == tmp_path
    assert user_path(tmp_path / "no" / "such", DataError) == tmp_path / "no" / "such"
    assert user_path("~", DataError).is_absolute()


def test_a_name_that_is_no_utf8_passes(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    assert user_path(folder, ModelError).is_dir()


def test_weights_are_not_kept_under_a_name_that_is_no_utf8(tmp_path, monkeypatch):
    """safetensors opens no such path, so it is refused before anything is computed, also where the name is made up."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    Path(f"{name}.yaml").write_text("weights: {algorithm: rtn}")
    with pytest.raises(ModelError, match=r"is not UTF-8, .*; rename it"):
        resolve_model(name, assets.default_model())
    for recipe, output in (("w4a16-rtn", name), (f"{name}.yaml", None)):
        with pytest.raises(OutputError, match=r"is not UTF-8, .*; choose another --output"):
            quantkit.quantize(recipe, output=output, evaluate=False)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.yaml"]


PIECES = (
    "a",
    "..",
    ".",
    "~",
    "~root",
    "~no\nuser",
    "/",
    "//",
    "\0",
    "\ud800",
    "\udcff",
    " ",
    "\n",
    "x" * 300,
    "*",
)
PIECES += (
    "\x1b[31m",
    "[/i]",
    "%s",
    "{}",
    "con",
    "ü",
    "/dev/null",
    "/proc/self/fd/0",
    "hf:",
    ":",
    "@",
    "é" * 200,
)


@pytest.mark.parametrize("seed", range(4))
def test_any_path_is_one_or_an_error_of_ours(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantkit.models.headers._download", lambda name: tmp_path)
    draw = random.Random(seed)
    for _ in range(150):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 6)))
        for opened in (
            lambda text: user_path(text, DataError),
            lambda text: weights_path(text, ModelError),
            lambda text: load_recipe(text),
            lambda text: resolve_model(text, tmp_path),
        ):
            with contextlib.suppress(UserError):
                opened(text)
    assert list(tmp_path.iterdir()) == []
