"""Every family end to end: the walk gives the model's logits, and what `quantize` writes runs as it says."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, pipeline
from transformers.pytorch_utils import Conv1D

import quantkit
from quantkit import assets
from quantkit.calibration.forward import embed, finish
from quantkit.calibration.returned import Form, returned
from quantkit.cli.main import run
from quantkit.errors import DataError, ModelError
from quantkit.formats.registry import codec
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.structure.trace import first_output

HEADS = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX: the head on disk -> in the model
BACKEND = "reference"  # logits are compared to the bit
NAMES = list(tiny_models.CONFIGS)
TIED = ("gemma", "opt", "gpt2", "falcon")  # families whose heads usually are; the others untied
RECIPES = {
    "rtn": {"weights": {"algorithm": "rtn", "bits": 4, "group_size": 16, "symmetric": True}},
    "gptq": {"weights": {"algorithm": "gptq", "bits": 4, "group_size": 32, "symmetric": False}},
    "awq": {
        "weights": {"algorithm": {"name": "rtn", "range": "minmax"}, "bits": 8, "group_size": 16},
        "transforms": [{"name": "awq", "grid": 4, "clip": False}],
    },
}


def two_layers(name, **overrides):
    """A tiny model of two blocks; of the mixed families one slides and one does not."""
    _, settings = tiny_models.CONFIGS[name]
    types = {"layer_types": ["sliding_attention", "full_attention"]} if "layer_types" in settings else {}
    return tiny_models.FAMILIES[name](num_hidden_layers=2, **types, **overrides)


def ids():
    """[2, 24]: longer than the sliding windows."""
    return tiny_models.ids(24, batch=2, vocabulary=100)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def quantize(recipe, model, output):
    """By a recipe mapping, on a little of the embedded text."""
    text = model.parent / "text"
    text.write_text(assets.calibration_text().read_text()[:20000])
    calibration = {"data": [str(text)], "samples": 6, "sequence_length": 32}
    return quantkit.quantize(recipe | {"calibration": calibration}, model, output, evaluate=False)


@dataclass
class Case:
    """One family in a folder: the original, and what each recipe makes of it, computed once."""

    name: str
    folder: Path

    def __post_init__(self):
        tied = self.name.startswith(TIED)
        tiny_models.save(two_layers(self.name, tie_word_embeddings=tied), self.folder / "original")
        self.output = cache(self._output)

    @property
    def original(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "original", dtype=torch.float32)

    def _output(self, recipe):
        return quantize(RECIPES[recipe], self.folder / "original", self.folder / recipe).output


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


def stored(folder):
    """All tensors of a checkpoint."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@torch.no_grad()
def dense(original, output, rescaled=False):
    """`original` with the weights that `output` holds, dequantized; rescaled: and its norms and biases.

    Without `rescaled`, what is not quantized must not have changed. Returns the model and the number of
    quantized linears.
    """
    tensors = stored(output)
    scheme_of = codec().parse(json.loads((output / "config.json").read_text())["quantization_config"])
    count = 0
    for name, module in original.named_modules():
        parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        packed = {p: tensors.pop(f"{name}.{p}") for p in parts if f"{name}.{p}" in tensors}
        if packed:
            weight = codec().unpack(packed, scheme_of(name)).dequantize()
            module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)
            count += 1
    parameters = dict(original.named_parameters(remove_duplicate=False))
    for disk, tensor in tensors.items():
        name = HEADS.get(disk, disk)
        if rescaled:
            parameters[name].copy_(tensor)
        else:
            assert torch.equal(parameters[name], tensor), name
    return original, count


def manifest_of(output):
    return json.loads((output / "quantkit.json").read_text())


def linears_of_blocks(model):
    return sum(isinstance(m, nn.Linear | Conv1D) for m in tiny_models.blocks(model).modules())


def relative(x, y):
    """RMS(x - y) / RMS(y)."""
    return float((x - y).square().mean().sqrt() / y.square().mean().sqrt())


