"""`save_pretrained` of a loaded model: the same checkpoint again, with its types and its record.

transformers writes every tensor in the type the model runs in. Here tensors go back to the type they were loaded from
where that loses nothing, and if every tensor then has the bytes that `quantkit.json` recorded, the record is kept, with
the names, sizes and digests of the new files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.check import crc32, digest_file
from quantkit.checkpoint.manifest import read_manifest, write_manifest
from quantkit.checkpoint.records import FileRecord
from quantkit.errors import BackendError, VerificationError
from quantkit.files import write_json
from quantkit.models.tensors import INDEX, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def remember(model: PreTrainedModel, source: Path, dtype: str | None) -> None:
    """Make `model.save_pretrained` write the checkpoint in `source` again; dtype: what its config.json names."""
    model.__dict__["save_pretrained"] = partial(save_again, model, source, dtype)


def refuse_saving(model: PreTrainedModel, source: Path) -> None:
    """Make `model.save_pretrained` say that a checkpoint of another tool, or one whose linears lie otherwise in the
    model than on disk, is not written.
    """

    def refused(*_: Any, **__: Any) -> None:
        raise BackendError(
            f"the model's packed linears are not what {source} holds, which quantkit reads so and does not write; copy "
            "that folder"
        )

    model.__dict__["save_pretrained"] = refused


def save_again(
    model: PreTrainedModel,
    source: Path,
    dtype: str | None,
    save_directory: str | Path,
    *args: Any,
    **options: Any,
) -> None:
    """transformers' `save_pretrained`, then the type in config.json and the record of the run."""
    type(model).save_pretrained(model, save_directory, *args, **options)
    folder = Path(save_directory)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"dtype": dtype})
    _keep_record(source, folder)


def all_as_stored(state: dict[str, torch.Tensor], stored: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Every tensor in the type it had on disk (`stored`, by name); tied tensors stay one tensor."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name in sorted(state, key=lambda name: name not in stored):
        tensor = state[name]
        cast.setdefault((tensor.data_ptr(), tensor.shape), as_stored(tensor, stored.get(name)))
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def as_stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in the type it had on disk if it comes back from it unchanged, else as it is."""
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point() or tensor.is_meta:
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor


def _keep_record(source: Path, folder: Path) -> None:
    """Write `quantkit.json` into `folder` if its tensors are those that the one in `source` recorded."""
    try:
        manifest = read_manifest(source)
    except VerificationError:
        return
    recorded = {n: crc for entry in manifest.files.values() for n, crc in (entry.tensors or {}).items()}
    paths, tensors = read_tensors(folder)
    sums = {name: crc32(info) for name, info in tensors.items()}
    if not recorded or sums != recorded:
        return
    written = [*paths, folder / "config.json"]
    written += [path for name in (INDEX, "generation_config.json") if (path := folder / name).is_file()]
    files = {p.name: FileRecord(digest_file(p), p.stat().st_size) for p in written}
    for path in paths:
        held = {n: sums[n] for n, info in tensors.items() if info.file == path}
        files[path.name] = replace(files[path.name], tensors=held)
    write_manifest(folder, replace(manifest, files=files))
