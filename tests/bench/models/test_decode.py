import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.bench import rounds, synthetic
from quantkit.bench.kernels.ops import LLAMA
from quantkit.bench.machine import native_available
from quantkit.bench.models import decode, gguf_file, llamacpp

TINY = synthetic.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)

MIXTURE = synthetic.Mixture(
    hidden=128, intermediate=128, heads=2, kv_heads=1, vocabulary=160, experts=4, top=2
)


@pytest.fixture(autouse=True)
def _own_choice_of_backend(monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("bench") / "tiny", 2, shape=TINY)


def test_synthetic_model_loads_and_has_the_shape(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    block = model.model.layers[1]
    assert block.self_attn.k_proj.weight.shape == (64, 128)
    assert block.mlp.down_proj.weight.shape == (128, 256)
    assert model.lm_head.weight.shape == (160, 128)
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()


def test_every_way_runs_on_the_same_packed_model_or_says_why(dense):
    made = decode.models(dense.parent, 2, TINY)
    made["dense"] = dense
    ready, missing = decode.engines(decode.WAYS, made, prompt=5, new=3)
    assert {"eager bf16", "eager W4A16", "eager torch int4"} <= ready.keys()
    assert ready.keys() | missing.keys() == decode.WAYS.keys()
    if native_available():
        assert missing == {}
    for run in ready.values():
        assert all(speed > 0 for speed in run().values())


def test_measure_feeds_every_new_token_back():
    seen = []

    class Out:
        past_key_values = "cache"
        logits = torch.eye(4)[None, 2:3]  # token 2 is the most likely

    class Model:
        device = torch.device("cpu")

        def forward(self, **given):
            seen.append((given["input_ids"].tolist(), given["past_key_values"]))
            return Out

        __call__ = forward

        def modules(self):
            return iter(())

    decode.measure(Model(), 4, prompt=3, new=2)
    assert len(seen[0][0][0]) == 3
    assert [cache for _, cache in seen] == [None, None, "cache", "cache"]
    assert [tokens for tokens, _ in seen[2:]] == [[[2]], [[2]]]


def test_rounds_are_interleaved_and_the_first_does_not_count(capsys):
    order = []

    def engine(name, *speeds):
        left = list(speeds)

        def run():
            order.append(name)
            return {"decode": left.pop(0), "prefill": 1.0}

        return run

    engines = {"a": engine("a", 99, 10, 30, 20), "b": engine("b", 99, 5, 10, 20)}
    report = rounds.interleave(engines, 3, window=lambda: 1.0)
    assert "".join(order) == "baabbaab"  # turned in every round
    assert report["engines"]["a"]["decode"] == {
        "median": 20,
        "mad": 10,
        "min": 10,
        "max": 30,
        "rounds": [10, 30, 20],
    }
    assert report["read_bytes_per_s"] == [1.0] * 3
    assert rounds.ratio(report, "decode", "a", "b") == 2  # of 2, 3 and 1, not 20 / 10
    assert rounds.ratios(report, "a", ["a", "b", "c"]) == {"b": {"decode": 2, "prefill": 1}}
    assert "round 3" in capsys.readouterr().out
    order.clear()
    rounds.interleave({"a": engine("a", 9, 9), "b": engine("b", 9)}, 1, lambda: 1.0, warm={"b"})
    assert "".join(order) == "aab"  # b warms up by itself


def test_peak_sees_memory_that_is_gone_again():
    before = decode.anonymous()
    with decode.peak() as highest:
        block = np.ones(64 << 20, np.uint8)
        time.sleep(0.2)  # until the sampler has had its turn
        del block
    assert highest[0] - before > 60 << 20


@pytest.mark.slow
def test_memory_counts_what_the_packed_linears_take(dense):
    packed = decode.models(dense.parent, 2, TINY)["packed"]
    found = decode.memory_apart(packed, "eager W4A16", 2)
    assert found["run_peak"] > 0
    assert 4.1 < found["bits_per_packed_weight"] < 4.6
    weights = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256) + 160 * 128
    assert found["packed_bytes"] == pytest.approx(weights * found["bits_per_packed_weight"] / 8)


def test_gguf_tensors_are_the_bits_of_the_checkpoint(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).state_dict()
    found = dict(gguf_file.tensors(dense))
    assert found.keys() == model.keys()
    for name, bits in found.items():
        assert np.array_equal(bits.view(np.int16), model[name].view(torch.int16).numpy()), name


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return synthetic.make_mixture(tmp_path_factory.mktemp("bench") / "mixture", 1, MIXTURE)


