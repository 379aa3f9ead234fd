import json
from dataclasses import replace

import pytest

from quantkit import assets
from quantkit.errors import RecipeError
from quantkit.recipe import words
from quantkit.recipe.errors import _parts
from quantkit.recipe.recipe import ALGORITHMS, TRANSFORMS, Recipe, load_recipe, parse_recipe
from quantkit.scheme import KV_PRESETS, PRESETS, Scheme, integer

LEAST = {"weights": {"preset": "W4A16", "algorithm": "gptq"}}


def problems(tmp_path, text, *overrides):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file, overrides)
    return [line.replace(f"{file}:", "") for line in str(error.value).splitlines()]


def with_weights(**keys):
    return parse_recipe({"weights": {"algorithm": "rtn"} | keys}).weights


@pytest.mark.parametrize("name", assets.recipe_names())
def test_shipped_recipe_loads_and_says_its_command(name):
    recipe = load_recipe(name)
    lines = assets.recipe_path(name).read_text().splitlines()
    assert lines[0] == f"# quantkit quantize recipes/{name}.yaml"
    assert lines[1].startswith("# ")
    assert recipe.model is None
    assert recipe.calibration.data == ()
    assert (recipe.calibration.samples, recipe.calibration.sequence_length) == (128, 512)
    assert (recipe.kv_cache is not None) == ("kv" in name)
    if recipe.weights is None:
        assert name.startswith("kv")
        return
    inputs = 16 if recipe.inputs is None else recipe.inputs.grid.bits
    assert name.partition("-")[0].endswith(f"{recipe.weights.bits}a{inputs}")
    assert ("gptq" if recipe.weights.algorithm.name == "gptq" else "round to nearest") in lines[1].lower()
    assert recipe.weights.algorithm.name == "gptq" or "gptq" not in name
    named = {"awq": "awq", "smoothquant": "smoothquant"}
    if "smoothquant-plus" in name:
        named = {"smoothquant-plus": "smoothquant_plus"}
    assert [t.name for t in recipe.transforms] == [named[each] for each in named if each in name]
    assert lines[1].endswith("asymmetric.") is not recipe.weights.symmetric
    if name.endswith("-sym"):
        assert recipe.weights.symmetric


@pytest.mark.parametrize("name", assets.recipe_names())
def test_beside_every_asymmetric_recipe_lies_a_symmetric_one(name):
    """Plain transformers 5.23 does not load asymmetric weights."""
    recipe = load_recipe(name)
    if recipe.weights is not None and not recipe.weights.symmetric:
        other = load_recipe(f"{name}-sym")
        weights = recipe.weights.model_copy(update={"symmetric": True})
        assert other == recipe.model_copy(update={"weights": weights})


def test_all_widths_and_methods_are_shipped():
    methods = ("rtn", "gptq", "awq", "awq-gptq")
    assert set(assets.recipe_names()) >= {f"w{b}a16-{m}" for b in (2, 3, 4, 8) for m in methods}


