"""Targets of size and gates: what is chosen, what is written, what a kill leaves, and when a run fails."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_mixtures
import tiny_models
import torch
from click.testing import CliRunner

import quantkit
from quantkit import assets
from quantkit.checkpoint.journal import Journal
from quantkit.cli.verbs import cli
from quantkit.errors import RecipeError, UserError
from quantkit.models.headers import read_checkpoint
from quantkit.pipeline import searched
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.run import beyond
from quantkit.pipeline.sensitivity import Asked, measure
from quantkit.plan import build_plan
from quantkit.predict.sizes import predict
from quantkit.recipe.recipe import parse_recipe
from quantkit.validation import search_space, validate

pytestmark = pytest.mark.usefixtures("steady")
ONLY_BESIDE = {"quantkit.recipe.yaml", "quantkit.allocation.json", "quantkit.run.json"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with `model` (Llama, 2 blocks, bf16) and `text`."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2)
    tiny_models.save(model, folder / "model", dtype=torch.bfloat16)
    (folder / "text").write_text(assets.calibration_text().read_text()[:20000])
    return folder


def asked(inputs, algorithm="rtn", bits=4, **more):
    """A recipe with a target or a gate."""
    return {
        "weights": {"algorithm": algorithm, "bits": bits, "group_size": 32},
        "calibration": {"data": [str(inputs / "text")], "samples": 8, "sequence_length": 64},
        **more,
    }


def target(bits, **more):
    return {"bits_per_weight": bits, "windows": 4} | more


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ONLY_BESIDE
    }


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """(recipe, result) of a search with GPTQ and a rule of the user's."""
    recipe = asked(
        inputs,
        "gptq",
        target=target(3.5),
        rules=[
            {"match": "*.1.self_attn.o_proj", "bits": 8},
            {"match": "*.0.mlp.down_proj", "algorithm": "rtn"},
        ],
    )
    output = tmp_path_factory.mktemp("made") / "out"
    return recipe, quantkit.quantize(recipe, inputs / "model", output, evaluate=False)


def test_the_target_is_met_and_siblings_agree(made):
    _, result = made
    size = result.manifest.size.linear_bits_per_weight
    assert 3.3 < size <= 3.5
    schemes = {layer.name: layer.scheme for layer in result.manifest.layers}
    assert len(set(schemes.values())) > 2
    for block in ("model.layers.0", "model.layers.1"):
        assert len({schemes[f"{block}.self_attn.{each}_proj"] for each in "qkv"}) == 1
        assert schemes[f"{block}.mlp.gate_proj"] == schemes[f"{block}.mlp.up_proj"]
    assert schemes["model.layers.1.self_attn.o_proj"] == "W8A16 g32 sym"  # the rule's
    by_name = {layer.name: layer.algorithm for layer in result.manifest.layers}
    assert by_name["model.layers.0.mlp.down_proj"] == "rtn"  # the rule says nothing of bits, and is kept


def test_the_written_recipe_makes_the_same_files_without_searching(made, inputs, tmp_path, monkeypatch):
    _, result = made
    monkeypatch.setattr("quantkit.pipeline.search_state.measure", None)
    recipe = result.output / "quantkit.recipe.yaml"
    again = quantkit.quantize(recipe, inputs / "model", tmp_path / "again", evaluate=False)
    assert files(again.output) == files(result.output)
    loaded = quantkit.load_recipe(recipe)
    assert not loaded.searched
    assert parse_recipe(loaded.resolved()) == loaded


def test_a_finished_search_is_verified_and_returned(made, inputs, monkeypatch):
    recipe, result = made
    monkeypatch.setattr("quantkit.pipeline.search_state.measure", None)
    before = files(result.output)
    again = quantkit.quantize(recipe, inputs / "model", result.output, evaluate=False)
    assert again.manifest == result.manifest
    assert files(result.output) == before
    other = recipe | {"target": target(3.0)}
    with pytest.raises(quantkit.errors.OutputError, match=r"search.target.bits_per_weight: 3.5 -> 3.0"):
        quantkit.quantize(other, inputs / "model", result.output, evaluate=False)


class _Killed(BaseException):
    pass


def test_killed_at_every_step_it_goes_on_and_measures_nothing_twice(made, inputs, tmp_path, monkeypatch):
    recipe, result = made
    output, steps, append = tmp_path / "out", [], Journal.append

    def killed_after(journal, entry):
        append(journal, entry)
        if journal.output == output:
            steps.append(next(iter(entry)))
            raise _Killed

    monkeypatch.setattr("quantkit.pipeline.sensitivity.AT_ONCE", 4)
    monkeypatch.setattr(Journal, "append", killed_after)
    moves = 0
    replace = searched.os.replace

    def moved(source, into):
        nonlocal moves
        replace(source, into)
        moves += 1
        if moves == 3:
            raise _Killed

    monkeypatch.setattr(searched.os, "replace", moved)
    for _ in range(20):
        try:
            quantkit.quantize(recipe, inputs / "model", output, evaluate=False)
        except _Killed:
            continue
        break
    assert steps == ["measured", "measured", "attempt", "moving"]
    assert moves > 3
    assert files(output) == files(result.output)
    assert not (output / ".quantkit").exists()
    found, whole = (
        json.loads((each / "quantkit.allocation.json").read_text()) for each in (output, result.output)
    )
    assert found["attempts"] == whole["attempts"]


