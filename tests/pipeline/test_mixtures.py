"""Mixtures of experts through a whole run: every expert quantized on its own tokens, written and loaded again."""

import json
from dataclasses import replace

import pytest
import tiny_mixtures
import tiny_models
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.expert_run import ExpertRun
from quantkit.calibration.experts import expert_stages
from quantkit.calibration.walk import Wanted, walk
from quantkit.checkpoint.manifest import read_manifest
from quantkit.errors import ModelError, NumericalError, RecipeError
from quantkit.models import skeleton
from quantkit.models.experts import Experts, part_of, stack_of
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.experts import AT_ONCE, FEW, NONE, SHORT, quantize_experts
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.pipeline.solve import run_steps
from quantkit.recipe.schemes import ExpertsPart

WEIGHTS = {"bits": 8, "group_size": 16}
CALIBRATION = {"samples": 4, "sequence_length": 64}
GPTQ = {"weights": WEIGHTS | {"algorithm": "gptq"}, "calibration": CALIBRATION}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (the model, the folder of its checkpoint), made once."""
    made = {}

    def give(name):
        if name not in made:
            model = tiny_mixtures.build(name)
            made[name] = model, tiny_models.save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return give


def run(recipe, source, output):
    quantkit.quantize(recipe, model=source, output=output, evaluate=False, device="cpu")
    return read_manifest(output)


@torch.no_grad()
def assert_runs(folder, name):
    """What is loaded gives the logits of transformers' own experts with the dequantized weights.

    The original's logits are no measure: a router that is in doubt sends a token elsewhere.
    """
    loaded, model, ids = (
        quantkit.load(folder, device="cpu"),
        tiny_mixtures.build(name),
        tiny_models.ids(24, batch=2),
    )
    found = loaded(input_ids=ids, use_cache=False).logits
    dense = quantkit.load(folder, device="cpu").dequantize()
    apart = {n: m for n, m in dense.named_modules() if isinstance(m, Experts)}
    own, places = dense.state_dict(), model.state_dict()
    for module, experts in apart.items():
        for role in experts.names:
            for leaf in ("weight", "bias") if experts.shape.bias else ("weight",):
                name_of = f"{module}.{stack_of(role, leaf, experts.shape)}"
                stack = model.get_parameter(name_of)
                places.pop(name_of, None)
                for e in range(tiny_mixtures.EXPERTS):
                    part = part_of(stack, e, role, leaf, experts.shape)
                    part.copy_(experts.linear(e, role).get_parameter(leaf))
    for where, place in places.items():
        place.copy_(own[where])
    wanted = model(input_ids=ids, use_cache=False).logits
    assert relative(found, wanted) < 1e-4


def close(found, wanted):
    """Equal but for the last bits, which are another processor's business."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def untouched(one):
    """The work on an expert of which nothing is quantized."""
    yield from ()
    return BlockResult()


def relative(found, wanted):
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_moe", "deepseek_v3", "glm4_moe")]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "granitemoe", "dbrx", *SLOW])
def test_gptq_of_every_kind_of_experts(name, saved, tmp_path):
    model, source = saved(name)
    manifest = run(GPTQ, source, tmp_path)
    blocks = tiny_mixtures.experts(model)
    experts = [layer for layer in manifest.layers if ".experts." in layer.name]
    assert len(experts) == len(blocks) * tiny_mixtures.EXPERTS * 3
    assert all(layer.algorithm == "gptq" for layer in experts)
    assert_runs(tmp_path, name)
    (stored,) = (json.loads((tmp_path / "config.json").read_text())["quantization_config"],)
    assert not [each for each in stored["ignore"] if each.endswith(("experts.0.down_proj", "experts.0.w2"))]
    top = model.config.num_experts_per_tok
    for report in manifest.experts:
        assert sum(report["tokens"]) == top * CALIBRATION["samples"] * CALIBRATION["sequence_length"]


