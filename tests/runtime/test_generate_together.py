"""`generate` of several prompts against each of them alone, on every way to run."""

from dataclasses import replace

import packed_experts
import pytest
import tiny_mixtures
import tiny_models
import torch
from quantkit_eval.errors import EvalError
from quantkit_eval.together import Apart, Padded
from quantkit_kernels.cpu import library

from quantkit.bench.models.subject import Opening, Subject
from quantkit.errors import BackendError
from quantkit.layers.kv_cache import attach
from quantkit.runtime import generate, native, stream, stream_together, together
from quantkit.runtime.together import NativeBatch, choose_batch
from quantkit.scheme import KV_PRESETS, integer

needs_library = pytest.mark.skipif(
    not library.available(), reason="needs the native library (a C++ compiler)"
)
LENGTHS = (5, 12, 1)
PAD = 3
SAMPLED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 11}


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), as transformers' tokenizers give them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    return ids, mask


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    return [tiny_models.ids(n, seed=n)[0].tolist() for n in lengths]


def alone(model, prompts, new, **options) -> list[list[int]]:
    seed = options.pop("seed", 0)
    return [
        list(stream(model, torch.tensor(p), new, seed=seed + i, **options)) for i, p in enumerate(prompts)
    ]


@needs_library
@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3", "mixture"])
def test_a_native_batch_gives_each_prompt_what_it_gets_alone(name, options):
    if name == "mixture":
        model = packed_experts.packed(packed_experts.apart(tiny_mixtures.build("mixtral")), integer(4, 32))
    else:
        model = tiny_models.FAMILIES[name]()
    prompts = prompts_of()
    ids, mask = left_padded(prompts)
    got = generate(model, ids, 40, stop=(), attention_mask=mask, **options)
    assert torch.equal(got[:, : ids.shape[1]], ids)
    assert got[:, ids.shape[1] :].tolist() == alone(model, prompts, 40, stop=(), **options)
    assert isinstance(choose_batch(model)[0], NativeBatch)


@needs_library
def test_sequences_end_on_their_own_and_are_filled_up():
    model, prompts = tiny_models.FAMILIES["llama-gqa"](), prompts_of()
    free = alone(model, prompts, 30, stop=(), **SAMPLED)
    ends = {free[1][4], free[2][9]}
    wanted = alone(model, prompts, 30, stop=ends, **SAMPLED)
    assert len({len(each) for each in wanted}) > 1
    ids, mask = left_padded(prompts)
    model.generation_config.pad_token_id = 2
    got = generate(model, ids, 30, stop=ends, attention_mask=mask, **SAMPLED)[:, ids.shape[1] :].tolist()
    longest = max(map(len, wanted))
    assert got == [each + [2] * (longest - len(each)) for each in wanted]
    rounds = list(stream_together(model, prompts, 30, stop=ends, **SAMPLED))
    assert [[r.tokens[i] for r in rounds if i in r.tokens] for i in range(3)] == wanted
    model.generation_config.pad_token_id = None
    got = generate(model, ids, 30, stop=ends, attention_mask=mask, **SAMPLED)[:, ids.shape[1] :].tolist()
    assert got == [each + [min(ends)] * (longest - len(each)) for each in wanted]


