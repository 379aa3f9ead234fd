"""A quantized KV cache in transformers models: what is read is what was rounded once, however the model is called."""

import copy
import pickle
from dataclasses import replace

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import kv_pages, library
from transformers import DynamicCache

from quantkit.errors import ModelError
from quantkit.layers.kv_attention import NAME, attention
from quantkit.layers.kv_cache import QuantizedCache, attach, cache_of
from quantkit.layers.kv_entries import PAGE, Entries
from quantkit.numerics.kv import KVScales, decode, encode, rounded
from quantkit.scheme import KV_PRESETS, NUMBERS, Grid, KVScheme

INT8, INT4 = KV_PRESETS["INT8"], KV_PRESETS["INT4"]
FAMILIES = ["llama-gqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "opt", "gpt2"]
IDS = tiny_models.ids(12, batch=2)


@pytest.fixture(params=["twin", "native"])
def route(request, monkeypatch):
    """Both ways over the pages; the native one must have been gone, where it can be."""
    if request.param == "twin":
        yield
        return
    if not library.available():
        pytest.skip("needs the native library (a C++ compiler)")
    calls = []
    monkeypatch.setenv(kv_pages.ENVIRONMENT, "cpu")
    native = kv_pages.native
    monkeypatch.setattr(kv_pages, "native", lambda *given: (calls.append(1), native(*given)))
    yield
    assert calls


class Rounding(DynamicCache):
    """An exact cache of entries that were rounded when they came: what a quantized one must equal."""

    def __init__(self, scheme, scales=None):
        super().__init__()
        self.scheme, self.scales = scheme, scales

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        scales = None if self.scales is None else self.scales[layer_idx]
        scheme = self.scheme if not self.layers[layer_idx:] else replace(self.scheme, sinks=0)
        k, v = rounded(key_states, value_states, scheme, scales)
        return super().update(k, v, layer_idx, *args, **kwargs)


def model_of(family, scheme=None, scales=None):
    model = tiny_models.FAMILIES[family]()
    model.set_attn_implementation("eager")
    if scheme is not None:
        attach(model, scheme, scales)
    return model


@torch.no_grad()
def logits(model, ids=IDS, **how):
    return model(ids, **how).logits


def close(one, other, most=2e-5):
    assert float((one - other).abs().max()) <= most * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_every_family_reads_what_was_rounded(family, scheme, route):
    plain, model = model_of(family), model_of(family, scheme)
    wanted = logits(plain, past_key_values=Rounding(scheme))
    close(logits(model), wanted)
    close(logits(model, use_cache=False), wanted)
    assert float((wanted - logits(plain)).abs().max()) > 1e-6


@pytest.mark.parametrize("scheme", [INT8, INT4, replace(INT4, sinks=3), replace(INT8, rotate=True)], ids=str)
def test_token_by_token_is_the_whole_forward(scheme, route):
    model = model_of("llama-gqa", scheme)
    whole, cache, steps = logits(model), cache_of(model)(), []
    for piece in IDS.split([5, 1, 1, 3, 1, 1], 1):
        steps.append(logits(model, piece, past_key_values=cache))
    close(torch.cat(steps, 1), whole)
    assert cache.get_seq_length() == 12


def fp8_scales(model, granularity):
    shape = (1,) if granularity == "tensor" else (2, 1, 1)
    return {i: KVScales(torch.full(shape, 0.011), torch.full(shape, 0.003)) for i in range(3)}


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("number", ["fp8_e4m3", "int8"])
def test_stored_scales(granularity, number, route):
    grid = Grid(NUMBERS[number], granularity)
    scheme, plain = KVScheme(grid, grid), model_of("llama-gqa")
    scales = fp8_scales(plain, granularity)
    close(
        logits(model_of("llama-gqa", scheme, scales)), logits(plain, past_key_values=Rounding(scheme, scales))
    )
    with pytest.raises(ModelError, match=r"stored scales of 3 layers, got those of \[0, 1\]"):
        attach(plain, scheme, {0: scales[0], 1: scales[1]})


def test_padded_batches_are_their_rows(route):
    model = model_of("llama-gqa", INT8)
    short = IDS[:1, :7]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    places = torch.stack([torch.arange(12), torch.cat([torch.zeros(5, dtype=torch.int64), torch.arange(7)])])
    both = logits(model, torch.cat([IDS[:1], padded]), attention_mask=mask, position_ids=places)
    close(both[1, 5:], logits(model, short, position_ids=torch.arange(7)[None])[0])
    close(both[0], logits(model, IDS[:1])[0])


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "mistral"])
def test_other_attention_functions_get_dense_tensors(family):
    model = model_of(family, INT8)
    ours = logits(model)
    model.set_attn_implementation("eager")
    close(logits(model), ours)


