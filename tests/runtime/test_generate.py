"""`generate` on the native path against the eager model, and its options."""

import pytest
import tiny_models
import torch
from quantkit_eval import generate_stream
from quantkit_eval.errors import EvalError
from quantkit_eval.loop import generate_tokens
from quantkit_eval.sampler import Sampling
from quantkit_kernels.cpu import library

import quantkit
from quantkit.assets import calibration_text, default_model
from quantkit.runtime import GraphDecoder, generate, native, stream

needs_library = pytest.mark.skipif(
    not library.available(), reason="needs the native library (a C++ compiler)"
)
FAMILIES = ["llama", "llama-gqa", "llama-bias", "llama3-rope", "mistral", "qwen2", "qwen3", "phi3-gqa"]
MARGIN = 1e-3  # between the two best logits; below it, sums in another order may choose otherwise


@pytest.fixture(scope="module")
def bookworm():
    return quantkit.load(default_model())


@pytest.fixture(scope="module")
def prompt(bookworm):
    from transformers import AutoTokenizer

    text = calibration_text().read_text(encoding="utf-8")[:300]
    return AutoTokenizer.from_pretrained(default_model())(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def eager_greedy(model, ids: torch.Tensor, steps: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and the margin of each."""
    tokens, margins, cache, given = [], [], None, ids
    for _ in range(steps):
        out = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache, best = out.past_key_values, out.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        given = torch.tensor([[tokens[-1]]])
    return tokens, margins


@needs_library
def test_256_greedy_tokens_of_the_embedded_model_are_the_eager_ones(bookworm, prompt):
    wanted, margins = eager_greedy(bookworm, prompt, 256)
    print(f"smallest margin {min(margins):.2g}")
    got = generate(bookworm, prompt, 256, stop=())
    assert got[0, : prompt.shape[1]].tolist() == prompt[0].tolist()
    assert got[0, prompt.shape[1] :].tolist() == wanted


@needs_library
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_every_family_up_to_the_first_close_call(name):
    model, ids = tiny_models.FAMILIES[name](), tiny_models.ids(20)
    wanted, margins = eager_greedy(model, ids, 100)
    close = next((i for i, margin in enumerate(margins) if margin < MARGIN), 100)
    print(f"{name}: margins from {min(margins):.2g}, compared {close} tokens")
    assert close >= 10
    assert generate(model, ids, 100, stop=())[0, 20 : 20 + close].tolist() == wanted[:close]


@needs_library
def test_the_text_is_that_of_the_eager_model(bookworm):
    """The decoder in the place of the model, in code that knows only transformers' calling convention."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model())
    options = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 3}
    wanted = generate_stream(bookworm, tokenizer, "It was a", **options)
    got = generate_stream(native(bookworm), tokenizer, "It was a", **options)
    assert (got.text, got.decode_steps) == (wanted.text, wanted.decode_steps)


@needs_library
def test_sampling_is_seeded_and_heeds_its_options(bookworm, prompt):
    def drawn(**options) -> list[int]:
        return generate(bookworm, prompt, 30, stop=(), **options)[0].tolist()

    greedy = drawn()
    assert drawn(temperature=1.0) == drawn(temperature=1.0) != greedy
    assert drawn(temperature=1.0) != drawn(temperature=1.0, seed=1)
    assert drawn(temperature=1.0, top_k=1) == greedy
    assert drawn(temperature=1.0, top_p=1e-6) == greedy
    state = torch.get_rng_state()
    drawn(temperature=1.0, seed=None)
    assert torch.equal(torch.get_rng_state(), state)


@needs_library
def test_stop_tokens_end_the_stream_and_belong_to_it(bookworm, prompt):
    tokens = list(stream(bookworm, prompt, 20, stop=()))
    end = tokens.index(tokens[7])
    assert list(stream(bookworm, prompt[0], 20, stop={tokens[7]})) == tokens[: end + 1]
    seen = []
    generate(bookworm, prompt, 20, stop=[tokens[7]], on_token=seen.append)
    assert seen == tokens[: end + 1]
    bookworm.generation_config.eos_token_id, before = tokens[7], bookworm.generation_config.eos_token_id
    try:
        assert list(stream(bookworm, prompt, 20)) == tokens[: end + 1]
    finally:
        bookworm.generation_config.eos_token_id = before


@needs_library
def test_a_token_is_there_before_the_next_is_computed(bookworm, prompt):
    tokens = stream(native(bookworm), prompt, 1000, stop=())
    assert next(tokens) == next(stream(bookworm, prompt, 1))


def test_what_is_not_native_runs_eager_and_says_why():
    model, ids = tiny_models.FAMILIES["gpt2"](), tiny_models.ids(10)
    wanted, _ = eager_greedy(model, ids, 12)
    with pytest.warns(UserWarning, match=r"runs eager: .*not GPT2LMHeadModel"):
        assert generate(model, ids, 12, stop=())[0, 10:].tolist() == wanted


@needs_library
@pytest.mark.parametrize(
    ("ids", "new", "error"),
    [
        (torch.empty(0, dtype=torch.int64), 5, "no tokens"),
        (torch.tensor([3]), 0, "max_new_tokens must be at least 1, got 0"),
        (torch.tensor([3] * 100), 29, "100 tokens of prompt and 29 new ones are more than the model's 128"),
        (torch.ones(2, 5, dtype=torch.int64), 5, r"got \[2, 5\]"),
    ],
)
def test_prompts_that_do_not_fit_are_errors(ids, new, error):
    with pytest.raises(EvalError, match=error):
        stream(tiny_models.FAMILIES["llama"](), ids, new)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(EvalError, match=f"{next(iter(options))} must be"):
        stream(tiny_models.FAMILIES["llama"](), torch.tensor([3]), 5, **options)


@needs_library
def test_a_token_the_model_does_not_have_is_an_error():
    with pytest.raises(EvalError, match="token 128"):
        stream(tiny_models.FAMILIES["llama"](), torch.tensor([128]))


@needs_library
@pytest.mark.parametrize("run", [native, lambda model: GraphDecoder(model, 20), lambda model: model])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}])
def test_text_and_tokens_come_from_one_loop(bookworm, run, options):
    """`generate` and `generate_stream` choose the same tokens on every way to run, and end at the same ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model())
    ids, runner = tokenizer("It was a", return_tensors="pt")["input_ids"], run(bookworm)
    text = generate_stream(runner, tokenizer, "It was a", 20, **options)
    if runner is bookworm:  # the loop itself; `generate` would take the native path
        tokens = [t.id for t in generate_tokens(runner, ids[0].tolist(), 20, Sampling(**options), ())]
    else:
        tokens = generate(runner, ids, 20, **options)[0, ids.shape[1] :].tolist()
    assert text.text == tokenizer.decode(tokens, skip_special_tokens=True)