@torch.no_grad()
def test_linears_of_experts_that_lie_side_by_side(saved, tmp_path):
    """JetMoE's: those of its MLP and of its attention."""
    _, source = saved("jetmoe")
    manifest = run(GPTQ, source, tmp_path)
    found = {layer.name for layer in manifest.layers if layer.algorithm == "gptq"}
    for part in ("mlp", "self_attention.experts"):
        for leaf in ("input_linear", "output_linear"):
            names = {f"model.layers.1.{part}.{leaf}.{e}" for e in range(tiny_mixtures.EXPERTS)}
            assert names <= found
    ids, model = tiny_models.ids(24, batch=2), tiny_mixtures.build("jetmoe")
    logits = quantkit.load(tmp_path, device="cpu")(input_ids=ids, use_cache=False).logits
    own = quantkit.load(tmp_path, device="cpu").dequantize().state_dict()
    for name, place in model.state_dict().items():
        owner = name.removesuffix(".weight")
        parts = [own[f"{owner}.{e}.weight"] for e in range(tiny_mixtures.EXPERTS) if name not in own]
        place.copy_(torch.stack(parts) if parts else own[name])
    assert relative(logits, model(input_ids=ids, use_cache=False).logits) < 1e-4


def test_a_linear_that_the_router_sends_nothing_to_is_rounded_to_nearest(saved, tmp_path):
    few = {"calibration": {"samples": 1, "sequence_length": 2}}
    manifest = run(GPTQ | few, saved("jetmoe")[1], tmp_path)
    unseen = [layer for layer in manifest.layers if layer.algorithm == "rtn"]
    assert any("mlp.input_linear" in layer.name for layer in unseen)
    assert all("it never ran on the calibration text" in layer.fallbacks[0] for layer in unseen)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe"])
def test_routers_are_named_in_ignore(name, saved, tmp_path):
    _, source = saved(name)
    run({"weights": WEIGHTS | {"algorithm": "rtn"}}, source, tmp_path)
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    on_disk = {
        "mixtral": "block_sparse_moe.gate",
        "qwen3_moe": "mlp.gate",
        "granitemoe": "block_sparse_moe.router.layer",
    }
    assert {f"model.layers.{i}.{on_disk[name]}" for i in (0, 1)} <= set(ignored)


def test_the_walk_with_experts_one_by_one_is_the_model(saved, tmp_path):
    """In two ways: experts read when a token comes to them, and one after the other for all tokens."""
    model, source = saved("qwen2_moe")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    ids = ready.windows.ids
    wanted = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: wanted.append(out if torch.is_tensor(out) else out[0]))
    model(input_ids=ids, use_cache=False)
    for block in model.model.layers:
        block._forward_hooks.clear()
    blocks = walk(ready.model, ready.source, ready.plan, ids, Wanted(len(ids), True, behind_last=True))
    for block, whole in zip(blocks, wanted, strict=True):
        chunk = block.chunks()[0]
        close(block.forward(chunk, full=True), whole[chunk])
        (stage,) = block.experts.values()
        block.route(stage)
        for expert in range(stage.experts.shape.experts):
            ExpertRun(block, stage, expert, wanted=0).advance()
        stage.finish()
        block.leave()
        close(block.streams.full, whole)
        close(block.streams.quantized, whole)


def test_an_expert_is_calibrated_on_its_own_tokens(saved, tmp_path):
    """Its Hessian is that of what the router sends to it, seen from outside through transformers' own experts."""
    model, source = saved("mixtral")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    seen = []
    fused = model.model.layers[0].mlp.experts
    handle = fused.register_forward_pre_hook(lambda m, args: seen.append(args))
    model(input_ids=ready.windows.ids, use_cache=False)
    handle.remove()
    ((hidden, index, _),) = seen
    rows = hidden[(index == 2).any(-1)]
    blocks = walk(ready.model, ready.source, ready.plan, ready.windows.ids, Wanted(0, True))
    block = next(blocks)
    (stage,) = block.experts.values()
    block.route(stage)
    one = ExpertRun(block, stage, 2, wanted=0)
    assert one.own == len(rows)
    siblings = one.trace.siblings[0]
    found = one.collect([siblings], {siblings: frozenset({"hessian"})})[siblings]
    close(found.hessian, 2 / len(rows) * rows.T @ rows)
    every = ExpertRun(block, stage, 2, wanted=1 << 40)
    both = every.collect([siblings], {siblings: frozenset({"hessian"})})[siblings]
    close(both.hessian, 2 / len(hidden) * hidden.T @ hidden)
    half = ExpertRun(block, stage, 2, wanted=len(rows) + 10)
    assert half.streams.leading.shape[0] == len(rows) + 10