def test_generation_continues_searches_beams_and_crops(route):
    model = model_of("llama-gqa", INT4)
    how = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    cache = cache_of(model)()
    first = model.generate(IDS[:1], past_key_values=cache, **how)
    assert isinstance(cache, QuantizedCache)
    whole = model.generate(IDS[:1], **how | {"max_new_tokens": 12})
    assert torch.equal(model.generate(first, past_key_values=cache, **how), whole)
    assert torch.equal(model.generate(IDS[:1], use_cache=False, **how), whole[:, :18])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    wanted = model_of("llama-gqa").generate(IDS, past_key_values=Rounding(INT4), **how, **beams)
    assert torch.equal(model.generate(IDS, **how, **beams), wanted)
    cache.crop(-6)
    assert cache.get_seq_length() == 17
    close(logits(model, whole[:, 17:18], past_key_values=cache), logits(model, whole[:, :18])[:, -1:])
    with pytest.raises(ModelError, match="leave out cache_implementation='static'"):
        model.generate(IDS, cache_implementation="static", **how)


def test_an_exact_cache_that_is_passed_is_used():
    model, cache = model_of("llama-gqa", INT8), DynamicCache()
    close(logits(model, past_key_values=cache), logits(model_of("llama-gqa")))
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize(
    "scheme", [INT8, INT4, replace(INT4, sinks=4), replace(INT8, residual=20), KV_PRESETS["FP8"]], ids=str
)
def test_attention_over_several_pages_is_that_over_what_they_hold(scheme, route):
    """In a prompt, chunks and steps, with padding, a window, a cap and a score beside the tokens."""
    g = torch.Generator().manual_seed(0)
    scales = None if scheme.dynamic else {0: KVScales(*[torch.tensor([0.01, 0.02]).view(2, 1, 1)] * 2)}
    cache, module = QuantizedCache(1, scheme, scales), torch.nn.Identity()
    s_aux = torch.randn(6, generator=g)
    for tokens in (PAGE + 5, PAGE - 7, 30, 1, 1):
        k, v = torch.randn(2, 2, 2, tokens, 32, generator=g)
        q = torch.randn(2, 6, tokens, 32, generator=g)
        keys, values = cache.update(k, v, 0)
        place = torch.arange(keys.length)
        token = place[-tokens:, None]
        seen = ((place <= token) & (place > token - 300))[None, None].repeat(2, 1, 1, 1)
        seen[0, ..., :3] = False
        scores = q @ keys.dense().repeat_interleave(3, 1).transpose(2, 3) / 32**0.5
        scores = (torch.tanh(scores / 3) * 3).masked_fill(~seen, -torch.inf)
        scores = torch.cat([scores, s_aux.view(1, 6, 1, 1).expand(2, 6, tokens, 1)], -1)
        wanted = (scores.softmax(-1)[..., :-1] @ values.dense().repeat_interleave(3, 1)).transpose(1, 2)
        found, _ = attention(module, q, keys, values, seen, softcap=3.0, s_aux=s_aux)
        close(found, wanted, 5e-6)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        for dtype in (torch.float32, torch.bfloat16):
            found, _ = attention(module, q, keys, values, bias.to(dtype), softcap=3.0, s_aux=s_aux)
            close(found, wanted, 5e-6)
    assert keys.length == 2 * PAGE + 30


