"""Opening the tokenizer beside a model: the only place that does, with remote code off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import ModelError
from quantkit.models.borders import foreign_errors, quiet
from quantkit.models.json_reader import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
# Vocabularies that transformers finds without a class naming them.
_VOCABULARIES = ("tokenizer.json", "tekken.json", "*.tiktoken", "tokenizer.model*")
_PROBE = "a b"
_ADVICE = (
    "copy the tokenizer's files of the original model into the folder (tokenizer.json, tokenizer_config.json)"
)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer in a model folder, tried on a few words.

    ModelError if it is missing, damaged, without a vocabulary, or needs Python code of the folder.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    settings = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    what, advice = f"{path}: the tokenizer cannot be opened", _ADVICE
    if settings.get("auto_map"):
        what = f"{path / SETTINGS} asks for Python code of the folder (auto_map), which quantkit never runs"
        advice = (
            "if the folder has a tokenizer.json, remove auto_map and set tokenizer_class to "
            "PreTrainedTokenizerFast"
        )
    with quiet(), foreign_errors(what, advice):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    _check_vocabulary(path, tokenizer)
    with quiet(), foreign_errors(f"{path}: the tokenizer cannot be used", _ADVICE):
        tokenizer(_PROBE)
    return tokenizer


def _check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError if the folder has no vocabulary: transformers then makes up an empty tokenizer."""
    names = getattr(tokenizer, "vocab_files_names", None) or {}
    if not names:  # of bytes or characters, without files
        return
    patterns = {*_VOCABULARIES, *(name for name in names.values() if isinstance(name, str))} - {SETTINGS}
    if not any(file.is_file() for pattern in patterns for file in path.glob(pattern)):
        raise ModelError(f"{path} has no tokenizer ({', '.join(sorted(patterns))}); {_ADVICE}")
