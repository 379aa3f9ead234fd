"""What an error of a command tells the user to do is done here, and the command then works."""

import json
import re
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from quantkit.cli.main import run

RTN = "weights: {algorithm: rtn, bits: 4, group_size: 32}\n"
GPTQ = "weights: {algorithm: gptq, bits: 4, group_size: 32}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Hidden 64, MLP 96, 128 positions, two blocks."""
    folder = tmp_path_factory.mktemp("model")
    tiny = tiny_models.build("llama-gqa", num_hidden_layers=2, intermediate_size=96)
    return tiny_models.save(tiny, folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """A checkpoint of the model; not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "r.yaml").write_text(RTN)
    assert run(["quantize", str(folder / "r.yaml"), "--model", str(model), "--output", str(folder / "o"),
                "--no-eval", "--device", "cpu"]) == 0  # fmt: skip
    return folder / "o"


@pytest.fixture
def refused(capsys):
    """refused(*command line) -> what it says; it must end with 2."""

    def told(*line):
        assert run([str(word) for word in line]) == 2
        return " ".join(capsys.readouterr().err.split())

    return told


@pytest.fixture
def works(capsys):
    def check(*line):
        code = run([str(word) for word in line])
        assert code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return check


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return write


@pytest.fixture
def line(recipe, model, tmp_path):
    """line(text of a recipe) -> the command that quantizes the model into a new folder."""

    def make(text):
        options = ("--output", tmp_path / "o", "--no-eval", "--device", "cpu")
        return ("quantize", recipe(text), "--model", model, *options)

    return make


def advice(pattern, said):
    match = re.search(pattern, said)
    assert match, said
    return match


def test_group_sizes_that_are_told_fit_and_so_does_the_rule(recipe, model, refused, works):
    told = refused("validate", recipe(RTN.replace("32", "64")), "--model", model)
    sizes = advice(r"use group_size ([\w, ]+), or a rule (\{.*?\})", told)
    for size in sizes[1].split(", "):
        works("validate", recipe(RTN.replace("32", size)), "--model", model)
    works("validate", recipe(RTN.replace("32", "64") + f"rules: [{sizes[2]}]"), "--model", model)


def test_siblings_with_two_schemes_are_let_through_either_way(recipe, model, refused, works):
    text = RTN + "rules: [{match: '*.q_proj', bits: 8}]\n"
    told = refused("validate", recipe(text), "--model", model)
    key, value = advice(r"set ([a-z_.]+): (\w+)", told).groups()
    works("validate", recipe(text), "--model", model, "--set", f"{key}={value}")
    works("validate", recipe(text.replace("q_proj", "[qkv]_proj")), "--model", model)


def test_windows_are_cut_to_the_length_that_is_told(recipe, model, refused, works):
    text = GPTQ + "calibration: {sequence_length: 500, samples: 2}\n"
    told = refused("validate", recipe(text), "--model", model)
    works("validate", recipe(text), "--model", model, "--set", advice(r"--set (\S+)", told)[1])


def test_as_many_windows_as_are_told_can_be_cut(line, tmp_path, refused, works):
    (tmp_path / "short.txt").write_text("a few words of text. " * 20)
    text = GPTQ + f"calibration: {{data: [{tmp_path}/short.txt], samples: 50, sequence_length: 32}}\n"
    told = refused(*line(text))
    most = int(advice(r"lower calibration.samples \(to (\d+) at most\)", told)[1])
    works(*line(text), "--set", f"calibration.samples={most}")
    refused(*line(text), "--set", f"calibration.samples={most + 1}")


def test_the_field_that_is_told_can_be_named(line, tmp_path, refused, works):
    record = json.dumps({"body": "some words of text. " * 50})
    (tmp_path / "own.jsonl").write_text(record + "\n")
    source = f"{{source: {tmp_path}/own.jsonl}}"
    text = GPTQ + f"calibration: {{data: [{source}], samples: 2, sequence_length: 32}}\n"
    told = refused(*line(text))
    field = advice(r"it has (\w+); name the one to use with `(\w+)`", told)
    named = text.replace(source, f"{{source: {tmp_path}/own.jsonl, {field[2]}: {field[1]}}}")
    works(*line(named))


def test_words_of_other_tools_are_replaced_by_what_is_meant(recipe, refused, works):
    text = "weights: {algorithm: gptq, preset: w4a16}\n"
    meant = advice(r"did you mean `(\w+)`", refused("validate", recipe(text)))[1]
    works("validate", recipe(text.replace("w4a16", meant)))
    text = "weights: {algorithm: awq, bits: 4}\n"
    line = advice(r"awq is a transform: `(.*?)`", refused("validate", recipe(text)))[1]
    works("validate", recipe(text.replace("awq", "rtn") + line))
    text = "weights: {algorithm: rtn}\nignore: [lm_head]\n"
    rule = advice(r"one `(\{.*?\})`", refused("validate", recipe(text)))[1]
    works("validate", recipe(f"weights: {{algorithm: rtn}}\nrules: [{rule.replace('NAME', 'lm_head')}]\n"))


def test_an_output_of_another_run_is_started_over_or_left(recipe, model, packed, tmp_path, refused, works):
    output = shutil.copytree(packed, tmp_path / "o")
    line = ("--model", model, "--no-eval", "--device", "cpu")
    told = refused("quantize", recipe(RTN.replace("4,", "8,")), *line, "--output", output)
    assert "choose another --output, or start over with --no-resume" in told
    works("quantize", recipe(RTN.replace("4,", "8,")), *line, "--output", tmp_path / "other")
    works("quantize", recipe(RTN.replace("4,", "8,")), *line, "--output", output, "--no-resume")
    assert "W8A16" in works("inspect", output)


def test_foreign_files_stay_and_another_output_works(recipe, model, tmp_path, refused, works):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    line = ("quantize", recipe(RTN), "--model", model, "--no-eval", "--device", "cpu", "--output")
    assert "choose another --output or remove it" in refused(*line, tmp_path / "mine")
    works(*line, tmp_path / "other")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [["--eval-tokens", "64"], ["--eval-text", "a.txt"]])
def test_no_eval_is_not_given_with_what_to_evaluate(recipe, model, tmp_path, options, refused):
    told = refused("quantize", recipe(RTN), "--model", model, "--no-eval", *options)
    assert "leave out --eval-tokens and --eval-text" in told


def test_an_evaluation_fits_into_the_sizes_that_are_told(packed, refused, works):
    line = ("eval", packed, "--device", "cpu", "--max-tokens", "200")
    most = advice(r"beyond the model's (\d+) tokens; use at most those", refused(*line, "--context", "4000"))[
        1
    ]
    works(*line, "--context", most)
    line = ("eval", packed, "--device", "cpu", "--context", "64", "--max-tokens")
    least = advice(r"less than one window of (\d+); raise it or lower context", refused(*line, "8"))[1]
    works(*line, least)


def test_a_longer_generation_is_asked_for_less(packed, refused, works):
    line = ("generate", packed, "--device", "cpu", "--prompt", "abc", "--max-new-tokens")
    most = int(advice(r"more than the model's (\d+); shorten the prompt or lower", refused(*line, "4000"))[1])
    works(*line, most - 4)


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_the_devices_that_are_told_work(packed, device, refused, works):
    names = advice(
        r"use (auto)(?: or|,) (cpu)", refused("generate", packed, "--prompt", "a", "--device", device)
    )
    for name in names.groups():
        works("generate", packed, "--prompt", "a", "--max-new-tokens", "1", "--device", name)


def test_a_checkpoint_that_was_touched_is_opened_as_told(packed, tmp_path, refused, works):
    folder = shutil.copytree(packed, tmp_path / "o")
    save_file({"x": torch.zeros(2)}, folder / "stray.safetensors")
    assert "stray.safetensors; remove them" in refused("inspect", folder)
    (folder / "stray.safetensors").unlink()
    works("inspect", folder, "--verify")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": 1}))
    assert "or remove quantkit.json to use it without" in refused("inspect", folder, "--verify")
    (folder / "quantkit.json").unlink()
    works("inspect", folder)


def test_companions_are_mended_as_told(model, recipe, tmp_path, refused, works):
    folder = shutil.copytree(model, tmp_path / "m")
    (tmp_path / "terms.txt").write_text("terms")
    line = ("quantize", recipe(RTN), "--model", folder, "--no-eval", "--device", "cpu", "--output")
    (folder / "TERMS").symlink_to(tmp_path / "terms.txt")
    assert "put the file itself there, or remove the link" in refused(*line, tmp_path / "o")
    (folder / "TERMS").unlink()
    shutil.copy(tmp_path / "terms.txt", folder / "TERMS")
    (folder / "generation_config.json").write_text('{"max_new_tokens": -3}')
    assert "generation_config.json" in refused(*line, tmp_path / "o")
    (folder / "generation_config.json").unlink()
    works(*line, tmp_path / "o")
    assert (tmp_path / "o/TERMS").read_text() == "terms"


def test_a_tokenizer_with_code_is_opened_by_its_file_as_told(model, packed, tmp_path, refused, works):
    folder = shutil.copytree(packed, tmp_path / "o")
    (folder / "quantkit.json").unlink()
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    code = {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"}
    file.write_text(json.dumps(settings | code))
    line = ("generate", folder, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu")
    told = refused(*line)
    name = advice(r"remove auto_map and set tokenizer_class to (\w+)", told)[1]
    file.write_text(json.dumps(settings | {"tokenizer_class": name}))
    works(*line)


def test_a_head_tied_to_the_embedding_is_left_out_of_the_rules(tmp_path, recipe, refused, works):
    tied = tiny_models.save(tiny_models.build("llama", tie_word_embeddings=True), tmp_path / "m")
    told = refused("validate", recipe(RTN + "rules: [{match: lm_head, bits: 8}]"), "--model", tied)
    assert "remove the rule" in told
    works("validate", recipe(RTN), "--model", tied)
