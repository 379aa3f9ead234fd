"""A checkpoint that can be quantized: its folder, its `config.json` and its tensors' headers; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.encodings import Encoding, encoding_of
from quantkit.formats.foreign import QUANTIZED_TENSOR
from quantkit.models import families
from quantkit.models.blocks import text_config
from quantkit.models.borders import foreign_errors
from quantkit.models.config import MODEL_FREE, check_sizes, longest_window, quantization_config, read_config
from quantkit.models.stacks import taken_apart
from quantkit.models.tensors import (
    DTYPES,
    FLOATS,
    WEIGHT_DTYPES,
    Peek,
    TensorInfo,
    named,
    read_tensors,
)
from quantkit.paths import weights_path

_DOWNLOADED = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
_NOT_DOWNLOADED = ("original/*", "consolidated*.safetensors")  # the same weights again, in another layout
FLOATS_OR_TABLES = (
    *WEIGHT_DTYPES,
    "I32",
    "I64",
)  # tables of numbers, such as the experts of every token, are carried
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True, eq=False)
class Headers:
    """A checkpoint that passed every check its headers allow. tensors: by disk name, in file order.

    encoding: how its linears are stored, if it is quantized already. Each of these is one tensor here, the decoded
    weight `P.weight`, whose `parts` are the stored ones.
    model_free: it is read without a model class, so that every tensor is kept.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[Path]
    encoding: Encoding | None = None
    model_free: bool = False

    @cached_property
    def stored(self) -> dict[str, TensorInfo]:
        """Every tensor of the files."""
        return {each.name: each for info in self.tensors.values() for each in info.stored}

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @cached_property
    def text_type(self) -> str:
        """The model type of the language model: of a multimodal model, that of the part inside."""
        return str(text_config(self.config).get("model_type") or self.model_type)

    @cached_property
    def dropped(self) -> dict[str, str]:
        """Disk name -> why transformers leaves this tensor out."""
        found = {} if self.model_free else families.dropped(self.model_type, self.tensors)
        cache = (name for name in self.tensors if self.encoding and self.encoding.of_cache(name))
        return found | dict.fromkeys(cache, "scale of the KV cache of the source's quantization")

    @cached_property
    def name(self) -> str:
        """What the model is called: the folder's name, or owner/name for a folder in the hub's cache."""
        *_, repository, snapshots, folder = ("", "", *self.path.resolve().parts)
        if snapshots == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1)
        return folder

    @property
    def positions(self) -> int | None:
        """How many tokens the model takes at once, by config.json; None if the file does not say."""
        return longest_window(self.config)

    @cached_property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        parts = (self.config, text_config(self.config))
        said = next(
            (part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None),
            None,
        )
        known = families.FAMILIES | families.OTHERS
        if said is None:
            said = next(
                (known[kind].tied for kind in (self.model_type, self.text_type) if kind in known), None
            )
        if said is None:
            owners = (name.rpartition(".")[0] for name in self.tensors if name.endswith(".weight"))
            said = not any(families.is_head(owner) for owner in owners)
        return bool(said)


def resolve_model(path_or_id: str | Path | None, default: Path) -> Path:
    """The folder of a model: a local one, that of a hub id[@revision] (fetched or cached), or `default`."""
    if path_or_id is None:
        return default
    text = str(path_or_id)
    path = weights_path(text, ModelError)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{text} is a file; a model is a folder with config.json and safetensors weights")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"no folder {text!r}; give a model folder or a hub id like owner/name[@revision]")
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = hub_id.partition("@")
    with foreign_errors(
        f"model {hub_id!r} is no local folder and cannot be fetched from the hub",
        "check the name and the network, log in for a gated model, or give a local folder",
    ):
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=list(_DOWNLOADED),
                ignore_patterns=list(_NOT_DOWNLOADED),
            )
        )


