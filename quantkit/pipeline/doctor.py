"""The calibration text of a recipe as a model will see it, before a run: what it holds, what it misses, what to do.

The tokenizer is all that is read of the model, but for the tokens that come to each expert of a mixture: these need its
weights, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantkit_eval
import torch
from quantkit_eval.text import Text, source_name
from quantkit_eval.windows import first_tokens

from quantkit import assets
from quantkit.calibration.duplicates import Duplicates, Overlap, duplicates, overlap
from quantkit.calibration.scripts import Script, scripts
from quantkit.calibration.text import Read, Windows, leading_token, read_windows
from quantkit.calibration.walk import Wanted, walk
from quantkit.device import find_device
from quantkit.errors import DataError, ModelError, memory_named
from quantkit.models import families, skeleton
from quantkit.models.blocks import text_config
from quantkit.models.borders import quiet
from quantkit.models.config import read_config
from quantkit.models.headers import Headers, read_checkpoint, resolve_model
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.advice import advice
from quantkit.plan import Plan, build_plan
from quantkit.recipe.recipe import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "quantkit-calibration/1"
COMPARED = 1 << 20  # tokens of the evaluation text, at most, that calibration is compared with
SMALL = 1 << 30  # bytes of a mixture whose experts are counted without being asked for
MODEL_FREE = "the recipe has model_free: true, which uses no text"


@dataclass(frozen=True)
class Lengths:
    """Tokens of documents. longer: share of the documents that no window holds whole; shorter: of the others."""

    min: int
    median: float
    p95: float
    max: int
    longer: float
    shorter: float

    @classmethod
    def of(cls, counts: Sequence[int], window: int) -> Lengths:
        """Of documents with so many tokens each, cut into windows of `window`."""
        values = torch.tensor(counts, dtype=torch.float64)
        longer = float((values > window).double().mean())
        middle, high = (float(values.quantile(q)) for q in (0.5, 0.95))
        return cls(int(values.min()), middle, high, int(values.max()), longer, 1 - longer)


@dataclass(frozen=True)
class SourceReport:
    """One source. characters, tokens: read of it; cut: it has more. windows: taken from it, `used` of its tokens.

    chats: documents that the chat template has rendered. empty: records without text. unknown, special: shares of its
    tokens.
    """

    name: str
    sha256: str
    documents: int
    empty: int
    chats: int
    characters: int
    cut: bool
    tokens: int
    windows: int
    used: float
    unknown: float
    special: float
    lengths: Lengths
    duplicates: Duplicates


@dataclass(frozen=True)
class Tokenizer:
    """What the tokenizer puts around texts. bos, eos: the tokens, as text; None: it has none.

    bos_first: whether every window begins with BOS. bos_inside, eos_inside: how many more are in the windows, from
    texts and templates. template: whether it has a chat template.
    """

    vocabulary: int
    bos: str | None
    bos_first: bool
    bos_inside: int
    eos: str | None
    eos_inside: int
    template: bool


@dataclass(frozen=True)
class ExpertsReport:
    """Calibration tokens of each expert of one layer. needed: tokens from which a Hessian has full rank."""

    name: str
    tokens: list[int]
    needed: int


@dataclass(frozen=True)
class CalibrationReport:
    """What is known about a recipe's calibration text.

    embedded: it is the text that quantkit ships. window: the tokens of the first window. widest: the most inputs of a
    planned linear. needed: whether the recipe uses the text at all. covered: share of the vocabulary that the windows
    touch. evaluation: names of the text that it was compared with. experts: None if they were not counted.
    """

    model: str
    embedded: bool
    needed: bool | None
    sequence_length: int
    samples: int
    seed: int
    digest: str
    sources: list[SourceReport]
    tokenizer: Tokenizer
    window: list[str]
    covered: float
    scripts: list[Script]
    evaluation: list[str]
    overlap: Overlap
    widest: int | None
    experts: list[ExpertsReport] | None
    experts_left: str | None

    @property
    def warnings(self) -> list[str]:
        """What looks wrong, each with what to do about it."""
        return advice(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-calibration/1" (docs/calibration.md)."""
        return {"schema": SCHEMA} | asdict(self) | {"warnings": self.warnings}