def test_all_errors_come_at_once_with_path_and_line(tmp_path):
    found = problems(
        tmp_path,
        "weights:\n"
        "  algorithm: {name: gptq, dampng: 0.1}\n"
        "  bits: 9\n"
        "inputs: {dtype: int8}\n"
        "rules:\n"
        "  - {match: a, skip: true, bits: 3}\n"
        '  - {bits: "4"}\n'
        "transforms: [awk]\n"
        "kv_cache: {dtype: int8}\n"
        "speed: 1\n",
    )
    where = [": ".join(line.split(": ")[:2]) for line in found]
    assert where == [
        "2: weights.algorithm.dampng",
        "3: weights.bits",
        "4: inputs.dtype",
        "9: kv_cache.dtype",
        "8: transforms.0",
        "6: rules.0",
        "7: rules.1.match",
        "7: rules.1.bits",
        "10: speed",
    ]
    assert "known here: name, order, groups" in found[0]
    assert "known here: number, granularity" in found[2]
    assert "known here: preset, number" in found[3]
    assert "known here: model, weights" in found[8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: {algorithm: {name: gptq, groups: dynamic}}", "order: none"),
        ("weights: {algorithm: gptw}", "'rtn', 'gptq'"),
        ("weights: {bits: 4}", "weights.algorithm: missing"),
        ("weights: {algorithm: rtn, preset: W5A16}", "'W4A16'"),
        ("weights: {algorithm: rtn, preset: [1]}", "weights.preset"),
        ("weights: {algorithm: rtn, group_size: 8}", "16"),
        ("weights: {algorithm: rtn, symmetric: 1}", "weights.symmetric"),
        ("weights: {algorithm: {name: gptq, damping: .inf}}", "weights.algorithm.damping"),
        ("weights: 3", "expected a mapping"),
        ("weights: {algorithm: rtn}\nrules: {match: a}", "rules: expected a list"),
        ("weights: {algorithm: rtn}\nrules: [{match: a, bits: null}]", "need a value"),
        (
            "weights: {algorithm: rtn}\ncalibration: {data: [a:1, b:2], samples: 4}",
            "sum to 3, not to samples: 4",
        ),
        ("weights: {algorithm: rtn}\ncalibration: {data: [a:4, b], samples: 4}", "leaves less than"),
        ("weights: {algorithm: rtn}\ncalibration: {samples: 0}", "calibration.samples"),
        ("weights: {algorithm: rtn}\noutput: {format: gguf}", "compressed-tensors"),
        ("- weights", "expected a mapping"),
        ("", "empty"),
    ],
)
def test_wrong_value_is_named(tmp_path, text, message):
    assert message in "\n".join(problems(tmp_path, text))


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match="w4a16-gptq"):
        load_recipe("w4a16-gptk")


STORED = [name for name in PRESETS if name != "NF4"]


def of(recipe):
    """The scheme of a recipe without rules."""
    return Scheme(recipe.weights.scheme.weights, None if recipe.inputs is None else recipe.inputs.grid)


@pytest.mark.parametrize("name", STORED)
def test_preset_fills_the_scheme_and_comes_back(name):
    recipe = parse_recipe({"weights": {"algorithm": "rtn", "preset": name}})
    assert of(recipe) == PRESETS[name]
    assert parse_recipe(recipe.resolved()) == recipe


def test_inputs_of_a_preset_can_be_replaced_and_removed():
    weights = {"algorithm": "rtn", "preset": "FP8_DYNAMIC"}
    removed = parse_recipe({"weights": weights, "inputs": "none"})
    assert of(removed) == PRESETS["W8A16_FP8"]
    other = parse_recipe({"weights": weights, "inputs": {"number": "int8"}})
    assert of(other).inputs == PRESETS["W8A8"].inputs
    assert parse_recipe(other.resolved()) == other


@pytest.mark.parametrize(
    ("rule", "scheme"),
    [
        ({"preset": "W8A16"}, PRESETS["W8A16"]),
        ({"preset": "NVFP4A16"}, PRESETS["NVFP4A16"]),
        ({"inputs": "none"}, PRESETS["W8A16_FP8"]),
        ({"bits": 8, "group_size": "channel"}, PRESETS["W8A8"].weights),
    ],
)
def test_a_rule_replaces_the_number(rule, scheme):
    recipe = parse_recipe(
        {"weights": {"algorithm": "rtn", "preset": "FP8_DYNAMIC"}, "rules": [{"match": "a"} | rule]}
    )
    found, _ = recipe.rules[0].apply(recipe.weights, recipe.inputs)
    assert found == (scheme if isinstance(scheme, Scheme) else Scheme(scheme, PRESETS["FP8_DYNAMIC"].inputs))
    assert parse_recipe(recipe.resolved()) == recipe


@pytest.mark.parametrize("name", KV_PRESETS)
def test_a_cache_by_name(name):
    recipe = parse_recipe({"weights": "none", "kv_cache": name})
    assert recipe.kv_cache.scheme == KV_PRESETS[name]
    assert parse_recipe(recipe.resolved()) == recipe


