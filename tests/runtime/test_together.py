"""Sequences that decode together natively against each of them alone: the same bits."""

from dataclasses import replace

import packed_experts
import pytest
import tiny_mixtures
import tiny_models
import torch
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.together import PARTS
from torch import nn

from quantkit.algorithms.rtn import rtn
from quantkit.layers.kv_cache import attach
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import NativeDecoder, native
from quantkit.runtime.native import Sequence
from quantkit.scheme import KV_PRESETS, PRESETS, Grid, integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

LENGTHS = (3, 1, 40, 17, 8)  # of the prompts: of several decoders, some shorter than a window
PATHS = [
    name for i, name in enumerate(library.ISAS) if library.available() and library.load().qk_isa_available(i)
]
FAMILIES = ["llama-gqa", "mistral", "qwen2", "qwen3", "phi3-gqa"]


def packed(model: nn.Module, grid: Grid) -> nn.Module:
    """Every linear but the head packed, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bias = None if module.bias is None else module.bias.data
            weight = rtn(module.weight.data, grid, torch.bfloat16)
            model.set_submodule(name, QuantLinear.from_quantized(weight, bias))
    return model.requires_grad_(False)


def decoder(model: nn.Module, **options) -> NativeDecoder:
    found = native(model, **options)
    assert isinstance(found, NativeDecoder), found
    return found


def begun(run: NativeDecoder) -> list[Sequence]:
    sequences = [run.start() for _ in LENGTHS]
    for number, (sequence, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
        sequence.append(tiny_models.ids(length + number)[0, number:])
    return sequences


def assert_the_same_together(run: NativeDecoder, tolerance: float = 0.0, steps: int = 4) -> None:
    alone, together = begun(run), begun(run)
    for step in range(steps):
        tokens = tiny_models.ids(len(LENGTHS) + step)[0, step:]
        live = list(range(len(LENGTHS) - step))  # one drops out after each
        wanted = torch.cat([alone[i].append(tokens[i : i + 1]) for i in live])
        got = Sequence.step([together[i] for i in live], tokens[live])
        assert torch.isfinite(wanted).all()
        off = float((got - wanted).abs().max() / wanted.abs().max())
        assert off <= tolerance, f"step {step}: off by {off:.2g} of the largest logit"
    assert [len(each) for each in together] == [len(each) for each in alone]


@pytest.mark.parametrize("compute", ["float", "int8", "int8-token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_models_give_the_same_bits(name, compute):
    assert_the_same_together(decoder(packed(tiny_models.FAMILIES[name](), integer(4, 32)), compute=compute))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_that_are_not_quantized_give_the_same_bits(dtype):
    assert_the_same_together(decoder(tiny_models.FAMILIES["llama-gqa"]().to(dtype)))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_mixtures_give_the_same_bits(name):
    overrides = {"shared_expert_intermediate_size": 64} if name == "qwen2_moe" else {}
    model = packed_experts.packed(
        packed_experts.apart(tiny_mixtures.build(name, **overrides)), integer(4, 32)
    )
    assert_the_same_together(decoder(model))


@pytest.mark.parametrize("name", ["INT8", "INT4", "sinks"])
def test_quantized_caches_give_the_same_bits(name):
    model = tiny_models.FAMILIES["llama-gqa"]()
    attach(model, replace(KV_PRESETS["INT4"], sinks=9) if name == "sinks" else KV_PRESETS[name])
    assert_the_same_together(decoder(model))


@pytest.mark.parametrize(("preset", "tolerance"), [("NVFP4A16", 0.0), ("W8A16_FP8", 2e-5)])
def test_floats_of_four_bits_give_the_same_bits_and_of_eight_nearly(preset, tolerance):
    """Codes of FP8 are multiplied as fp32 values, whose sums go in another order for more tokens."""
    model = packed(tiny_models.FAMILIES["llama-gqa"](hidden_size=128), PRESETS[preset].weights)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare("cpu", torch.float32)
    assert_the_same_together(decoder(model), tolerance)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_frequencies_are_those_of_each_length(rope):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)], "factor": 4.0}
    family, more = ("llama-gqa", {"factor": 2.0}) if rope == "dynamic" else ("phi3", factors)
    positions = {"original_max_position_embeddings": 32} if rope == "longrope" else {}
    parameters = {"rope_theta": 10000.0, "rope_type": rope} | more | positions
    model = tiny_models.FAMILIES[family](rope_parameters=parameters, max_position_embeddings=40, **positions)
    assert_the_same_together(decoder(model))


@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set_gives_the_same_bits(path):
    before = library.isa()
    try:
        library.set_isa(path)
        assert_the_same_together(decoder(packed(tiny_models.FAMILIES["qwen3"](), integer(4, 32))))
        assert_the_same_together(decoder(tiny_models.FAMILIES["llama-gqa"]().to(torch.bfloat16)))
    finally:
        library.set_isa(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_the_same_together(decoder(packed(tiny_models.FAMILIES["llama-gqa"](), integer(4, 32))))
    finally:
        torch.set_num_threads(before)


def test_many_sequences_cross_a_page_together():
    run = decoder(packed(tiny_models.FAMILIES["llama-gqa"](max_position_embeddings=512), integer(4, 32)))
    prompts = [tiny_models.ids(120 + i)[0] for i in range(19)]
    alone, together = ([run.start() for _ in prompts] for _ in range(2))
    for sequences in (alone, together):
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.append(prompt)
    for token in range(12):
        tokens = torch.arange(19) + token
        wanted = torch.cat([each.append(tokens[i : i + 1]) for i, each in enumerate(alone)])
        assert torch.equal(Sequence.step(together, tokens), wanted), token


def test_sequences_that_do_not_belong_together_are_refused_and_nothing_is_appended():
    run, other = (decoder(tiny_models.FAMILIES["llama-gqa"]()) for _ in range(2))
    one, two, foreign = run.start(), run.start(), other.start()
    for wrong, tokens in (
        ([one, one], [1, 2]),
        ([one, foreign], [1, 2]),
        ([one, two], [1, 128]),
        ([one, two], [-1, 1]),
        ([one, two], [1]),
    ):
        with pytest.raises(ValueError, match=r"decoder refused a step|wanted int64 tokens"):
            Sequence.step(wrong, torch.tensor(tokens))
    narrow = decoder(run_model := tiny_models.FAMILIES["llama-gqa"](), cache_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one model"):
        Sequence.step([native(run_model).start(), narrow.start()], torch.tensor([1, 2]))
    assert len(one) == len(two) == len(foreign) == 0


def test_the_time_of_steps_is_that_of_their_parts():
    model = packed_experts.packed(packed_experts.apart(tiny_mixtures.build("mixtral")), integer(4, 32))
    run = decoder(model)
    sequences = [run.start(), run.start()]
    with sequences[0].timed() as seconds:
        sequences[0].append(tiny_models.ids(9)[0])
        first = dict(seconds)
        Sequence.step(sequences[:1] + sequences[1:], torch.tensor([1, 2]))
    assert first == dict.fromkeys(PARTS, 0.0)  # complete when the block ends
    assert all(value > 0 for value in seconds.values())
    before = dict(seconds)
    sequences[0].append(torch.tensor([3]))
    assert seconds == before
