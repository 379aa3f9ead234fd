"""`quantkit.load`: packed and plain folders, placement, refusals, and who else loads the same files."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from quantkit_kernels import unpack_bits
from quantkit_kernels.cpu import library
from racing import race
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import quantkit
from quantkit.checkpoint import load as loading
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.errors import BackendError, ModelError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.scheme import Scheme, integer

SYM, ASYM = Scheme(integer(4, 32, True)), Scheme(integer(4, 32, False))
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids.to(model.device), **kwargs).logits


def packed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def _id(scheme):
    return getattr(scheme, "__name__", str(scheme))


def mixed(name):
    """3 bits in groups, down projections in 8 bits per channel, the head asymmetric."""
    if name == "lm_head":
        return Scheme(integer(5, 16, False))
    return Scheme(integer(8, None, True)) if name.endswith("down_proj") else Scheme(integer(3, 32, True))


@pytest.mark.parametrize(
    "scheme", [SYM, ASYM, Scheme(integer(3, 16, False)), Scheme(integer(6, None, True)), mixed], ids=_id
)
def test_logits_equal_the_dequantized_model(packed_llama, scheme):
    if scheme is mixed:
        folder, dense = packed_llama(scheme, ignore=())
    else:
        folder, dense = packed_llama(scheme)
    model = quantkit.load(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert len(packed(model)) == (15 if scheme is mixed else 14)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_scales_keep_the_stored_dtype_and_the_rest_gets_the_one_asked_for(packed_llama, stored, dtype):
    folder, dense = packed_llama(ASYM, stored=stored)
    model = quantkit.load(folder, dtype=dtype)
    assert {m.weight_scale.dtype for m in packed(model).values()} == {stored}
    assert {p.dtype for p in model.parameters()} == {stored if dtype == "auto" else dtype}
    if model.dtype == torch.float32:
        assert torch.equal(logits(model), logits(dense))


FAMILIES = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64),
    "opt": OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        word_embed_proj_dim=64, max_position_embeddings=64,
    ),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        tie_word_embeddings=False,
    ),
    "falcon": FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_conv1d_subclasses_biases_and_tied_heads(pack_config, family):
    folder, dense = pack_config(FAMILIES[family], lambda name: None if "head" in name else ASYM)
    model = quantkit.load(folder)
    names = {name.rpartition(".")[2] for name in packed(model)}
    assert not any(hasattr(module, "weight") for module in packed(model).values())
    assert (
        names
        == {
            "gpt2": {"c_attn", "c_proj", "c_fc"},
            "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
            "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
            "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        }[family]
    )
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)


def test_llama_with_biases_and_a_tied_head(packed_llama):
    folder, dense = packed_llama(SYM, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    model = quantkit.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(module.bias is not None for module in packed(model).values())
    assert torch.equal(logits(model), logits(dense))


def test_unquantized_folders_load_plainly(tmp_path, random_llama):
    random_llama.save_pretrained(tmp_path)
    model = quantkit.load(tmp_path)
    assert torch.equal(logits(model), logits(random_llama))
    with pytest.raises(BackendError, match="no packed linears"):
        quantkit.load(tmp_path, backend="torch")


@pytest.mark.parametrize("scheme", [SYM, ASYM, Scheme(integer(8, None, True))], ids=str)
def test_a_named_backend_runs_every_packed_linear(packed_llama, scheme):
    folder, dense = packed_llama(scheme)
    model = quantkit.load(folder, backend="torch")
    assert {m.backend for m in packed(model).values()} == {"torch"}
    assert not any(m.leaves for m in packed(model).values())
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)
    with pytest.raises(BackendError, match="what a checkpoint stores"):
        model.save_pretrained(folder.parent / "again")


def test_the_environment_forces_a_backend(packed_llama, monkeypatch):
    folder, _ = packed_llama(SYM)
    monkeypatch.setenv("QUANTKIT_BACKEND", "torch")
    assert {m.backend for m in packed(quantkit.load(folder)).values()} == {"torch"}
    monkeypatch.setenv("QUANTKIT_BACKEND", "nope")
    with pytest.raises(BackendError, match="unknown backend 'nope'"):
        quantkit.load(folder)


def test_saving_a_loaded_model_gives_the_same_checkpoint(packed_llama, tmp_path):
    folder, dense = packed_llama(mixed, ignore=())
    quantkit.load(folder, dtype="auto").save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(quantkit.load(tmp_path / "again")), logits(dense))


def test_generate_pads_left_and_continues_like_single_rows(packed_llama):
    folder, dense = packed_llama(ASYM)
    model = quantkit.load(folder)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = [IDS[0, :5], IDS[1, :9]]
    batch = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, -len(row) :], mask[i, -len(row) :] = row, 1
    together = model.generate(batch, attention_mask=mask, **settings)[:, 9:]
    for i, row in enumerate(rows):
        for other in (model, dense):
            single = other.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
            assert torch.equal(single[0, len(row) :], together[i])


def test_the_text_generation_pipeline_runs(packed_llama):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder, dense = packed_llama(SYM)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    tokenizer.padding_side = "left"
    texts = ["w5 w6 w7", "w9"]

    def run(model):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
        return generate(texts, batch_size=2, max_new_tokens=5, do_sample=False)

    assert run(quantkit.load(folder)) == run(dense)


def layer_map(model, where):
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    return dict.fromkeys(names, "cpu") | {f"model.layers.{i}": where[i] for i in range(len(where))}


@pytest.mark.parametrize("where", [("cpu", "disk"), ("disk", "disk")])
def test_a_device_map_with_disk_gives_the_same_logits(packed_llama, tmp_path, where):
    folder, dense = packed_llama(ASYM)
    model = quantkit.load(folder, device_map=layer_map(dense, where), offload_folder=tmp_path / "offload")
    offloaded = [name for name, m in packed(model).items() if m.offloaded]
    assert len(offloaded) == 7 * where.count("disk")
    assert torch.equal(logits(model), logits(dense))
    assert torch.equal(logits(model), logits(dense))  # the second time layers come back from disk
    with pytest.raises(BackendError, match="needs every layer in memory"):
        quantkit.load(folder, device_map=layer_map(dense, where), backend="torch")


def test_an_automatic_map_keeps_to_max_memory(packed_llama, tmp_path):
    folder, dense = packed_llama(SYM, num_hidden_layers=4)
    model = quantkit.load(
        folder, device_map="auto", max_memory={"cpu": 120_000}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in model.hf_device_map.values()
    assert any(m.offloaded for m in packed(model).values())
    assert torch.equal(logits(model), logits(dense))


def rewrite(folder, change):
    """Apply `change(tensors)` to the stored tensors of `folder`."""
    file = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"


def without(name):
    return lambda tensors: tensors.pop(name)


def having(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}.weight_scale"), rf"missing tensors: {Q}.weight_scale"),
        (without(f"{Q}.weight_packed"), rf"missing tensors: {Q}.weight_packed"),
        (without("model.norm.weight"), "missing tensors: model.norm.weight"),
        (having(f"{Q}.weight_order", lambda _: torch.zeros(64)), rf"no place for: {Q}.weight_order"),
        (
            having(f"{Q}.weight_scale", lambda _: torch.ones(1, 1)),
            r"q_proj.weight_scale is \[1, 1\].*\[64, 2\]",
        ),
        (having("model.norm.weight", lambda _: torch.ones(1)), r"model.norm.weight is \[1\].*\[64\]"),
        (having(f"{Q}.weight_packed", torch.Tensor.long), "weight_packed is I64, not I32"),
        (having(f"{Q}.weight_scale", torch.Tensor.int), "weight_scale has the dtype I32"),
        (
            having(f"{Q}.weight_shape", lambda _: torch.tensor([64, 32])),
            r"q_proj: weight_shape says \[64, 32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(packed_llama, change, message):
    folder, _ = packed_llama(SYM)
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        quantkit.load(folder)


def in_older_words(codes, bits):
    """int32 [rows, ceil(M / floor(32 / b))], lowest bits first, as compressed-tensors packed before May 2026."""
    count = 32 // bits
    words = torch.zeros(len(codes), -(-codes.shape[1] // count), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // count] |= codes[:, column].long() << bits * (column % count)
    return words.to(torch.int32)


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (None, True)])
def test_the_older_packing_is_read(packed_llama, bits, group, symmetric):
    folder, dense = packed_llama(Scheme(integer(bits, group, symmetric)))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = quantkit.load(folder, device="cpu")(ids).logits

    def older(tensors):
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            owner = name.removesuffix(".weight_packed")
            n, k = tensors[f"{owner}.weight_shape"].tolist()
            tensors[name] = in_older_words(unpack_bits(tensors[name], bits, k), bits)
            assert tensors[name].shape != (n, -(-k * bits // 32))
            if f"{owner}.weight_zero_point" in tensors:
                zero = unpack_bits(tensors[f"{owner}.weight_zero_point"].T.contiguous(), bits, n)
                tensors[f"{owner}.weight_zero_point"] = in_older_words(zero, bits).T.contiguous()

    rewrite(folder, older)
    model = quantkit.load(folder, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted)
    checkpoint = Source(read_checkpoint(folder))
    assert torch.equal(checkpoint.tensor(f"{Q}.weight", torch.float32), dense.get_submodule(Q).weight)
    report = inspect_checkpoint(folder)
    assert report["totals"]["quantized_layers"] == 14


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_missing_tensors_of_a_plain_model_are_named(tmp_path, random_llama):
    random_llama.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"missing tensors: model\.norm\.weight"):
        quantkit.load(tmp_path)


def test_folders_and_configs_that_cannot_be_read(packed_llama, tmp_path):
    folder, _ = packed_llama(SYM)
    with pytest.raises(ModelError, match="no folder"):
        quantkit.load(tmp_path / "nothing here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        quantkit.load(tmp_path / "empty")
    old = {"actorder": "columns"}
    edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(old))
    with pytest.raises(ModelError, match="actorder 'columns'"):
        quantkit.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        quantkit.load(folder)


def test_truncated_weights_and_remote_code_are_refused(packed_llama):
    folder, _ = packed_llama(SYM)
    edit_config(folder, lambda c: c.update(model_type="own", auto_map={"AutoConfig": "evil.Config"}))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="custom code which must be executed"):
        quantkit.load(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="truncated"):
        quantkit.load(folder)


def test_devices_that_are_not_there_are_refused(packed_llama):
    folder, _ = packed_llama(SYM)
    with pytest.raises(ModelError, match="cuda:99 is not available"):
        quantkit.load(folder, device="cuda:99")
    with pytest.raises(ModelError, match="'gpu' is not a device"):
        quantkit.load(folder, device="gpu")
    with pytest.raises(ModelError, match="not both"):
        quantkit.load(folder, device="cpu", device_map="auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loads_and_generates_on_cuda(packed_llama):
    folder, dense = packed_llama(ASYM)
    model = quantkit.load(folder, device="cuda", dtype=torch.float32)
    assert model.device.type == "cuda"
    assert quantkit.load(folder).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).cpu(), logits(dense), rtol=0, atol=1e-4)


# What plain transformers with compressed-tensors 0.20 does with the same files, as docs/checkpoint.md records it.
NEW = Version(transformers.__version__) >= Version("5.23.0")


def plain_load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def dequantizing(folder):
    return plain_load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


def symmetric_mixed(name):
    return (
        None
        if name == "lm_head"
        else Scheme(integer(8, None))
        if name.endswith("down_proj")
        else Scheme(integer(3, 32))
    )


@pytest.mark.parametrize(
    "scheme", [SYM, Scheme(integer(3, 32, True)), Scheme(integer(8, None, True)), symmetric_mixed], ids=_id
)
def test_plain_transformers_loads_symmetric_checkpoints_equally(packed_llama, scheme):
    folder, _ = packed_llama(scheme)
    assert torch.equal(logits(plain_load(folder)), logits(quantkit.load(folder)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_plain_transformers_since_5_23_needs_dequantize_for_asymmetric_checkpoints(packed_llama):
    folder, _ = packed_llama(ASYM, stored=torch.float32)
    ours = logits(quantkit.load(folder))
    if NEW:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            plain_load(folder)
    else:
        assert torch.equal(logits(plain_load(folder)), ours)
    assert torch.equal(logits(dequantizing(folder)), ours)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_dequantize_since_5_23_reads_several_schemes_by_the_first(packed_llama):
    folder, _ = packed_llama(symmetric_mixed, stored=torch.float32)
    off = (logits(dequantizing(folder)) - logits(quantkit.load(folder))).abs().max()
    assert off > 0.1 if NEW else off == 0


def test_plain_transformers_leaves_conv1d_random_and_only_warns(pack_config):
    folder, _ = pack_config(FAMILIES["gpt2"], lambda name: None if "head" in name else SYM)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "transformer.h.0.attn.c_attn.weight" in info["missing_keys"]


MEASURE = """
import sys, torch, quantkit
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def run(path, peak=lambda: None):
    model = quantkit.load(path, backend=sys.argv[3])
    for module in model.modules():
        module.register_forward_hook(lambda *_: peak())
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.long))