def test_a_cache_by_its_keys():
    cache = {"number": "int4", "sinks": 4, "rotate": True}
    scheme = parse_recipe(LEAST | {"kv_cache": cache}).kv_cache.scheme
    assert scheme == replace(KV_PRESETS["INT4"], sinks=4)
    assert parse_recipe(LEAST | {"kv_cache": {"number": "fp8_e4m3"}}).kv_cache.scheme == KV_PRESETS["FP8"]


def test_what_is_usual_is_not_written():
    assert parse_recipe(LEAST).resolved().keys() == {
        *("model", "weights", "transforms", "rules", "calibration", "output")
    }
    assert parse_recipe(LEAST).resolved()["weights"].keys() == {
        "algorithm",
        "bits",
        "group_size",
        "symmetric",
    }


def test_other_keys_override_the_preset():
    assert with_weights(preset="W3A16", group_size=64).scheme == Scheme(integer(3, 64, True))


@pytest.mark.parametrize("channel", [None, -1, "channel"])
def test_group_size_spells_channel(channel):
    assert with_weights(group_size=channel).scheme.weights.group_size is None


def test_rule_replaces_only_written_keys():
    rule = {"match": "*.down_proj", "group_size": "channel", "algorithm": "rtn"}
    recipe = parse_recipe(LEAST | {"rules": [rule]})
    scheme, algorithm = recipe.rules[0].apply(recipe.weights, None)
    assert scheme == Scheme(integer(4, None, True))
    assert algorithm.name == "rtn"
    assert recipe.rules[0].fits("model.layers.3.mlp.down_proj")
    assert not recipe.rules[0].fits("model.layers.3.mlp.Down_proj")


def test_data_short_forms():
    data = ["a.txt", "b.txt:100", {"source": "c", "split": "train"}]
    sources = parse_recipe(LEAST | {"calibration": {"data": data}}).calibration.data
    assert [(s.source, s.samples) for s in sources] == [("a.txt", None), ("b.txt", 100), ("c", None)]


def test_resolved_is_plain_and_parses_to_the_same_recipe():
    recipe = parse_recipe(
        LEAST
        | {
            "model": "m",
            "transforms": ["awq"],
            "rules": [{"match": "a", "preset": "W8A16", "algorithm": "rtn"}, {"match": "b", "skip": True}],
            "calibration": {"data": ["x:128"]},
        }
    )
    plain = recipe.resolved()
    assert parse_recipe(json.loads(json.dumps(plain))) == recipe
    assert plain["weights"]["algorithm"]["damping"] == 0.01
    assert plain["rules"][0]["group_size"] is None
    assert "preset" not in json.dumps(plain)


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(LEAST).model = "x"


