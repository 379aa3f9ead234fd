"""The native decoder against the eager model, on tiny random models of every family it knows."""

import ctypes
import gc
import os
import shutil
import subprocess
import threading
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import library
from torch import nn

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import NativeDecoder, native
from quantkit.runtime.native import Sequence
from quantkit.scheme import INT8_TOKEN, Grid, integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

KNOWN = [
    name
    for name in tiny_models.CONFIGS
    if tiny_models.CONFIGS[name][0] in ("llama", "mistral", "qwen2", "qwen3", "phi3")
]
PATHS = [
    name for i, name in enumerate(library.ISAS) if library.available() and library.load().qk_isa_available(i)
]
LONG = {"max_position_embeddings": 512}
TOLERANCE = 2e-5  # of the largest logit; fp32 sums in another order reach a tenth of it
_ROPE = {"rope_theta": 10000.0}
_YARN = _ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_DYNAMIC = _ROPE | {"rope_type": "dynamic", "factor": 2.0}
_PARTIAL = _ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}
_LONGROPE = _ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "tied": ("llama-gqa", {"tie_word_embeddings": True}),
    "odd-sizes": (
        "llama-gqa",
        {"hidden_size": 60, "head_dim": 20, "intermediate_size": 90, "vocab_size": 101},
    ),
    "one-kv-head": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 48, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "yarn": ("llama-gqa", {"rope_parameters": _YARN}),
    "partial-rotary": ("phi3-gqa", {"rope_parameters": _PARTIAL}),
    "longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 40}),
    "qwen3-window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
}


def decoder(model: nn.Module, **options) -> NativeDecoder:
    found = native(model, **options)
    assert isinstance(found, NativeDecoder), found
    return found