seen = []
run(sys.argv[2])
before = anonymous()
run(sys.argv[1], lambda: seen.append(anonymous()))
print(max(seen) - before)
"""
# glibc gives freed memory back to the system at once; by default it keeps some, more or less as threads happen to run.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_running_model_is_never_dense_in_memory(wide_llamas, backend):
    folder, warm, dense = wide_llamas
    command = [sys.executable, "-c", MEASURE, str(folder), str(warm), backend]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)} | AT_ONCE
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1]) / dense
    assert grown < {"reference": 0.05, "torch": 0.25}[backend], f"grew by {grown:.2f} of the dense linears"


needs_native = pytest.mark.skipif(not library.available(), reason="the native library is not built")


@needs_native
def test_a_cast_and_a_copy_of_a_running_model_give_its_results(packed_llama):
    folder, _ = packed_llama(ASYM)
    model = quantkit.load(folder, backend="cpu")
    truth = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), truth)
    assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in model.buffers()}
    unused = quantkit.load(folder, backend="cpu")
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(logits(model.to(dtype)), logits(unused.to(dtype)))


@needs_native
def test_hooks_of_a_device_map_change_no_bit(packed_llama):
    folder, dense = packed_llama(ASYM)
    place = dict.fromkeys(layer_map(dense, ("cpu", "disk")), "cpu")
    hooked = quantkit.load(folder, backend="cpu", device_map=place)
    assert torch.equal(logits(hooked), logits(quantkit.load(folder, backend="cpu")))


@needs_native
def test_eight_threads_with_one_model_give_the_serial_results(packed_llama):
    folder, _ = packed_llama(ASYM, attention_bias=True)
    model = quantkit.load(folder, backend="cpu")
    texts = [tiny_models.ids(length, seed=length) for length in (1, 1, 2, 3, 7, 1, 12, 30)]
    serial = [logits(model, ids) for ids in texts]
    wrong = []
    race(lambda i: wrong.extend(i for _ in range(8) if not torch.equal(logits(model, texts[i]), serial[i])))
    assert not wrong


@needs_native
def test_saving_a_model_that_runs_natively_writes_what_it_was_loaded_from(
    packed_llama, tmp_path, monkeypatch
):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    folder, _ = packed_llama(ASYM)
    model = quantkit.load(folder)
    assert {m.backend for m in packed(model).values()} == {"cpu"}
    logits(model)
    model.save_pretrained(tmp_path / "again")
    before = quantkit.load(folder, backend="reference").state_dict()
    after = quantkit.load(tmp_path / "again", backend="reference").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


HINT = "the native CPU kernels are not built, so decode on the CPU is about 15 times slower"


def hints(folder, **options):
    """Warnings of `load` about the native kernels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantkit.load(folder, **options)
    return [each for each in caught if HINT in str(each.message)]


