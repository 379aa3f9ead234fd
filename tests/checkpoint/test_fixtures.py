"""Checkpoints of other tools load with the logits of their own loader, or are refused by name.

Most are llm-compressor's (0.14), with the logits of transformers 5.17 and compressed-tensors.

logits.safetensors: input_ids [1, 24]; logits: fp32, eager attention, activations rounded as the config says;
dense.NAME: some decoded weights. The networks are random, so one flipped code moves logits by up to 0.25: inputs are
compared layer by layer in tests/numerics/test_inputs.py, and ends with a tolerance.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.errors import BackendError, ModelError
from quantkit.formats.registry import codec
from quantkit.layers.kv_attention import NAME
from quantkit.layers.kv_cache import cache_of
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.inputs import round_inputs

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXACT = [
    "w8a8-int8-dynamic",
    "w8a8-int8-static-asym",
    "w4a8-int8",
    "fp8-dynamic",
    "fp8-block",
    "model-free-fp8-dynamic",
    "mxfp4a16",
    "mixed-w4-w8",
    "awq-w4a16-asym",
    "gptq-actorder",
    "w4a16-sym",
    "w8a16-channel",
    "awq4-gemm",
    "autoround-int4",
    "bnb-nf4",
    "gptq3-sym",
    "gptq4-desc-act",
    "gptq4-sym",
    "gptq4-v2-asym",
    "modelopt-fp8-kv-fp8",
    "mxfp8",
    "moe-w4a16",
]
DECODED = ["awq4-gemm", "autoround-int4", "gptq3-sym", "gptq4-desc-act", "gptq4-sym", "gptq4-v2-asym"]
SHOWN = {
    "mxfp4a16": "W4A16 fp4_e2m1 g32",
    "mixed-w4-w8": "W4A16 g32 sym; W8A16 channel sym",
    "w8a8-int8-dynamic": "W8A8 channel sym, inputs int8 token",
    "w8a8-int8-static-asym": "W8A8 channel sym, inputs int8 tensor asym",
    "w4a8-int8": "W4A8 g32 sym, inputs int8 token",
    "fp8-dynamic": "W8A8 fp8_e4m3 channel, inputs fp8_e4m3 token",
    "model-free-fp8-dynamic": "W8A8 fp8_e4m3 channel, inputs fp8_e4m3 token",
    "fp8-block": "W8A8 fp8_e4m3 b128, inputs fp8_e4m3 g128",
    "awq-w4a16-asym": "W4A16 g32 asym",
    "gptq-actorder": "W4A16 g32 sym",
    "w4a16-sym": "W4A16 g32 sym",
    "w8a16-channel": "W8A16 channel sym",
    "awq4-gemm": "W4A16 g32 asym",
    "autoround-int4": "W4A16 g32 sym",
    "bnb-nf4": "W4A16 nf4 g64",
    "gptq3-sym": "W3A16 g32 sym",
    "gptq4-desc-act": "W4A16 g32 sym",
    "gptq4-sym": "W4A16 g32 sym",
    "gptq4-v2-asym": "W4A16 g32 asym",
    "modelopt-fp8-kv-fp8": "W8A8 fp8_e4m3 tensor, inputs fp8_e4m3 tensor",
    "moe-w4a16": "W4A16 g32 sym",
    "mxfp8": "W8A8 fp8_e4m3 g32, inputs fp8_e4m3 g32",
    "nvfp4": "W4A4 fp4_e2m1 g16, inputs fp4_e2m1 g16",
}


def opened(name, **how):
    """(model in fp32 with eager attention, what was recorded). name: of a fixture, or a folder made from NVFP4's."""
    folder = FIXTURES / name
    model = quantkit.load(folder, device="cpu", dtype=torch.float32, **how)
    model.set_attn_implementation("eager")
    recorded = folder / "logits.safetensors"
    return model, load_file(recorded if recorded.exists() else FIXTURES / "nvfp4/logits.safetensors")


@pytest.mark.parametrize("name", EXACT)
def test_logits_are_those_of_its_own_loader(name):
    model, recorded = opened(name)
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    assert "; ".join(sorted(schemes)) == SHOWN[name]
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    assert distance(logits, recorded["logits"]) < 1e-2


def distance(logits, wanted):
    """The RMS of the difference, relative to that of `wanted`."""
    return float((logits - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("name", ["kv-fp8-tensor", "kv-fp8-head", "kv-int8-tensor"])
@pytest.mark.parametrize("attention", ["eager", NAME])
def test_caches_give_the_logits_of_their_own_loader(name, attention):
    model, recorded = opened(name)
    model.set_attn_implementation(attention)
    ids = recorded["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = cache_of(model)()
        steps = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1, 1], 1)]
    for logits in (whole, torch.cat(steps, 1)):
        off = (logits - recorded["logits"]).square().mean().sqrt() / recorded["logits"].square().mean().sqrt()
        assert float(off) < 1e-2, f"{float(off):.3g}"