# the walk ------------------------------


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_the_streamed_walk_gives_the_models_logits(tmp_path, name, tie):
    tiny_models.save(two_layers(name, tie_word_embeddings=tie), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    source = Source(read_checkpoint(tmp_path))
    model = skeleton.build(source)
    prefix, blocks = skeleton.find_blocks(model)
    skeleton.load_outside(model, source, prefix)
    hidden, calls = embed(model, blocks, ids())
    for index, call in enumerate(calls):
        block = skeleton.load_block(model, source, index, blocks_prefix=prefix)
        with torch.no_grad():
            out = block(hidden, *call.args, **call.kwargs)
        form = Form(returned(out))
        hidden = first_output(out)
        skeleton.free_block(model, index, prefix)
    assert torch.equal(finish(model, blocks, hidden, ids(), form), logits(reference))


# quantize, save, load ------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_loaded_logits_equal_the_dequantized_model(case, name, recipe):
    output = case(name).output(recipe)
    original = case(name).original
    before = logits(original)
    wanted = linears_of_blocks(original)
    reference, count = dense(original, output, rescaled=recipe == "awq")
    assert count == wanted
    after, loaded = logits(reference), logits(quantkit.load(output))
    if name in ("falcon-new", "falcon-alibi"):  # FalconLinear adds its bias after rounding the product
        torch.testing.assert_close(loaded, after, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(loaded, after)
    assert 0 < relative(after, before) < (0.03 if recipe == "awq" else 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_awq_stores_the_norms_it_rescaled_and_no_others(case, name):
    output = case(name).output("awq")
    manifest = manifest_of(output)
    scaled = [s for s in manifest["scaling"] if s["exponent"] is not None]
    assert scaled
    assert all(s["loss"] < s["identity_loss"] for s in scaled)
    norms = {s["producer"] for s in scaled if "norm" in s["producer"] or s["producer"].startswith("ln_")}
    before, after = stored(case(name).folder / "original"), stored(output)
    moved = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved if n.endswith("weight")} == norms


@pytest.mark.parametrize("name", ["llama-gqa", "falcon"])  # blocks that return a tensor, and a tuple
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_rule_quantizes_an_untied_head(tmp_path, name, algorithm):
    original = tiny_models.save(two_layers(name), tmp_path / "original")
    rules = [{"match": "lm_head", "bits": 8}, {"match": "*.1.*", "skip": True}]
    weights = {"algorithm": algorithm, "bits": 8, "group_size": 16}
    result = quantize({"weights": weights, "rules": rules}, original, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    before, wanted = logits(model), linears_of_blocks(model) // 2 + 1
    reference, count = dense(model, result.output)
    assert count == wanted
    assert "lm_head" in {layer.name for layer in result.manifest.layers}
    assert torch.equal(logits(quantkit.load(result.output)), logits(reference))
    assert relative(logits(reference), before) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-bias", "gemma2", "gpt2", "falcon"])
def test_sharded_half_precision_checkpoints(tmp_path, name, dtype):
    """Rescaled norms and biases are rounded to the stored dtype before the consumers take their share."""
    original = tiny_models.save(two_layers(name), tmp_path / "original", dtype, max_shard_size="40KB")
    recipe = {"weights": {"algorithm": "gptq", "bits": 8, "group_size": 16}, "transforms": ["awq"]}
    output = quantize(recipe, original, tmp_path / "out").output
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    before = logits(model)
    reference, _ = dense(model, output, rescaled=True)
    assert torch.equal(logits(quantkit.load(output)), logits(reference))
    assert relative(logits(reference), before) < 0.05
    assert {t.dtype for t in stored(output).values()} <= {dtype, torch.int32, torch.int64}


# run ------------------------------


def generated(model, tokens, mask):
    out = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    return out[:, tokens.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_generates_what_single_rows_do(case, name):
    model = quantkit.load(case(name).output("rtn"))
    rows = [tiny_models.ids(length, vocabulary=100, seed=length) for length in (3, 7, 12)]
    width = max(row.shape[1] for row in rows)
    tokens = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    together = generated(model, tokens, mask)
    for row, batched in zip(rows, together, strict=True):
        assert generated(model, row, torch.ones_like(row))[0].tolist() == batched.tolist()


def test_a_text_generation_pipeline_runs(case):
    output = case("llama-gqa").output("awq")
    task = pipeline("text-generation", quantkit.load(output), tokenizer=AutoTokenizer.from_pretrained(output))
    told = task("It was", do_sample=False, max_new_tokens=4)[0]["generated_text"]
    assert told.startswith("It was")
    assert len(told) > len("It was")


# plain transformers with compressed-tensors ------------------------------

NEW = Version(transformers.__version__) >= Version("5.23.0")  # what docs/checkpoint.md records by version
OF_LINEARS = [n for n in NAMES if not n.startswith(("gpt2", "falcon"))]


def plain(output, **kwargs):
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, **kwargs)


def dequantized(output):
    return plain(output, quantization_config=CompressedTensorsConfig(dequantize=True))


@pytest.mark.parametrize("name", OF_LINEARS)
def test_plain_transformers_gives_the_same_logits(case, name):
    output = case(name).output("rtn")
    assert torch.equal(logits(plain(output)), logits(quantkit.load(output)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_asymmetric_through_dequantize(case):
    output = case("llama-gqa").output("gptq")
    assert torch.equal(logits(dequantized(output)), logits(quantkit.load(output)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_falcon_needs_dequantize_and_says_so(case):
    """FalconLinear reads `weight` in its forward; compressed-tensors has put the packed tensors in its place."""
    output = case("falcon").output("rtn")
    with pytest.raises(AttributeError, match="weight"):
        logits(plain(output))
    if NEW:
        assert torch.equal(logits(dequantized(output)), logits(quantkit.load(output)))
    else:
        with pytest.raises(AttributeError, match="weight"):
            logits(dequantized(output))
    assert any("the code of this family reads" in note for note in manifest_of(output)["notes"])


def test_gpt2_says_that_only_quantkit_loads_it(case):
    notes = manifest_of(case("gpt2").output("rtn"))["notes"]
    assert any("Conv1D, which only quantkit.load runs" in note for note in notes)


# what is in no table ------------------------------


def save_unlisted(model_type, folder, **settings):
    shape = tiny_models._COMMON | tiny_models._GROUPED | {"num_hidden_layers": 2} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
    tiny_models.randomise(model)
    return tiny_models.save(model.eval(), folder)


@pytest.mark.parametrize("model_type", ["stablelm", "starcoder2", "olmo2", "biogpt", "openai-gpt"])
def test_an_unlisted_dense_family_runs_end_to_end(tmp_path, model_type):
    """BioGPT's tied head is not called lm_head; the blocks and attentions of the first GPT return lists."""
    original = save_unlisted(model_type, tmp_path / "original")
    recipe = {"weights": {"algorithm": "gptq", "bits": 8, "group_size": 16}, "transforms": ["awq"]}
    result = quantize(recipe, original, tmp_path / "out")
    assert result.manifest.scaling
    assert all(s["producer"] or s["left_out"] for s in result.manifest.scaling)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    before = logits(model)
    reference, _ = dense(model, result.output, rescaled=True)
    assert torch.equal(logits(quantkit.load(result.output)), logits(reference))
    assert relative(logits(reference), before) < 0.05


@pytest.mark.parametrize("name", tiny_models.BY_TOKENS)
@pytest.mark.parametrize("transforms", [[], ["awq"]])
def test_a_family_whose_blocks_are_called_with_the_tokens(tmp_path, name, transforms):
    original = tiny_models.save(tiny_models.build(name, tie_word_embeddings=True), tmp_path / "original")
    recipe = {"weights": {"algorithm": "gptq", "bits": 8, "group_size": 16}, "transforms": transforms}
    result = quantize(recipe, original, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    before = logits(model)
    assert len(result.manifest.layers) == linears_of_blocks(model)
    assert relative(logits(quantkit.load(result.output)), before) < 0.15


def test_a_family_that_makes_tensors_of_one_type_is_proved_in_another(tmp_path):
    """XGLM's attention fills a mask with the smallest fp32 number, which the proof in float64 has to allow."""
    sizes = {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128}
    original = save_unlisted("xglm", tmp_path / "original", **sizes)
    recipe = {"weights": {"algorithm": "gptq", "bits": 8, "group_size": 16}, "transforms": ["awq"]}
    manifest = quantize(recipe, original, tmp_path / "awq").manifest
    assert any("left_out" not in each for each in manifest.scaling)


# checkpoints and recipes that do not fit ------------------------------


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, recipe):
    original = tiny_models.save(two_layers("llama"), tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(32)
    del tensors["model.norm.weight"]
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"missing: model\.norm\.weight; .*layers\.1\.input_layernorm.*\[32\]"
    ):
        quantize(RECIPES[recipe], original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    original = tiny_models.save(two_layers("llama", vocab_size=64), tmp_path / "original")
    with pytest.raises(DataError, match="the model has 64"):
        quantize(RECIPES["gptq"], original, tmp_path / "out")


def test_a_group_size_that_does_not_divide_is_exit_code_2(tmp_path, capsys):
    original = tiny_models.save(two_layers("llama", intermediate_size=96), tmp_path / "original")
    command = ["quantize", "w4a16-rtn", "--model", str(original), "--output", str(tmp_path / "out")]
    assert run([*command, "--set", "weights.group_size=64"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "in_features=96 is not divisible by group_size=64 in model.layers.*.mlp.down_proj" in told
    assert "use group_size 32, channel, or a rule" in told
