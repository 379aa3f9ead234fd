"""The captured decode step on a GPU: real graphs, the Triton kernels in them, and what happens when a capture fails."""

import gc
import threading
import warnings

import pytest
import tiny_models
import torch
from torch import nn

import quantkit
from quantkit.algorithms.rtn import rtn
from quantkit.assets import default_model
from quantkit.cli.main import run
from quantkit.layers.kv_cache import attach
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.kv import KVScales
from quantkit.runtime import GraphDecoder, generate, graphed, graphs
from quantkit.runtime.buffers import Buffers
from quantkit.scheme import KV_PRESETS, integer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = [
    "llama-gqa",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3-gqa",
    "opt",
    "gpt2",
    "falcon",
]


@torch.no_grad()
def decode(model, ids, steps, given=None):
    """Tokens fed after the prompt (the greedy ones, or those given) and all logits, [steps, vocabulary]."""
    tokens, logits, cache = [], [], None
    for i in range(steps):
        out = model(input_ids=ids.cuda(), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float().clone())
        tokens.append(int(logits[-1].argmax()) if given is None else given[i])
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logits)


def packed(name, backend, dtype=torch.bfloat16, bits=4, group=32, symmetric=True):
    """A tiny model on the GPU whose linears run packed on a backend."""
    model = tiny_models.FAMILIES[name](hidden_size=128, intermediate_size=256, head_dim=32).to("cuda", dtype)
    for block in tiny_models.blocks(model):
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                weight = rtn(module.weight.float(), integer(bits, group, symmetric), dtype)
                linear = QuantLinear.from_quantized(weight, module.bias).cuda()
                linear.prepare(backend, dtype)
                parent, _, leaf = path.rpartition(".")
                setattr(block.get_submodule(parent), leaf, linear)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_is_the_eager_model(name):
    model, ids = tiny_models.FAMILIES[name]().cuda(), tiny_models.ids(5)
    decoder = graphed(model, 64)
    assert isinstance(decoder, GraphDecoder), decoder
    tokens, logits = decode(model, ids, 64)
    found = decode(decoder, ids, 64, tokens)[1]
    assert decoder.why_eager is None
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_gemma2_is_right_captured_or_not():
    """Its attention makes masks by a copy from the host in transformers 5.17, which a capture refuses."""
    model, ids = tiny_models.FAMILIES["gemma2"]().cuda(), tiny_models.ids(5)
    tokens, logits = decode(model, ids, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decode(GraphDecoder(model, 40), ids, 40, tokens)[1]
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize("preset", ["INT8", "FP8"])
def test_quantized_caches_are_captured(name, preset):
    model, ids = tiny_models.FAMILIES[name]().cuda(), tiny_models.ids(5)
    scale = torch.full((2, 1, 1), 0.02)
    scales = None if preset == "INT8" else {i: KVScales(scale, scale) for i in range(3)}
    attach(model, KV_PRESETS[preset], scales)
    tokens, logits = decode(model, ids, 64)
    decoder = graphed(model, 64)
    assert isinstance(decoder, GraphDecoder), decoder
    found = decode(decoder, ids, 64, tokens)[1]
    assert decoder.why_eager is None
    assert (
        found - logits
    ).norm() <= 5e-3 * logits.norm()  # an entry between two codes may take the other one
    assert torch.equal(decode(GraphDecoder(model, 64), ids, 64, tokens)[1], found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_triton_linears_are_captured(bits, symmetric):
    model = packed("llama-gqa", "triton", bits=bits, symmetric=symmetric)
    ids, decoder = tiny_models.ids(40), GraphDecoder(model, 50)
    tokens, logits = decode(model, ids, 50)
    found = decode(decoder, ids, 50, tokens)[1]
    assert decoder.why_eager is None
    assert (found - logits).norm() <= 0.02 * logits.norm()  # bf16 attention over another length
    reference = packed("llama-gqa", "reference", bits=bits, symmetric=symmetric)
    truth = decode(reference, ids, 50, tokens)[1]
    assert (found - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_replay_repeated_gives_the_same_bits(backend):
    model = packed("llama-gqa", backend)
    buffers = Buffers(3, 128, torch.device("cuda"))
    buffers.prompt(model, tiny_models.ids(60))
    first = buffers.step(model, 7, 60).clone()
    for token in (8, 7, 7):
        again = buffers.step(model, token, 60).clone()
        assert torch.equal(again, first) == (token == 7)


def test_generations_of_other_lengths_follow_each_other():
    """Greedy, through the public function; the second reuses the first one's graph, the third needs a longer one."""
    model = quantkit.load(default_model(), device="cuda", dtype=torch.float32)
    for length, new in ((30, 60), (20, 30), (150, 80), (9, 5)):
        ids = tiny_models.ids(length, vocabulary=1000, seed=length)
        wanted = decode(model, ids, new)[0]
        assert generate(model, ids, new, stop=())[0, length:].tolist() == wanted
    assert graphs._shelf(model).failed is None


def test_memory_does_not_grow():
    model, ids = packed("llama-gqa", "triton"), tiny_models.ids(20)
    used = []
    for _ in range(6):
        decode(GraphDecoder(model, 100), ids, 100)
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1]


def test_a_capture_that_fails_leaves_eager_decoding():
    model, ids = tiny_models.FAMILIES["llama"]().cuda(), tiny_models.ids(6)
    wanted = decode(model, ids, 12)[0]
    hook = tiny_models.blocks(model)[1].register_forward_pre_hook(
        lambda _, args: args[0].sum().item() and None
    )
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert generate(model, ids, 12, stop=())[0, 6:].tolist() == wanted
    assert graphed(model, 12) == graphs._shelf(model).failed  # the reason, not asked again
    hook.remove()
    torch.cuda.synchronize()
    other = tiny_models.FAMILIES["qwen3"]().cuda()  # captures still work
    decoder = GraphDecoder(other, 12)
    assert decode(decoder, ids, 12)[0] == decode(other, ids, 12)[0]
    assert decoder.why_eager is None


def test_a_model_that_is_partly_elsewhere_is_not_captured():
    model = tiny_models.FAMILIES["llama"]().cuda()
    tiny_models.blocks(model)[0].cpu()
    assert "offloaded" in graphed(model, 9)


def test_threads_capture_and_replay_beside_each_other():
    model = packed("llama-gqa", "triton")
    prompts = [tiny_models.ids(10 + 3 * i, seed=i) for i in range(4)]
    wanted = [decode(GraphDecoder(model, 40), ids, 40)[0] for ids in prompts]
    found = [None] * len(prompts)

    def work(i):
        found[i] = decode(GraphDecoder(model, 40), prompts[i], 40)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_the_command_says_which_path_ran(capsys):
    arguments = ["generate", str(default_model()), "--prompt", "The king", "--max-new-tokens", "8"]
    assert run([*arguments, "--device", "cuda"]) == 0
    assert "decode in a CUDA graph: 8 tokens" in capsys.readouterr().err