@pytest.mark.parametrize("name", EXACT)
def test_weights_are_decoded_exactly(name):
    model, recorded = opened(name)
    dense = {key.removeprefix("dense."): t for key, t in recorded.items() if key.startswith("dense.")}
    assert dense
    for tensor, wanted in dense.items():
        module = model.get_submodule(tensor.removesuffix(".weight"))
        found = codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize()
        if name == "bnb-nf4":
            found = found.bfloat16().float()  # as its tool decodes it
        assert torch.equal(found, wanted.float()), tensor


@pytest.mark.parametrize("name", DECODED)
def test_logits_are_those_of_the_decoded_weights(name):
    """Their own loader decodes in fp16; (q - z) * scale in fp32 is what our kernels compute."""
    model, recorded = opened(name)
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits[:, -8:]
    wanted = recorded["logits_decoded"]
    assert (logits - wanted).square().mean().sqrt() < 1e-4 * wanted.square().mean().sqrt()


def test_columns_out_of_order_are_gathered_once_per_layer():
    """GPTQ's desc_act: logits on every backend and of the dequantized model agree, and the layers do gather."""
    model, recorded = opened("gptq4-desc-act", backend="reference")
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert packed
    assert all(module.ordered for module in packed)
    with torch.no_grad():
        first = model(recorded["input_ids"]).logits
        dense = model.dequantize()(recorded["input_ids"]).logits
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(first, dense, rtol=1e-4, atol=1e-4)


def test_a_model_of_another_tools_checkpoint_is_not_saved(tmp_path):
    model, _ = opened("gptq4-sym")
    with pytest.raises(BackendError, match="does not write; copy that folder"):
        model.save_pretrained(tmp_path)


READ = ["awq4-gemm", "autoround-int4", "bnb-nf4", "gptq3-sym", "gptq4-desc-act", "modelopt-fp8-kv-fp8"]


@pytest.mark.parametrize("name", READ)
def test_inspect_says_who_made_it_and_what_it_holds(name):
    report = inspect_checkpoint(FIXTURES / name)
    schemes = {layer["scheme"] for layer in report["layers"] if layer["scheme"]}
    assert "; ".join(sorted(schemes)) == SHOWN[name]
    assert report["totals"]["quantized_layers"] == (7 if name == "awq4-gemm" else 14)
    assert report["made_by"]
    assert [loader["name"] for loader in report["loaders"]] == ["quantkit", "transformers", "vLLM"]


