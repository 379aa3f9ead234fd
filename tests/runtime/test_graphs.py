"""The captured decode step, without a GPU: a tape (`taped.py`) in the place of the graph."""

import gc
import warnings
import weakref

import pytest
import tiny_models
import torch
from quantkit_eval import generate_stream
from taped import decode
from torch import nn
from transformers import AutoTokenizer

import quantkit
from quantkit.algorithms.rtn import rtn
from quantkit.assets import default_model
from quantkit.errors import ModelError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import GraphDecoder, buffers, generate, graphed, graphs, stream
from quantkit.scheme import integer

FAMILIES = ["llama-gqa", "llama3-rope", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-gqa"]
FAMILIES += ["opt", "gpt2", "gpt-neox", "falcon", "falcon-alibi"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("taped", [True, False])
def test_the_step_is_that_of_a_dynamic_cache(name, taped, request):
    """33 steps from a prompt of 5: past the sliding windows, which are 8 long."""
    if taped:
        captured = request.getfixturevalue("tape")
    model, ids = tiny_models.FAMILIES[name](), tiny_models.ids(5)
    decoder = GraphDecoder(model, 33)
    tokens, logits = decode(model, ids, 33)
    found_tokens, found = decode(decoder, ids, 33)
    assert decoder.why_eager is None
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)
    assert found_tokens == tokens
    assert not taped or len(captured) == 1


def packed(model):
    """The linears of every block at 4 bits."""
    for block in tiny_models.blocks(model):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                weight = rtn(module.weight, integer(bits=4, group_size=32), torch.float16)
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, QuantLinear.from_quantized(weight, module.bias))
    return model


def test_packed_linears_are_captured(tape):
    model, ids = packed(tiny_models.FAMILIES["llama-gqa"]()), tiny_models.ids(9)
    tokens, logits = decode(model, ids, 20)
    found_tokens, found = decode(GraphDecoder(model, 20), ids, 20)
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)
    assert found_tokens == tokens


def test_a_step_repeated_gives_the_same_bits(tape):
    model = tiny_models.FAMILIES["llama"]()
    memory = buffers.Buffers(3, 64, torch.device("cpu"))
    memory.prompt(model, tiny_models.ids(9))
    first = memory.step(model, 7, 9).clone()
    assert torch.equal(memory.step(model, 7, 9), first)
    assert not torch.equal(memory.step(model, 8, 9), first)
    assert torch.equal(memory.step(model, 7, 9), first)
    assert len(tape) == 1


def test_generations_of_other_lengths_follow_each_other(tape):
    """Buffers that fit are reused, with nothing left in them that shows; others are made anew."""
    model = tiny_models.FAMILIES["llama-gqa"](max_position_embeddings=256)
    for length, new, captures in ((30, 30, 1), (4, 50, 1), (5, 8, 1), (150, 20, 2), (100, 20, 2), (3, 9, 3)):
        ids = tiny_models.ids(length, seed=length)
        found, _ = decode(GraphDecoder(model, new), ids, new)
        assert found == decode(model, ids, new)[0]
        assert len(tape) == captures
        gc.collect()


def test_the_cache_is_as_long_as_the_sequence_can_get():
    model, ids = tiny_models.FAMILIES["llama-gqa"](), tiny_models.ids(60)
    decoder = GraphDecoder(model, 5)
    out = decoder(input_ids=ids)
    layer = out.past_key_values.buffers.layers[0]
    assert layer.keys.shape == layer.values.shape == (1, 2, 128, 16)
    short = GraphDecoder(model, 4)(input_ids=ids)
    assert short.past_key_values.buffers.layers[0].keys.shape[2] == 64
    step = GraphDecoder(model, 4)(input_ids=tiny_models.ids(4), past_key_values=short.past_key_values)
    with pytest.raises(ModelError, match="room for 64 tokens"):
        decoder(input_ids=tiny_models.ids(1), past_key_values=step.past_key_values)


def test_sequences_side_by_side_do_not_meet(tape):
    model, decoder = tiny_models.FAMILIES["qwen2"](), None
    decoder = GraphDecoder(model, 20)
    streams = [stream(decoder, tiny_models.ids(6, seed=s), 20, stop=()) for s in (1, 2)]
    found = list(zip(*streams, strict=True))
    for s, tokens in zip((1, 2), zip(*found, strict=True), strict=True):
        assert list(tokens) == decode(model, tiny_models.ids(6, seed=s), 20)[0]