@needs_library
def test_one_prompt_with_a_mask_and_prompts_of_one_length_without():
    model, prompts = tiny_models.FAMILIES["llama-gqa"](), prompts_of()
    ids, mask = left_padded(prompts)
    one = generate(model, ids[:1], 9, stop=(), attention_mask=mask[:1])
    assert one[0, ids.shape[1] :].tolist() == alone(model, prompts[:1], 9, stop=())[0]
    same = torch.tensor(prompts_of((7, 7))[:1] * 2)
    got = generate(model, same, 9, stop=(), temperature=1.0)
    assert got[0].tolist() != got[1].tolist()  # two draws for one prompt
    assert got[:, 7:].tolist() == alone(model, same.tolist(), 9, stop=(), temperature=1.0)


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", Padded), ("gemma2", Padded), ("llama-gqa", Padded), ("cache", Apart)]
)
def test_what_is_not_native_runs_in_transformers(name, kind, monkeypatch):
    """Greedy, in fp32: sums in another order could choose otherwise only where two logits nearly tie."""
    model = tiny_models.FAMILIES["llama-gqa" if name == "cache" else name]()
    if name == "cache":
        attach(model, replace(KV_PRESETS["INT8"], residual=4))
    elif name == "llama-gqa":
        monkeypatch.setattr("quantkit.runtime.dispatch.native", lambda *_: "the test says so")
    batch, runner = choose_batch(model)
    assert (type(batch), runner.way) == (kind, "eager")
    assert runner.reason
    prompts = prompts_of()
    ids, mask = left_padded(prompts)
    with pytest.warns(UserWarning, match="runs eager"):
        got = generate(model, ids, 12, stop=(), attention_mask=mask)[:, ids.shape[1] :].tolist()
    with pytest.warns(UserWarning, match="runs eager"):
        assert got == alone(model, prompts, 12, stop=())


def test_a_graph_holds_one_sequence(monkeypatch):
    model = tiny_models.FAMILIES["gpt2"]()
    with pytest.raises(BackendError, match="a CUDA graph holds one sequence"):
        choose_batch(model, "graph")
    monkeypatch.setattr(together, "device_of", lambda model: torch.device("cuda"))
    batch, runner = choose_batch(model)
    assert (type(batch), runner.way) == (Padded, "eager")
    assert runner.reason == "a CUDA graph holds one sequence"
    assert choose_batch(model, "eager")[1].reason is None
    assert Subject("", Opening("", way="graph"), model, []).runner(2, 4).way == "eager"


@torch.no_grad()
def test_padded_logits_are_those_of_each_prompt():
    model, prompts = tiny_models.FAMILIES["llama-gqa"](), prompts_of()
    padded, apart = Padded(model, PAD), Apart(model)
    torch.testing.assert_close(padded.begin(prompts), apart.begin(prompts), rtol=1e-4, atol=1e-5)
    for live in ([0, 1, 2], [0, 2], [2]):  # sequences that ended stay out of the others' way
        tokens = [7 + i for i in live]
        wanted = apart.step(live, tokens)
        torch.testing.assert_close(padded.step(live, tokens), wanted, rtol=1e-4, atol=1e-5)


def test_batches_that_do_not_fit_are_errors():
    model = tiny_models.FAMILIES["llama-gqa"]()
    ids, mask = left_padded(prompts_of())
    for wrong, message in (
        ({"attention_mask": mask[:2]}, "they must match"),
        ({"attention_mask": mask.flip(1)}, "prompt 1 is padded behind or inside"),
        ({"attention_mask": mask * torch.tensor([[1], [1], [0]])}, "prompt 3: the prompt has no tokens"),
        ({"max_new_tokens": 1000}, "prompt 1: 12 tokens of prompt and 1000 new ones"),
        ({"on_token": print}, "on_token follows one sequence"),
        ({"seed": 2**64}, "seed must be"),
    ):
        with pytest.raises(EvalError, match=message):
            generate(model, ids, **({"max_new_tokens": 10} | wrong))
    with pytest.raises(EvalError, match=r"\[batch, length\]"):
        generate(model, ids[None])
    with pytest.raises(EvalError, match="no prompt"):
        stream_together(model, [])


@needs_library
def test_weights_are_read_once_for_all():
    """A step of a batch is one native call, whatever its size."""
    model = tiny_models.FAMILIES["llama-gqa"]()
    batch = NativeBatch(native(model))
    batch.begin(prompts_of())
    with batch.sequences[0].timed() as first, batch.sequences[1].timed() as second:
        batch.step([0, 1, 2], [4, 5, 6])
    assert first["linears"] > 0
    assert second["linears"] == 0
