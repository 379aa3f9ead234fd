"""Train the embedded mixture of experts, bookworm-moe-6m, from the embedded dense model in minutes on one core.

    python -m quantkit.bench.upcycle OUT [--minutes 11] [--json docs/benchmarks/mixture.json]

Four of the eight dense blocks stay, with embedding, norms and attention; the two key-value heads are averaged to one.
In place of each MLP come eight experts, of which a router chooses two per token. The inputs of the MLP are clustered by
direction (k-means), the centres become the rows of the router, and an expert begins as those neurons of the MLP that
move the output most for the tokens of its cluster. Then everything but the embedding is trained to give the dense
model's distribution of the next token (KL divergence, temperature 1) on the embedded calibration text, with
transformers' load-balancing loss. The last 5 % of that text are never trained on.

Reported on the embedded evaluation text: perplexity of both models and of a bigram model of the same training text
(interpolated Kneser-Ney, discount 0.75), tokens per expert, and how far the experts are specialists (`specialisation`).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.models.tokenizer import open_tokenizer

EXPERTS, TOP, INTERMEDIATE = 8, 2, 128
BLOCKS = (0, 2, 4, 7)  # of all subsets with block 0, the dense model without the others is best with this one
WINDOW, BATCH = 512, 4
RATE, WARM_UP, DECAY, BALANCE = 1e-3, 40, 0.01, 0.02
HELD_OUT = 0.05
EVALUATED = 120  # windows


class Text(NamedTuple):
    """Windows of token ids, int64 [n, WINDOW]."""

    train: torch.Tensor
    held_out: torch.Tensor
    evaluation: torch.Tensor


def read_text() -> Text:
    """The embedded texts in windows of 512 tokens."""
    tokenizer = open_tokenizer(assets.default_model())

    def windows(path: Path) -> torch.Tensor:
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
        return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)

    known = windows(assets.calibration_text())
    kept = len(known) - round(HELD_OUT * len(known))
    return Text(known[:kept], known[kept:], windows(assets.evaluation_text())[:EVALUATED])


def mixture_of(dense: Any, ids: torch.Tensor, seed: int = 0) -> Any:
    """The untrained mixture. ids: the windows [n, WINDOW] whose MLP inputs are clustered."""
    from transformers import MixtralConfig, MixtralForCausalLM

    given = dense.config.to_dict()
    kept = (
        "vocab_size hidden_size num_attention_heads head_dim hidden_act rms_norm_eps max_position_embeddings"
    )
    kept += " rope_parameters bos_token_id eos_token_id pad_token_id"
    config = MixtralConfig(
        **{key: given[key] for key in kept.split()},
        num_hidden_layers=len(BLOCKS),
        num_key_value_heads=1,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP,
        router_aux_loss_coef=BALANCE,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight)
        model.model.norm.weight.copy_(dense.model.norm.weight)
        inputs = _mlp_inputs(dense, ids)
        for block, number in zip(model.model.layers, BLOCKS, strict=True):
            _fill(block, dense.model.layers[number], inputs[number], seed)
    return model


def _mlp_inputs(dense: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Block -> the inputs of its MLP, fp32 [tokens, hidden]."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        dense.model.layers[i].mlp.register_forward_pre_hook(
            lambda _, args, i=i: seen.__setitem__(i, args[0].flatten(0, 1))
        )
        for i in BLOCKS
    ]
    dense(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _fill(block: Any, dense: Any, x: torch.Tensor, seed: int) -> None:
    """Give a block of the mixture the weights of a dense one; x: the inputs of its MLP [tokens, hidden]."""
    for name in ("q_proj", "o_proj"):
        getattr(block.self_attn, name).weight.copy_(getattr(dense.self_attn, name).weight)
    for name in ("k_proj", "v_proj"):
        weight = getattr(dense.self_attn, name).weight
        getattr(block.self_attn, name).weight.copy_(
            weight.view(-1, dense.self_attn.head_dim, weight.shape[1]).mean(0)
        )
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(block, name).weight.copy_(getattr(dense, name).weight)
    centres, cluster = _clusters(x, seed)
    block.mlp.gate.weight.copy_(centres)
    mlp = dense.mlp
    active = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)  # [tokens, neurons]
    moved = active.abs() * mlp.down_proj.weight.norm(dim=0)
    experts = block.mlp.experts
    for e in range(EXPERTS):
        chosen = moved[cluster == e].mean(0).topk(INTERMEDIATE).indices.sort().values
        experts.gate_up_proj[e].copy_(torch.cat([mlp.gate_proj.weight[chosen], mlp.up_proj.weight[chosen]]))
        experts.down_proj[e].copy_(mlp.down_proj.weight[:, chosen])
    wanted, got = mlp(x), block.mlp(x[None])[0]
    experts.down_proj.mul_(
        (wanted * got).sum() / got.square().sum()
    )  # as large as the dense output, least squares


def _clusters(x: torch.Tensor, seed: int, rounds: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Spherical k-means: (rows of a router [EXPERTS, hidden], cluster of each token [tokens])."""
    unit = F.normalize(x, dim=1)
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:EXPERTS]
    centres = unit[start]
    for _ in range(rounds):
        cluster = (unit @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, unit)
        centres = F.normalize(sums, dim=1)
    similar = unit @ centres.T
    spread = (similar - similar.mean(1, keepdim=True)).std() * x.norm(dim=1).mean()
    return centres / spread, similar.argmax(1)  # logits with a standard deviation of about 1


