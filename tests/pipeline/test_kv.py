"""A recipe's kv_cache: calibrated scales in the shards, and what other loaders make of them."""

import json
from unittest.mock import patch

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import assets
from quantkit.calibration.kv import PassingCache
from quantkit.calibration.kv_range import KVRange, check_scale
from quantkit.checkpoint.manifest import read_manifest
from quantkit.checkpoint.records import KVRecord
from quantkit.checkpoint.verify import verify_shard
from quantkit.errors import NumericalError, RecipeError, VerificationError
from quantkit.formats.registry import codec
from quantkit.numerics.kv import KVScales, rounded
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.preflight.cache import engine_flag
from quantkit.scheme import KV_PRESETS, KVScheme

pytestmark = pytest.mark.usefixtures("steady")

LENGTH = 32
GPTQ = {"preset": "W4A16", "group_size": 32, "algorithm": "gptq"}


@pytest.fixture(scope="module")
def quantized(inputs, tmp_path_factory):
    """quantized(weights, kv_cache) -> the folder of a run."""
    known = {}

    def make(weights, kv_cache):
        key = repr((weights, kv_cache))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("kv") / "out"
            run(inputs, known[key], weights, kv_cache)
        return known[key]

    return make


def run(inputs, output, weights, kv_cache, **options):
    calibration = {"data": [str(inputs / "text")], "samples": 6, "sequence_length": LENGTH}
    recipe = {"weights": weights, "kv_cache": kv_cache, "calibration": calibration}
    return quantkit.quantize(recipe, inputs / "model", output, evaluate=False, **options)


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def stored_scales(folder):
    """One KVScales per layer."""
    found = {n: t for n, t in tensors(folder).items() if n.endswith(("k_scale", "v_scale"))}
    name = "model.layers.{}.self_attn.{}_scale".format
    assert found.keys() == {name(i, which) for i in range(4) for which in "kv"}
    return [KVScales(found[name(i, "k")], found[name(i, "v")]) for i in range(4)]


class Layered(PassingCache):
    """Rounds the entries of layer i with its own scales, and notes the range of what came."""

    def __init__(self, scheme, scales):
        super().__init__(lambda keys, values: (keys, values))
        self.scheme, self.scales = scheme, scales
        self.ranges = [KVRange(scheme) for _ in scales]

    def update(self, keys, values, layer, *args, **kwargs):
        self.ranges[layer].update(keys, values)
        return rounded(keys, values, self.scheme, self.scales[layer])


@torch.no_grad()
def reference(model, ids, scheme, scales):
    cache = Layered(scheme, scales)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits, cache.ranges


def windows(inputs):
    from quantkit.calibration.text import token_windows
    from quantkit.models.tokenizer import open_tokenizer
    from quantkit.recipe.recipe import Calibration

    calibration = Calibration(data=[str(inputs / "text")], samples=6, sequence_length=LENGTH)
    tokenizer = open_tokenizer(inputs / "model")
    return token_windows(calibration, tokenizer, assets.calibration_text(), vocabulary=128).ids


@pytest.mark.parametrize("preset", ["FP8", "FP8_TENSOR"])
def test_scales_are_those_of_the_model_whose_earlier_caches_are_rounded(quantized, inputs, preset):
    folder, scheme = quantized("none", preset), KV_PRESETS[preset]
    scales = stored_scales(folder)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    _, ranges = reference(model, windows(inputs), scheme, scales)
    shape = (1,) if preset == "FP8_TENSOR" else (2, 1, 1)
    for index, (found, seen) in enumerate(zip(scales, ranges, strict=True)):
        expected = seen.scales(f"layer {index}", torch.bfloat16)
        for one, other in ((found.keys, expected.keys), (found.values, expected.values)):
            assert one.dtype == torch.bfloat16
            assert one.shape == shape
            assert torch.allclose(one.float(), other.float(), rtol=1e-2, atol=0)  # one step of bfloat16
    exact = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    _, plain = reference(exact, windows(inputs), KVScheme(scheme.keys, scheme.values, sinks=LENGTH), scales)
    assert any(not torch.equal(a.largest["k"], b.largest["k"]) for a, b in zip(ranges, plain, strict=True))


def test_weights_none_copies_every_tensor(quantized, inputs):
    source, made = tensors(inputs / "model"), tensors(quantized("none", "FP8"))
    assert made.keys() - source.keys() == {n for n in made if n.endswith(("k_scale", "v_scale"))}
    assert all(torch.equal(made[name], tensor) for name, tensor in source.items())