@memory_named()
@quiet(bars=False)
def examine_calibration(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
    eval_text: Sequence[str | Path] = (),
    experts: bool | None = None,
    device: str = "auto",
) -> CalibrationReport:
    """Look at the calibration text of a recipe with the tokenizer of a model.

    recipe, model, overrides: as of `quantize`. eval_text: what the result will be evaluated on; default the embedded
    text. experts: whether to count the tokens that come to the experts of a mixture, which runs the model block by
    block on `device`; None: if its weights take at most SMALL bytes.

    Raises the errors of `quantize` for a recipe, model or text that cannot be used.
    """
    checked = _recipe(recipe, overrides)
    if checked.model_free:
        raise DataError(f"there is no calibration to look at: {MODEL_FREE}")
    named = str(model) if model is not None else checked.model
    path = resolve_model(named, assets.default_model())
    headers = read_checkpoint(path) if any(path.glob("*.safetensors")) else None
    plan = None if headers is None else build_plan(checked, headers)
    tokenizer = open_tokenizer(path)
    size = text_config(read_config(path)).get("vocab_size")
    calibration = checked.calibration
    rows = size if isinstance(size, int) else None
    windows, read = read_windows(calibration, tokenizer, assets.calibration_text(), rows)
    evaluation = [str(each) for each in eval_text] or [str(assets.evaluation_text())]
    touched = windows.ids.unique().tolist()
    vocabulary = scripts(tokenizer, touched)
    counted, left = _experts(checked, headers, windows, experts, device)
    return CalibrationReport(
        model=headers.name if headers else path.resolve().name,
        embedded=not calibration.data,
        needed=None if plan is None else plan.needs_text(checked),
        sequence_length=calibration.sequence_length,
        samples=calibration.samples,
        seed=calibration.seed,
        digest=windows.digest,
        sources=[_source(each, tokenizer, windows.ids.shape[1]) for each in read],
        tokenizer=_tokenizer(tokenizer, windows.ids),
        window=list(tokenizer.convert_ids_to_tokens(windows.ids[0].tolist())),
        covered=sum(each.seen for each in vocabulary) / max(1, sum(each.tokens for each in vocabulary)),
        scripts=vocabulary,
        evaluation=[source_name(each) for each in evaluation],
        overlap=_overlap(windows, tokenizer, evaluation),
        widest=None if plan is None else max((one.shape[1] for one in plan.layers), default=None),
        experts=counted,
        experts_left=left,
    )


def _recipe(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        return parse_recipe(recipe.resolved(), overrides) if overrides else recipe
    return parse_recipe(recipe, overrides) if isinstance(recipe, Mapping) else load_recipe(recipe, overrides)


def _source(read: Read, tokenizer: PreTrainedTokenizerBase, window: int) -> SourceReport:
    document, tokens = read.document, read.tokens
    documents = document.documents()
    counts = [len(tokens)]
    if len(documents) > 1:
        found = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts = [len(ids) for ids in found["input_ids"]]
    body = window - (leading_token(tokenizer) is not None)
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids, dtype=torch.int64))
    unknown = tokenizer.unk_token_id
    missing = 0.0 if unknown is None else float((tokens == unknown).double().mean())
    return SourceReport(
        name=document.name,
        sha256=document.digest,
        documents=len(documents),
        empty=document.empty,
        chats=document.chats,
        characters=len(document.text),
        cut=document.cut,
        tokens=len(tokens),
        windows=read.windows,
        used=read.windows * body / len(tokens),
        unknown=missing,
        special=float(special.double().mean()),
        lengths=Lengths.of(counts, body),
        duplicates=duplicates(documents),
    )


def _tokenizer(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> Tokenizer:
    first = leading_token(tokenizer) is not None
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    inside = ids[:, 1:] if first else ids
    return Tokenizer(
        vocabulary=len(tokenizer),
        bos=tokenizer.bos_token,
        bos_first=first,
        bos_inside=0 if bos is None else int((inside == bos).sum()),
        eos=tokenizer.eos_token,
        eos_inside=0 if eos is None else int((inside == eos).sum()),
        template=bool(tokenizer.chat_template),
    )


def _overlap(windows: Windows, tokenizer: PreTrainedTokenizerBase, sources: list[str]) -> Overlap:
    try:
        tokens = first_tokens(tokenizer, Text(sources), COMPARED)
    except quantkit_eval.EvalError as error:
        raise DataError(str(error)) from None
    return overlap(windows.ids, torch.tensor(tokens, dtype=torch.int64))


def _experts(
    recipe: Recipe, headers: Headers | None, windows: Windows, wanted: bool | None, device: str
) -> tuple[list[ExpertsReport] | None, str | None]:
    """(tokens per expert, None) of a mixture, or (None, why they were not counted); (None, None) of another model."""
    if headers is None:
        if wanted:
            raise ModelError("counting tokens per expert needs the model's weights, and the folder has none")
        return None, None
    if wanted is None:
        mixture = any(families.EXPERT_TENSOR.search(name.rpartition(".")[0]) for name in headers.tensors)
        if not mixture:
            return None, None
        held = sum(info.nbytes for info in headers.tensors.values())
        if held > SMALL:
            return None, f"the weights take {held / 1e9:.1f} GB; --experts runs them block by block"
    if wanted is False:
        return None, None
    source = Source(headers)
    built = skeleton.build(source)
    plan = build_plan(recipe, headers, skeleton.places(built))
    with torch.no_grad():
        return _counted(source, built, plan, windows, device), None


def _counted(source: Source, built: Any, plan: Plan, windows: Windows, device: str) -> list[ExpertsReport]:
    """How many tokens of the windows the routers of the model, as it is, send to each expert."""
    found = []
    for block in walk(built, source, plan, windows.ids, Wanted(), device=find_device(device)):
        for stage in block.experts.values():
            block.route(stage)
            counts = torch.zeros(stage.experts.total, dtype=torch.int64)
            for _, routed in stage.all_recorded():
                counts += torch.tensor([len(routed.tokens(expert)) for expert in range(stage.experts.total)])
            needed = max(stage.experts.shape.hidden, stage.experts.shape.width)
            found.append(ExpertsReport(f"{block.name}.{stage.name}", counts.tolist(), needed))
    return found