def test_several_tokens_after_the_prompt(tape):
    model, ids = tiny_models.FAMILIES["gemma2"](), tiny_models.ids(20)
    decoder = GraphDecoder(model, 10)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        start = decoder(input_ids=ids[:, :12])
        rest = decoder(input_ids=ids[:, 12:], past_key_values=start.past_key_values)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole, rtol=0, atol=2e-5)


def test_new_weights_are_captured_anew(tape):
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(6)
    decode(GraphDecoder(model, 9), ids, 9)
    gc.collect()
    layer = tiny_models.blocks(model)[0].mlp.down_proj
    layer.weight = nn.Parameter(-layer.weight, requires_grad=False)
    found, _ = decode(GraphDecoder(model, 9), ids, 9)
    assert len(tape) == 2
    assert found == decode(model, ids, 9)[0]


def test_what_waits_for_the_device_runs_eager_and_says_why(tape):
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(6)
    wanted = decode(model, ids, 12)[0]
    tiny_models.blocks(model)[1].register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    decoder = GraphDecoder(model, 12)
    with pytest.warns(
        UserWarning, match=r"without CUDA graphs: .*_local_scalar_dense.* waits for the device"
    ):
        assert list(stream(decoder, ids, 12, stop=())) == wanted
    assert "waits" in decoder.why_eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert list(stream(GraphDecoder(model, 12), ids, 12, stop=())) == wanted


def test_options_are_heeded(tape):
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(6)
    decoder = GraphDecoder(model, 16)
    drawn = generate(decoder, ids, 16, temperature=1.0, top_k=20, seed=4, stop=())
    assert torch.equal(drawn, generate(decoder, ids, 16, temperature=1.0, top_k=20, seed=4, stop=()))
    assert not torch.equal(drawn, generate(decoder, ids, 16, stop=()))
    end = int(drawn[0, 10])
    stopped = generate(decoder, ids, 16, temperature=1.0, top_k=20, seed=4, stop={end})
    assert stopped[0].tolist() == drawn[0, : stopped.shape[1]].tolist()
    assert stopped[0, -1] == end


def test_buffers_of_other_weights_are_not_reused(tape):
    """Given back late, after the weights changed."""
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(6)
    early = stream(GraphDecoder(model, 9), ids, 9, stop=())
    next(early)
    next(early)
    layer = tiny_models.blocks(model)[0].mlp.down_proj
    layer.weight = nn.Parameter(-layer.weight, requires_grad=False)
    found = decode(GraphDecoder(model, 9), ids, 9)[0]
    del early
    gc.collect()
    assert decode(GraphDecoder(model, 9), ids, 9)[0] == found == decode(model, ids, 9)[0]
    assert len(tape) == 3


def test_the_text_is_that_of_the_eager_model(tape):
    """The decoder in the place of the model, as `quantkit generate` uses it."""
    model = quantkit.load(default_model())
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    options = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 3}
    wanted = generate_stream(model, tokenizer, "It was a", **options)
    found = generate_stream(GraphDecoder(model, 30), tokenizer, "It was a", **options)
    assert (found.text, found.decode_steps) == (wanted.text, wanted.decode_steps)


def test_nothing_keeps_a_model_alive(tape):
    model = tiny_models.FAMILIES["llama"]()
    decode(GraphDecoder(model, 9), tiny_models.ids(6), 9)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_inference_mode_leaves_no_trace(tape):
    model, ids = tiny_models.FAMILIES["llama"](), tiny_models.ids(6)
    with torch.inference_mode():
        first = decode(GraphDecoder(model, 9), ids, 9)[0]
    gc.collect()
    assert decode(GraphDecoder(model, 9), ids, 9)[0] == first
    assert len(tape) == 1


def test_what_cannot_be_captured_is_named(monkeypatch):
    llama = tiny_models.FAMILIES["llama"]()
    assert graphed(llama, 9) == "CUDA graphs need the whole model on a CUDA device; it is on cpu"
    moving = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = tiny_models.FAMILIES["llama"](rope_parameters=moving)
    assert "dynamic rotary" in graphs.unfit(dynamic)
    monkeypatch.setattr(llama.config, "_attn_implementation", "flash_attention_2")
    assert "flash_attention_2" in graphs.unfit(llama)
    gpt2 = tiny_models.FAMILIES["gpt2"]()
    monkeypatch.setattr(type(gpt2), "_can_compile_fullgraph", False)
    assert "GPT2LMHeadModel" in graphs.unfit(gpt2)
    qwen = tiny_models.FAMILIES["qwen2"]()
    monkeypatch.setattr(qwen.config, "layer_types", ["linear_attention"] * 3)
    assert "LinearAttention" in graphs.unfit(qwen)