@torch.no_grad()
def eager(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[length, vocabulary]"""
    return model(input_ids=ids[None]).logits[0]


def assert_close(got: torch.Tensor, truth: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == truth.shape
    error = float((got - truth).abs().max() / truth.abs().max())
    assert error < tolerance, f"off by {error:.2g} of the largest logit"


def quantized(model: nn.Module, grid: Grid, dtype=torch.bfloat16) -> nn.Module:
    """Every linear but the head packed, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bias = None if module.bias is None else module.bias.data
            model.set_submodule(name, QuantLinear.from_quantized(rtn(module.weight.data, grid, dtype), bias))
    return model.requires_grad_(False)


def test_inputs_in_int8_per_token_are_rounded_as_the_layers_do():
    model, ids = tiny_models.FAMILIES["llama-gqa"](), tiny_models.ids(40)[0]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = rtn(module.weight.data, integer(8, None), torch.bfloat16)
            model.set_submodule(name, QuantLinear.from_quantized(weight, None, inputs=INT8_TOKEN))
    assert "rounds its inputs" in native(model)  # by torch, which the decoder does not call
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare("cpu", torch.float32)
    got = decoder(model).start().append(ids, keep=40)
    truth, other = eager(model, ids), decoder(model, compute="int8").start().append(ids, keep=40)
    off, apart = ((logits - truth).square().mean().sqrt() for logits in (got, other))
    assert off < 0.3 * apart  # a code may flip, but they are not rounded another way
    assert torch.equal(decoder(model, compute="float").start().append(ids, keep=40), got)


@pytest.mark.parametrize("name", KNOWN)
def test_logits_are_those_of_the_eager_model(name):
    model, ids = tiny_models.FAMILIES[name](), tiny_models.ids(100)[0]
    assert_close(decoder(model).start().append(ids, keep=100), eager(model, ids))


@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set_gives_the_same_logits(path):
    before = library.isa()
    model, ids = tiny_models.FAMILIES["qwen3"](), tiny_models.ids(40)[0]
    try:
        library.set_isa(path)
        assert_close(decoder(model).start().append(ids, keep=40), eager(model, ids))
    finally:
        library.set_isa(before)


@pytest.fixture(scope="module")
def widest(tmp_path_factory):
    """The decoder's sources with the AVX-512 path's vectors, run by whatever this machine has. Dense matrices only."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("widest")
    (folder / "rest.cpp").write_text(
        '#include "common.h"\n'
        'extern "C" int qk_isa() { return qk::AVX512; }\n'
        "namespace qk {\n"
        "bool supported(const Weight &) { return false; }\n"
        "size_t scratch_bytes(const Weight &, int64_t, int) { return 0; }\n"
        "void prepare_part(const Weight &, const void *, int, int64_t, int64_t, int, void *, int, int) {}\n"
        "void run_part(const Weight &, const void *, int64_t, int, void *, int, int64_t, int, int) {}\n"
        "void run_blocks_of(const Weight &, const void *, int64_t, void *, int, int64_t, int, int) {}\n"
        "}\n"
    )
    sources = Path(library.__file__).parent
    command = [compiler, "-std=c++17", "-O1", "-fopenmp", "-fPIC", "-shared", "-DQK_EMULATE"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{sources}", "-o", str(folder / "widest.so")]
    command += os.environ.get("QUANTKIT_CXXFLAGS", "").split()
    files = [*sources.glob("decode*.cpp"), sources / "grouped.cpp", folder / "rest.cpp"]
    subprocess.run([*command, *map(str, files)], check=True)
    return ctypes.CDLL(str(folder / "widest.so"))


@pytest.mark.parametrize("name", ["qwen2", "phi3-gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_avx512_sized_vectors_give_the_same_logits(widest, name, dtype, monkeypatch):
    monkeypatch.setattr(library, "required", lambda: widest)
    odd = {"hidden_size": 72, "head_dim": 20, "vocab_size": 101}
    model, ids = tiny_models.FAMILIES[name](**odd), tiny_models.ids(60, vocabulary=101)[0]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    got = decoder(model).start().append(ids, keep=60)
    assert_close(got, eager(model.float(), ids))


def test_avx512_sized_vectors_give_the_same_bits_together(widest, monkeypatch):
    monkeypatch.setattr(library, "required", lambda: widest)
    run = decoder(tiny_models.FAMILIES["qwen2"](hidden_size=72, head_dim=20, vocab_size=101).bfloat16())
    alone, together = ([run.start() for _ in range(4)] for _ in range(2))
    tokens = torch.tensor([5, 6, 7, 8])
    for _ in range(3):
        wanted = torch.cat([each.append(tokens[i : i + 1]) for i, each in enumerate(alone)])
        assert torch.equal(Sequence.step(together, tokens), wanted)


def test_a_half_precision_model_keeps_more_than_eager_does():
    """Packed linears of a bf16 model take 15 bits of each activation; eager rounds everything to bf16."""
    grid, ids = integer(4, 32, True), tiny_models.ids(60)[0]
    model = quantized(tiny_models.FAMILIES["llama-gqa"](), grid).to(torch.bfloat16)
    got, rounded = decoder(model).start().append(ids, keep=60), eager(model, ids).float()
    exact = eager(model.float(), ids)
    assert 0 < float((got - exact).norm()) < float((rounded - exact).norm()) / 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_within_a_family(variant):
    """Prompt, then token by token, as transformers does it: some rope types depend on that."""
    name, overrides = VARIANTS[variant]
    model, ids = tiny_models.FAMILIES[name](**overrides), tiny_models.ids(60, vocabulary=101)[0]
    sequence, cache = decoder(model).start(), None
    for part in (ids[:20], *ids[20:].split(1)):
        with torch.no_grad():
            out = model(input_ids=part[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_close(sequence.append(part, keep=len(part)), out.logits[0])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_equals_prefill_at_once(name, chunk):
    start, ids = decoder(tiny_models.FAMILIES[name]()).start, tiny_models.ids(100)[0]
    assert_close(start().append(ids, 100, chunk), start().append(ids, 100), TOLERANCE / 2)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_the_cache_grows_past_its_first_pages(name, cache_dtype):
    """300 positions over pages of 128, the last ones token by token, with windows that cross the border."""
    overrides = {} if name == "llama-gqa" else {"sliding_window": 100}
    model, ids = tiny_models.FAMILIES[name](**LONG, **overrides), tiny_models.ids(300)[0]
    sequence = decoder(model, cache_dtype=cache_dtype).start()
    small = sequence.cache_bytes
    got = [sequence.append(part, len(part)) for part in (ids[:120], *ids[120:140].split(1), ids[140:250])]
    middle = sequence.cache_bytes
    got += [sequence.append(part) for part in ids[250:].split(1)]
    assert small < middle < sequence.cache_bytes
    assert len(sequence) == 300
    assert_close(torch.cat(got), eager(model, ids), TOLERANCE if cache_dtype == torch.float32 else 0.02)


def test_truncated_sequences_continue_as_if_nothing_had_been():
    model, ids = tiny_models.FAMILIES["mistral"](), tiny_models.ids(60)[0]
    sequence = decoder(model).start()
    sequence.append(ids[:40])
    sequence.append(ids.flip(0)[:15])
    sequence.truncate(40)
    assert_close(sequence.append(ids[40:], keep=20), eager(model, ids)[40:])
    with pytest.raises(ValueError, match="61 of 60"):
        sequence.truncate(61)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_weights_stay_in_their_dtype(dtype):
    """Against fp32 arithmetic on the same 16-bit weights."""
    model, ids = tiny_models.FAMILIES["qwen2"]().to(dtype), tiny_models.ids(50)[0]
    truth = tiny_models.FAMILIES["qwen2"]()
    truth.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    model.model.rotary_emb = truth.model.rotary_emb  # which `.to` has rounded
    found = decoder(model)
    assert (
        found.tables.layers[0].o.weight.data_ptr() == model.model.layers[0].self_attn.o_proj.weight.data_ptr()
    )
    assert_close(found.start().append(ids, keep=50), eager(truth, ids))


@pytest.mark.parametrize(
    "grid", [integer(4, 32, False), integer(4, 64, True), integer(3, 32, False), integer(8, None, True),
               integer(6, 32, True), integer(5, None, False), integer(2, 32, False)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama-bias", "phi3-gqa"])
def test_packed_linears(name, grid):
    model, ids = quantized(tiny_models.FAMILIES[name](), grid), tiny_models.ids(50)[0]
    truth, sequence = eager(model, ids), decoder(model).start()
    got = torch.cat([sequence.append(ids[:40], 40), *(sequence.append(t) for t in ids[40:].split(1))])
    assert_close(got, truth, 2e-4)


@pytest.mark.parametrize("compute", ["int8", "int8-token"])
def test_int8_activations_are_near(compute):
    model = quantized(tiny_models.FAMILIES["llama-gqa"](), integer(4, 32, False))
    ids = tiny_models.ids(50)[0]
    truth, got = eager(model, ids), decoder(model, compute=compute).start().append(ids, keep=50)
    assert not torch.allclose(got, truth, rtol=0, atol=1e-4)  # or the option does nothing
    assert ((got - truth).square().mean() / truth.square().mean()).sqrt() < 0.1


def test_a_mixed_model_runs_with_siblings_of_different_kinds():
    model, ids = tiny_models.FAMILIES["llama-bias"](), tiny_models.ids(50)[0]
    layers = model.model.layers
    for module, grid in (
        (layers[0].self_attn, {"q_proj": integer(4, 32, False), "v_proj": integer(8, None, True)}),
        (layers[1].mlp, {"up_proj": integer(3, 64, True)}),
        (layers[2].self_attn, {"k_proj": integer(4, 64, True), "v_proj": integer(8, 64, True)}),
    ):
        for name, each in grid.items():
            linear = getattr(module, name)
            packed = rtn(linear.weight.data, each, torch.bfloat16)
            setattr(module, name, QuantLinear.from_quantized(packed, linear.bias.data))
    assert_close(decoder(model).start().append(ids, keep=50), eager(model, ids), 2e-4)


def test_a_layout_that_is_built_already_is_used_without_a_copy():
    model, ids = quantized(tiny_models.FAMILIES["llama"](), integer(4, 32, False)), tiny_models.ids(30)[0]
    truth, packed = eager(model, ids), [m for m in model.modules() if isinstance(m, QuantLinear)]
    for module in packed:
        module.prepare("cpu", torch.float32, "int8")
    found = decoder(model)
    assert found.compute == "int8"
    units = [m.weight.units for layer in found.tables.layers for m in (layer.o, layer.down)]
    assert {u.data_ptr() for u in units} <= {m.units.data_ptr() for m in packed}
    assert_close(decoder(model, compute="float").start().append(ids, keep=30), truth, 2e-4)
    packed[0].prepare("cpu", torch.float32)
    assert "compute float and int8" in native(model)


def test_a_layout_of_another_backend_is_refused_by_name():
    model = quantized(tiny_models.FAMILIES["llama"](), integer(4, 32, False))
    model.model.layers[2].mlp.up_proj.prepare("torch", torch.float32)
    assert "model.layers.2.mlp.up_proj runs on backend 'torch'" in native(model)


def test_eight_threads_with_a_sequence_each():
    """Together as one after the other, to the bit, also while they ask for the decoder at the same time."""
    model = tiny_models.FAMILIES["llama-gqa"](**LONG)
    texts = [tiny_models.ids(140 + i, seed=i)[0] for i in range(8)]

    def run(ids: torch.Tensor) -> torch.Tensor:
        sequence = decoder(model).start()
        return torch.cat([sequence.append(ids[:130], 130), *(sequence.append(t) for t in ids[130:].split(1))])

    alone = [run(ids) for ids in texts]
    together = [None] * 8

    def work(i: int) -> None:
        together[i] = run(texts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_does_not_matter(threads):
    """5 threads are more than key-value heads: query heads of one group are then split."""
    before = torch.get_num_threads()
    model, ids = tiny_models.FAMILIES["qwen3"](), tiny_models.ids(21)[0]

    def run() -> torch.Tensor:
        sequence = decoder(model).start()
        return torch.cat([sequence.append(ids[:20], 20), sequence.append(ids[20:])])

    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(threads)
        assert_close(run(), one, TOLERANCE / 2)
    finally:
        torch.set_num_threads(before)


def test_other_families_say_why_they_run_eager():
    for name in set(tiny_models.CONFIGS) - set(KNOWN):
        assert "the native path knows llama, mistral" in native(tiny_models.FAMILIES[name]())


def test_what_the_tables_cannot_show_is_refused_by_name():
    def reason(change) -> str:
        model = tiny_models.FAMILIES["llama"]()
        change(model)
        found = native(model)
        assert isinstance(found, str)
        return found

    attention = "model.layers.1.self_attn"
    assert "o_proj has forward hooks" in reason(
        lambda m: m.get_submodule(attention).o_proj.register_forward_hook(print)
    )
    assert f"{attention}.q_proj is a Sequential" in reason(
        lambda m: setattr(
            m.get_submodule(attention), "q_proj", nn.Sequential(m.get_submodule(attention).q_proj)
        )
    )
    assert "forward of model.norm was replaced" in reason(lambda m: setattr(m.model.norm, "forward", print))
    assert "uses GELU" in reason(lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()))
    assert "is on meta" in reason(lambda m: m.lm_head.to("meta"))
    assert "float64" in reason(lambda m: m.lm_head.double())


def test_the_tables_are_made_once_and_anew_when_a_weight_changes():
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(20)[0]
    first = decoder(model)
    assert decoder(model) is first
    model.model.norm.weight.mul_(2)
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(128, 64)
    assert decoder(model) is not first
    assert_close(decoder(model).start().append(ids, keep=20), eager(model, ids))


def test_a_dropped_model_is_freed():
    model = tiny_models.FAMILIES["llama"]()
    decoder(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_token_outside_the_vocabulary_is_an_error():
    sequence = decoder(tiny_models.FAMILIES["llama"]()).start()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sequence.append(torch.tensor([5, 128]))
    assert len(sequence) == 0
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sequence.append(torch.tensor([-1]))
