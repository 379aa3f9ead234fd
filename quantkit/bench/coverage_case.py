"""One model type of the coverage run: a tiny random model is saved, quantized, loaded and compared with itself."""

from __future__ import annotations

import inspect
import re
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.bench.shrink import shrunk
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMITS = {
    "w8-rtn": 0.03,
    "w4-gptq": 0.5,
    "w4-awq": 0.5,
}  # relative error of the logits above which a result is wrong
WALK_LIMIT = 1e-3  # of the logits behind the block walk, which quantizes nothing
LARGEST = 8_000_000  # weights of a tiny model
TEXT, BATCH = 32, 2  # tokens of a window, windows
_CALIBRATION = {"samples": 8, "sequence_length": TEXT, "seed": 0}
RECIPES: dict[str, dict[str, Any]] = {
    "w8-rtn": {"weights": {"preset": "W8A16", "algorithm": "rtn", "group_size": "channel"}},
    "w4-gptq": {
        "weights": {"preset": "W4A16", "algorithm": "gptq", "group_size": 16},
        "calibration": _CALIBRATION,
    },
    "w4-awq": {
        "weights": {"preset": "W4A16_ASYM", "algorithm": "rtn", "group_size": 16},
        "transforms": ["awq"],
        "calibration": _CALIBRATION,
    },
}
GENERATES, WALKS = (
    "w8-rtn",
    "w4-gptq",
)  # what decoding with a cache and the block walk are looked at with, once
_RECURRENT = re.compile(
    r"(^|\.)(A_log|conv1d|conv|rg_lru|time_decay|time_mix_key|igate_preact|q_conv1d)(\.|$)"
)
_FREE = re.compile(r"/tmp\S*/|/\S*quantkit-coverage\S*")


@dataclass
class Case:
    """What became of one model type.

    family: dense, mixture, hybrid, wrapper or other. built: why no tiny model could be built and run, "" if it was.
    outcomes: recipe -> {"outcome": accepted, refused or wrong, "error": of the logits, "reason": ...}.
    """

    model_type: str
    architecture: str
    family: str = "other"
    built: str = ""
    parameters: int = 0
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_case(model_type: str, architecture: str, recipes: list[str]) -> Case:
    """Build, quantize by every recipe, load and compare one model type."""
    case = Case(model_type, architecture)
    try:
        model = built(model_type, architecture)
    except Exception as error:  # whatever transformers raises for a config that it does not like
        case.built = said(error)
        case.family = family_of(model_type, None)
        return case
    case.family = family_of(model_type, model)
    case.parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory(prefix="quantkit-coverage") as folder:
        source = Path(folder) / "source"
        try:
            model.save_pretrained(source)
            tokenizer().save_pretrained(source)
            original = (
                type(model).from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
            )
            wanted = logits(original)
            if not torch.isfinite(wanted).all() or not bool(wanted.any()):
                raise ValueError("its logits are not finite or all zero")
        except Exception as error:  # a class that cannot read what it wrote
            case.built = f"saved and loaded by transformers: {said(error)}"
            return case
        del model
        for name in recipes:
            case.outcomes[name] = outcome(name, source, Path(folder) / name, original, wanted)
    return case


def outcome(
    name: str, source: Path, output: Path, original: PreTrainedModel, wanted: torch.Tensor
) -> dict[str, Any]:
    """Quantize by one recipe, load, and compare the logits with those of the original."""
    import quantkit

    try:
        quantkit.quantize(RECIPES[name], model=source, output=output, evaluate=False, device="cpu")
    except QuantkitError as error:
        late = any(output.glob("*.safetensors"))
        return {"outcome": "wrong" if late else "refused", "reason": said(error)}
    except Exception as error:  # a crash is a defect
        return {"outcome": "wrong", "reason": f"crash: {said(error)} {where(error)}"}
    try:
        loaded = quantkit.load(output, device="cpu")
        error_of_logits = relative(logits(loaded), wanted)
        tokens = generated(loaded) if name == GENERATES and not generated(original) else ""
    except Exception as error:  # whatever it is, the finished checkpoint does not run
        return {"outcome": "wrong", "reason": f"finished, does not load or run: {said(error)} {where(error)}"}
    found: dict[str, Any] = {"outcome": "accepted", "error": round(error_of_logits, 4)}
    if not error_of_logits < LIMITS[name]:
        found |= {"outcome": "wrong", "reason": f"logits differ by {error_of_logits:.3g}"}
    if tokens:
        found |= {"outcome": "wrong", "reason": tokens}
    if name == WALKS:
        try:
            away = walked(name, source)
        except Exception as error:  # seen by nothing else
            found |= {"outcome": "wrong", "reason": f"walk: {said(error)} {where(error)}"}
        else:
            found["walk"] = float(f"{away:.1g}")
            if not away < WALK_LIMIT:
                found |= {"outcome": "wrong", "reason": f"the walk's logits differ by {away:.3g}"}
    return found


