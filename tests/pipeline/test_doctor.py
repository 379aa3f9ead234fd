"""`quantkit calibration`: what is wrong with a text is seen, and what is right gives no warning."""

import json
from dataclasses import replace

import pytest
import tiny_mixtures
import tiny_models
import torch
from calibration_data import jsonl, words

import quantkit
from quantkit import assets
from quantkit.calibration.scripts import Script
from quantkit.cli.main import run
from quantkit.errors import DataError, ModelError
from quantkit.pipeline.doctor import ExpertsReport

SMALL = assets.default_model() / "README.md"  # a text that has nothing to do with the others
TEMPLATE = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def examine(*data, samples=4, length=64, model=None, **keywords):
    calibration = {"data": list(map(str, data)), "samples": samples, "sequence_length": length}
    recipe = {"weights": {"bits": 4, "group_size": 32, "algorithm": "gptq"}, "calibration": calibration}
    return quantkit.examine_calibration(recipe, model, **({"eval_text": [SMALL]} | keywords))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny Llama's config and tokenizer, with a chat template and a BOS, and without any weights."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(assets.default_model())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8192}))
    return folder


@pytest.fixture(scope="module")
def embedded():
    return quantkit.examine_calibration("w4a16-gptq")


def test_the_embedded_text_is_sound_and_counted(embedded):
    found = embedded
    (source,) = found.sources
    assert found.warnings == []
    assert (found.embedded, found.needed, found.widest) == (True, True, 768)
    assert (source.documents, source.windows, source.unknown, source.special) == (1, 128, 0, 0)
    assert source.used == 128 * 512 / source.tokens
    whole = sum(script.tokens for script in found.scripts)
    assert 8180 < whole < 8192
    assert found.covered == sum(script.seen for script in found.scripts) / whole
    assert found.scripts[0].name == "Latin"


def test_text_of_the_evaluation_is_a_warning(tmp_path):
    text = tmp_path / "books.txt"
    text.write_text(assets.evaluation_text().read_text()[:40_000])
    found = examine(text, eval_text=[text])
    assert found.overlap.windows == 4
    assert any("the evaluation will look better than it is" in each for each in found.warnings)
    assert found.overlap.share == pytest.approx(4 * (64 - 15) / found.sources[0].tokens, rel=0.05)


def test_documents_have_lengths_and_duplicates(tmp_path):
    texts = [words(200), words(200), words(40, 1000), words(4, 5000), ""]
    found = examine(jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts)))
    (source,) = found.sources
    assert (source.documents, source.empty, source.duplicates.exact) == (4, 1, 1)
    assert source.lengths.max > 64 > source.lengths.min > 0
    assert (source.lengths.longer, source.lengths.shorter) == (0.75, 0.25)
    assert source.lengths.min <= source.lengths.median <= source.lengths.p95 <= source.lengths.max
    said = "\n".join(found.warnings)
    assert "of 4 documents, 1 are equal to an earlier one" in said
    assert "1 of 5 records are empty" in said
    assert "256 tokens are fewer than the 768 inputs of the widest linear" in said


def test_a_tokenizer_alone_is_enough_and_its_template_is_shown(chat_model, tmp_path):
    plain = jsonl(tmp_path / "plain.jsonl", *({"text": words(200, i)} for i in range(0, 600, 200)))
    found = examine(plain, model=chat_model)
    assert (found.needed, found.widest, found.experts) == (None, None, None)
    assert any("a chat template, and no text uses it" in each for each in found.warnings)
    chat = [{"role": "user", "content": words(60)}, {"role": "assistant", "content": words(60, 100)}]
    found = examine(jsonl(tmp_path / "chat.jsonl", *({"messages": chat} for _ in range(3))), model=chat_model)
    (source,) = found.sources
    assert (source.documents, source.chats, source.duplicates.exact) == (3, 3, 2)
    assert found.tokenizer.bos_inside + found.tokenizer.eos_inside > 0
    assert source.special == pytest.approx(12 / source.tokens)
    assert len(found.window) == 64
    with pytest.raises(ModelError, match="needs the model's weights"):
        examine(plain, model=chat_model, experts=True)


def test_tokens_per_expert_are_those_of_the_routers(tmp_path):
    model = tiny_mixtures.build("mixtral")
    folder = tiny_models.save(model, tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text(words(400))
    found = examine(text, model=folder, length=32)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[1]}))
    recipe = quantkit.load_recipe("w4a16-gptq", [f"calibration.data=[{text}]", "calibration.samples=4"])
    windows = windows_of(recipe, folder)
    model(input_ids=windows)
    assert len(found.experts) == len(seen) == 2
    for layer in found.experts:
        assert layer.tokens == torch.bincount(seen[layer.name].flatten(), minlength=4).tolist()
        assert sum(layer.tokens) == 4 * 32 * tiny_mixtures.TOP
    assert examine(text, model=folder, length=32, experts=False).experts is None


def windows_of(recipe, folder):
    from quantkit.calibration.text import token_windows
    from quantkit.models.tokenizer import open_tokenizer

    calibration = recipe.calibration.model_copy(update={"sequence_length": 32})
    return token_windows(calibration, open_tokenizer(folder), assets.calibration_text()).ids


def test_experts_with_few_tokens_and_scripts_never_touched_are_warnings(embedded):
    layers = [ExpertsReport("a", [0, 9, 10, 11], 10), ExpertsReport("b", [0, 0, 500, 1], 10)]
    first, second = replace(embedded, experts=layers).warnings
    assert first.startswith("no token comes to 3 of 8 experts")
    assert second.startswith("2 of 8 experts get fewer tokens than they have inputs")
    missed = [
        Script("Cyrillic", 500, 0),
        Script("Thai", 50, 0),
        Script("Greek", 500, 1),
        Script("digits", 500, 0),
    ]
    (said,) = replace(embedded, scripts=[Script("Latin", 8450, 9), *missed]).warnings
    assert said.startswith("parts of the vocabulary that the text never touches: Cyrillic (5.0%); add text")


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="windows of 64 tokens need"):
        examine(tmp_path / "short.txt")
    with pytest.raises(DataError, match="model_free: true"):
        quantkit.examine_calibration({"weights": {"algorithm": "rtn"}, "model_free": True})


def test_the_command_prints_tokens_and_warnings(tmp_path, capsys):
    text = tmp_path / "books.txt"
    text.write_text(assets.calibration_text().read_text()[:40_000])
    asked = [
        "calibration",
        "w4a16-rtn",
        "--set",
        f"calibration.data=['{text}:4']",
        "--set",
        "calibration.samples=4",
    ]
    assert run([*asked, "--json", str(tmp_path / "r.json"), "--eval-text", str(text)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert "first window: " + "|".join(report["window"][:64]) in shown
    assert report["schema"] == "quantkit-calibration/1"
    assert len(report["warnings"]) == shown.count("warning: ") == 2
    assert report["warnings"][0].startswith("the recipe calibrates nothing")