def gated(inputs, tmp_path, recipe):
    """The result of the command line."""
    file = tmp_path / "gated.yaml"
    file.write_text(json.dumps(recipe))
    words = ["quantize", str(file), "--model", str(inputs / "model"), "--output", str(tmp_path / "out")]
    return CliRunner().invoke(cli, [*words, "--eval-text", str(inputs / "text"), "--eval-tokens", "1024"])


def allocation(tmp_path):
    return json.loads((tmp_path / "out" / "quantkit.allocation.json").read_text())


def test_a_gate_that_fails_gives_more_bits_until_it_passes(inputs, tmp_path):
    result = gated(inputs, tmp_path, asked(inputs, bits=2, gate={"kl_mean": 0.02, "perplexity": "+5%"}))
    assert result.exit_code == 0, result.output
    found = allocation(tmp_path)
    assert len(found["attempts"]) > 1
    bits = [attempt["bits_per_weight"] for attempt in found["attempts"]]
    assert bits == sorted(bits)
    assert [attempt["passed"] for attempt in found["attempts"]] == [False] * (len(bits) - 1) + [True]
    for attempt in found["attempts"]:
        assert attempt["passed"] == all(check["high"] < check["limit"] for check in attempt["checks"])
    for before, after in pairwise(found["attempts"]):
        for group, old, new in zip(found["groups"], before["chosen"], after["chosen"], strict=True):
            assert group["bytes"][new] >= group["bytes"][old]
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["size"]["linear_bits_per_weight"] == pytest.approx(bits[-1])
    assert "kept" in result.output


def test_a_gate_that_cannot_pass_ends_with_1_and_the_best_attempt(inputs, tmp_path):
    recipe = asked(inputs, bits=2, gate={"kl_mean": 1e-5, "max_bits_per_weight": 4.0})
    result = gated(inputs, tmp_path, recipe)
    assert result.exit_code == 1
    found = allocation(tmp_path)
    (missed,) = found["missed"]
    assert f"the gate is not passed: {missed};" in " ".join(result.output.split())
    best = min(found["attempts"], key=lambda attempt: attempt["checks"][0]["high"])
    assert (found["passed"], found["kept"]) == (False, best["number"])
    assert all(attempt["bits_per_weight"] <= 4.0 for attempt in found["attempts"])
    quantkit.load(tmp_path / "out")
    assert gated(inputs, tmp_path, recipe).exit_code == 1  # the same answer again, from what is kept


def test_what_cannot_be_met_is_refused_before_anything_is_written(inputs, tmp_path):
    cases = {
        "target.bits_per_weight: 1.5 cannot be met: with these choices it is from 2": {
            "bits_per_weight": 1.5
        },
        "target.size: 1000 B cannot be met: with these choices it takes from": {"size": 1000},
        "activations": {"memory": "20kB", "context": 64},
    }
    for said, goal in cases.items():
        recipe = asked(inputs, target=goal)
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        with pytest.raises(RecipeError, match=said):
            validate(file, str(inputs / "model"))
        with pytest.raises(RecipeError, match=said):
            quantkit.quantize(recipe, inputs / "model", tmp_path / "out", evaluate=False)
        assert not (tmp_path / "out").exists()


def test_a_search_refuses_kept_statistics(inputs, tmp_path):
    for more in ({"target": target(3.0)}, {"gate": {"kl_mean": 0.1}}):
        with pytest.raises(UserError, match="kept statistics serve no search"):
            quantkit.quantize(
                asked(inputs, **more), inputs / "model", tmp_path / "out", statistics=tmp_path / "kept"
            )
    assert not (tmp_path / "out").exists()


def test_a_budget_is_that_of_what_a_search_makes(inputs, tmp_path):
    """Not of the recipe as it stands, in 8 bits; with a gate, two attempts lie on disk at once."""
    headers = read_checkpoint(inputs / "model")
    file = tmp_path / "recipe.yaml"
    recipe = asked(inputs, bits=8, target=target(3.0))
    whole = parse_recipe({key: value for key, value in recipe.items() if key != "target"})
    large = predict(whole, build_plan(whole, headers), headers).disk
    recipe["budget"] = {"disk": large - 1}
    file.write_text(json.dumps(recipe))
    needed = validate(file, str(inputs / "model")).prediction.disk
    run = prepared(recipe, inputs / "model", tmp_path / "out", (), "cpu", None, Silent())
    assert run.needed.disk == needed < large
    recipe["budget"] = {"ram": "8GiB"}
    saving = prepared(recipe, inputs / "model", tmp_path / "out", (), "cpu", None, Silent())
    assert saving.ways.spilled  # measuring branches off hidden states, which no prediction of memory has
    assert saving.needed.disk - needed >= 8 * 64 * headers.config["hidden_size"] * 4
    gate = recipe | {"gate": {"kl_mean": 0.1}, "budget": {"disk": 1000}}
    with pytest.raises(RecipeError, match="two checkpoints at once"):
        prepared(gate, inputs / "model", tmp_path / "out", (), "cpu", None, Silent())


