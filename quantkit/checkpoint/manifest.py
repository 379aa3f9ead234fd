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

from quantkit.checkpoint.records import Manifest, RunFacts, parse, plain
from quantkit.errors import QuantkitError, VerificationError
from quantkit.files import write_json
from quantkit.models.json_reader import read_json

MANIFEST = "quantkit.json"
RUN = "quantkit.run.json"
RECIPE = "quantkit.recipe.yaml"  # of a search: the recipe that makes the same files without it
ALLOCATION = "quantkit.allocation.json"  # what the search has found
SCHEMA = "quantkit/2"
OLDER = "quantkit/1"  # without a checksum
AGAIN = "quantize again with --no-resume"
SEAL = "sha256"


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


def write_manifest(output: Path, manifest: Manifest) -> None:
    """Write `quantkit.json`, which makes the folder a finished checkpoint."""
    write_sealed(output / MANIFEST, manifest.to_json())


def read_manifest(
    output: Path, error: type[QuantkitError] = VerificationError, advice: str = AGAIN
) -> Manifest:
    """`quantkit.json` of a finished checkpoint; `error` if it is damaged or not what quantkit writes."""
    file = output / MANIFEST
    value = read_sealed(file, error, advice)
    if value.get("schema") not in (SCHEMA, OLDER):
        raise error(f"{file} has the schema {value.get('schema')!r}, not {SCHEMA!r}; {advice}")
    try:
        manifest = Manifest.from_json(value)
    except ValueError as wrong:
        raise error(f"{file} has no proper entry for {wrong}; {advice}") from None
    bad = [name for name, entry in manifest.files.items() if not inside(name) or entry.bytes < 0]
    if bad:
        raise error(f"{file} has no proper entry for {', '.join(bad[:4])}; {advice}")
    return manifest


def write_facts(output: Path, facts: RunFacts) -> None:
    """Write `quantkit.run.json`."""
    write_sealed(output / RUN, plain(facts))


def read_facts(output: Path) -> RunFacts:
    """`quantkit.run.json` of a folder; VerificationError if it is damaged or not what quantkit writes."""
    file = output / RUN
    try:
        return parse(RunFacts, read_sealed(file))
    except ValueError as wrong:
        raise VerificationError(f"{file} has no proper entry for {wrong}; {AGAIN}") from None


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
    ours = {MANIFEST, RUN, RECIPE, ALLOCATION}
    with contextlib.suppress(VerificationError):
        return {*ours, *read_manifest(output).files}
    with contextlib.suppress(VerificationError):
        ours |= {name for name in read_facts(output).files if inside(name)}
    return ours
