"""The coverage run: tiny configs are consistent, and a handful of types of each kind is quantized right."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import quantkit
from quantkit.bench import coverage
from quantkit.bench.coverage_case import RECIPES, relative, run_case
from quantkit.bench.coverage_judge import grids, limit, noisy, share
from quantkit.bench.coverage_model import built, logits, tokenizer
from quantkit.bench.shrink import fixes, shrunk
from quantkit.errors import ModelError
from quantkit.pipeline.in_memory import quantize_in_memory

# Hybrids: Mamba 2 beside attention, gated delta net, shared blocks, RG-LRU, a model without attention.
# And cross-attention that no text reaches, merged convolutions, a tower whose device is asked for.
FAST = ("bamba", "zaya", "zamba2", "recurrent_gemma", "rwkv", "bart", "olmo_hybrid", "smolvlm")
SLOW = (
    "qwen3_5_text",
    "hy_v4",
    "lfm3",
    "gemma4",
    "kimi_k25",
    "cpmant",
    "falcon_h1",
    "falcon_mamba",
    "lfm2",
    "mamba",
    "mamba2",
    "ernie4_5_vl_moe",
    "step3p7",
    "muse_spark",
    "jetmoe",
    "inkling2_text",
)


def accepted(model_type, recipes):
    case = run_case(model_type, coverage.types()[model_type], recipes)
    assert case.built == ""
    assert {r: (o["outcome"], o.get("reason")) for r, o in case.outcomes.items()} == dict.fromkeys(
        recipes, ("accepted", None)
    )


@pytest.mark.parametrize("model_type", FAST[:3])  # all of them in the slow tier, by every recipe
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


def test_a_refusal_is_told_by_name(monkeypatch):
    def refuse(*args, **kwargs):
        raise ModelError("a reason")

    monkeypatch.setattr(quantkit, "quantize", refuse)
    case = run_case("mixtral", "MixtralForCausalLM", ["w8-rtn"])
    assert case.family == "mixture"
    assert case.outcomes["w8-rtn"] == {"outcome": "refused", "reason": "a reason"}


GOOD = {"outcome": "accepted", "error": 0.01, "noise": 0.01, "share": 1.0}


def case_of(model_type="llama", built="", **outcomes):
    return {"model_type": model_type, "family": "dense", "built": built, "outcomes": outcomes}


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (case_of(rtn=GOOD), "accepted"),
        (case_of(rtn=GOOD, gptq={"outcome": "wrong", "reason": "logits | differ"}), "wrong"),
        (case_of(rtn=GOOD, gptq={"outcome": "refused", "reason": "no"}), "partly"),
        (case_of(rtn=GOOD | {"share": 0.2}), "partly"),
        (case_of(rtn={"outcome": "refused", "reason": "x is an encoder-decoder model; only"}), "outside"),
        (case_of(rtn={"outcome": "refused", "reason": "no place for: x"}), "refused"),
        (case_of(built="KeyError: 'x'"), "not buildable"),
        (case_of("pi0", built="TypeError: missing 'state'"), "outside"),
    ],
    ids=["accepted", "wrong", "partly", "little", "outside", "refused", "unbuilt", "robot"],
)
def test_the_verdict_is_the_worst_outcome_of_a_type(case, verdict):
    assert coverage.verdict(case) == verdict
    row = next(line for line in coverage.summary([case]) if line.startswith("| dense"))
    counted = dict(zip(coverage.VERDICTS, row.split("|")[2:-1], strict=True))
    assert {name: int(count) for name, count in counted.items()} == dict.fromkeys(coverage.VERDICTS, 0) | {
        verdict: 1
    }
    assert ("\n".join(coverage.details({"odd": case})).count("odd")) == 1


def test_reasons_fit_a_cell_of_the_table():
    case = case_of(rtn=GOOD, gptq={"outcome": "wrong", "reason": "logits | differ"})
    assert any("gptq: logits \\| differ" in line for line in coverage.details({"odd": case}))


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """(a tiny model that amplifies changes of its weights, what it becomes at 8 bits, the other's logits)."""
    model, inputs = built("muse_glimmer", coverage.types()["muse_glimmer"])
    folder = tmp_path_factory.mktemp("sharp")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model, quantize_in_memory(RECIPES["w8-rtn"], folder, device="cpu"), logits(model, inputs)


def test_a_result_is_judged_by_noise_on_the_weights(sharp):
    model, loaded, wanted = sharp
    by_noise = relative(logits(noisy(model, loaded), {}), wanted)
    assert 0.03 < relative(logits(loaded, {}), wanted) < limit(by_noise)
    wrong = model.get_submodule(next(iter(grids(loaded))))
    wrong.weight[:8] = wrong.weight[8:16].clone()
    assert relative(logits(model, {}), wanted) > limit(by_noise)


def test_the_share_counts_matrices_that_are_left_as_they_were(sharp):
    model, loaded, _ = sharp
    assert share(model, loaded) == 1.0
    assert share(model, model) == 0.0


def test_a_page_gets_the_table_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{coverage.BEGIN}\nold\n{coverage.END}\nbelow\n")
    case = case_of(rtn=GOOD)
    coverage.document(page, {"llama": json.loads(json.dumps(case))}, {"transformers": "5", "commit": "c"})
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert "`llama`" in text