def test_experts_that_see_little_or_nothing_are_told(saved, tmp_path):
    _, source = saved("mixtral")
    recipe = GPTQ | {"calibration": {"samples": 1, "sequence_length": 2}}
    manifest = run(recipe, source, tmp_path / "routed")
    tokens = [count for report in manifest.experts for count in report["tokens"]]
    assert 0 in tokens
    assert any(0 < count < 64 for count in tokens)
    layers = [layer for layer in manifest.layers if ".experts." in layer.name]
    for layer in layers:
        wanted = {0: NONE.format("gptq"), 1: FEW, 2: SHORT}  # of the layer's two tokens
        assert wanted[layer.details["tokens"]] in layer.fallbacks
        assert layer.algorithm == ("gptq" if layer.details["tokens"] else "rtn")
    every = run(recipe | {"experts": {"calibrate": "all"}}, source, tmp_path / "all")
    told = {each for layer in every.layers for each in layer.fallbacks or ()}
    assert not {FEW, SHORT, NONE.format("gptq")} & told
    unseen = 3 * sum(report["unseen"] for report in manifest.experts)
    told = [note for note in manifest.notes if NONE.format("gptq") in note]
    assert sum(int(note.split()[0]) for note in told) == unseen


def test_an_expert_of_llama_4_that_sees_nothing_is_rounded_to_nearest(saved, tmp_path):
    """Its tokens come weighted by its own choice, so none of the others can be taken in their place."""
    _, source = saved("llama4")
    few = {"calibration": {"samples": 1, "sequence_length": 2}}
    manifest = run(GPTQ | few | {"transforms": [{"name": "awq", "grid": 2}]}, source, tmp_path / "out")
    assert 0 in manifest.experts[0]["tokens"]
    experts = [layer for layer in manifest.layers if "experts" in layer.name]
    assert all(layer.algorithm == ("gptq" if layer.details["tokens"] else "rtn") for layer in experts)
    assert all(SHORT in layer.fallbacks for layer in experts if layer.details["tokens"])
    static = {"weights": {"preset": "W8A8_STATIC", "algorithm": "rtn"}} | few
    with pytest.raises(NumericalError, match=r"experts\.\d\.\w+ never ran on the calibration text"):
        run(static, source, tmp_path / "static")


def test_the_experts_of_the_last_block_give_their_outputs_too(saved, tmp_path):
    """Linears behind them in that block are calibrated on what they give."""
    _, source = saved("mixtral")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    for block in walk(ready.model, ready.source, ready.plan, ready.windows.ids, Wanted(0, True)):
        (stage,) = block.experts.values()
        quantize_experts(block, stage, ExpertsPart(), untouched, lambda result: None, Clock())
        outputs = [routed.output() for _, routed in stage.all_recorded()]
    assert block.last
    assert all(bool(output.any(-1).all()) for output in outputs)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_more_tokens_for_every_expert(name, saved, tmp_path):
    _, source = saved(name)
    manifests, written = {}, {}
    for how in ("routed", "top:3", "all"):
        options = {"experts": {"calibrate": how, "min_tokens": 0}}
        manifests[how] = run(GPTQ | options, source, tmp_path / how)
        files = [load_file(file) for file in sorted((tmp_path / how).glob("*.safetensors"))]
        packed = {
            n: t
            for file in files
            for n, t in file.items()
            if n.endswith(("experts.0.w1.weight_packed", "experts.0.gate_proj.weight_packed"))
        }
        written[how] = next(iter(packed.values()))
    told = {how: manifest.experts[0] for how, manifest in manifests.items()}
    assert [each["calibrate"] for each in told.values()] == ["routed", "top:3", "all"]
    assert told["routed"]["tokens"] == told["all"]["tokens"]
    tokens = CALIBRATION["samples"] * CALIBRATION["sequence_length"]
    assert (sum(told["routed"]["tokens"]), sum(told["top:3"]["tokens"])) == (2 * tokens, 3 * tokens)
    for one, other in (("routed", "all"), ("top:3", "all"), ("routed", "top:3")):
        assert not torch.equal(written[one], written[other])


def test_as_many_as_there_are_is_all():
    part = ExpertsPart(calibrate="top:4", min_tokens=7)
    assert part.top == 4
    assert part.of(5) == part
    assert part.of(4) == ExpertsPart(calibrate="all", min_tokens=7)
    assert ExpertsPart().of(4) == ExpertsPart()


@pytest.mark.parametrize("how", ["some", "top:0", "top:x", "top:", "top:2.5", "top:-1", 4])
def test_other_ways_to_calibrate_experts_are_refused(how, saved, tmp_path):
    _, source = saved("mixtral")
    with pytest.raises(RecipeError, match=r"experts\.calibrate: must be routed, all or top:N .* got "):
        run(GPTQ | {"experts": {"calibrate": how}}, source, tmp_path / "no")