def test_copies_and_pickles_keep_the_cache():
    model = model_of("llama-gqa", INT8)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), wanted)
        assert cache_of(twin)().scheme == INT8
        generated = twin.generate(IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert torch.equal(
            generated, model.generate(IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
        )
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("name", ["KIVI4", "KIVI2"])
def test_the_newest_tokens_of_kivi_stay_exact(name):
    scheme = KV_PRESETS[name]
    x = torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(0))
    k, v = Entries(scheme.keys, residual=128), Entries(scheme.values, residual=128)
    for piece in x.split([100, 27, 1, 1, 150, 21], 2):
        for entries in (k, v):
            entries.append(piece)
            assert torch.equal(entries.read(len(entries) - 1, len(entries), x.dtype), piece[:, :, -1:])
    for entries in (k, v):
        entries.append(x[:, :, :0])  # whatever left the window is rounded by the next call
    assert (k.paged, v.paged) == (256, 172)
    assert torch.equal(
        k.read(0, 256, x.dtype), decode(encode(x[:, :, :256], scheme.keys), scheme.keys, x.dtype)
    )
    assert torch.equal(
        v.read(0, 172, x.dtype), decode(encode(x[:, :, :172], scheme.values), scheme.values, x.dtype)
    )
    assert torch.equal(k.read(256, 300, x.dtype), x[:, :, 256:])
    assert torch.equal(v.read(100, 300, x.dtype)[:, :, 72:], x[:, :, 172:])


def test_kivi_is_exact_before_its_window_is_full():
    values = Grid(NUMBERS["int4"], "token", 16, symmetric=False, dynamic=True)
    scheme = replace(KV_PRESETS["KIVI4"], values=values)
    close(logits(model_of("llama-gqa", scheme)), logits(model_of("llama-gqa")))


@pytest.mark.parametrize("scheme", [INT8, INT4, KV_PRESETS["FP8"], replace(INT4, sinks=4)], ids=str)
def test_pages_hold_what_one_call_gives(scheme):
    stored = None if scheme.dynamic else torch.tensor([0.01, 0.02]).view(2, 1, 1)
    x = torch.randn(2, 2, 2 * PAGE + 9, 32, generator=torch.Generator().manual_seed(1))
    one, many = (Entries(scheme.keys, scheme.sinks, 0, scheme.rotate, stored) for _ in range(2))
    one.append(x)
    for piece in x.split([PAGE - 1, 2, PAGE, 8], 2):
        many.append(piece)
    length = x.shape[2]
    for start, end in ((0, length), (PAGE - 3, PAGE + 5), (2, 3), (length - 1, length)):
        assert torch.equal(one.read(start, end, x.dtype), many.read(start, end, x.dtype))
    assert torch.equal(one.read(0, length, x.dtype)[:, :, : scheme.sinks], x[:, :, : scheme.sinks])
    one.each(
        lambda t: (
            t.flip(0)
            if t.element_size() > 1 or not t.is_floating_point()
            else t.view(torch.uint8).flip(0).view(t.dtype)
        )
    )
    assert torch.equal(one.read(5, 9, x.dtype), many.read(5, 9, x.dtype).flip(0))
    many.crop(PAGE + 1)
    assert len(many) == PAGE + 1
    many.append(x[:, :, PAGE + 1 :])
    assert torch.equal(one.read(0, length, x.dtype).flip(0), many.read(0, length, x.dtype))


@pytest.mark.parametrize(
    ("name", "d", "share"), [("INT8", 128, 0.53), ("INT8", 64, 0.54), ("FP8", 128, 0.53), ("INT4", 64, 0.30)]
)
def test_memory_is_that_of_codes_and_scales(name, d, share):
    scheme = KV_PRESETS[name]
    scales = None if scheme.dynamic else {0: KVScales(*[torch.ones(2, 1, 1) * 0.1] * 2)}
    cache, exact = QuantizedCache(1, scheme, scales), DynamicCache()
    for _ in range(17):
        x = torch.randn(1, 2, 240, d).bfloat16()
        cache.update(x, x, 0)
        exact.update(x, x, 0)
    bf16 = sum(layer.keys.nbytes + layer.values.nbytes for layer in exact.layers)
    assert cache.nbytes <= share * bf16, cache.nbytes / bf16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_lora_rank": 8}, "multi-head latent attention"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"num_kv_shared_layers": 1}, "share keys and values"),
        ({"head_dim": 24}, "rotate: false"),
    ],
)
def test_other_caches_are_refused_by_name(change, says):
    model = model_of("llama-gqa")
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(ModelError, match=says):
        attach(model, INT4)


def test_arguments_that_it_does_not_know_are_refused():
    model = model_of("llama-gqa", INT8)
    with pytest.raises(ModelError, match="does not do alibi"):
        logits(model, alibi=torch.ones(1))


def test_rows_of_a_batch_are_repeated_chosen_and_forgotten():
    scheme = replace(INT8, sinks=2)
    x = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    cache = QuantizedCache(1, scheme)
    cache.update(x, x, 0)
    read = cache.layers[0].entries[0].read(0, 9, x.dtype)
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[0].entries[0].read(0, 9, x.dtype), read.repeat_interleave(3, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(cache.layers[0].entries[0].read(0, 9, x.dtype), read.flip(0))
    cache.layers[0].reset()
    assert cache.get_seq_length() == 0
    cache.update(x[:1], x[:1], 0)
    assert torch.equal(cache.layers[0].entries[1].read(0, 9, x.dtype), read[:1])


def test_a_score_beside_the_tokens_takes_part_in_the_softmax_only():
    """Attention sinks of GPT-OSS: a score per head whose value is nothing."""
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16)
    v, sink = torch.randn(2, 2, 5, 16), torch.randn(4)
    found, _ = attention(torch.nn.Identity(), q, k, v, torch.ones(2, 1, 3, 5, dtype=torch.bool), s_aux=sink)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4
    with_sink = torch.cat([scores, sink.view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1).softmax(-1)[..., :5]
    close(found, (with_sink @ v.repeat_interleave(2, 1)).transpose(1, 2))