def test_synthetic_mixture_loads_and_has_the_shape(mixture):
    model, info = AutoModelForCausalLM.from_pretrained(mixture, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 256, 128)
    assert model.model.layers[0].mlp.gate.top_k == 2


def test_gguf_experts_of_a_role_are_stacked(mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16)
    found = dict(gguf_file.stacked(mixture))
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    wanted = {
        "gate": gate_up[:, :128],
        "up": gate_up[:, 128:],
        "down": model.model.layers[0].mlp.experts.down_proj,
    }
    for role, stacked in wanted.items():
        bits = found[f"blk.0.ffn_{role}_exps.weight"]
        assert np.array_equal(bits.view(np.int16), stacked.view(torch.int16).numpy()), role
    assert {
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_k_norm.weight",
    } <= found.keys()


@pytest.mark.skipif(not native_available(), reason="needs the native library (a C++ compiler)")
def test_a_mixture_runs_natively(mixture):
    made = decode.models(mixture.parent, 1, MIXTURE) | {"dense": mixture}
    ways = {name: decode.WAYS[name] for name in ("native W4A8", "native W4A16")}
    ready, missing = decode.engines(ways, made, prompt=5, new=3)
    assert missing == {}
    assert ready.keys() == ways.keys()


def test_gguf_names_are_llamacpps():
    assert gguf_file.rename("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert gguf_file.rename("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_file.rename("lm_head.weight") == "output.weight"


def test_gguf_rotary_rows_lie_in_pairs():
    heads, d = 3, 8
    x = np.arange(heads * d, dtype=np.float64)[:, None] + 1
    halves = x.reshape(heads, 2, d // 2)  # transformers rotates (i, i + d/2)
    angles = np.linspace(0.1, 1.0, d // 2)
    turned = np.concatenate(
        [
            halves[:, 0] * np.cos(angles) - halves[:, 1] * np.sin(angles),
            halves[:, 1] * np.cos(angles) + halves[:, 0] * np.sin(angles),
        ],
        1,
    ).reshape(-1, 1)
    pairs = gguf_file.pairs_together(x, heads).reshape(heads, d // 2, 2)  # llama.cpp rotates (2i, 2i + 1)
    even = pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles)
    odd = pairs[..., 1] * np.cos(angles) + pairs[..., 0] * np.sin(angles)
    theirs = np.stack([even, odd], -1).reshape(-1, 1)
    assert np.allclose(gguf_file.pairs_together(turned, heads), theirs)


def test_llama_bench_json_is_read():
    rows = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 130.5}, {"n_prompt": 0, "n_gen": 64, "avg_ts": 54.0}]
    assert llamacpp.read_bench(json.dumps(rows)) == {"decode": 54.0, "prefill": 130.5}


def test_tile_guard_is_added_once(tmp_path):
    file = tmp_path / llamacpp.TILES
    file.parent.mkdir(parents=True)
    file.write_text("void init() {\n    _tile_loadconfig(&tc);\n    done = true;\n}\n")
    assert llamacpp.guard_tiles(tmp_path)
    assert llamacpp.guard_tiles(tmp_path)
    text = file.read_text()
    assert text.count("asm volatile") == 1
    assert text.index("asm volatile") < text.index("_tile_loadconfig")
    file.write_text("nothing to guard\n")
    assert not llamacpp.guard_tiles(tmp_path)


def test_gguf_writer_needs_nothing_of_quantkit():
    imports = [
        line
        for line in Path(gguf_file.__file__).read_text().splitlines()
        if line.strip().startswith(("import", "from"))
    ]
    assert all("quantkit" not in line and "torch" not in line for line in imports)


def test_another_engines_products_are_lanes(tmp_path):
    program = tmp_path / "ops"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "for line in sys.stdin:\n"
        "    open(sys.argv[0] + '.log', 'a').write(line)\n"
        "    print('CPU' if line.startswith('open') else 0.25, flush=True)\n"
    )
    program.chmod(0o755)
    engine = llamacpp.Products(program, "Q4_0", 1)
    lane = engine.lane(64, 128, 1, rotation=10 * 64 * 128 // 32 * 18)
    assert (lane.name, lane.n_bytes, lane.burst()) == (LLAMA, 64 * 128 // 32 * 18, 0.25)
    engine.close()
    assert (tmp_path / "ops.log").read_text().splitlines() == ["open Q4_0 64 128 1 10 32", "run 32", "run 1"]
