"""Configs, tokenizers and models are opened without foreign code, and what is wrong with them is told by name."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, save

from quantkit.errors import ModelError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OPENS = {"from_pretrained", "from_config"}
ONLY_IN = {"AutoTokenizer": "models/tokenizer.py", "AutoConfig": "models/config.py"}


def openings(source: str) -> list[tuple[str, str, bool]]:
    """(class, method, whether remote code is off) of every call that opens something of transformers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OPENS
        ):
            continue
        off = any(
            word.arg == "trust_remote_code"
            and isinstance(word.value, ast.Constant)
            and word.value.value is False
            for word in node.keywords
        )
        found.append((ast.unparse(node.func.value), node.func.attr, off))
    return found


def test_remote_code_is_off_wherever_something_is_opened():
    wrong, seen = [], set()
    for file in (
        f for room in ("quantkit", "eval", "kernels", "examples") for f in (ROOT / room).rglob("*.py")
    ):
        for kind, method, off in openings(file.read_text(encoding="utf-8")):
            seen.add(kind)
            home = ONLY_IN.get(kind)
            if (not off and kind != "GenerationConfig") or (home and not file.as_posix().endswith(home)):
                wrong.append(f"{file}: {kind}.{method}")
    assert wrong == []
    assert {"AutoTokenizer", "AutoConfig", "opens"} <= seen  # opens: the class of a model


def test_an_opening_that_allows_remote_code_is_found():
    assert openings("AutoTokenizer.from_pretrained(p)") == [("AutoTokenizer", "from_pretrained", False)]
    assert not openings("A.from_config(c, trust_remote_code=True)")[0][2]
    assert openings("A.from_config(c, trust_remote_code=False)")[0][2]


def error_of(call, *arguments):
    """What the call says is wrong, None when it works; any other kind of error fails the test."""
    try:
        call(*arguments)
    except ModelError as error:
        return str(error)
    return None


def edit(file, **changes):
    value = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(FAMILIES["llama"](), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def with_code(folder):
    """A model folder whose tokenizer, config and generation ask for Python code that leaves a mark."""
    mark = folder.parent / "ran"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast, LlamaConfig\n"
            "class T(PreTrainedTokenizerFast): pass\nclass C(LlamaConfig): pass\ndef generate(*a, **k): pass\n"
        )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="T",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    return folder, mark


@pytest.mark.parametrize(
    "verb",
    [
        [
            "quantize",
            "w4a16-rtn",
            "--no-eval",
            "--set",
            "weights.group_size=32",
            "--output",
            "out",
            "--model",
        ],
        ["generate", "--prompt", "a", "--max-new-tokens", "2"],
        ["eval", "--max-tokens", "64", "--context", "32"],
        pytest.param(["inspect"], marks=pytest.mark.slow),
        pytest.param(["validate", "w4a16-rtn", "--model"], marks=pytest.mark.slow),
    ],
    ids=lambda verb: verb[0],
)
def test_code_of_a_folder_never_runs_whatever_stdin_answers(with_code, verb, tmp_path):
    folder, mark = with_code
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *verb, str(folder)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert not mark.exists()
    assert "Traceback" not in done.stderr
    assert "trust_remote_code" not in done.stderr
    if verb[0] in ("quantize", "generate", "eval"):
        assert done.returncode == 2
        assert "never runs" in done.stderr


def test_the_advice_on_code_of_a_tokenizer_is_true(with_code):
    folder, mark = with_code
    with pytest.raises(
        ModelError, match="remove auto_map and set tokenizer_class to PreTrainedTokenizerFast"
    ):
        open_tokenizer(folder)
    edit(folder / "tokenizer_config.json", auto_map=None, tokenizer_class="PreTrainedTokenizerFast")
    assert open_tokenizer(folder)("ab")["input_ids"]
    assert not mark.exists()


BROKEN = {
    "gone": None,
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "no object": b"7",
    "an empty object": b"{}",
    "not UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 10_000,
}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_missing_or_broken_tokenizer_is_told_by_folder(folder, file, what):
    content = BROKEN[what]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    error = error_of(open_tokenizer, folder)
    if error is None:  # without settings a vocabulary may still be enough
        assert file == "tokenizer_config.json"
        assert open_tokenizer(folder)("ab")["input_ids"]
    else:
        assert str(folder) in error
        assert "Error: Error" not in error


def test_a_folder_without_a_tokenizer_is_told(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        open_tokenizer(folder)


SETTINGS = [
    {"bos_token": 7},
    {"tokenizer_class": 7},
    {"tokenizer_class": "NoSuchTokenizer"},
    {"model_max_length": "x"},
    {"added_tokens_decoder": {"x": 1}},
    {"added_tokens_decoder": [1]},
    {"extra_special_tokens": 7},
    {"auto_map": 7},
    {"chat_template": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_a_wrong_type_are_an_error_of_ours_or_harmless(folder, settings):
    edit(folder / "tokenizer_config.json", **settings)
    assert str(folder) in (error_of(open_tokenizer, folder) or str(folder))


VALUES = [None, 0, -1, 1.5, 10**9, 10**18, "x", "", [], {}, [1], {"a": 1}, True]


def opened(folder):
    """Everything `quantize` opens before it computes."""
    source = Source(read_checkpoint(folder))
    skeleton.build(source)
    open_tokenizer(folder)


@pytest.mark.parametrize("seed", range(40))
def test_any_value_in_a_config_is_read_or_refused_by_name(folder, seed):
    draw = random.Random(seed)
    file = folder / draw.choice(
        ["config.json", "config.json", "generation_config.json", "tokenizer_config.json"]
    )
    value = json.loads(file.read_text()) if file.is_file() else {"max_length": 20, "eos_token_id": 2}
    for key in draw.sample(sorted(value), min(len(value), draw.choice([1, 1, 2]))):
        value[key] = draw.choice(VALUES)
    file.write_text(json.dumps(value))
    assert str(folder) in (error_of(opened, folder) or str(folder)), value


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_to_a_file_is_read_or_refused_by_name(folder, seed):
    draw = random.Random(seed)
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    )
    file = folder / draw.choice([name for name in names if (folder / name).is_file()])
    raw = bytearray(file.read_bytes())
    end = min(len(raw), 3000)  # within the header of the weights
    for _ in range(draw.choice([1, 3, 10])):
        raw[draw.randrange(end)] = draw.randrange(256)
    file.write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.3 else raw)
    assert str(folder) in (error_of(opened, folder) or str(folder))
