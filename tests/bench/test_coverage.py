"""The coverage run: tiny configs are consistent, and a handful of types of each kind is quantized right."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantkit.bench import coverage
from quantkit.bench.coverage_case import RECIPES, run_case
from quantkit.bench.shrink import fixes, shrunk

# Hybrids: Mamba 2 beside attention, gated delta net, shared blocks, RG-LRU, a model without attention.
# And cross-attention that no text reaches, merged convolutions, a tower whose device is asked for.
FAST = ("bamba", "zamba2", "recurrent_gemma", "rwkv", "bart", "olmo_hybrid", "smolvlm")
SLOW = (
    "qwen3_5_text",
    "lfm3",
    "gemma4",
    "kimi_k25",
    "cpmant",
    "falcon_h1",
    "falcon_mamba",
    "lfm2",
    "mamba",
    "mamba2",
)


def accepted(model_type, recipes):
    case = run_case(model_type, coverage.types()[model_type], recipes)
    assert case.built == ""
    assert {r: (o["outcome"], o.get("reason")) for r, o in case.outcomes.items()} == dict.fromkeys(
        recipes, ("accepted", None)
    )


@pytest.mark.parametrize("model_type", FAST)
def test_types_are_calibrated_on_their_own_hidden_states(model_type):
    accepted(model_type, ["w4-gptq"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*FAST, *SLOW])
def test_types_by_every_recipe(model_type):
    accepted(model_type, list(RECIPES))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_5_text", "llava", "gemma4_text"])
def test_a_tiny_config_keeps_what_belongs_together(model_type):
    config = next(shrunk(CONFIG_MAPPING[model_type])).get_text_config()
    assert config.hidden_size == 64
    assert config.vocab_size == 160
    assert 2 <= config.num_hidden_layers <= 6
    kinds = getattr(config, "layer_types", None)
    whole = getattr(CONFIG_MAPPING[model_type]().get_text_config(), "layer_types", None)
    if kinds is not None:
        assert len(kinds) == config.num_hidden_layers
        assert set(kinds) == set(whole)


def test_placeholders_of_pictures_are_no_ids_of_text():
    config = next(shrunk(CONFIG_MAPPING["llava"]))
    assert 100 < config.image_token_index < 160


def test_fixes_name_types_that_exist():
    parts = {name for name in fixes() if name not in CONFIG_MAPPING}
    assert not parts


def test_a_refusal_is_told_by_name():
    case = run_case("mixtral", "MixtralForCausalLM", ["w8-rtn"])
    assert case.family == "mixture"
    assert case.outcomes["w8-rtn"]["outcome"] == "refused"
    assert "mixture of experts" in case.outcomes["w8-rtn"]["reason"]


def test_the_summary_counts_the_worst_outcome_of_a_type():
    good, bad = {"outcome": "accepted", "error": 0.01}, {"outcome": "wrong", "reason": "logits | differ"}
    case = {"family": "dense", "built": "", "outcomes": {"w8-rtn": good, "w4-gptq": bad}}
    fine = case | {"outcomes": {"w8-rtn": good}}
    none = case | {"built": "ImportError: no pillow", "outcomes": {}}
    lines = coverage.summary([case, fine, none])
    assert lines[2] == "| dense | 1 | 0 | 0 | 1 | 1 |"
    assert any("logits \\| differ" in line for line in coverage.details({"odd": case, "fine": fine}))


def test_a_page_gets_the_table_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{coverage.BEGIN}\nold\n{coverage.END}\nbelow\n")
    case = {"family": "dense", "built": "", "outcomes": {"w8-rtn": {"outcome": "accepted", "error": 0.01}}}
    coverage.document(page, {"llama": json.loads(json.dumps(case))}, {"transformers": "5", "commit": "c"})
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert "`llama`" in text
