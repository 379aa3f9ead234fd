"""`quantkit eval --explain`: layers of a checkpoint put back to full precision, with what was folded between them."""

import json

import pytest
import tiny_models
import torch

import quantkit
from quantkit.checkpoint.manifest import MANIFEST, read_facts
from quantkit.checkpoint.restore import restorations
from quantkit.cli.main import run
from quantkit.errors import ModelError

LINE = "the quick brown fox jumps over the lazy dog, 1234 times.\n"
RECIPE = {
    "weights": {"algorithm": "rtn", "bits": 3, "group_size": 16},
    "transforms": ["awq"],
    "calibration": {"samples": 4, "sequence_length": 32},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(original folder, AWQ checkpoint, a text)."""
    root = tmp_path_factory.mktemp("explained")
    (root / "text.txt").write_text("".join(f"{i}: {LINE[i % 7 :]}" for i in range(12)))
    tiny_models.save(tiny_models.build("llama-gqa"), root / "model")
    recipe = RECIPE | {"calibration": RECIPE["calibration"] | {"data": [str(root / "text.txt")]}}
    (root / "r.yaml").write_text(json.dumps(recipe))
    given = [str(root / "r.yaml"), "--model", str(root / "model"), "--output", str(root / "awq")]
    assert run(["quantize", *given, "--no-eval", "--report", str(root / "page.html")]) == 0
    return root / "model", root / "awq", root / "text.txt"


@pytest.fixture(scope="module")
def pair(made):
    return quantkit.load(made[1], device="cpu"), quantkit.load(made[0], device="cpu")


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny_models.ids(24)).logits


def test_what_a_scale_was_folded_into_is_restored_as_one(made, pair):
    scaling = json.loads((made[1] / MANIFEST).read_text())["scaling"]
    folded = {s["producer"]: s["consumers"] for s in scaling if s["exponent"] is not None}
    assert folded
    units, by = restorations(made[1], *pair)
    assert "share a scale" in by
    modules = [set(name.replace(" + ", " ").split()) for name in units]
    for producer, consumers in folded.items():
        holders = [unit for unit in modules if any(name.endswith(producer) for name in unit)]
        assert holders
        assert all(any(name.endswith(c) for name in unit) for unit in holders for c in consumers)


def test_all_layers_restored_are_the_original_and_each_goes_back(made, pair):
    model, original = pair
    before, exact = logits(model), logits(original)
    assert not torch.allclose(before, exact, atol=1e-2)
    units, _ = restorations(made[1], model, original)
    entered = [restore() for restore in units.values()]
    for each in entered:
        each.__enter__()
    torch.testing.assert_close(logits(model), exact, atol=1e-5, rtol=1e-4)
    for each in reversed(entered):
        each.__exit__(None, None, None)
    assert torch.equal(logits(model), before)


def test_one_unit_restored_moves_the_model_towards_the_original(made, pair):
    """A unit that was cut in the middle of a fold would throw it far away."""
    model, original = pair
    before, exact = logits(model), logits(original)
    apart = (before - exact).square().mean()
    for restore in restorations(made[1], model, original)[0].values():
        with restore():
            assert (logits(model) - exact).square().mean() < 1.2 * apart


def test_blocks_where_layers_are_too_many_or_nothing_says_what_was_folded(made, pair, tmp_path):
    blocks = {f"model.layers.{number}" for number in range(len(tiny_models.blocks(pair[1])))}
    units, by = restorations(made[1], *pair, most=1)
    assert (set(units), by) == (blocks, "block")
    units, by = restorations(tmp_path, *pair)
    assert (set(units), by) == (blocks, "block")


def test_a_model_without_the_quantized_modules_is_refused(made, pair):
    other = tiny_models.build("gpt2")
    with pytest.raises(ModelError, match="is it the model that was quantized"):
        restorations(made[1], pair[0], other)


def test_the_verb_writes_what_explains_the_kl(made, capsys, tmp_path):
    original, packed, text = map(str, made)
    file = tmp_path / "e.json"
    options = ["--baseline", original, "--text", text, "--context", "32", "--explain", "--json", str(file)]
    assert run(["eval", packed, *options]) == 0
    shown = capsys.readouterr().out
    assert "tokens with the largest KL" in shown
    told = json.loads(file.read_text())
    assert (told["model"], told["baseline"]) == (packed, original)
    found = told["explanation"]
    assert found["worst"][0]["kl"] == pytest.approx(told["kl_max"])
    assert found["kl_all_restored"] < 1e-6 < found["kl_mean"]
    assert len(found["restored"]) > 2


def test_quantize_draws_its_page(made):
    text = (made[1].parent / "page.html").read_text()
    assert "<h1>awq</h1>" in text
    assert "Seconds of each block" in text


def test_a_run_records_the_time_and_memory_of_each_block(made, pair):
    facts = read_facts(made[1])
    count = len(tiny_models.blocks(pair[1]))
    assert [b.name for b in facts.blocks] == [f"model.layers.{i}" for i in range(count)] + [
        "outside the blocks"
    ]
    assert sum(b.seconds for b in facts.blocks) <= facts.seconds["total"]
    peaks = [b.peak_rss_bytes for b in facts.blocks]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= facts.peak_rss_bytes
    assert all(b.rss_bytes is None or b.rss_bytes > 0 for b in facts.blocks)


def test_a_page_on_standard_output_is_refused_before_the_work(capsys):
    assert run(["quantize", "w4a16-rtn", "--report", "-"]) == 2
    assert "such as report.html" in capsys.readouterr().err


def test_an_explanation_needs_a_baseline(capsys, made):
    assert run(["eval", str(made[1]), "--explain"]) == 2
    assert "add --baseline" in capsys.readouterr().err