def read_checkpoint(path: str | Path, model_free: bool = False) -> Headers:
    """Read and check the headers of the checkpoint in folder `path`; ModelError, with names, if one fails.

    model_free: no model is built from it, so that its config and its tensors may be of any kind.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"no model folder {path}")
    config = read_config(path) if model_free else _config(path)
    files, tensors = read_tensors(path)
    encoding = None
    if (quantization := quantization_config(path, config)) is not None:
        try:
            encoding = encoding_of(quantization)
            tensors = _decodable(encoding, config, tensors)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
    if not model_free:
        tensors = taken_apart(config, tensors)
    headers = Headers(path, config, tensors, files, encoding, model_free)
    if model_free:
        _refuse_quantized(headers, list(tensors))
        return headers
    check_sizes(path, config, tensors)
    _check_tensors(headers)
    return headers


def _decodable(
    encoding: Encoding, config: Mapping[str, Any], stored: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of a quantized checkpoint, with one decoded weight in place of those that it is made of."""
    found = quantized_linears(encoding.leaves, stored, encoding.joint)
    linear_of = {info.name: linear for linear, leaves in found.items() for info in leaves.values()}
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if name not in linear_of:
            tensors[name] = info
            continue
        linear = linear_of[name]
        weight, leaves = linear + encoding.dense, found[linear]
        if weight in tensors:
            continue
        shape = encoding.shape(linear, {leaf: Peek(part) for leaf, part in leaves.items()})
        parts, size = tuple(leaves.values()), sum(part.nbytes for part in leaves.values())
        tensors[weight] = TensorInfo(weight, _decoded_dtype(config, parts), shape, info.file, 0, size, parts)
    return tensors


def quantized_linears(
    leaves: Iterable[str], tensors: Mapping[str, TensorInfo], joint: str = "."
) -> dict[str, dict[str, TensorInfo]]:
    """The quantized linears of a checkpoint by name, each with its stored tensors by leaf: more than a float weight.

    leaves: what the name of a stored tensor of a linear P may have behind P and `joint`.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    endings = sorted(leaves, key=len, reverse=True)
    for name, info in tensors.items():
        leaf = next((each for each in endings if name.endswith(joint + each)), None)
        if leaf is not None:
            found.setdefault(name.removesuffix(joint + leaf), {})[leaf] = info
    return {
        linear: infos
        for linear, infos in found.items()
        if infos.keys() != {"weight"} or infos["weight"].dtype not in FLOATS
    }


def _decoded_dtype(config: Mapping[str, Any], parts: Iterable[TensorInfo]) -> str:
    """The dtype a weight is decoded to: the model's, by config.json or else by the scales; BF16 if neither says."""
    said = text_config(config).get("dtype") or config.get("dtype") or config.get("torch_dtype")
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items() if name in WEIGHT_DTYPES}
    scales = (part.dtype for part in parts if part.dtype in WEIGHT_DTYPES)
    return names.get(str(said)) or next(scales, "BF16")


def _config(path: Path) -> dict[str, Any]:
    """config.json, refused if it describes something other than a dense model that generates text."""
    config = read_config(path)
    kind = config["model_type"]
    text = text_config(config)
    for part in (config,) if text is config else (config, text):
        _refuse_kind(part, f"{path} ({part.get('model_type', kind)})")
    key, supported, reason = families.UNSUPPORTED.get(kind, ("", None, ""))
    if key and config.get(key) != supported:
        raise ModelError(f"{path}: model type {kind} is not supported: {reason}")
    architectures = config.get("architectures") or []
    other_heads = [
        a for a in architectures if re.search(r"For(?!CausalLM|ConditionalGeneration|\w*Text2Text)[A-Z]", a)
    ]
    if other_heads:
        raise ModelError(
            f"{path} holds {', '.join(other_heads)}, not a causal LM; give a ...ForCausalLM checkpoint"
        )
    return config


def _refuse_kind(config: Mapping[str, Any], what: str) -> None:
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{what} is an encoder-decoder model; only decoder-only causal LMs are supported")
    if config.get("auto_map") and config.get("model_type") not in families.FAMILIES:
        raise ModelError(
            f"{what} needs remote code (auto_map in config.json), which quantkit never runs; if your "
            f"transformers knows this model type, remove auto_map from config.json, {MODEL_FREE}"
        )


def _check_tensors(headers: Headers) -> None:
    names = [name for name in headers.tensors if name not in headers.dropped]
    if not names:
        raise ModelError(f"{headers.path} holds no weights")
    _refuse_quantized(headers, names)
    wrong = [
        f"{n} ({headers.tensors[n].dtype})"
        for n in names
        if headers.tensors[n].dtype
        not in (WEIGHT_DTYPES if n.endswith((".weight", ".bias")) else FLOATS_OR_TABLES)
    ]
    if wrong:
        raise ModelError(
            f"{headers.path} has weights that are not {', '.join(WEIGHT_DTYPES)}: {named(wrong)}"
        )


def _refuse_quantized(headers: Headers, names: list[str]) -> None:
    quantized = [name for name in names if QUANTIZED_TENSOR.search(name)]
    if quantized:
        raise ModelError(
            f"{headers.path} is already quantized ({named(quantized)}) in a way that its config.json does not say; "
            "give the original checkpoint"
        )
