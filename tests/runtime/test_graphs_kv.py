"""The captured decode step of a model with a quantized KV cache, on a tape (`taped.py`) or run as it is."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from taped import decode

from quantkit.errors import ModelError
from quantkit.layers.kv_attention import NAME
from quantkit.layers.kv_buffer import KVBuffer, Seen
from quantkit.layers.kv_cache import attach
from quantkit.numerics.hadamard import hadamard
from quantkit.numerics.kv import KVScales, encode
from quantkit.runtime import GraphDecoder, buffers, graphs
from quantkit.scheme import KV_PRESETS, NUMBERS, Grid, KVScheme

INT8, FP8 = KV_PRESETS["INT8"], KV_PRESETS["FP8"]
ROTATED = replace(INT8, rotate=True)
FAMILIES = [
    "llama-gqa",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3-gqa",
    "opt",
    "gpt2",
]
SCHEMES = {"INT8": INT8, "INT8 rotated": ROTATED, "FP8": FP8, "FP8_TENSOR": KV_PRESETS["FP8_TENSOR"]}


def scales_of(scheme, heads):
    if scheme.dynamic:
        return None
    shape = (1,) if scheme.keys.granularity == "tensor" else (heads, 1, 1)
    grow = torch.linspace(1, 2, shape[0]).view(shape)
    return {i: KVScales((0.011 * grow).bfloat16(), (0.004 * grow).bfloat16()) for i in range(3)}


def model_of(name, scheme):
    model = tiny_models.FAMILIES[name]()
    config = model.config
    attach(
        model, scheme, scales_of(scheme, getattr(config, "num_key_value_heads", config.num_attention_heads))
    )
    return model


def same(name, scheme, steps=33):
    """33 steps from a prompt of 5: past the sliding windows, which are 8 long."""
    model, ids = model_of(name, scheme), tiny_models.ids(5)
    assert graphs.unfit(model) is None
    decoder = GraphDecoder(model, steps)
    tokens, logits = decode(model, ids, steps)
    found_tokens, found = decode(decoder, ids, steps)
    assert decoder.why_eager is None
    whole = torch.cat([ids, torch.tensor([tokens[:-1]])], 1)
    with torch.no_grad():
        exact = tiny_models.FAMILIES[name]()(whole).logits[0, ids.shape[1] - 1 :]
    rounding = float((logits - exact).norm())
    assert rounding > 1e-4 * float(exact.norm())  # what is compared is quantized
    assert (
        float((found - logits).norm()) < 0.2 * rounding
    )  # an entry between two codes may take the other one
    assert float((found - logits).abs().median()) < 3e-5
    assert found_tokens == tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_the_step_is_that_of_the_quantized_cache(name, tape):
    """Among them GQA, soft-capping (gemma2) and sliding windows (mistral, qwen2, gemma2, gemma3)."""
    same(name, INT8)
    assert len(tape) == 1


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("taped", [True, False])
def test_every_scheme_that_is_held(name, taped, request):
    if taped:
        request.getfixturevalue("tape")
    same("llama-gqa", SCHEMES[name], 20)


def test_sequences_follow_each_other_in_the_same_memory(tape):
    model = model_of("llama-gqa", INT8)
    for length, new in ((30, 20), (4, 40), (5, 8)):
        ids = tiny_models.ids(length, seed=length)
        assert decode(GraphDecoder(model, new), ids, new)[0] == decode(model, ids, new)[0]
    assert len(tape) == 1


def test_another_cache_is_captured_anew(tape):
    model, ids = model_of("llama-gqa", INT8), tiny_models.ids(6)
    decode(GraphDecoder(model, 9), ids, 9)
    attach(model, ROTATED)
    found = decode(GraphDecoder(model, 9), ids, 9)[1]
    torch.testing.assert_close(found, decode(model, ids, 9)[1], rtol=0, atol=3e-5)
    assert len(tape) == 2


def test_the_memory_is_that_of_codes():
    model, ids = model_of("llama-gqa", INT8), tiny_models.ids(60)
    memory = GraphDecoder(model, 5)(input_ids=ids).past_key_values.buffers
    for layer in memory.layers:
        buffer = layer.buffer
        assert buffer.keys.dtype == buffer.values.dtype == torch.int8
        assert buffer.keys.shape == buffer.values.shape == (1, 2, 128, 16)
        assert [scale.shape for scale in buffer.scales] == [(1, 2, 128)] * 2
        assert not hasattr(layer, "keys") or layer.keys is None


@pytest.mark.parametrize("name", ["INT8", "INT8 rotated", "FP8", "FP8_TENSOR"])
def test_entries_are_the_codes_of_the_cache(name):
    """As `quantkit.numerics.kv` rounds them, which is what the eager cache holds."""
    scheme = SCHEMES[name]
    x = torch.randn(2, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = None if scheme.dynamic else scales_of(scheme, 2)[0]
    buffer = KVBuffer(scheme, scales, x[0], 20, Seen())
    buffer.write(x[0, :, :, :4], x[1, :, :, :4], torch.tensor(3))
    buffer.write(x[0, :, :, 4:], x[1, :, :, 4:], torch.tensor(7))
    entries = (hadamard(x[0].float()) if scheme.rotate else x[0], x[1])
    stored = (None, None) if scales is None else (scales.keys, scales.values)
    held = zip((buffer.keys, buffer.values), buffer.scales, entries, stored, strict=True)
    for codes, scale, entry, of in held:
        made = encode(entry, scheme.keys, of)
        assert torch.equal(codes[:, :, 3:12].float(), made.codes.float())
        if of is None:
            assert torch.equal(scale[:, :, 3:12, None], made.scale)
        assert not codes[:, :, :3].float().any()
        assert not codes[:, :, 12:].float().any()


def test_a_mask_is_read_once_for_all_layers():
    seen = Seen()
    mask = torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.bool).view(1, 1, 1, 6)
    first, end = seen.of(mask)
    assert (first.dtype, first.tolist(), end.tolist()) == (torch.int32, [2], [5])
    assert seen.of(mask)[0] is first
    seen.forget()
    assert seen.of(mask)[0] is not first
    for wrong in (None, mask.float(), mask.expand(2, 1, 1, 6)):
        with pytest.raises(ModelError, match="needs a mask of places"):
            seen.of(wrong)


def test_what_is_not_captured_is_named(monkeypatch):
    int8 = Grid(NUMBERS["int8"], "tensor")
    for scheme, reason in (
        (KV_PRESETS["INT4"], "captured graphs hold INT8"),
        (replace(INT8, residual=8), "the newest tokens exact"),
        (replace(INT8, sinks=4), "the first tokens exact"),
        (KVScheme(int8, int8), "captured graphs hold INT8"),
        (KVScheme(INT8.keys, KV_PRESETS["INT4"].values), "captured graphs hold INT8"),
    ):
        assert reason in graphs.unfit(model_of("llama-gqa", scheme)), scheme
    model = model_of("llama-gqa", INT8)
    monkeypatch.setattr(model.config, "head_dim", 512)
    assert "heads of 512 channels" in graphs.unfit(model)
    model = model_of("llama-gqa", INT8)
    model.set_attn_implementation("eager")
    assert "eager attention does not read" in graphs.unfit(model)
    assert model.config._attn_implementation != NAME


def test_what_attention_cannot_do_runs_eager_and_says_why(tape, monkeypatch):
    model, ids = model_of("llama-gqa", INT8), tiny_models.ids(6)
    wanted = decode(model, ids, 5)[0]
    forward = buffers.Buffers._forward

    def without_mask(self, model):
        monkeypatch.setattr(self.seen, "of", lambda mask: Seen().of(None))
        return forward(self, model)

    monkeypatch.setattr(buffers.Buffers, "_forward", without_mask)
    with pytest.warns(UserWarning, match="without CUDA graphs: ModelError: .* needs a mask of places"):
        found = decode(GraphDecoder(model, 5), ids, 5)[0]
    assert found == wanted