def test_modelopt_is_known_by_its_own_file_too(tmp_path):
    folder = shutil.copytree(FIXTURES / "modelopt-fp8-kv-fp8", tmp_path / "model")
    (folder / "logits.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    model = quantkit.load(folder, device="cpu", dtype=torch.float32)
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    assert schemes == {SHOWN["modelopt-fp8-kv-fp8"]}
    assert cache_of(model) is not None


def test_a_cache_of_autoround_that_was_never_calibrated_is_refused(tmp_path):
    """Its scales come out as 0.0, without an error of the tool."""
    folder = shutil.copytree(FIXTURES / "autoround-int4", tmp_path / "model")
    (folder / "logits.safetensors").unlink()
    shutil.copy(FIXTURES / "autoround-kv-fp8-zero-scales/config.json", folder)
    tensors = load_file(folder / "model.safetensors")
    scales = [f"model.layers.{layer}.self_attn.{leaf}_scale" for layer in (0, 1) for leaf in "kv"]
    save_file(tensors | {n: torch.zeros(1) for n in scales}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"a scale of 0 or below in model\.layers\.0\.self_attn\.k_scale"):
        quantkit.load(folder, device="cpu")
    save_file(
        tensors | {n: torch.ones(1) / 8 for n in scales}, folder / "model.safetensors", {"format": "pt"}
    )
    model = quantkit.load(folder, device="cpu")
    assert cache_of(model) is not None


CHANGED = [
    (
        "gptq4-sym",
        {"sym": True, "checkpoint_format": "gptq_v2"},
        "a symmetric linear has zero points other than 8",
    ),
    ("gptq4-sym", {"checkpoint_format": "marlin"}, "GPTQ format 'marlin', .* is not read"),
    ("gptq4-sym", {"bits": 5}, "bits 5, group_size 32 is not read; quantkit reads 2, 3, 4, 8 bits"),
    ("gptq4-sym", {"group_size": 64}, r"model.layers.0.\w+.\w+: qweight .* goes with"),
    ("gptq4-sym", {"dynamic": {"(a": {}}}, r"the pattern '\(a' cannot be used"),
    ("awq4-gemm", {"version": "gemv"}, "AWQ version 'gemv', .* is not read"),
    ("autoround-int4", {"packing_format": "auto_round:fp8_static"}, "packing_format .* is not read"),
    ("bnb-nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' is not read"),
    ("modelopt-fp8-kv-fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ', .* is not read"),
    ("modelopt-fp8-kv-fp8", {"quant_algo": "NVFP4"}, r"a weight torch.float8_e4m3fn .* is no W4A4 fp4_e2m1"),
]


@pytest.mark.parametrize(("name", "change", "says"), CHANGED, ids=[str(n) for n in range(len(CHANGED))])
def test_a_config_that_does_not_fit_its_tensors_is_refused(name, change, says, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / "model")
    (folder / "logits.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says):
        quantkit.load(folder, device="cpu")


@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_fp8_of_transformers_with_one_scale_for_a_weight(inputs, tmp_path):
    """The fixture of ModelOpt with transformers' names: the same weights, and with stored ranges the same logits."""
    config = json.loads((FIXTURES / "modelopt-fp8-kv-fp8/config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": inputs}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    names, tensors = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}, {}
    for name, tensor in load_file(FIXTURES / "modelopt-fp8-kv-fp8/model.safetensors").items():
        owner, _, leaf = name.rpartition(".")
        if leaf not in ("k_scale", "v_scale") and (leaf != "input_scale" or inputs == "static"):
            tensors[f"{owner}.{names.get(leaf, leaf)}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = quantkit.load(tmp_path, device="cpu", dtype=torch.float32)
    with pytest.warns(UserWarning, match="the KV cache runs as exact, as asked for"):
        twin, recorded = opened("modelopt-fp8-kv-fp8", kv_cache="exact")
    how = "fp8_e4m3 tensor" if inputs == "static" else "fp8_e4m3 token"
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {str(m.scheme) for m in packed.values()} == {f"W8A8 fp8_e4m3 tensor, inputs {how}"}
    for name, module in packed.items():
        weights = (
            codec(m.file_format).unpack(m.on_disk(), m.scheme).dequantize()
            for m in (module, twin.get_submodule(name))
        )
        assert torch.equal(*weights), name
    with torch.no_grad():
        logits, wanted = model(recorded["input_ids"]).logits, twin(recorded["input_ids"]).logits
    assert distance(logits, wanted) < (1e-5 if inputs == "static" else 0.2)


def test_scales_of_fp8_blocks_may_be_powers_of_two(tmp_path):
    """scale_fmt ue8m0, one byte for a scale, as DeepSeek's newer checkpoints have it."""
    config = json.loads((FIXTURES / "fp8-block/config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors = load_file(FIXTURES / "fp8-block/model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[f"{name}_inv"] = tensors.pop(name).float().log2().round().exp2().to(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = quantkit.load(tmp_path, device="cpu", dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    module = model.get_submodule(name)
    scale = tensors[f"{name}.weight_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    wanted = tensors[f"{name}.weight"].float() * scale
    assert torch.equal(codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize(), wanted)


def renamed_to_modelopt(folder):
    """The fixture of NVFP4 as ModelOpt writes it: other names, and scales that multiply instead of dividing."""
    config = json.loads((FIXTURES / "nvfp4/config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    names = {
        "weight_packed": "weight",
        "weight_global_scale": "weight_scale_2",
        "input_global_scale": "input_scale",
    }
    tensors = {}
    for name, tensor in load_file(FIXTURES / "nvfp4/model.safetensors").items():
        owner, _, leaf = name.rpartition(".")
        turned = tensor.double().reciprocal().float()[0] if leaf.endswith("global_scale") else tensor
        tensors[f"{owner}.{names.get(leaf, leaf)}"] = turned
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("tool", ["llm-compressor", "modelopt"])
def test_nvfp4_inputs_are_rounded_as_its_own_arithmetic_has_it(tool, tmp_path):
    """logits_fp32: weights decoded in fp32. A value that is rounded to the other side moves logits by up to a tenth."""
    folder = FIXTURES / "nvfp4" if tool == "llm-compressor" else renamed_to_modelopt(tmp_path)
    model, recorded = opened(folder)
    assert {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)} == {SHOWN["nvfp4"]}
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits[:, -8:]
    assert distance(logits, recorded["logits_fp32"]) < 0.1 < distance(logits, recorded["logits_decoded"])
    name = "model.layers.0.self_attn.k_proj"
    module = model.get_submodule(name)
    found = codec(module.file_format).unpack(module.on_disk(), module.scheme).dequantize()
    torch.testing.assert_close(found, recorded[f"dense.{name}.weight"], rtol=1e-6, atol=0)


def test_nvfp4_with_weights_in_bfloat16_has_the_logits_of_its_own_loader():
    """compressed-tensors rounds decoded FP4 weights to bf16, which moves these logits by 18 %; ours are not rounded."""
    model, recorded = opened("nvfp4", backend="reference")
    for module in [m for m in model.modules() if isinstance(m, QuantLinear)]:
        weight = codec(module.file_format).unpack(module.on_disk(), module.scheme)
        dense = weight.dequantize(torch.bfloat16).float()
        module.forward = lambda x, weight=dense, module=module: module.rounded(x) @ weight.T
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    assert distance(logits, recorded["logits"]) < 0.1


def test_fp4_inputs_by_groups_of_32_are_run(tmp_path):
    """MXFP4 with MXFP4 inputs, of which there is no recording: the fixture without them, and inputs rounded by hand."""
    config = json.loads((FIXTURES / "mxfp4a16/config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = group["weights"] | {"dynamic": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / "mxfp4a16/model.safetensors", tmp_path)
    model = quantkit.load(tmp_path, device="cpu", dtype=torch.float32)
    twin, _ = opened("mxfp4a16")
    name = "model.layers.0.mlp.down_proj"
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    grid = replace(twin.get_submodule(name).scheme.weights, dynamic=True)
    with torch.no_grad():
        found = model.get_submodule(name)(x)
        wanted = twin.get_submodule(name)(round_inputs(x, grid))
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(wanted, twin.get_submodule(name)(x))


@pytest.mark.parametrize("use", [quantkit.load, inspect_checkpoint])
def test_a_gguf_file_is_refused_by_name(use, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no config\.json, but model\.gguf: a GGUF file"):
        use(tmp_path)


def spoiled(name, leaf, value, tmp_path):
    """A copy of a fixture in which every tensor called `leaf` has one value replaced, or with None is missing."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "model")
    (folder / "logits.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    of_leaf = sorted(each for each in tensors if each.endswith(f".{leaf}"))
    assert of_leaf
    for each in of_leaf:
        if value is None:
            del tensors[each]
            continue
        if tensors[each].dtype == torch.uint8:  # E8M0, which has neither 0 nor a sign
            tensors[each].view(-1)[-1] = 255
        else:
            tensors[each] = tensors[each].float().contiguous()
            tensors[each].view(-1)[-1] = value
            tensors[each] = tensors[each].to(load_dtype(name, each))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, of_leaf[0]


def load_dtype(name, tensor):
    return load_file(FIXTURES / name / "model.safetensors")[tensor].dtype


NAN, INF = float("nan"), float("inf")
SCALES = [
    *[("w8a8-int8-dynamic", "weight_scale", value) for value in (0.0, -0.5, NAN, INF, None)],
    *[("fp8-block", "weight_scale", value) for value in (0.0, -0.5, NAN, None)],
    *[("nvfp4", "weight_scale", value) for value in (0.0, -0.5, NAN, None)],
    *[("nvfp4", "weight_global_scale", value) for value in (0.0, -0.5, NAN, INF, None)],
    *[("nvfp4", "input_global_scale", value) for value in (0.0, NAN, None)],
    *[("mxfp4a16", "weight_scale", value) for value in (NAN, None)],
    *[("mxfp8", "weight_scale", value) for value in (NAN, None)],
    *[("w8a8-int8-static-asym", "input_scale", value) for value in (0.0, -0.5, NAN, INF, None)],
    *[
        ("kv-fp8-head", leaf, value)
        for leaf in ("k_scale", "v_scale")
        for value in (0.0, -0.5, NAN, INF, None)
    ],
]


@pytest.mark.parametrize(("name", "leaf", "value"), SCALES, ids=str)
def test_a_scale_that_is_no_scale_is_refused_by_its_name(name, leaf, value, tmp_path):
    folder, tensor = spoiled(name, leaf, value, tmp_path)
    if value is None:
        says = rf"(missing tensors|are missing): {tensor}"
    else:
        says = f"a scale of 0 or below in {tensor}" if value <= 0 else f"NaN or infinity in {tensor}"
    with pytest.raises(ModelError, match=says):
        quantkit.load(folder, device="cpu")