@pytest.mark.parametrize("top", [1, 3])
def test_an_expert_is_calibrated_on_the_tokens_that_rank_it(top, saved, tmp_path):
    """And gives the layer what it gives those that chose it."""
    model, source = saved("qwen3_moe")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    seen = []
    mixture = model.model.layers[0].mlp
    handles = [
        mixture.register_forward_hook(lambda m, args, out: seen.append((args[0].flatten(0, 1), out))),
        mixture.gate.register_forward_hook(lambda m, args, out: seen.append(out)),
    ]
    model(input_ids=ready.windows.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    (logits, *_), (hidden, output) = seen
    block = next(walk(ready.model, ready.source, ready.plan, ready.windows.ids, Wanted(0, True)))
    (stage,) = block.experts.values()
    block.route(stage, top)
    for expert in range(tiny_mixtures.EXPERTS):
        one = ExpertRun(block, stage, expert, wanted=0)
        rows = hidden[(logits.topk(top).indices == expert).any(-1)]
        close(one.streams.leading[:, 0], rows)
        assert (one.own, one.others) == (len(rows), 0)
        one.advance()
    given = torch.cat([routed.output() for _, routed in stage.all_recorded()])
    close(given, output.flatten(0, 1))


def test_top_is_refused_where_nothing_ranks_the_experts(saved, tmp_path):
    recipe = GPTQ | {"experts": {"calibrate": "top:2"}}
    with pytest.raises(
        ModelError, match=r"feed_forward\.experts: experts\.calibrate: top:2 .* routed, or all"
    ):
        run(recipe, saved("llama4")[1], tmp_path / "weighted")
    ready = prepared(recipe, saved("mixtral")[1], tmp_path, (), "cpu", None, Silent())
    block = next(walk(ready.model, ready.source, ready.plan, ready.windows.ids, Wanted(0, True)))
    (stage,) = block.experts.values()
    gate = block.module.get_submodule("mlp.gate")
    hashed = torch.stack((torch.arange(64) % 4, torch.arange(1, 65) % 4), 1)  # by place, as if by token

    def route(hidden):
        index = hashed.repeat(len(hidden) // 64, 1)
        return hidden @ gate.weight.T, torch.full(index.shape, 0.5), index

    gate.forward = route
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts: .* top:2 .* routed, or all"):
        block.route(stage, 2)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_experts_that_a_rule_skips_stay_as_they_are(name, saved, tmp_path):
    _model, source = saved(name)
    manifest = run(GPTQ | {"rules": [{"match": "*experts*", "skip": True}]}, source, tmp_path)
    assert not [layer for layer in manifest.layers if "experts" in layer.name]
    tensors = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
    original = load_file(source / "model.safetensors")
    kept = [n for n in original if "experts." in n or "_linear" in n]
    assert kept
    assert all(torch.equal(tensors[n], original[n]) for n in kept)
    assert_runs(tmp_path, name)


def test_one_expert_alone_can_be_left(saved, tmp_path):
    model, source = saved("gpt_oss")
    name = "model.layers.1.mlp.experts.3.down_proj"
    manifest = run(GPTQ | {"rules": [{"match": name, "skip": True}]}, source, tmp_path)
    assert name not in [layer.name for layer in manifest.layers]
    assert manifest.tensors["model.layers.1.mlp.experts.down_proj"].how == "quantized"
    tensors = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
    wanted = model.model.layers[1].mlp.experts.down_proj[3].T
    assert torch.equal(tensors[f"{name}.weight"], wanted)
    assert_runs(tmp_path, "gpt_oss")


def test_awq_scales_inside_an_expert(saved, tmp_path):
    """up -> down of each expert; the norm before the router stays, as router and experts read it too."""
    _model, source = saved("mixtral")
    recipe = GPTQ | {"transforms": [{"name": "awq", "grid": 4}]}
    manifest = run(recipe, source, tmp_path)
    inside = [s for s in manifest.scaling if s.get("producer") == "w3" and not s.get("left_out")]
    assert len(inside) == 2 * tiny_mixtures.EXPERTS
    norms = [s for s in manifest.scaling if s.get("producer") == "post_attention_layernorm"]
    assert not [s for s in norms if not s.get("left_out")]
    assert_runs(tmp_path, "mixtral")


@pytest.fixture
def at_once(monkeypatch):
    """How many experts were worked on at once, batch by batch."""
    counts = []

    def watched(ranks, sequences, clock):
        counts.append(len(sequences))
        return run_steps(ranks, sequences, clock)

    monkeypatch.setattr("quantkit.pipeline.experts.run_steps", watched)
    return counts


def test_experts_worked_on_at_once_become_what_each_becomes_alone(saved, tmp_path, monkeypatch, at_once):
    """Also where the run ended when some of the second block's experts had files already. GPTQ is kept from solving
    them as one batch, whose sums may be in another order.
    """
    _model, source = saved("mixtral")
    singly = replace(algorithm("gptq"), quantize_all=None)
    monkeypatch.setattr("quantkit.pipeline.solve.algorithm", lambda name: singly)
    gptq = {"bits": 4, "group_size": 16, "algorithm": {"name": "gptq", "retarget": 1.0}}
    recipe = GPTQ | {"weights": gptq, "transforms": [{"name": "awq", "grid": 2}]}
    alone = run(recipe, source, tmp_path / "alone")
    monkeypatch.setitem(AT_ONCE, "cpu", 3)
    out = tmp_path / "together"
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "put_aside", ending_at(1, 2, ShardWriter.put_aside))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, source, out)
    assert len(list((out / ".quantkit").glob("expert-1-*"))) == 2
    together = run(recipe, source, out)
    assert at_once == [*[1] * 8, 3, 1, 3, 3, 1]
    assert together.layers == alone.layers
    assert (together.scaling, together.experts) == (alone.scaling, alone.experts)
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_finished_block_keeps_nothing_of_its_experts(saved, tmp_path, monkeypatch):
    """Their modules are there until the run ends: what they have recorded and given is freed with the block."""
    stages, left = [], []

    def watched(*given):
        left.append(sum(len(stage.all_recorded()) for stage in stages))
        found = expert_stages(*given)
        stages.extend(found)
        return found

    monkeypatch.setattr("quantkit.calibration.walk.expert_stages", watched)
    _model, source = saved("mixtral")
    run(GPTQ, source, tmp_path / "out")
    assert len(stages) == 2
    assert not any(left)
    assert all(stage.experts.__dict__["answer"] is None for stage in stages)


