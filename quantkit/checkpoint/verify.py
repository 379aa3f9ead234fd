"""Is the checkpoint on disk the one that was computed?

`verify_shard` runs while the quantized weights are still in memory: the file is opened again with the safetensors
library (not with our own reader), unpacked, compared code by code, and the stored tensors are multiplied on the
backend that `load` would choose and compared with the dequantized weight. `verify_checkpoint` needs only the folder:
digests, names, shapes and the account of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from quantkit.checkpoint.check import damage, digest_file
from quantkit.checkpoint.manifest import AGAIN
from quantkit.checkpoint.records import FileRecord, TensorRecord
from quantkit.device import find_device
from quantkit.errors import ModelError, VerificationError
from quantkit.formats.registry import Codec
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.json_reader import read_json
from quantkit.models.tensors import INDEX, named
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

_PROBE = 4  # tokens of the packed product
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of its root mean square


def verify_shard(path: Path, weights: dict[str, QuantizedWeight], codec: Codec) -> None:
    """Re-open a written shard and compare every quantized linear with `weights` (by module name)."""
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path} cannot be opened again: {error}") from error
    with file:
        for name, wanted in weights.items():
            prefix = f"{name}."
            stored = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            stored.pop("bias", None)
            try:
                found = codec.unpack(stored, Scheme(wanted.grid))
            except ModelError as error:
                raise VerificationError(f"{path.name}: {name}: {error}") from error
            same = torch.equal(found.codes, wanted.codes.cpu()) and torch.equal(
                found.scale, wanted.scale.cpu()
            )
            if wanted.zero is not None:
                same = same and found.zero is not None and torch.equal(found.zero, wanted.zero.cpu())
            if not same:
                raise VerificationError(f"{path.name}: what was read back for {name} is not what was written")
            _verify_forward(name, stored, found, wanted, codec)


@torch.no_grad()
def _verify_forward(
    name: str, stored: dict[str, torch.Tensor], found: QuantizedWeight, wanted: QuantizedWeight, codec: Codec
) -> None:
    """Run the tensors of the file on the device and backend that `load` chooses, against the dense product."""
    where = find_device(None)
    scale = wanted.scale.dtype
    dtype = torch.float32 if where.type == "cpu" else scale
    n, k = found.shape
    linear = QuantLinear(k, n, Scheme(wanted.grid), False, scale, None, "meta", codec.name)
    for leaf, tensor in stored.items():
        setattr(linear, leaf, tensor.to(where))
    linear.prepare(None, dtype)
    x = torch.randn(_PROBE, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense = torch.nn.functional.linear(x.float(), wanted.dequantize().cpu())
    off = (linear(x.to(where)).float().cpu() - dense).square().mean().sqrt()
    size = dense.square().mean().sqrt()
    if not float(off) <= _TOLERANCE[dtype] * float(size) + 1e-12:
        raise VerificationError(
            f"{name}: on backend {linear.backend!r} the packed product differs from the dequantized one by "
            f"{float(off):.3g} (root mean square; the product is {float(size):.3g})"
        )


def verify_checkpoint(
    output: Path, files: Mapping[str, FileRecord], account: Mapping[str, TensorRecord]
) -> None:
    """VerificationError unless the folder holds exactly what the manifest's `files` and `tensors` say."""
    for name, entry in files.items():
        path = output / name
        if not path.is_file():
            raise VerificationError(f"{output}: {name} is missing; {AGAIN}")
        if path.stat().st_size != entry.bytes or digest_file(path) != entry.sha256:
            where = damage(path, entry)
            raise VerificationError(f"{output}: {name} is not the file that was written{where}; {AGAIN}")
    stray = {each.name for each in output.glob("*.safetensors")} - files.keys()
    if stray:
        raise VerificationError(f"{output} holds weight files of another origin: {named(stray)}; remove them")
    weight_map = read_json(output / INDEX, VerificationError, advice=AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise VerificationError(f"{output / INDEX} has no weight_map; {AGAIN}")
    held: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        try:
            with safe_open(output / name, "pt") as file:
                held |= dict.fromkeys(file.keys(), name)
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{output}: {name} cannot be opened: {error}") from error
    if held != weight_map:
        wrong = sorted(held.items() ^ weight_map.items())[:4]
        raise VerificationError(f"{output}: the index and the shards disagree: {wrong}")
    promised = {name for entry in account.values() for name in entry.became or ()}
    if promised != held.keys():
        raise VerificationError(
            f"{output}: tensors without an account: {sorted(promised ^ held.keys())[:4]} of {len(held)}"
        )
