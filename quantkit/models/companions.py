"""Companions: the files beside the weights that belong to a model, such as tokenizer, chat templates and licences.

Everything in the model's folder travels that is no weight, no code, no copy of another companion, and not written
anew (config.json, the index). A subfolder with weights of its own is another model or another form of this one, and
stays behind. Only regular files inside the model's folder are read; the one exception are the links that the hub's
cache makes from a snapshot into its own `blobs`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.errors import ModelError

WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data",
     ".tflite", ".npz", ".npy", ".mlmodel", ".pdparams", ".pkl", ".pickle")
)  # fmt: skip
CODE = frozenset((".py", ".pyc", ".pyi", ".ipynb", ".so", ".sh", ".dll", ".exe", ".bat", ".ps1"))
WRITTEN = frozenset(
    ("config.json", "quantkit.json", "quantkit.run.json", "quantkit.recipe.yaml", "quantkit.allocation.json")
)
# How another tool quantized these weights: beside weights in another scheme they would mislead an engine.
STALE = frozenset(
    (
        "quantize_config.json",
        "quant_config.json",
        "quantization_config.json",
        "hf_quant_config.json",
        "recipe.yaml",
    )
)
MAX_FILES = 2000
MAX_DEPTH = 4  # folders below the model's


@dataclass(frozen=True)
class Companion:
    """One file to copy. name: relative to the model's folder, with "/". file: where it is read."""

    name: str
    file: Path
    nbytes: int
    mode: int


@dataclass
class Companions:
    """What travels with a model, by name, and what stays behind with the reason."""

    files: dict[str, Companion] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def find_companions(model: Path, output: Path | None = None) -> Companions:
    """The companions in the folder `model`, `output` left out if it lies inside.

    ModelError names a file that cannot be copied: a link that leaves the folder, a device, one that cannot be read.
    """
    found = Companions()
    skip = None if output is None else output.resolve()
    try:
        _walk(model.resolve(), model.resolve(), skip, found, 0)
    except OSError as error:
        raise ModelError(f"{model} cannot be read: {error.strerror or error}") from error
    _leave_duplicates(found)
    return found


def _walk(root: Path, folder: Path, skip: Path | None, found: Companions, depth: int) -> None:
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    if depth and any(Path(entry.name).suffix.lower() in WEIGHTS for entry in entries):
        found.left[folder.relative_to(root).as_posix() + "/"] = "it has weights of its own"
        return
    for entry in entries:
        path = Path(entry.path)
        name = path.relative_to(root).as_posix()
        if entry.name.startswith(".") or path == skip:
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < MAX_DEPTH:
                _walk(root, path, skip, found, depth + 1)
            else:
                found.left[f"{name}/"] = f"it lies more than {MAX_DEPTH} folders deep"
        elif reason := _stays(entry.name):
            found.left[name] = reason
        elif not (depth == 0 and (entry.name in WRITTEN or entry.name.endswith(".index.json"))):
            found.files[name] = _companion(root, name, path)
    if len(found.files) > MAX_FILES:
        raise ModelError(
            f"{root} holds more than {MAX_FILES} files beside its weights; give a folder with the model only"
        )


def _stays(name: str) -> str | None:
    suffix = Path(name).suffix.lower()
    if suffix in WEIGHTS:
        return "weights"
    if name in STALE:
        return "it describes the source's quantization"
    return "code, which quantkit never runs" if suffix in CODE else None


def _companion(root: Path, name: str, path: Path) -> Companion:
    """A regular file of the model's folder, or one that the hub's cache links there."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ModelError(
            f"{path}: the name of this file is not UTF-8, so quantkit.json cannot list it; rename the file, or give a "
            "folder with the model only"
        ) from None
    file = path
    if path.is_symlink():
        file = path.resolve()
        blobs = root.parent.parent / "blobs"  # models--owner--name/{snapshots/revision, blobs}
        ours = root.parent.name == "snapshots" and file.parent == blobs.resolve()
        if not ours and root not in file.parents:
            raise ModelError(
                f"{path} is a symbolic link to a file outside the model's folder, which is not copied into a "
                "checkpoint; put the file itself there, or remove the link"
            )
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is no regular file; remove it, or give a folder with the model only")
    return Companion(name, file, status.st_size, stat.S_IMODE(status.st_mode) & 0o644)


def _leave_duplicates(found: Companions) -> None:
    """Leave files of subfolders behind that the model's folder itself holds under the same name and content."""
    for name, each in list(found.files.items()):
        twin = found.files.get(name.rpartition("/")[2])
        if twin is None or twin is each or twin.nbytes != each.nbytes:
            continue
        if _digest(twin.file) == _digest(each.file):
            found.left[name] = f"the same as {twin.name}"
            del found.files[name]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