def teach(
    model: Any, dense: Any, text: Text, minutes: float, seed: int = 0, steps: int | None = None
) -> dict[str, Any]:
    """Train `model` in place for about so many CPU-minutes, or exactly `steps`; returns what was done."""
    start = time.process_time()
    head = dense.lm_head.weight
    with torch.no_grad():
        target = torch.cat([dense.model(input_ids=w[None]).last_hidden_state for w in text.train])
    model.train()
    model.model.embed_tokens.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, (0.9, 0.98), weight_decay=DECAY)
    done = 0
    for batch in _batches(len(text.train), seed):
        begin = time.process_time()
        share = done / steps if steps else (begin - start) / (60 * minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                RATE * min(1.0, (done + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            )
        loss, balance = _losses(model, head, text.train[batch], target[batch])
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        if done % 20 == 0:
            print(f"step {done}: KL {loss.item():.3f}, balance {balance.item():.3f}", flush=True)
    model.eval()
    return {"steps": done, "tokens": done * BATCH * WINDOW, "cpu_seconds": time.process_time() - start}


def _batches(count: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of window numbers, every window once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


def _losses(
    model: Any, head: torch.Tensor, ids: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL to the dense model in nats per token, load-balancing loss). target: its last hidden states."""
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    student = F.log_softmax(out.logits.flatten(0, 1), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(target.flatten(0, 1) @ head.T, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean"), out.aux_loss


@torch.no_grad()
def negative_log_likelihood(model: Any, windows: torch.Tensor) -> float:
    """Mean over all tokens but each window's first, in nats."""
    total = 0.0
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
    return total / (windows.numel() - len(windows))


class Bigram:
    """Interpolated Kneser-Ney over pairs of tokens, with one discount; what was never seen shares a uniform rest."""

    DISCOUNT = 0.75

    def __init__(self, ids: torch.Tensor, vocabulary: int) -> None:
        """ids: the training tokens, int64 [n]."""
        self.vocabulary = vocabulary
        self.pairs, self.counts = torch.unique(ids[:-1] * vocabulary + ids[1:], return_counts=True)
        first, second = self.pairs // vocabulary, self.pairs % vocabulary
        self.total = torch.zeros(vocabulary).index_add_(0, first, self.counts.float())
        self.followers = torch.bincount(first, minlength=vocabulary).float()
        before = torch.bincount(second, minlength=vocabulary).float()  # distinct tokens it follows
        rest = self.DISCOUNT * (before > 0).sum() / vocabulary
        self.unigram = ((before - self.DISCOUNT).clamp(min=0) + rest) / len(self.pairs)

    def negative_log_likelihood(self, windows: torch.Tensor) -> float:
        """Mean over all tokens but each window's first, in nats. windows: [n, length]."""
        first, second = windows[:, :-1].flatten(), windows[:, 1:].flatten()
        wanted = first * self.vocabulary + second
        at = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        count = torch.where(self.pairs[at] == wanted, self.counts[at], 0).float()
        total = self.total[first]
        known = (count - self.DISCOUNT).clamp(min=0) + self.DISCOUNT * self.followers[first] * self.unigram[
            second
        ]
        p = torch.where(total > 0, known / total.clamp(min=1), self.unigram[second])
        return -p.log().mean().item()


@torch.no_grad()
def specialisation(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Tokens per expert of each layer, and two signs that the experts differ.

    "by_token": how often the first choice of the router is the expert that this token id gets most often, over ids seen
    at least 20 times (chance: "largest_share", the share of the most used expert among first choices).
    "perplexity_exchanged": with every token sent to the experts numbered one higher than those chosen.
    """
    chosen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
        for layer, seen in zip(model.model.layers, chosen, strict=True)
    ]
    plain = negative_log_likelihood(model, windows)
    for hook in hooks:
        hook.remove()
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args: (args[0], (args[1] + 1) % EXPERTS, args[2])
        )
        for layer in model.model.layers
    ]
    exchanged = negative_log_likelihood(model, windows)
    for hook in hooks:
        hook.remove()
    layers = [_layer(torch.cat(index), windows.flatten()) for index in chosen]
    return {
        "perplexity": math.exp(plain),
        "perplexity_exchanged": math.exp(exchanged),
        "tokens": windows.numel(),
        "layers": layers,
    }


def _layer(index: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """One layer's row. index: experts of each token [tokens, TOP]; ids: the tokens."""
    first = index[:, 0]
    table = torch.zeros(int(ids.max()) + 1, EXPERTS).index_put_(
        (ids, first), torch.ones(len(ids)), accumulate=True
    )
    frequent = table[table.sum(1) >= 20]
    return {
        "tokens_per_expert": torch.bincount(index.flatten(), minlength=EXPERTS).tolist(),
        "by_token": (frequent.max(1).values.sum() / frequent.sum()).item(),
        "largest_share": (torch.bincount(first).max() / len(first)).item(),
    }


def write(model: Any, folder: Path) -> Path:
    """Save as bf16 with the tokenizer of the dense model, beside the README that is there."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets.default_model() / name, folder / name)
    return folder


def report(folder: Path, dense: Any, text: Text) -> dict[str, Any]:
    """The numbers of a finished checkpoint, run in fp32, on the evaluation windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.set_experts_implementation("eager")
    bigram = Bigram(text.train.flatten(), dense.config.vocab_size)
    return {
        "bytes": (folder / "model.safetensors").stat().st_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": {
            "mixture": math.exp(negative_log_likelihood(model, text.evaluation)),
            "dense": math.exp(negative_log_likelihood(dense, text.evaluation)),
            "bigram": math.exp(bigram.negative_log_likelihood(text.evaluation)),
            "mixture, held-out calibration text": math.exp(negative_log_likelihood(model, text.held_out)),
            "dense, held-out calibration text": math.exp(negative_log_likelihood(dense, text.held_out)),
        },
        "specialisation": specialisation(model, text.evaluation[:40]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the mixture")
    parser.add_argument("--minutes", type=float, default=11, help="CPU-minutes of training; 0: only report")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, dense = read_text(), load(assets.default_model(), device="cpu")
    training = None
    if arguments.minutes:
        model = mixture_of(dense, text.train[::12])
        training = teach(model, dense, text, arguments.minutes)
        write(model, arguments.out)
    found = {"schema": "quantkit-mixture/1", "machine": machine(), "training": training}
    found |= report(arguments.out, dense, text)
    print(json.dumps(found, indent=1))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
