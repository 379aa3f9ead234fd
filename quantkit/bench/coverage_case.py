"""One model type of the coverage run: a tiny random model is saved, quantized, loaded and compared with itself."""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.bench.coverage_judge import DRAWS, limit, noisy, share
from quantkit.bench.coverage_model import TEXT, Inputs, built, family_of, logits, tokenizer
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WALK_LIMIT = 1e-3  # of the logits behind the block walk, which quantizes nothing
READ_BACK = 1e-3  # of the logits of a model that transformers has written and read
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


@dataclass(frozen=True)
class Original:
    """A tiny model as transformers reads it from files.

    inputs: what its forward wants beside a text. logits: of a fixed text; None: an encoder-decoder, which is refused.
    """

    model: PreTrainedModel
    inputs: Inputs
    logits: torch.Tensor | None


def run_case(model_type: str, architecture: str, recipes: list[str]) -> Case:
    """Build, quantize by every recipe, load and compare one model type."""
    case = Case(model_type, architecture)
    try:
        model, inputs = built(model_type, architecture)
    except Exception as error:  # whatever transformers raises for a config that it does not like
        case.built = said(error)
        case.family = family_of(model_type, None)
        return case
    case.family = family_of(model_type, model)
    case.parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory(prefix="quantkit-coverage") as folder:
        source = Path(folder) / "source"
        try:
            original = saved(model, inputs, source)
        except Exception as error:  # a class that cannot read what it wrote
            case.built = f"saved and loaded by transformers: {said(error)}"
            return case
        del model
        for name in recipes:
            case.outcomes[name] = outcome(name, source, Path(folder) / name, original)
    return case


def saved(model: PreTrainedModel, inputs: Inputs, folder: Path) -> Original:
    """Write a model with a tokenizer, and read it; ValueError if that gives another one."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    read = type(model).from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    if model.config.is_encoder_decoder:
        return Original(read, inputs, None)
    found = logits(read, inputs)
    if not torch.isfinite(found).all() or not bool(found.any()):
        raise ValueError("its logits are not finite or all zero")
    away = relative(found, logits(model, inputs))
    if not away < READ_BACK:
        raise ValueError(
            f"transformers reads another model than it has written; the logits differ by {away:.3g}"
        )
    return Original(read, inputs, found)


def outcome(name: str, source: Path, output: Path, original: Original) -> dict[str, Any]:
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
        found = measured(name, quantkit.load(output, device="cpu"), original)
    except Exception as error:  # whatever it is, the finished checkpoint does not run
        return {"outcome": "wrong", "reason": f"finished, does not load or run: {said(error)} {where(error)}"}
    if name == WALKS and not original.inputs:
        try:
            away = walked(name, source)
        except Exception as error:  # seen by nothing else
            found |= {"outcome": "wrong", "reason": f"walk: {said(error)} {where(error)}"}
        else:
            found["walk"] = float(f"{away:.1g}")
            if not away < WALK_LIMIT:
                found |= {"outcome": "wrong", "reason": f"the walk's logits differ by {away:.3g}"}
    return found


def measured(name: str, loaded: PreTrainedModel, original: Original) -> dict[str, Any]:
    """A loaded result beside its original: errors, share of what is quantized, and what is wrong with it."""
    if original.logits is None:
        raise ValueError("an encoder-decoder was quantized as a decoder")
    error = relative(logits(loaded, original.inputs), original.logits)
    by_noise = 0.0
    for seed in range(DRAWS):
        draw = noisy(original.model, loaded, seed)
        by_noise = max(by_noise, relative(logits(draw, original.inputs), original.logits))
        if error < limit(by_noise):
            break
    found: dict[str, Any] = {
        "outcome": "accepted",
        "error": round(error, 4),
        "noise": round(by_noise, 4),
        "share": round(share(original.model, loaded), 3),
    }
    if not error < limit(by_noise):
        found |= {
            "outcome": "wrong",
            "reason": f"logits differ by {error:.3g}, and by {by_noise:.3g} with noise on the weights",
        }
    elif name == GENERATES and not generated(original.model) and (tokens := generated(loaded)):
        found |= {"outcome": "wrong", "reason": tokens}
    return found


@torch.no_grad()
def walked(name: str, source: Path) -> float:
    """How far the logits behind the block walk, nothing quantized, are from the model's own on the same windows."""
    from quantkit.calibration.forward import finish
    from quantkit.calibration.returned import FIRST
    from quantkit.calibration.walk import Wanted, walk
    from quantkit.models import skeleton
    from quantkit.pipeline.progress import Silent
    from quantkit.pipeline.quantize import prepared

    run = prepared(RECIPES[name], source, source.parent / "walk", (), "cpu", None, Silent())
    assert run.windows is not None
    ids = run.windows.ids[:4]
    streams, form = None, FIRST
    for block in walk(
        run.model, run.source, run.plan, ids, Wanted(len(ids), quantized=False, behind_last=True)
    ):
        block.leave()
        streams, form = block.streams, block.form
    assert streams is not None
    prefix, blocks = skeleton.find_blocks(run.model, run.plan.blocks_prefix)
    skeleton.load_outside(run.model, run.source, prefix)
    found = finish(run.model, blocks, streams.of(True)[:], ids, form)
    from quantkit.checkpoint.load import load

    return relative(found, skeleton.reader(load(source, device="cpu"))(input_ids=ids, use_cache=False).logits)


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


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what varies in `wanted`."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).double()
    return float((found - wanted).double().square().mean().sqrt() / spread.square().mean().sqrt())


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