def test_overrides_reach_every_depth(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("weights: {algorithm: gptq}\nrules: [{match: a, bits: 4}]\n")
    recipe = load_recipe(
        file,
        ["weights.bits=3", "weights.algorithm.damping=1e-2", "rules.0.bits=8", "rules.1.match=b",
         "rules.1.skip=true", "transforms=[awq]", "calibration.samples=7"],
    )  # fmt: skip
    assert recipe.weights.bits == 3
    assert (recipe.weights.algorithm.name, recipe.weights.algorithm.damping) == ("gptq", 0.01)
    assert [(r.match, r.bits, r.skip) for r in recipe.rules] == [("a", 8, False), ("b", None, True)]
    assert (recipe.transforms[0].name, recipe.calibration.samples) == ("awq", 7)


def test_override_is_named_in_its_error(tmp_path):
    found = problems(
        tmp_path, "weights: {algorithm: rtn}", "weights.bits=11", "x", "weights.algorithm.name.a=1"
    )
    assert "--set x: expected key=value" in found[0]
    assert "--set weights.algorithm.name.a=1: weights.algorithm.name is a single value" in found[1]
    assert found[2].startswith("--set weights.bits=11: weights.bits: ")


def test_override_leaves_the_callers_mapping_alone():
    given = {"weights": {"preset": "W4A16", "algorithm": "gptq"}}
    assert parse_recipe(given, ["weights.bits=3"]).weights.bits == 3
    assert given == LEAST


# a recipe that is no mapping ---------------------------------------


@pytest.mark.parametrize("text", ["- weights", "[1, 2]", "gptq", "7", "true"])
def test_overrides_do_not_hide_a_recipe_that_is_no_mapping(tmp_path, text):
    found = problems(tmp_path, text, "weights.preset=W4A16", "weights.algorithm=gptq")
    assert found == [found[0]]
    assert "recipe: expected a mapping of keys, got" in found[0]


@pytest.mark.parametrize("data", [[1], "gptq", 7, ("a",)])
def test_the_same_from_python(data):
    with pytest.raises(RecipeError, match="expected a mapping of keys"):
        parse_recipe(data, ["weights.algorithm=gptq"])


def test_overrides_alone_make_a_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("# nothing yet\n")
    assert load_recipe(file, ["weights.algorithm=gptq"]) == parse_recipe({"weights": {"algorithm": "gptq"}})


# words of other tools ----------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights: {algorithm: awq}", "awq is a transform: `transforms: [awq]`"),
        ("weights: {algorithm: AWQ}", "awq is a transform: `transforms: [awq]`"),
        ("weights: {algorithm: {name: awq}}", "awq is a transform: `transforms: [awq]`"),
        ("{weights: {algorithm: rtn}, transforms: [gptq]}", "gptq is an algorithm: `algorithm: gptq`"),
        ("weights: {algorithm: GPTQ}", "did you mean `gptq`?"),
        ("weights: {algorithm: nearest}", "did you mean `rtn`?"),
        ("{weights: {algorithm: rtn}, transforms: [AWQ]}", "did you mean `awq`?"),
        ("weights: {algorithm: rtn, sym: true}", "did you mean `symmetric`?"),
        ("weights: {algorithm: rtn, groupsize: 64}", "did you mean `group_size`?"),
        ("weights: {algorithm: rtn, q_group_size: 64}", "did you mean `group_size`?"),
        ("weights: {algorithm: rtn, w_bit: 4}", "did you mean `bits`?"),
        ("weights: {algorithm: rtn, group-size: 4}", "did you mean `group_size`?"),
        ("weights: {algorithm: rtn, Bits: 4}", "did you mean `bits`?"),
        ("weights: {algorithm: gptq, desc_act: true}", "did you mean `weights.algorithm.order`"),
        ("weights: {algorithm: {name: gptq, desc_act: true}}", "did you mean `order`"),
        ("weights: {algorithm: {name: gptq, damp_percent: 0.1}}", "did you mean `damping`?"),
        ("weights: {algorithm: {name: gptq, dampng: 0.1}}", "did you mean `damping`?"),
        ("weights: {algorithm: rtn, preset: w4a16}", "did you mean `W4A16`?"),
        ("weights: {algorithm: rtn, scheme: W4A16}", "did you mean `preset`?"),
        ("weights: w4a16", "`weights: {preset: W4A16, algorithm: gptq}`"),
        ("weights: rtn", "`weights: {preset: W4A16, algorithm: rtn}`"),
        ("weights: none", "leaves only the KV cache to quantize; give a kv_cache"),
        ("{weights: none, kv_cache: FP8, transforms: [awq]}", "leaves nothing for transforms"),
        ("{weights: {algorithm: rtn}, calibration: {num_samples: 8}}", "did you mean `samples`?"),
        ("{weights: {algorithm: rtn}, calibration: {nsamples: 8}}", "did you mean `samples`?"),
        ("{weights: {algorithm: rtn}, nsamples: 8}", "did you mean `calibration.samples`?"),
        ("{weights: {algorithm: rtn}, calibration: {seqlen: 8}}", "did you mean `sequence_length`?"),
        ("{weights: {algorithm: rtn}, ignore: [lm_head]}", "`{match: NAME, skip: true}`"),
        ("{weights: {algorithm: rtn}, rules: [{targets: a}]}", "did you mean `match`?"),
        ("{weights: {algorithm: rtn}, activations: {}}", "did you mean `inputs`?"),
        (
            "{weights: {algorithm: rtn}, inputs: {granularity: tensor, dynamic: true}}",
            "goes with dynamic: false",
        ),
        ("{weights: {algorithm: rtn}, inputs: {dynamic: false}}", "goes with dynamic: true"),
        ("{weights: {algorithm: rtn}, inputs: {range: mse}}", "for calibrated scales"),
        (
            "{weights: {algorithm: rtn}, inputs: {number: fp8_e4m3, symmetric: false}}",
            "only integers can be asymmetric",
        ),
        ("{weights: {algorithm: rtn}, inputs: {granularity: group}}", "needs a group_size"),
        ("{weights: {algorithm: rtn}, kv_cache: {}}", "give a preset (FP8, FP8_TENSOR, INT8"),
        ("{weights: {algorithm: rtn}, kv_cache: {number: int8, granularity: head}}", "granularity: token"),
        ("{weights: {algorithm: rtn}, kv_cache: int9}", "'INT8'"),
        (
            "{weights: {algorithm: rtn}, kv_cache: {preset: KIVI4, residual: 100}}",
            "a multiple of 32, got 100",
        ),
        ("{weights: {algorithm: rtn}, kv_cache: {preset: KIVI2, residual: 0}}", "a multiple of 32, got 0"),
        ("weights: {algorithm: rtn, preset: NF4}", "no format for W4A16 nf4 g64"),
        (
            "weights: {preset: FP8, algorithm: {name: gptq, groups: dynamic, order: none}}",
            "use groups: static",
        ),
        ("weights: {algorithm: rtn, preset: FP8, bits: 4}", "preset: FP8 has fp8_e4m3 weights, got bits: 4"),
        ("weights: {algorithm: rtn, number: fp8_e4m3, symmetric: false}", "only integers can be asymmetric"),
        ("weights: {algorithm: rtn, number: fp4_e2m1, group_size: 64, scale: e8m0}", "no format for"),
        ("{weights: {algorithm: rtn, preset: W8A8}, rules: [{match: a, symmetric: false}]}", "no format for"),
        ("{weights: {algorithm: rtn}, target: {engine: vlm}}", "target.engine"),
        ("{weights: {algorithm: rtn}, target: {engine: vllm, tp: 4}}", "did you mean `tensor_parallel`?"),
        ("{weights: {algorithm: rtn}, target: {engine: vllm, gpu: h100}}", "'sm90'"),
        ("{weights: {algorithm: rtn}, target: {}}", "give an engine"),
        ("{weights: {algorithm: rtn}, target: {size: 6 gig}}", "such as 6GiB or 500MB, got '6 gig'"),
        ("{weights: {algorithm: rtn}, target: {size: 1GB, bits_per_weight: 3}}", "keep one of them"),
        ("{weights: {algorithm: rtn}, target: {memory: 1GB}}", "memory needs the context"),
        ("{weights: {algorithm: rtn}, target: {size: 1GB, batch: 2}}", "for a target of memory"),
        ("{weights: {algorithm: rtn}, target: {engine: vllm, windows: 2}}", "for a target of size"),
        ("{weights: {algorithm: rtn}, target: {size: 1GB, choices: [W8A8]}}", "rounds inputs too"),
        ("{weights: {algorithm: rtn}, target: {size: 1GB, gpu: sm90}}", "are those of an engine"),
        ("{weights: none, kv_cache: INT8, target: {size: 1GB}}", "chooses bits of weights"),
        ("{weights: {algorithm: rtn, calibration: none}, gate: {kl_mean: 1}}", "a search of bits needs"),
        ("{weights: {algorithm: rtn}, gate: {}}", "give at least one of kl_mean"),
        ("{weights: {algorithm: rtn}, gate: {perplexity: 1%}}", "such as '+1%'"),
        ("{weights: {algorithm: rtn}, gate: {kl_men: 1}}", "did you mean `kl_mean`?"),
        ("{weights: {algorithm: rtn}, output: {format: compressed_tensors}}", "`compressed-tensors`"),
    ],
)
def test_messages_know_the_words_of_other_tools(tmp_path, text, said):
    assert said in "\n".join(problems(tmp_path, text))