@torch.no_grad()
def walked(name: str, source: Path) -> float:
    """How far the logits behind the block walk, nothing quantized, are from the model's own on the same windows."""
    from quantkit.calibration.forward import finish
    from quantkit.calibration.walk import Wanted, walk
    from quantkit.models import skeleton
    from quantkit.pipeline.progress import Silent
    from quantkit.pipeline.quantize import prepared

    run = prepared(RECIPES[name], source, source.parent / "walk", (), "cpu", None, Silent())
    assert run.windows is not None
    ids = run.windows.ids[:4]
    streams, form = None, None
    for block in walk(
        run.model, run.source, run.plan, ids, Wanted(len(ids), quantized=False, behind_last=True)
    ):
        block.leave()
        streams, form = block.streams, block.form
    assert streams is not None
    prefix, blocks = skeleton.find_blocks(run.model, run.plan.blocks_prefix)
    skeleton.load_outside(run.model, run.source, prefix)
    found = finish(run.model, blocks, streams.of(True), ids, form)
    from quantkit.checkpoint.load import load

    return relative(found, load(source, device="cpu")(input_ids=ids, use_cache=False).logits)


def generated(model: PreTrainedModel) -> str:
    """What is wrong with decoding behind a state cache: "" if its tokens are those of whole forwards."""
    ids = torch.arange(5, 13)[None]
    config: Any = model.generation_config
    generate: Any = model.generate
    config.eos_token_id = config.pad_token_id = None
    try:
        with torch.no_grad():
            by_cache = generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
            whole = generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    except Exception as error:
        return f"generate: {said(error)} {where(error)}"
    return "" if torch.equal(by_cache, whole) else "generate: a cache gives other tokens than whole forwards"


def built(model_type: str, architecture: str) -> PreTrainedModel:
    """The tiny model in fp32, eval mode, with random weights; the last error if no config of the type runs."""
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
            found = logits(model)
            if not torch.isfinite(found).all():
                raise ValueError("its logits are not finite")
            return model
        except Exception as error:  # the next strategy may do better
            last = error
    raise last


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
def logits(model: PreTrainedModel) -> torch.Tensor:
    """[windows, tokens, vocabulary] of a fixed text, without a picture."""
    ids = torch.randint(4, 100, (BATCH, TEXT), generator=torch.Generator().manual_seed(2))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    if found.shape[:2] != ids.shape:
        raise ValueError(f"its logits have the shape {list(found.shape)} for {list(ids.shape)} tokens")
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what varies in `wanted`."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).double()
    return float((found - wanted).double().square().mean().sqrt() / spread.square().mean().sqrt())


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


def said(error: BaseException) -> str:
    """The class and the first words of an error, without the names of temporary folders."""
    kind = "" if isinstance(error, QuantkitError) else f"{type(error).__name__}: "
    return kind + _FREE.sub("", " ".join(str(error).split()))[:400]


def where(error: BaseException) -> str:
    """The innermost line of an error's traceback that is ours or transformers'."""
    frames: Iterator[traceback.FrameSummary] = reversed(traceback.extract_tb(error.__traceback__))
    named = (
        f"({Path(f.filename).name}:{f.lineno})"
        for f in frames
        if re.search("quantkit|transformers", f.filename)
    )
    return next(named, "")