def ending_at(block, expert, put_aside):
    """`put_aside` that ends the run before it takes the expert of that number of a block."""
    left = [expert]

    def ending(writer, part, result):
        if part == block:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        put_aside(writer, part, result)

    return ending


def test_experts_are_as_many_at_once_as_memory_allows(saved, tmp_path, monkeypatch, at_once):
    _model, source = saved("mixtral")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    block = next(walk(ready.model, ready.source, ready.plan, ready.windows.ids, Wanted(0, True)))
    (stage,) = block.experts.values()
    monkeypatch.setitem(AT_ONCE, "cpu", 4)
    tokens = CALIBRATION["samples"] * CALIBRATION["sequence_length"]
    one = 4 * (3 * 64 * 96 + tokens * 64 + 3 * 96**2)
    for allowed in (1, 2 * one - 1, 2 * one, 4 * one):
        every = ExpertsPart(calibrate="all")  # so that all experts take the same
        quantize_experts(block, stage, every, untouched, lambda result: None, Clock(), allowed)
    assert at_once == [*[1] * 8, 2, 2, 4]


def test_only_the_loaded_experts_lie_in_memory(saved, tmp_path):
    """A loaded block holds no expert: they are on meta until one is read."""
    _, source = saved("mixtral")
    ready = prepared(GPTQ, source, tmp_path, (), "cpu", None, Silent())
    skeleton.load_outside(ready.model, ready.source, ready.plan.blocks_prefix)
    block = skeleton.load_block(ready.model, ready.source, 0)
    linears = [m for n, m in block.named_modules() if ".experts." in n and isinstance(m, torch.nn.Linear)]
    assert linears
    assert all(linear.weight.is_meta for linear in linears)
    assert expert_stages(block, {}, {}, lambda name: None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_in_memory_and_saved_again_it_is_the_same_model(name, saved, tmp_path):
    _, source = saved(name)
    run(GPTQ, source, tmp_path / "out")
    ids = tiny_models.ids(16)
    loaded = quantkit.load(tmp_path / "out", device="cpu")
    wanted = loaded(input_ids=ids).logits
    made = quantkit.quantize_in_memory(GPTQ, source, device="cpu")
    assert torch.equal(made(input_ids=ids).logits, wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(quantkit.load(tmp_path / "again", device="cpu")(input_ids=ids).logits, wanted)