def test_missing_native_kernels_are_hinted_at_once(packed_llama, monkeypatch):
    folder, _ = packed_llama(SYM)
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(loading, "_hinted", False)
    assert not hints(folder, backend="reference")
    monkeypatch.setenv("QUANTKIT_BACKEND", "reference")
    assert not hints(folder)
    monkeypatch.delenv("QUANTKIT_BACKEND")
    (hint,) = hints(folder)
    assert hint.category is UserWarning
    assert hint.filename == __file__  # the line that called `load`
    assert not hints(folder)


@pytest.mark.parametrize("scheme", [SYM, Scheme(integer(5, 32, True))], ids=str)
def test_no_hint_where_native_kernels_are_built_or_would_not_run(packed_llama, monkeypatch, scheme):
    folder, _ = packed_llama(scheme)
    monkeypatch.setattr(loading, "_hinted", False)
    if scheme is SYM and not library.available():
        pytest.skip("needs the native library (a C++ compiler)")
    if scheme is not SYM:
        monkeypatch.setattr(library, "load", lambda: None)
    assert not hints(folder)


def test_no_hint_for_a_model_without_packed_linears(random_llama, tmp_path, monkeypatch):
    random_llama.save_pretrained(tmp_path)
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(loading, "_hinted", False)
    assert not hints(tmp_path)