def test_every_word_of_the_table_names_a_key_that_exists():
    known = {".".join(p for p in path if p != "*") for path in _parts(Recipe)}
    keys = {
        f"{'.'.join(p for p in path if p != '*')}.{name}".strip(".")
        for path, part in _parts(Recipe).items()
        for name in part.model_fields
    }
    for union in (ALGORITHMS, "weights.algorithm"), (TRANSFORMS, "transforms"):
        keys |= {f"{union[1]}.{name}" for config in union[0].values() for name in config.model_fields}
    for written, meant in words.KEYS.items():
        path, space, more = meant.partition(" ")
        if not space or more.startswith("("):
            assert path in keys | known, f"{written} -> {meant}"


def test_a_word_of_ours_is_never_taken_for_anothers():
    for part in _parts(Recipe).values():
        for name in part.model_fields:
            assert words.meant_key(name, part.model_fields) == f"`{name}`"


# what is written back ----------------------------------------------


def test_what_is_published_names_no_folder(tmp_path):
    model, text = tmp_path / "my model", tmp_path / "books.txt"
    model.mkdir()
    text.write_text("a")
    recipe = parse_recipe(LEAST | {"model": str(model), "calibration": {"data": [f"{text}:128"]}})
    written = recipe.published()
    assert written["model"] == "my model"
    assert written["calibration"]["data"][0]["source"] == "books.txt"
    assert str(tmp_path) not in json.dumps(written)
    assert parse_recipe(written).calibration.data[0].samples == 128


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", "/nowhere/at/all/books.txt"])
def test_a_hub_id_is_published_as_it_is_and_an_absolute_path_never(name):
    written = parse_recipe(LEAST | {"model": name, "calibration": {"data": [name]}}).published()
    assert written["model"] == name.removeprefix("/nowhere/at/all/")
    assert written["calibration"]["data"][0]["source"] == written["model"]


