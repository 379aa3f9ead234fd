"""Scaling groups: found exactly where they are, refused everywhere else, and folding them changes nothing."""

import pytest
import tiny_models
import torch
from torch import nn

from quantkit.structure.discover import discover
from quantkit.structure.fold import fold
from quantkit.structure.trace import matrix

LENGTH = 12
HEADS, HEAD_DIM = 4, 16


def rows_of(kind, out):
    """Producer rows that the table below calls by name, as a list."""
    every = torch.arange(out)
    return {
        "all": every,
        "last half": every[out // 2 :],
        "last third": every[-(out // 3) :],
        "last quarter": every[-(out // 4) :],  # q of 4 heads, k and v of 2 each
        "last head": every[-HEAD_DIM:],
        "end of each head": every.view(HEADS, 3, HEAD_DIM)[:, 2].flatten() if out == 192 else None,
        "end of each group": every.view(2, 4, HEAD_DIM)[:, 3].flatten() if out == 128 else None,
    }[kind].tolist()


def llama(heads=1, form="gamma", mlp_norm="post_attention_layernorm"):
    """heads: query heads per value head."""
    return [
        ("input_layernorm", form, "self_attn.q_proj self_attn.k_proj self_attn.v_proj", 1, "self_attn"),
        ("self_attn.v_proj", "all", "self_attn.o_proj", heads, None),
        (mlp_norm, form, "mlp.gate_proj mlp.up_proj", 1, "mlp"),
        ("mlp.up_proj", "all", "mlp.down_proj", 1, None),
    ]


def phi3(value_rows, heads):
    return [
        ("input_layernorm", "gamma", "self_attn.qkv_proj", 1, None),
        ("self_attn.qkv_proj", value_rows, "self_attn.o_proj", heads, None),
        ("post_attention_layernorm", "gamma", "mlp.gate_up_proj", 1, None),
        ("mlp.gate_up_proj", "last half", "mlp.down_proj", 1, None),
    ]


def fused(attention, value_rows, heads=1, norms=("input_layernorm", "post_attention_layernorm")):
    return [
        (norms[0], "gamma", f"{attention}.query_key_value", 1, None),
        (f"{attention}.query_key_value", value_rows, f"{attention}.dense", heads, None),
        (norms[1], "gamma", "mlp.dense_h_to_4h", 1, None),
    ]


GEMMA = {"form": "one_plus_gamma", "mlp_norm": "pre_feedforward_layernorm"}
OPT = [
    ("self_attn_layer_norm", "gamma", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", 1, "self_attn"),
    ("self_attn.v_proj", "all", "self_attn.out_proj", 1, None),
    ("final_layer_norm", "gamma", "fc1", 1, None),
    ("fc1", "all", "fc2", 1, None),  # ReLU
]
GPT2 = [
    ("ln_1", "gamma", "attn.c_attn", 1, None),
    ("attn.c_attn", "last third", "attn.c_proj", 1, None),
    ("ln_2", "gamma", "mlp.c_fc", 1, None),
]
FALCON = [
    ("input_layernorm", "gamma", "self_attention.query_key_value mlp.dense_h_to_4h", 1, ""),
    ("self_attention.query_key_value", "last head", "self_attention.dense", 4, None),
]
# family -> [(producer, form or rows, consumers, query heads per channel, inspected; None = the consumer)]
EXPECTED = {
    "llama": llama(),
    "llama-gqa": llama(2),
    "llama-bias": llama(2),
    "llama3-rope": llama(2),
    "mistral": llama(2),
    "qwen2": llama(2),
    "qwen2-mha": llama(),
    "qwen3": llama(2),
    "qwen3-mha": llama(),
    "gemma2": llama(2, **GEMMA),
    "gemma2-mha": llama(**GEMMA),
    "gemma3": llama(2, **GEMMA),
    "gemma3-mha": llama(**GEMMA),
    "phi3": phi3("last third", 1),
    "phi3-gqa": phi3("last quarter", 2),
    "opt": OPT,
    "opt-post-norm": [OPT[1], OPT[3]],  # its norms feed the residual too
    "gpt2": GPT2,
    "gpt-neox": fused("attention", "end of each head"),
    "gpt-neox-sequential": fused("attention", "end of each head"),
    "falcon": FALCON,
    "falcon-new": fused("self_attention", "end of each group", 2, ("ln_attn", "ln_mlp")),
    "falcon-alibi": fused("self_attention", "end of each head"),
}


def shared_columns(channels, repeats):
    """Column (head, d) reads channel (head // repeats, d), written as a loop."""
    return [
        h // repeats * HEAD_DIM + d for h in range(channels * repeats // HEAD_DIM) for d in range(HEAD_DIM)
    ]


def described(block, group):
    """A group as the table's lists of numbers."""
    return (
        group.producer,
        group.form,
        group.consumers,
        None if group.rows is None else group.rows.tolist(),
        None if group.expand is None else group.expand.tolist(),
        group.inspect,
    )


def expected(block, row):
    producer, how, consumers, repeats, inspect = row
    consumers = tuple(consumers.split())
    rows = expand = None
    if not how.endswith("gamma"):
        rows = rows_of(how, matrix(block.get_submodule(producer)).shape[0])
        expand = shared_columns(len(rows), repeats) if repeats > 1 else None
    inspect = consumers[0] if inspect is None else inspect
    return producer, how if rows is None else "rows", consumers, rows, expand, inspect


def test_every_family_is_in_the_table():
    assert set(EXPECTED) == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("name", sorted(tiny_models.FAMILIES))
def test_groups_are_exact_and_folding_them_keeps_the_logits(name):
    model = tiny_models.FAMILIES[name]()
    ids = tiny_models.ids(LENGTH)
    found = []
    for block, call in zip(tiny_models.blocks(model), tiny_models.captured_calls(model, ids), strict=True):
        groups, _ = discover(block, *call)
        assert [described(block, g) for g in groups] == [expected(block, row) for row in EXPECTED[name]]
        found += [(block, group) for group in groups]
    model.double()
    before = model(input_ids=ids).logits
    for seed, (block, group) in enumerate(found):
        weights = [matrix(block.get_submodule(n)).clone() for n in (*group.consumers,)]
        fold(block, group, tiny_models.random_scales(block, group, seed))
        for name_, old in zip(group.consumers, weights, strict=True):
            assert not torch.allclose(matrix(block.get_submodule(name_)), old, rtol=0.1)
    after = model(input_ids=ids).logits
    assert float((after - before).square().mean().sqrt() / before.square().mean().sqrt()) < 2e-6


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2", "falcon"])
def test_tied_heads_change_nothing_inside_blocks(name):
    block, call = tiny_models.block_and_call(name, tie_word_embeddings=True)
    groups, _ = discover(block, *call)
    assert [described(block, g) for g in groups] == [expected(block, row) for row in EXPECTED[name]]


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("gpt2", "mlp.c_fc (256 rows in 0..255) -> mlp.c_proj"),
        ("gpt-neox", "mlp.dense_h_to_4h (128 rows in 0..127) -> mlp.dense_4h_to_h"),
        ("falcon", "mlp.dense_h_to_4h (256 rows in 0..255) -> mlp.dense_4h_to_h"),
        ("gemma2", "input_layernorm (gamma) -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
        ("opt-post-norm", "self_attn_layer_norm (gamma) -> fc1"),
    ],
)
def test_what_is_not_invariant_is_tried_and_refused(name, pair):
    block, call = tiny_models.block_and_call(name)
    _, refused = discover(block, *call)
    assert "moves the block's output" in dict(refused)[pair]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-alibi"])
@pytest.mark.parametrize("length", [48, 64])
def test_long_calls_are_cut_and_give_the_same_groups(name, length):
    """64 is also the hidden size."""
    block, call = tiny_models.block_and_call(name, length)
    groups, _ = discover(block, *call)
    assert [described(block, g) for g in groups] == [expected(block, row) for row in EXPECTED[name]]


def lengths_seen(block, call):
    """Sequence lengths of the forwards that `discover` runs (hooks stay on a copied module)."""
    seen = set()
    block.register_forward_pre_hook(lambda module, args: seen.add(args[0].shape[1]))
    groups, _ = discover(block, *call)
    return seen, [str(g) for g in groups]


def test_proofs_run_on_few_tokens():
    block, call = tiny_models.block_and_call("llama-gqa", 48)
    assert lengths_seen(block, call)[0] == {32}


def test_a_call_that_cannot_be_cut_is_used_whole():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)

        def forward(self, x, gate):  # gate: one number per channel, as many as there are tokens
            return x + self.b(self.a(x * gate))

    seen, groups = lengths_seen(Gated(), (torch.zeros(1, 40, 40), (), {"gate": torch.ones(40)}))
    assert 40 in seen
    assert groups == ["a (40 rows in 0..39) -> b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discover_leaves_block_and_random_state_untouched(dtype):
    block, (hidden, args, kwargs) = tiny_models.block_and_call("gpt-neox")
    block.to(dtype)
    weights = {n: p.clone() for n, p in block.named_parameters()}
    state = torch.get_rng_state()
    groups, _ = discover(block, hidden.to(dtype), args, kwargs)
    assert len(groups) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.dtype == dtype and torch.equal(p, weights[n]) for n, p in block.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_a_linear_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.relu(self.a(torch.relu(self.a(x))))) + x

    groups, refused = discover(Twice(), torch.ones(1, 9, 8), (), {})
    assert groups == []
    assert refused == [("? -> a", "a runs more than once")]


class Unlisted(nn.Module):
    """A block with names nobody knows: fused (up, gate) with up first, a norm before the second matrix."""

    def __init__(self):
        super().__init__()
        self.alpha, self.beta = nn.LayerNorm(8), nn.LayerNorm(16)
        self.wide, self.back = nn.Linear(8, 32), nn.Linear(16, 8)
        self.low, self.high = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        up, gate = self.wide(self.alpha(x)).chunk(2, -1)
        x = x + self.back(self.beta(up * torch.sigmoid(gate)))
        return x + self.high(self.low(x))


def test_an_unlisted_block_needs_no_names():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Unlisted().eval().requires_grad_(False)
    groups, _ = discover(block, torch.zeros(1, 9, 8), (), {})
    assert [str(g) for g in groups] == [
        "alpha (gamma) -> wide",
        "beta (gamma) -> back",
        "low (4 rows in 0..3) -> high",
    ]


def test_tensors_that_a_block_makes_are_as_precise_as_the_proof():
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):  # as XGLM does, whose least float64 is no float32
            return x + torch.max(self.b(self.a(x)), torch.full((), torch.finfo(x.dtype).min))

    groups, _ = discover(Bounded().eval().requires_grad_(False), torch.zeros(1, 9, 8), (), {})
    assert [str(g) for g in groups] == ["a (8 rows in 0..7) -> b"]
    assert torch.get_default_dtype() == torch.float32


def test_a_first_half_is_found_too():
    class UpFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.back = nn.Linear(8, 32), nn.Linear(16, 8)

        def forward(self, x):
            up, gate = self.wide(x).chunk(2, -1)
            return x + self.back(up * torch.sigmoid(gate))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = UpFirst().eval().requires_grad_(False)
    groups, _ = discover(block, torch.zeros(1, 9, 8), (), {})
    assert [str(g) for g in groups] == ["wide (16 rows in 0..15) -> back"]


class Marked(nn.Module):
    """A stand-in for a linear that is none by class."""

    is_linear = True

    def __init__(self, inner):
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.out_features, self.in_features = inner.weight.shape

    def forward(self, x):
        return nn.functional.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


def test_marked_modules_count_as_linears():
    block, call = tiny_models.block_and_call("llama-bias")
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Marked(module))
    groups, _ = discover(block, *call)
    assert [described(block, g) for g in groups] == [expected(block, row) for row in EXPECTED["llama-bias"]]


def test_tiny_models_keep_random_state_and_weights_move_away_from_their_defaults():
    state = torch.get_rng_state()
    model, again = tiny_models.FAMILIES["gemma3"](), tiny_models.FAMILIES["gemma3"]()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    norm = tiny_models.blocks(model)[0].input_layernorm.weight
    assert float(norm.abs().mean()) > 0.1
    text = "One, two.\n"
    tokenizer = tiny_models.tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_module_that_computes_in_fp32_is_proved_in_float64():
    """A gate that casts its input and not its weight, as routers do, where the rest of the block is float64."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.weight = nn.Parameter(torch.randn(1, 16))

        def forward(self, hidden):
            inner = self.up(self.norm(hidden))
            gate = nn.functional.linear(hidden.repeat(1, 1, 2).float(), self.weight).softmax(
                -1, dtype=torch.float32
            )
            return hidden + self.down(inner) * gate.to(hidden.dtype)

    groups, _ = discover(Block().eval(), torch.zeros(1, 4, 8), (), {})
    assert {(g.producer, *g.consumers) for g in groups} == {("norm", "up"), ("up", "down")}