def misfit(model, folder, **changes):
    """A folder of `model` whose config says something else."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_tensor_of_another_shape_is_named_with_both(random_llama, tmp_path):
    folder = misfit(random_llama, tmp_path, intermediate_size=48)
    name = "model.layers.0.mlp.down_proj.weight"
    says = rf"does not fit its config.json: .*{name} is \[64, 96\] in the file and \[64, 48\] in the model"
    with pytest.raises(ModelError, match=says):
        quantkit.load(folder)


LIBRARY = """
import sys, quantkit, quantkit_eval, torch
from quantkit.errors import ModelError
from quantkit.models.tokenizer import open_tokenizer
from transformers.utils import logging
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
misfit, fits, output, text = sys.argv[1:]
try:
    quantkit.load(misfit)
except ModelError as error:
    assert "missing tensors" in str(error)
set = ["weights.group_size=32", "calibration.sequence_length=16"]
quantkit.quantize("w4a16-rtn", fits, output, set, device="cpu", eval_text=text, eval_tokens=64)
model = quantkit.load(output, device="cpu")
quantkit_eval.evaluate(model, open_tokenizer(output), text=[text], context=16, max_tokens=64)
list(quantkit.generate(model, torch.tensor([1, 2, 3]), 4))
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before == (logging.WARNING, True)
"""


def test_libraries_print_nothing_and_keep_the_users_settings(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    fits = tiny_models.save(model, tmp_path / "fits")
    wrong = misfit(model, tmp_path / "wrong", num_hidden_layers=model.config.num_hidden_layers + 1)
    text = tmp_path / "text.txt"
    text.write_text("a few words of a text that is longer than the context of the model. " * 40)
    names = ("QUANTKIT_", "TRANSFORMERS_", "HF_HUB_DISABLE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LIBRARY, wrong, fits, tmp_path / "q", text]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing = "" if library.available() else HINT
    assert done.stdout == ""
    assert missing in done.stderr if missing else done.stderr == ""


def test_a_user_who_asked_transformers_for_more_keeps_it():
    from transformers.utils import logging

    from quantkit.models.borders import quiet

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        for verbosity, inside in ((logging.INFO, logging.INFO), (logging.WARNING, logging.ERROR)):
            logging.set_verbosity(verbosity)
            with quiet(bars=False), quiet():
                assert logging.get_verbosity() == inside
                assert not logging.is_progress_bar_enabled()
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, before[1])
    finally:
        logging.set_verbosity(before[0])