def test_a_gate_without_room_for_the_evaluation_is_refused_before_quantizing(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.predict.sizes.EVALUATION", 1e6)
    recipe = asked(inputs, gate={"kl_mean": 0.1}, budget={"ram": "2GB"})
    with pytest.raises(
        UserError, match=r"a gate is judged by the evaluation: .* more than budget\.ram allows"
    ):
        quantkit.quantize(recipe, inputs / "model", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "key"), [("cpu", "ram"), ("cuda", "vram")])
def test_the_evaluation_needs_memory_of_its_device(inputs, tmp_path, device, key):
    recipe = asked(inputs, budget={"ram": "2GB", "vram": "2GB"})
    run = prepared(recipe, inputs / "model", tmp_path / "out", (), "cpu", None, Silent())
    assert beyond(run) is None
    few = {"ram": 3 << 40, "vram": 3 << 40, key: 1}
    changed = recipe | {"budget": few}
    other = replace(run, recipe=parse_recipe(changed), device=torch.device(device))
    assert f"budget.{key} allows" in beyond(other)


def test_validate_shows_a_plan_of_the_size_that_is_asked_for(inputs, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(asked(inputs, target=target(3.0, engine="quantkit"))))
    found = validate(file, str(inputs / "model"))
    assert "8 groups of linears" in found.search
    small = found.prediction.tensors
    file.write_text(json.dumps(asked(inputs, target=target(5.0))))
    assert small < validate(file, str(inputs / "model")).prediction.tensors


def test_memory_is_shared_between_weights_and_cache(inputs, tmp_path):
    """With little memory and a long context a rounded cache is worth more than its bytes in weights."""
    goals = {"memory": 860_000, "context": 128, "batch": 4, "windows": 4}
    found = quantkit.quantize(asked(inputs, target=goals), inputs / "model", tmp_path / "out", evaluate=False)
    record = allocation(tmp_path)
    assert record["attempts"][0]["cache"] in ("FP8", "INT8")
    assert set(record["caches"]) == {"none", "FP8", "INT8"}
    assert record["caches"]["INT8"] > 0
    assert found.manifest.kv_cache is not None


def test_the_damage_of_one_group_is_the_kl_of_the_model_with_it(inputs, tmp_path):
    """Measured in a walk with others beside it, and by a whole model that is quantized nowhere else."""
    recipe = parse_recipe(
        asked(inputs, target=target(4.0, sensitivity="kl", choices=[{"bits": 3, "group_size": 32}]))
    )
    run = searched.prepared(recipe, inputs / "model", tmp_path, (), "cpu", None, searched.Silent())
    space = search_space(recipe, run.plan, run.source.headers)
    records = []
    measure(run, [Asked(group, (0,)) for group in space.groups], 8, records.extend)
    group = next(each for each in space.groups if each.name.endswith("1.mlp.gate_proj"))
    found = next(record for record in records if record.name == group.name)
    weights = {"algorithm": "rtn", "bits": 3, "group_size": 32}
    rules = [{"match": "*", "skip": True}, *({"match": layer.name, "bits": 3} for layer in group.layers)]
    model = quantkit.quantize_in_memory(
        asked(inputs) | {"weights": weights, "rules": rules}, inputs / "model"
    )
    original = quantkit.load(inputs / "model")
    ids = run.windows.ids
    with torch.no_grad():
        p, q = (
            each(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for each in (original, model)
        )
    assert found.kl[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_experts_of_a_layer_are_one_group_and_share_a_scheme(inputs, tmp_path):
    model = tmp_path / "model"
    tiny_models.save(tiny_mixtures.build("mixtral"), model, dtype=torch.bfloat16)
    recipe = asked(inputs, target=target(3.5))
    checked = parse_recipe(recipe)
    headers = read_checkpoint(model)
    groups = search_space(checked, build_plan(checked, headers), headers).groups
    experts = [group for group in groups if group.experts]
    assert experts
    assert all(len(group.layers) % 3 == 0 and len(group.layers) > 3 for group in experts)
    result = quantkit.quantize(recipe, model, tmp_path / "out", evaluate=False)
    schemes = {layer.name: layer.scheme for layer in result.manifest.layers}
    for group in experts:
        assert len({schemes[layer.name] for layer in group.layers}) == 1
    rules = quantkit.load_recipe(Path(result.output) / "quantkit.recipe.yaml").rules
    assert len(rules) < len(schemes)  # one for all experts of a layer
