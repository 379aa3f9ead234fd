"""The tiny random model of one type of the coverage run, and how it is asked for the logits of a text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.bench.shrink import shrunk
from quantkit.models.skeleton import reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 8_000_000  # weights of a tiny model
TEXT, BATCH = 32, 2  # tokens of a window, windows
Inputs = dict[str, torch.Tensor]  # what a forward wants beside a text: a picture
_RECURRENT = re.compile(
    r"(^|\.)(A_log|conv1d|conv|rg_lru|time_decay|time_mix_key|igate_preact|q_conv1d)(\.|$)"
)


def built(model_type: str, architecture: str) -> tuple[PreTrainedModel, Inputs]:
    """(the tiny model in fp32, eval mode, with random weights; what its forward wants beside a text).

    The last error if no config of the type runs. Encoder-decoders, which are refused by name, are not run.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    last: Exception = ValueError("no config")
    build = getattr(transformers, architecture)
    for config in shrunk(CONFIG_MAPPING[model_type]):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in build(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size} weights, more than {LARGEST}")
            torch.manual_seed(0)
            model: PreTrainedModel = build(config).float().eval().requires_grad_(False)
            randomise(model)
            return model, {} if model.config.is_encoder_decoder else wanted_inputs(model)
        except Exception as error:  # the next strategy may do better
            last = error
    raise last


def wanted_inputs(model: PreTrainedModel) -> Inputs:
    """What a forward wants beside a text: nothing, or random pictures; the error without any if nothing runs."""
    first: Exception | None = None
    for inputs in ({}, *_pictures(model)):
        try:
            found = logits(model, inputs)
            if not torch.isfinite(found).all():
                raise ValueError("its logits are not finite")
            return inputs
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _pictures(model: PreTrainedModel) -> Iterator[Inputs]:
    """Random pictures [windows, channels, height, width]; and one of several, which all tokens may see."""
    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    if "pixel_values" in inspect.signature(model.forward).parameters and type(side) is int:
        noise = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(4))
        yield {"pixel_values": noise}
        mask = torch.ones(BATCH, TEXT, 1, dtype=torch.long)
        yield {"pixel_values": noise[:, None], "image_attention_mask": mask}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices get variance 1/columns and embeddings 1; the weights of norms stay within 0.5 of their default, other
    vectors within 0.1.
    """
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        if parameter.dim() > 1 and re.search(r"A_log|time_|recurrent|decay", name):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.dim() > 1:
            convolution = parameter.dim() > 3 or (parameter.dim() == 3 and parameter.shape[1] == 1)
            columns = parameter[0].numel() if convolution else parameter.shape[-1]
            columns = 1 if id(parameter) in embeddings else columns
            parameter.normal_(0, columns**-0.5, generator=generator)
        elif name.endswith("norm.weight") or (name.endswith("weight") and parameter.dim() == 1):
            parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
        else:
            parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator) - 0.1)


def family_of(model_type: str, model: nn.Module | None) -> str:
    """dense, mixture, hybrid, wrapper or other, by what the built model holds (and by its mapping without one)."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    names = [name for name, _ in model.named_parameters()] if model is not None else []
    fields = set(getattr(config, "__dataclass_fields__", ()))
    if model is not None and any(
        type(m).__name__.endswith(("Experts", "MoE", "MoeBlock")) for m in model.modules()
    ):
        return "mixture"
    if (
        any(n.startswith(("num_experts", "n_routed_experts", "num_local_experts")) for n in fields)
        and model is None
    ):
        return "mixture"
    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or "vision_config" in fields:
        return "wrapper"
    if {"is_decoder", "is_encoder_decoder", "decoder_layers"} & set(inspect.get_annotations(config)):
        return "other"
    if any(_RECURRENT.search(name) for name in names):
        return "hybrid"
    return "dense" if model is not None else "other"


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """[windows, tokens, vocabulary] of a fixed text; of the tokens to be written, for a model that writes in blocks.

    inputs: what the forward wants beside the text.
    """
    ids = torch.randint(4, 100, (BATCH, TEXT), generator=torch.Generator().manual_seed(2))
    call: Callable[..., Any] = model if inputs else reader(model)
    found: torch.Tensor = call(input_ids=ids, use_cache=False, **inputs).logits
    if found.dim() != 3 or found.shape[0] != BATCH:
        raise ValueError(f"its logits have the shape {list(found.shape)} for {list(ids.shape)} tokens")
    return found


def tokenizer() -> Any:
    """One token per character: 4 special ones, newline, printable ASCII; 100 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