def test_the_config_is_that_of_a_dense_model_with_a_cache(quantized):
    """llm-compressor's, for a recipe of the cache alone."""
    config = json.loads((quantized("none", "FP8") / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["config_groups"], config["ignore"]) == ("dense", {}, [])
    assert config["quantization_status"] == "compressed"
    args = config["kv_cache_scheme"]
    facts = (args["num_bits"], args["type"], args["strategy"], args["symmetric"], args["dynamic"])
    assert facts == (8, "float", "attn_head", True, False)
    assert len(args) == 12


@pytest.mark.parametrize("weights", ["none", "rtn"])
def test_plain_transformers_gives_the_logits_of_the_rounded_cache(quantized, inputs, weights):
    """compressed-tensors quantizes in its cache's update, with the scales of the file."""
    pytest.importorskip("compressed_tensors")
    rtn = {"preset": "W4A16", "group_size": 32, "algorithm": "rtn"}
    folder = quantized("none" if weights == "none" else rtn, "FP8")
    ids = windows(inputs)[:2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = model(input_ids=ids).logits
    if weights == "none":
        plain = AutoModelForCausalLM.from_pretrained(
            inputs / "model", dtype=torch.float32, attn_implementation="eager"
        )
        expected, _ = reference(plain, ids, KV_PRESETS["FP8"], stored_scales(folder))
        exact = plain(input_ids=ids).logits
        off = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert off < 1e-3
        assert (found - exact).square().mean() > 100 * (found - expected).square().mean()
    assert torch.isfinite(found).all()


def test_a_scale_is_calibrated_behind_the_quantized_weights_before_it(quantized):
    """Not on the original's keys: 4-bit q, k and v have others."""
    plain, behind = stored_scales(quantized("none", "FP8")), stored_scales(quantized(GPTQ, "FP8"))
    assert any(not torch.equal(a.keys, b.keys) for a, b in zip(plain, behind, strict=True))


def test_gptq_sees_the_rounded_cache(quantized):
    """o_proj's inputs are behind the cache, those of q, k and v of the first block before it."""
    exact, behind = tensors(quantized(GPTQ, None)), tensors(quantized(GPTQ, "INT4"))
    name = "model.layers.0.self_attn.{}_proj.weight_packed".format
    assert torch.equal(exact[name("k")], behind[name("k")])
    assert not torch.equal(exact[name("o")], behind[name("o")])


def test_a_dynamic_cache_is_in_the_manifest_alone(quantized, inputs):
    folder = quantized("none", "INT8")
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((inputs / "model" / "config.json").read_text())
    manifest = read_manifest(folder)
    assert manifest.kv_cache.scheme == KV_PRESETS["INT8"]
    assert "KV cache in vLLM: --kv-cache-dtype int8_per_token_head" in manifest.notes
    config = json.loads((quantized(GPTQ, "INT4") / "config.json").read_text())
    assert config["quantization_config"].get("kv_cache_scheme") is None


@pytest.mark.parametrize("name", KV_PRESETS)
def test_a_record_gives_its_scheme_back(name):
    scheme = KV_PRESETS[name]
    assert KVRecord.of(scheme).scheme == scheme


def test_the_engines_flag_says_the_same_cache():
    assert engine_flag(KV_PRESETS["INT4"]) == "--kv-cache-dtype int4_per_token_head"
    assert engine_flag(KV_PRESETS["FP8"]) == "--kv-cache-dtype fp8"
    for other in (
        KV_PRESETS["KIVI4"],
        KVScheme(KV_PRESETS["INT4"].keys, KV_PRESETS["INT4"].values),
        KVScheme(KV_PRESETS["INT8"].keys, KV_PRESETS["INT8"].values, sinks=4),
    ):
        assert engine_flag(other) is None


def test_an_interrupted_run_ends_with_the_same_bytes(quantized, inputs, tmp_path):
    commit = ShardWriter.commit

    def failing(self, part, *args):
        if part == 2:
            raise KeyboardInterrupt
        commit(self, part, *args)

    with patch.object(ShardWriter, "commit", failing), pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "out", GPTQ, "FP8")
    result = run(inputs, tmp_path / "out", GPTQ, "FP8")
    assert result.report.resumed_blocks == 2
    whole = quantized(GPTQ, "FP8")
    for file in whole.iterdir():
        if file.name != "quantkit.run.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        ([0.5, 0.0], "scale of head 1 is 0"),
        ([float("nan"), 0.5], "scale of head 0 is nan"),
        ([float("inf"), 0.5], "scale of head 0 is inf"),
        ([1.0, 1.0], "never calibrated"),
    ],
)
def test_a_scale_that_is_none_is_never_written(scale, told):
    with pytest.raises(NumericalError, match=rf"a\.k_scale: .*{told}"):
        check_scale("a.k_scale", torch.tensor(scale)[:, None, None])


def test_values_of_zeros_stop_the_run_with_their_name(inputs, tmp_path):
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=4)
    torch.nn.init.zeros_(model.model.layers[2].self_attn.v_proj.weight)
    tiny_models.save(model, tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text").write_text((inputs / "text").read_text())
    with pytest.raises(NumericalError, match=r"model\.layers\.2\.self_attn\.v_scale: .* is 0"):
        run(tmp_path, tmp_path / "out", "none", "FP8")
    assert not (tmp_path / "out" / "quantkit.json").exists()


def test_scales_that_changed_on_disk_are_seen(quantized):
    shard = sorted(quantized("none", "FP8").glob("*.safetensors"))[0]
    name = "model.layers.0.self_attn.k_scale"
    scale = load_file(shard)[name]
    verify_shard(shard, {}, codec(), scales={name: scale})
    for wrong in (scale * 2, scale.float()):
        with pytest.raises(VerificationError, match=f"read back for {name}"):
            verify_shard(shard, {}, codec(), scales={name: wrong})
    with pytest.raises(VerificationError, match="read back for other"):
        verify_shard(shard, {}, codec(), scales={"other": scale})


def test_calibrated_scales_go_without_what_the_file_cannot_say(inputs, tmp_path):
    for more in ({"sinks": 4}, {"rotate": True}, {"residual": 32}):
        with pytest.raises(RecipeError, match="calibrated scales"):
            run(inputs, tmp_path / "out", "none", {"preset": "FP8"} | more)


FAMILIES = ("gpt2", "gemma2", "gemma3", "qwen3", "phi3", "opt", "gpt-neox", "falcon-new", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_hand_their_cache_over_too(family, inputs, tmp_path):
    tiny_models.save(tiny_models.FAMILIES[family](), tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text").write_text((inputs / "text").read_text())
    run(tmp_path, tmp_path / "out", "none", "FP8")
    scales = [n for n in tensors(tmp_path / "out") if n.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 6
