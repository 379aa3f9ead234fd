import json
import re
import struct
import subprocess
import sys

import pytest

from quantkit import assets
from quantkit.errors import ModelError, RecipeError
from quantkit.models.headers import read_checkpoint
from quantkit.models.places import Place, Places
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe
from quantkit.scheme import Scheme, integer


def checkpoint(folder, shapes, **config):
    """A folder whose safetensors header names zero weights of these shapes, and a config."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    return read_checkpoint(folder)


def plan(headers, rules=(), output=None, **weights):
    weights = {"algorithm": "rtn", "group_size": 64} | weights
    return build_plan(parse_recipe({"weights": weights, "rules": rules, "output": output or {}}), headers)


@pytest.fixture(scope="module")
def bookworm():
    return read_checkpoint(assets.default_model())


@pytest.fixture
def untied(tmp_path):
    shapes = {"model.embed_tokens.weight": (32, 64), "lm_head.weight": (32, 64)}
    for block in range(2):
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            shapes[f"model.layers.{block}.{leaf}.weight"] = (64, 64)
        shapes[f"model.layers.{block}.input_layernorm.weight"] = (64,)
    return checkpoint(tmp_path / "untied", shapes, model_type="llama", tie_word_embeddings=False)


def test_default_scope_is_every_linear_of_the_blocks(bookworm):
    found = plan(bookworm)
    assert (found.blocks_prefix, found.n_blocks, len(found.layers)) == ("model.layers", 8, 56)
    assert found.skipped == ()
    down = next(layer for layer in found.layers if layer.name == "model.layers.3.mlp.down_proj")
    assert (down.shape, down.block, down.transposed) == ((256, 768), 3, False)
    assert down.scheme == Scheme(integer(4, 64, True))


def test_untied_head_stays_unless_a_rule_names_it(untied):
    assert ("lm_head", "outside the decoder blocks") in plan(untied).skipped
    head = plan(untied, [{"match": "lm_head", "bits": 8}]).layers[-1]
    assert (head.name, head.block, head.scheme.weights.bits) == ("lm_head", None, 8)
    everything = plan(untied, [{"match": "*", "bits": 8}])
    assert ("lm_head", "outside the decoder blocks") in everything.skipped
    assert {layer.scheme.weights.bits for layer in everything.layers} == {8}
    assert ("lm_head", "rule 'lm_head'") in plan(untied, [{"match": "lm_head", "skip": True}]).skipped


def test_last_matching_rule_wins(bookworm):
    rules = [{"match": "*.down_proj", "bits": 8}, {"match": "model.layers.0.*", "skip": True}]
    found = plan(bookworm, [*rules, {"match": "model.layers.0.mlp.down_proj", "algorithm": "gptq"}])
    down = {layer.block: layer for layer in found.layers if layer.name.endswith("down_proj")}
    assert (down[0].scheme.weights.bits, down[0].algorithm.name) == (4, "gptq")
    assert (down[1].scheme.weights.bits, down[1].algorithm.name) == (8, "rtn")
    assert len(found.skipped) == 6


def test_every_rule_that_matches_nothing_is_named(bookworm):
    with pytest.raises(RecipeError) as error:
        plan(bookworm, [{"match": "*.fc1", "bits": 8}, {"match": "*.norm", "skip": True}])
    text = str(error.value)
    assert "rules.0: '*.fc1' fits no linear" in text
    assert "rules.1: '*.norm' fits no linear" in text
    assert "model.layers.*.mlp.down_proj" in text


def test_embedding_is_no_linear(untied):
    with pytest.raises(RecipeError, match="fits no linear"):
        plan(untied, [{"match": "*embed_tokens", "bits": 8}])


def test_rule_on_a_tied_head_is_refused(bookworm):
    with pytest.raises(RecipeError, match="shares its weight"):
        plan(bookworm, [{"match": "lm_head", "bits": 8}])
    assert len(plan(bookworm, [{"match": "lm_head", "skip": True}]).layers) == 56


@pytest.mark.parametrize(
    ("rule", "parent"),
    [
        ({"match": "*.v_proj", "bits": 8}, "model.layers.*.self_attn: k_proj W4A16 g64 sym"),
        ({"match": "*.k_proj", "skip": True}, "k_proj skipped"),
        ({"match": "*.up_proj", "group_size": 32}, "up_proj W4A16 g32 sym"),
    ],
)
def test_split_fusion_is_refused_unless_allowed(bookworm, rule, parent):
    with pytest.raises(RecipeError) as error:
        plan(bookworm, [rule])
    assert parent in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert plan(bookworm, [rule], {"allow_split_fusion": True}).n_blocks == 8


def test_different_algorithms_within_a_fusion_are_fine(bookworm):
    assert plan(bookworm, [{"match": "*.v_proj", "algorithm": "gptq"}]).n_blocks == 8


def test_group_that_does_not_divide_names_layers_and_remedies(bookworm):
    with pytest.raises(ModelError) as error:
        plan(bookworm, [{"match": "*.down_proj", "group_size": 100}])
    text = str(error.value)
    assert (
        "in_features=768 is not divisible by group_size=100 in model.layers.*.mlp.down_proj (8 of them)"
        in text
    )
    assert "group_size 128, 64, 32, channel" in text
    assert "{match: 'model.layers.*.mlp.down_proj', skip: true}" in text


def test_skipping_everything_is_an_error(bookworm):
    with pytest.raises(RecipeError, match="skip every linear"):
        plan(bookworm, [{"match": "*", "skip": True}])


def test_conv1d_shape_is_turned_and_names_are_those_on_disk(tmp_path):
    shapes = {
        "wte.weight": (32, 64),
        "wpe.weight": (16, 64),
        "h.0.attn.c_attn.weight": (64, 192),
        "h.0.ln_1.weight": (64,),
    }
    found = plan(checkpoint(tmp_path / "m", shapes, model_type="gpt2"))
    assert found.blocks_prefix == "h"
    assert [(la.name, la.shape, la.transposed) for la in found.layers] == [
        ("h.0.attn.c_attn", (192, 64), True)
    ]


def test_a_model_without_blocks_or_with_a_gap_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no numbered decoder blocks"):
        plan(checkpoint(tmp_path / "a", {"lm_head.weight": (64, 64)}, model_type="llama"))
    gap = {f"model.layers.{i}.mlp.up_proj.weight": (64, 64) for i in (0, 2)}
    with pytest.raises(ModelError, match=r"none numbered 1"):
        plan(checkpoint(tmp_path / "b", gap, model_type="llama"))


def test_an_absurd_block_number_is_told_at_once(tmp_path):
    names = ("model.layers.0.mlp.up_proj.weight", f"model.layers.{10**18}.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=f"blocks up to {10**18} but none numbered 1"):
        plan(checkpoint(tmp_path / "m", dict.fromkeys(names, (64, 64)), model_type="llama"))


def test_every_kind_of_problem_is_told_at_once(bookworm):
    """A rule on a tied head, a rule that fits nothing, split siblings, long windows and group sizes."""
    rules = [
        {"match": "lm_head", "bits": 8},
        {"match": "*.fc1", "bits": 8},
        {"match": "*.v_proj", "bits": 8},
        {"match": "*.down_proj", "group_size": 100},
    ]
    recipe = {
        "weights": {"algorithm": "gptq", "group_size": 96},
        "rules": rules,
        "calibration": {"sequence_length": 5000},
    }
    with pytest.raises(RecipeError) as error:
        build_plan(parse_recipe(recipe), bookworm)
    lines = str(error.value).splitlines()
    for fragment in (
        "rules.0: 'lm_head' fits lm_head, which shares its weight",
        "rules.1: '*.fc1' fits no linear",
        "self_attn: k_proj",
        "windows of 5000 tokens",
        "not divisible by group_size=100 in model.layers.*.mlp.down_proj",
        "not divisible by group_size=96 in model.layers.*.mlp.up_proj",
    ):
        assert any(fragment in line for line in lines), fragment


def test_suggested_group_sizes_work_and_those_of_engines_come_first(bookworm):
    with pytest.raises(ModelError) as error:
        plan(bookworm, [{"match": "*.down_proj", "group_size": 100}])
    sizes = re.search(r"use group_size (.*?), or a rule", str(error.value))[1]
    sizes = sizes.split(", ")
    assert sizes == ["128", "64", "32", "channel"]
    for size in sizes:
        group = None if size == "channel" else int(size)
        plan(bookworm, [{"match": "*.down_proj", "group_size": group}])
    plan(
        bookworm,
        [
            {"match": "*.down_proj", "group_size": 100},
            {"match": "model.layers.*.mlp.down_proj", "skip": True},
        ],
    )


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_windows_longer_than_the_model_are_refused_where_text_is_used(tmp_path, key):
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 64)}
    headers = checkpoint(tmp_path / "m", shapes, model_type="llama", **{key: 256})

    def planned(algorithm, length, **more):
        weights = {"algorithm": algorithm, "group_size": 64}
        return build_plan(
            parse_recipe({"weights": weights, "calibration": {"sequence_length": length}} | more), headers
        )

    assert planned("gptq", 256).layers
    with pytest.raises(RecipeError, match=r"sequence_length=256 or less"):
        planned("gptq", 257)
    assert planned("rtn", 512).layers
    with pytest.raises(RecipeError, match=r"512 tokens.*256 positions"):
        planned("rtn", 512, transforms=["awq"])


MIXED = {
    "model.layers.0.mlp.up_proj.weight": (64, 64),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 64),
    "model.layers.0.mlp.router.weight": (4, 64),
    "model.layers.0.mlp.router.proj.weight": (4, 64),
    "model.layers.0.mixer.dt_proj.weight": (64, 8),
    "model.layers.0.linear_attn.in_proj_b.weight": (4, 64),
    "model.layers.0.positions.weight": (64, 64),
}


def test_routers_and_state_space_projections_stay_unless_a_rule_names_them(tmp_path):
    headers = checkpoint(tmp_path / "m", MIXED, model_type="own")
    found = plan(headers)
    assert [layer.name for layer in found.layers] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.positions",
    ]
    assert len(found.skipped) == 5
    assert len(plan(headers, [{"match": "*", "bits": 8}]).layers) == 2
    named = plan(headers, [{"match": "*.dt_proj", "group_size": None}])
    assert ("model.layers.0.mixer.dt_proj", (64, 8)) in [(layer.name, layer.shape) for layer in named.layers]


def test_what_the_built_model_says_is_no_linear_is_never_planned(tmp_path):
    headers = checkpoint(tmp_path / "m", MIXED, model_type="own")
    owners = {
        "model.layers.0.positions.weight": "Embedding",
        "model.layers.0.mlp.router.weight": "TopKRouter",
    }
    kinds = {name: ("other", owners[name]) if name in owners else ("linear", "Linear") for name in MIXED}
    by_disk = {name: Place(name, name, kind, owner) for name, (kind, owner) in kinds.items()}
    places = Places("model.layers", 1, by_disk, {name: (place,) for name, place in by_disk.items()})

    def planned(*rules):
        return build_plan(
            parse_recipe({"weights": {"algorithm": "rtn", "group_size": 64}, "rules": rules}), headers, places
        )

    found = planned()
    assert [layer.name for layer in found.layers] == ["model.layers.0.mlp.up_proj"]
    assert ("model.layers.0.positions", "a Embedding, not a linear layer") in found.skipped
    with pytest.raises(RecipeError, match=r"a TopKRouter, not a linear layer; remove the rule"):
        planned({"match": "*.router", "bits": 8})
    assert planned({"match": "*.router", "skip": True}).layers


def test_the_plan_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from quantkit.validation import validate; from quantkit import assets;"
        "assert validate('w4a16-gptq', str(assets.default_model())).plan.layers;"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
