"""`quantkit bench MODEL`: what it counts, and that its lanes run what they say."""

import json
from collections import Counter

import pytest
import tiny_mixtures
import tiny_models
import torch
from quantkit_kernels.cpu import library

import quantkit
from quantkit.bench.models import anatomy, generation, profile
from quantkit.bench.models.footprint import footprint
from quantkit.bench.models.lanes import make_lane, measure
from quantkit.bench.models.subject import Opening, open_subject, open_subjects, prompt_length
from quantkit.bench.roofline import KINDS, Roofline
from quantkit.cli.main import run
from quantkit.cost.hardware import Hardware
from quantkit.cost.model import find_model
from quantkit.cost.roofline import decode, operators
from quantkit.errors import NumericalError, UserError
from quantkit.models.headers import read_checkpoint
from quantkit.plan import build_plan
from quantkit.recipe.recipe import load_recipe

NATIVE = pytest.mark.skipif(not library.available(), reason="the native library is not built")
GROUPS = ["weights.group_size=32"]


@pytest.fixture(autouse=True)
def _own_choice_of_backend(monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    """The machine is not measured: 2 GB/s in every window."""
    peak = dict.fromkeys(KINDS, 1e11)
    monkeypatch.setattr(generation, "measure_roofline", lambda device: Roofline(1e9, peak, "test"))
    monkeypatch.setattr(generation, "read_bandwidth", lambda device: 2e9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"dense", "w4", "mixture", "mixture-w4", "gpt2"}: tiny checkpoints."""
    work = tmp_path_factory.mktemp("bench")
    made = {
        "dense": tiny_models.save(tiny_models.FAMILIES["llama-gqa"](), work / "dense"),
        "mixture": tiny_models.save(tiny_mixtures.build("mixtral"), work / "mixture"),
        "gpt2": tiny_models.save(tiny_models.FAMILIES["gpt2"](), work / "gpt2"),
    }
    for name, source in list(made.items())[:2]:
        made[f"{name}-w4" if name != "dense" else "w4"] = work / f"{name}-w4"
        quantkit.quantize("w4a16-rtn", source, work / f"{name}-w4", GROUPS, device="cpu", evaluate=False)
    return made


@pytest.mark.parametrize("name", ["dense", "w4", "mixture", "mixture-w4", "gpt2"])
def test_a_loaded_model_has_the_operators_of_its_plan(folders, name):
    """The same operations, whether they are counted from the tensors in memory or from recipe and headers."""
    subject = open_subject(Opening(str(folders[name]), device="cpu", dtype="bfloat16"))
    source = folders[name.removesuffix("-w4") if name != "w4" else "dense"]
    headers = read_checkpoint(source)
    short = ["calibration.sequence_length=64"]
    recipe = load_recipe(*(("w4a16-rtn", GROUPS) if "w4" in name else ("kv-fp8", short)))
    step = decode(50, 3)
    found = operators(anatomy.cost_model(subject.model, subject.weights), step)
    planned = operators(find_model(build_plan(recipe, headers), headers), step)

    def total(operators) -> dict[str, float]:
        """Operations by role: experts that are stacked in memory have gate and up in one."""
        counts: Counter[str] = Counter()
        for one in operators:
            leaf = one.name.rpartition("*.")[2].rpartition(".")[2]
            if "expert" in one.name:
                leaf = "down" if one.name.endswith(("down_proj", "w2")) else "inner"
            counts[leaf] += round(one.count * one.operations)
        return {key: value for key, value in counts.items() if value}

    wanted = total(planned)
    assert sum(wanted.values()) > 0
    assert total(found) == pytest.approx(wanted)
    assert subject.report()["weight_bytes"] == sum(kind["bytes"] for kind in subject.report()["kinds"])


@NATIVE
@pytest.mark.parametrize("way", ["native", "eager"])
def test_lanes_continue_the_whole_prompt_in_every_round(folders, way):
    tokens = tiny_models.ids(24, batch=3)
    subject = open_subject(Opening(str(folders["dense"]), device="cpu", way=way))
    runner = subject.runner(3, 4)
    assert runner.way == way
    lane = make_lane(runner, tokens, context=10)
    with torch.no_grad():
        truth = subject.model(input_ids=tokens).logits[:, -1]
    for _ in range(2):  # the second round goes back to where the prompt began
        lane.ready()
        torch.testing.assert_close(lane.prompt(), truth, rtol=1e-4, atol=1e-5)
        more = torch.cat([tokens, truth.argmax(-1)[:, None]], 1)
        with torch.no_grad():
            wanted = subject.model(input_ids=more).logits[:, -1]
        torch.testing.assert_close(lane.step(more[:, -1]), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_gives_nan_is_not_timed(folders):
    subject = open_subject(Opening(str(folders["dense"]), device="cpu", way="eager"))
    subject.model.lm_head.weight.data.fill_(torch.nan)
    lane = make_lane(subject.runner(1, 2), tiny_models.ids(5), 0)
    with pytest.raises(NumericalError, match="non-finite"):
        measure(lane, 2)


@pytest.mark.parametrize("name", ["dense", "gpt2", "mixture", "mixture-w4"])
def test_every_weight_is_watched_once_in_transformers(folders, name):
    subject = open_subject(Opening(str(folders[name]), device="cpu", way="eager"))
    model = subject.model
    watched = list(profile._kinds(model, model.get_output_embeddings()))
    names = {module: name for name, module in model.named_modules()}
    outer = [(names[module], kind) for module, kind in watched if kind not in ("attention",)]
    for one in subject.weights:
        over = [n for n, _ in outer if one.name == n or one.name.startswith(f"{n}.")]
        assert len(over) == 1 or one.name.endswith("mlp.gate"), one.name  # a router is among the rest
    parts = profile.profile(subject, subject.runner(1, 2), 2, 7)
    assert set(parts) == {"linears", "experts", "head", "attention", "rest"}
    assert (parts["experts"] > 0) == name.startswith("mixture")
    assert min(parts["linears"], parts["head"], parts["attention"], parts["rest"]) > 0
    assert not any(module._forward_hooks for module in model.modules())


@NATIVE
def test_the_report_is_consistent(folders):
    """A window of memory bandwidth is measured per round; medians, shares and ratios follow from the rounds."""
    subjects = open_subjects([Opening(str(folders[name]), device="cpu") for name in ("w4", "dense", "dense")])
    assert [subject.name for subject in subjects] == ["dense-w4", "dense #1", "dense #2"]
    plan = generation.Plan(prompt=20, new=5, batches=(1, 3), contexts=(0, 9), rounds=3)
    said = []
    report = generation.run(subjects, plan, said.append, lambda subject: {"of": subject.name})
    assert report["schema"] == "quantkit-bench/1"
    assert len(said) == 3 * 3 * 4  # rounds, models, cells; the warm-up is silent
    assert report["roofline"]["read_bytes_per_s"] == 2e9
    for model in report["models"]:
        assert model["way"] == "native"
        assert model["memory"] == {"of": model["name"]}
        assert [(row["batch"], row["context"]) for row in model["rows"]] == [(1, 0), (3, 0), (1, 9), (3, 9)]
        for row in model["rows"]:
            for kind in ("prefill", "decode"):
                cell = row[kind]
                rounds = cell["tokens_per_s"]["rounds"]
                assert len(rounds) == 3
                assert cell["tokens_per_s"]["median"] == sorted(rounds)[1]
                assert cell["tokens_per_s"]["mad"] <= max(rounds) - min(rounds)
                assert set(cell["parts_s"]) == {"linears", "experts", "head", "attention", "rest"}
            decode_, prefill_ = row["decode"], row["prefill"]
            first = row["batch"] * 20 / prefill_["first_token_s"]["median"]
            assert first == pytest.approx(prefill_["tokens_per_s"]["median"])
            step = decode_["step_s"]
            assert 0 < step["median"] <= step["p95"]
            assert sum(decode_["parts_s"].values()) < 2 * step["p95"]
            assert decode_["bandwidth_share"] == pytest.approx(decode_["step_bytes"] / step["median"] / 2e9)
            reached = row["batch"] / step["median"] / decode_["ceiling_tokens_per_s"]
            assert decode_["roofline_share"] == pytest.approx(reached)
    assert [(row["other"], row["batch"], row["context"]) for row in report["against"]] == [
        (other, batch, context)
        for batch, context in ((1, 0), (3, 0), (1, 9), (3, 9))
        for other in ("dense #1", "dense #2")
    ]
    own, other = (report["models"][i]["rows"][0]["decode"]["tokens_per_s"]["rounds"] for i in (0, 1))
    assert report["against"][0]["decode"]["rounds"] == [a / b for a, b in zip(own, other, strict=True)]
    json.dumps(report)


def test_a_step_moves_the_packed_weights_once_and_every_sequence_its_cache(folders):
    """Counted by hand: weights once for the batch; keys and values of fp32 for each sequence."""
    device = Hardware("x", "x", None, 1.0, {"fp32": 1e30}, "test")
    subject = open_subject(Opening(str(folders["w4"]), device="cpu"))
    model = anatomy.cost_model(subject.model, subject.weights)
    one, four, longer = (
        sum(
            each.operator.count * each.operator.n_bytes
            for each in anatomy.bounds(model, decode(context, batch), device, entry_bytes=4)
        )
        for context, batch in ((10, 1), (10, 4), (110, 1))
    )
    config = subject.model.config
    entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert longer - one == 100 * 4 * entries
    weight_bytes = sum(kind["bytes"] for kind in anatomy.kinds(subject.weights))
    assert 4 * one - four == pytest.approx(3 * weight_bytes)


def test_prompts_that_do_not_fit_are_refused_and_the_default_fits(folders):
    subjects = [open_subject(Opening(str(folders["dense"]), device="cpu"))]  # made for 128 tokens
    assert prompt_length(subjects, None, 64, [0, 20]) == 128 - 20 - 65
    assert prompt_length(subjects, 40, 64, [0]) == 40
    with pytest.raises(UserError, match="20 tokens of context, 100 of prompt and 65 new ones"):
        prompt_length(subjects, 100, 64, [0, 20])


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(folders):
    found = footprint(Opening(str(folders["w4"]), device="cpu"), 2, 0, 8, 2)
    assert 0 < found["load_peak_bytes"] <= found["peak_bytes"] < 2**30
    with pytest.raises(quantkit.errors.RunError, match=r"nowhere.* failed"):
        footprint(Opening("nowhere"), 1, 0, 8, 2)


def test_the_verb_writes_what_it_prints(folders, tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", str(folders["w4"]), "--against", str(folders["dense"]), "--batch", "1,2"]
    command += ["--prompt", "8", "--new", "2", "--rounds", "1", "--no-memory", "--device", "cpu"]
    assert run([*command, "--json", str(out)]) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert [model["memory"] for model in report["models"]] == [None, None]
    for model in report["models"]:
        for row in model["rows"]:
            assert f"{row['decode']['tokens_per_s']['median']:.1f} ±" in shown
    assert "dense-w4 / dense, batch 2: prefill" in shown
    assert "W4A16 g32 sym" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--products"], "leave MODEL out"),
        (["--batch", "0"], "batch must be a positive integer, got '0'"),
        (["--context", "-1"], "context must be an integer of 0 or more, got '-1'"),
        (["--prompt", "500"], "made for"),
        (["--backend", "nothing"], "nothing"),
    ],
)
def test_wrong_arguments_are_exit_code_2(folders, wrong, message, capsys):
    assert run(["bench", str(folders["dense"]), "--device", "cpu", *wrong]) == 2
    assert message in capsys.readouterr().err
