"""`quantkit.json`, the record of a finished checkpoint, and the checksum that protects it.

A sealed JSON file holds, beside its own keys, `sha256`: the digest of all its other keys, written with sorted keys
and without spaces. Reading compares it, so that a changed number never passes for the one that was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint.shards import write_json
from quantkit.errors import QuantkitError, VerificationError
from quantkit.models.json_reader import read_json

MANIFEST = "quantkit.json"
RUN = "quantkit.run.json"
SCHEMA = "quantkit/2"
OLDER = "quantkit/1"  # without a checksum
AGAIN = "quantize again with --no-resume"
SEAL = "sha256"
_TYPES: dict[str, type] = {
    "identity": dict,
    "files": dict,
    "tensors": dict,
    "size": dict,
    "layers": list,
    "scaling": list,
    "notes": list,
}


def seal(value: dict[str, Any]) -> str:
    """The digest of a JSON object without its own seal."""
    rest = {key: each for key, each in value.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: dict[str, Any]) -> str:
    """Write a JSON object with its seal, atomically; returns the sha256 of the file."""
    return write_json(path, value | {SEAL: seal(value)})


def read_sealed(
    path: Path, error: type[QuantkitError] = VerificationError, advice: str = AGAIN
) -> dict[str, Any]:
    """A sealed JSON object, without its seal; otherwise `error`."""
    value: dict[str, Any] = read_json(path, error, advice=advice)
    found = value.pop(SEAL, None)
    if found is None and value.get("schema") != OLDER:
        raise error(f"{path} has no checksum ({SEAL}), so it is damaged or was changed; {advice}")
    if found is not None and found != seal(value):
        raise error(f"{path} does not match its checksum, so it is damaged or was changed; {advice}")
    return value


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write `quantkit.json`, which makes the folder a finished checkpoint."""
    write_sealed(output / MANIFEST, manifest)


def read_manifest(
    output: Path, error: type[QuantkitError] = VerificationError, advice: str = AGAIN
) -> dict[str, Any]:
    """`quantkit.json` of a finished checkpoint; `error` if it is damaged or not what quantkit writes."""
    file = output / MANIFEST
    manifest = read_sealed(file, error, advice)
    if manifest.get("schema") not in (SCHEMA, OLDER):
        raise error(f"{file} has the schema {manifest.get('schema')!r}, not {SCHEMA!r}; {advice}")
    wrong = [key for key, kind in _TYPES.items() if not isinstance(manifest.get(key), kind)]
    if wrong:
        raise error(f"{file} lacks {', '.join(wrong)}, or has them in another type; {advice}")
    bad = [name for name, entry in manifest["files"].items() if not inside(name) or not _is_entry(entry)]
    bad += [name for name, entry in manifest["tensors"].items() if not isinstance(entry, dict)]
    if bad or not all(isinstance(layer, dict) for layer in manifest["layers"]):
        raise error(f"{file} has no proper entry for {', '.join(bad[:4]) or 'a layer'}; {advice}")
    return manifest


def inside(name: object) -> bool:
    """Whether a file name of a manifest or journal stays in its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


def recorded(output: Path) -> set[str]:
    """The files in a finished folder that its manifest, or else its record of the run, says quantkit wrote."""
    if not (output / MANIFEST).exists():
        return set()
    ours = {MANIFEST, RUN}
    with contextlib.suppress(VerificationError):
        return {*ours, *read_manifest(output)["files"]}
    with contextlib.suppress(VerificationError):
        files = read_sealed(output / RUN).get("files")
        ours |= {name for name in files if inside(name)} if isinstance(files, dict) else set()
    return ours


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
    )