def test_the_place_of_model_and_text_is_no_part_of_a_runs_identity():
    recipes = [
        parse_recipe(LEAST | {"model": f"{at}/m", "calibration": {"data": [f"{at}/{at}.txt"]}}) for at in "ab"
    ]
    assert recipes[0].identity() == recipes[1].identity()
    other = parse_recipe(LEAST | {"calibration": {"seed": 1}})
    assert other.identity() != recipes[0].identity()


def test_a_search_is_written_back_with_sizes_in_bytes():
    target = {
        "memory": "1.5GiB",
        "context": 4096,
        "choices": ["W4A16", {"bits": 3}],
        "kv_caches": ["none", "FP8"],
    }
    recipe = parse_recipe({"weights": {"algorithm": "rtn"}, "target": target, "gate": {"perplexity": "+1%"}})
    written = recipe.resolved()
    assert written["target"]["memory"] == 3 << 29
    assert [choice["bits"] for choice in written["target"]["choices"]] == [4, 3]
    assert written["gate"] == {"perplexity": "+1%", "confidence": 0.95, "max_bits_per_weight": 8.5}
    assert parse_recipe(written) == recipe
    assert recipe.searched == ("target.memory", "gate")
    assert recipe.identity() == parse_recipe({"weights": {"algorithm": "rtn"}}).identity()


def test_a_target_is_written_back_and_decides_nothing_of_the_result():
    plain = parse_recipe({"weights": {"algorithm": "rtn"}})
    short = parse_recipe({"weights": {"algorithm": "rtn"}, "target": "vllm"})
    assert short.resolved()["target"] == {"engine": "vllm", "tensor_parallel": 1}
    assert parse_recipe(short.resolved()) == short
    assert "target" not in plain.resolved()
    assert short.identity() == plain.identity()
    full = parse_recipe({"weights": {"algorithm": "rtn"}, "target": {"engine": "vllm", "gpu": "sm90"}})
    assert full.resolved()["target"] == {"engine": "vllm", "tensor_parallel": 1, "gpu": "sm90"}
